// The one way native code refuses its input: SPARSENET_CHECK(condition, parts of a sentence...).
#pragma once

#include <sstream>
#include <stdexcept>

namespace sparsenet {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str()); // pybind11 turns it into ValueError
}

} // namespace sparsenet

#define SPARSENET_CHECK(condition, ...)                                                                                \
  do {                                                                                                                 \
    if (!(condition)) ::sparsenet::fail(__VA_ARGS__);                                                                  \
  } while (false)
