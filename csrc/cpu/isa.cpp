#include "isa.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../checks.h"

namespace sparsenet::cpu {
namespace {

struct Candidate {
  const KernelTable* table;
  bool (*runs_here)();
};

// Best first. A set is listed only where the compiler could build it.
const Candidate kCandidates[] = {
#if defined(SPARSENET_HAVE_AVX512BF16)
    {&avx512bf16::kTable,
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     }},
#endif
#if defined(SPARSENET_HAVE_AVX512)
    {&avx512::kTable,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
#if defined(SPARSENET_HAVE_AVX2)
    {&avx2::kTable, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::kTable, [] { return true; }},
};

const KernelTable& choose() {
  const char* forced = std::getenv("SPARSENET_ISA");
  std::string known;
  for (const Candidate& candidate : kCandidates) {
    if (forced != nullptr && *forced != '\0') {
      known += std::string(known.empty() ? "" : ", ") + candidate.table->name;
      if (std::strcmp(forced, candidate.table->name) != 0) continue;
      SPARSENET_CHECK(candidate.runs_here(), "SPARSENET_ISA: this machine has no ", forced);
      return *candidate.table;
    }
    if (candidate.runs_here()) return *candidate.table;
  }
  fail("SPARSENET_ISA: must be one of ", known, ", got ", forced);
}

const KernelTable& active_table() {
  static const KernelTable& table = choose();
  return table;
}

// The entry of `row`, one of KernelTable's, for the dtype.
template <class Op> Kernel<Op> entry(const Row<Op>* KernelTable::* row, int dtype) {
  const Kernel<Op> own = (active_table().*row)->by_dtype[dtype];
  return own != nullptr ? own : (portable::kTable.*row)->by_dtype[dtype];
}

} // namespace

const char* active_set() { return active_table().name; }

const char* const* available_sets() {
  static const char* names[std::size(kCandidates) + 1] = {};
  size_t count = 0;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) names[count++] = candidate.table->name;
  names[count] = nullptr;
  return names;
}

const Kernels& kernels_for(DType dtype) {
  static const std::array<Kernels, kNumDTypes> kernels = [] {
    std::array<Kernels, kNumDTypes> found;
    for (int i = 0; i < kNumDTypes; ++i)
      found[size_t(i)] = {.linear_forward = entry(&KernelTable::linear_forward, i),
                          .linear_backward = entry(&KernelTable::linear_backward, i),
                          .gradient_norms = entry(&KernelTable::gradient_norms, i),
                          .candidate_gradients = entry(&KernelTable::candidate_gradients, i)};
    return found;
  }();
  SPARSENET_CHECK(int(dtype) >= 0 && int(dtype) < kNumDTypes, "dtype: must be a number from 0 to ", kNumDTypes - 1,
                  ", got ", int(dtype));
  return kernels[size_t(dtype)];
}

} // namespace sparsenet::cpu
