// Scratch memory of one op call: taken once, before any parallel region, so that running out of memory is an ordinary
// exception. Each calling thread keeps its buffers for its next call, up to kKeptWorkspaceBytes each.
#pragma once

#include <cstdint>

namespace sparsenet::cpu {

constexpr int64_t kKeptWorkspaceBytes = int64_t(64) << 20;

// One 64-byte aligned buffer, given back when this goes out of scope. At most two are alive in a thread at a time.
class Workspace {
public:
  explicit Workspace(int64_t bytes); // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

private:
  char* data_ = nullptr;
};

// Sizes the pieces first, then hands them out: piece(n) returns an offset into the buffer.
struct WorkspacePlan {
  int64_t bytes = 0;
  int64_t piece(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  }
};

int64_t workspace_bytes(); // held by all threads together, in use or kept
void trim_workspace();     // gives back what the calling thread keeps

} // namespace sparsenet::cpu
