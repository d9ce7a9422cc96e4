#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <sys/mman.h>

namespace sparsenet::cpu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExact = true; // nothing rounded up, nothing kept: the sanitizer sees one byte too many
#else
constexpr bool kExact = false;
#endif
constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int64_t kAlwaysMapped = int64_t(32) << 20; // glibc's malloc never keeps larger blocks for their next use
std::atomic<int64_t> total_bytes{0};

struct Kept {
  char* data = nullptr;
  int64_t bytes = 0;
  void release() {
    if (data == nullptr) return;
    std::free(data);
    total_bytes -= bytes;
    data = nullptr;
    bytes = 0;
  }
  ~Kept() { release(); }
};
thread_local Kept kept[kWorkspaceDepth];
thread_local int depth = 0;
thread_local DryRun* dry_run = nullptr;

int64_t page_for(int64_t bytes) { return kExact ? 64 : bytes >= kHugePage ? kHugePage : 4096; }
int64_t rounded_up(int64_t bytes) { return (bytes + page_for(bytes) - 1) / page_for(bytes) * page_for(bytes); }

} // namespace

Workspace::Workspace(int64_t bytes) : taken_(bytes > 0), dry_(dry_run != nullptr) {
  if (!taken_) return;
  if (depth == kWorkspaceDepth) std::abort(); // ops do not nest deeper
  if (dry_) {
    dry_run->bytes_[depth] = std::max(dry_run->bytes_[depth], rounded_up(bytes));
    ++depth;
    return;
  }
  Kept& mine = kept[depth];
  if (kExact || mine.bytes < bytes) {
    mine.release();
    const int64_t page = page_for(bytes), rounded = rounded_up(bytes);
    char* fresh = static_cast<char*>(std::aligned_alloc(size_t(page), size_t(rounded)));
    if (fresh == nullptr) throw std::bad_alloc();
    if (page == kHugePage) madvise(fresh, size_t(rounded), MADV_HUGEPAGE); // fewer TLB misses over a packed panel
    mine.data = fresh;
    mine.bytes = rounded;
    total_bytes += rounded;
  }
  data_ = mine.data;
  ++depth;
}

Workspace::~Workspace() {
  if (!taken_) return;
  --depth;
  if (!dry_ && (kExact || kept[depth].bytes > kKeptWorkspaceBytes)) kept[depth].release();
}

DryRun::DryRun() { dry_run = this; }
DryRun::~DryRun() { dry_run = nullptr; }

void use_huge_pages(void* data, int64_t bytes) {
  if (data == nullptr || bytes < kAlwaysMapped) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a hint: it may be refused
}

int64_t workspace_bytes() { return total_bytes.load(); }

void trim_workspace() {
  for (int i = depth; i < kWorkspaceDepth; ++i) kept[i].release();
}

} // namespace sparsenet::cpu
