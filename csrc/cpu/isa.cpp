#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <pthread.h>
#include <string>

#include "../checks.h"

namespace sparsenet::cpu {
namespace {

struct Candidate {
  const KernelTable* table;
  bool (*runs_here)();
};

// Priority order. A set is listed only where the compiler could build it.
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

// Set in a child whose parent had more than one thread when it forked: torch's parallel regions start libgomp's
// workers as well as ours do, and a child that opens one waits forever for workers it does not have.
std::atomic<bool> forked_from_threads{false};
std::atomic<bool> had_threads{true};

void before_fork() {
  int entries = 0;
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
  }
  had_threads.store(entries != 3); // ".", ".." and the one thread
}
void after_fork_in_child() {
  if (had_threads.load()) forked_from_threads.store(true);
}
const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);

} // namespace

const KernelTable& active_table() {
  static const KernelTable& table = choose();
  return table;
}

const KernelTable& table_for(DType dtype) {
  if (dtype == DType::float64 || dtype == DType::float16) return portable::kTable;
  return active_table();
}

const char* const* available_sets() {
  static const char* names[std::size(kCandidates) + 1] = {};
  size_t count = 0;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) names[count++] = candidate.table->name;
  names[count] = nullptr;
  return names;
}

int usable_threads(int wanted) { return wanted <= 1 || forked_from_threads.load() ? 1 : wanted; }

} // namespace sparsenet::cpu
