// Scratch memory of one op call: taken once, before any parallel region, so that running out of memory is an ordinary
// exception. Each calling thread keeps its buffers for its next call, up to kKeptWorkspaceBytes each. How much a call
// takes is found by a DryRun of the call itself.
#pragma once

#include <cstdint>

namespace sparsenet::cpu {

constexpr int64_t kKeptWorkspaceBytes = int64_t(64) << 20;
constexpr int kWorkspaceDepth = 2; // buffers alive in a thread at a time

// One 64-byte aligned buffer, given back when this goes out of scope. One of no bytes is none.
class Workspace {
public:
  explicit Workspace(int64_t bytes); // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }
  bool dry() const { return dry_; } // a DryRun is alive: there is no buffer, the op touches no data and returns

private:
  char* data_ = nullptr;
  const bool taken_, dry_;
};

// While one is alive, the ops that its thread calls only say what they would take.
class DryRun {
public:
  DryRun();
  ~DryRun();
  DryRun(const DryRun&) = delete;
  DryRun& operator=(const DryRun&) = delete;
  int64_t bytes(int depth) const { return bytes_[depth]; } // the largest buffer of each depth

private:
  friend class Workspace;
  int64_t bytes_[kWorkspaceDepth] = {};
};

// Asks for huge pages under `bytes` of memory about to be written. For results so large that the allocator maps them
// anew for every call: faulting in 4 KiB pages then takes as long as a sparse product.
void use_huge_pages(void* data, int64_t bytes);

int64_t workspace_bytes(); // held by all threads together, in use or kept
void trim_workspace();     // gives back what the calling thread keeps

} // namespace sparsenet::cpu
