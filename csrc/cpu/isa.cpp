#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <string>

#include "../check.h"

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

std::atomic<bool> used_parallel{false};
std::atomic<bool> forked{false};

void after_fork_in_child() {
  if (used_parallel.load()) forked.store(true);
}
const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

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

int usable_threads(int wanted) {
  if (wanted <= 1 || forked.load()) return 1;
  used_parallel.store(true);
  return wanted;
}

} // namespace sparsenet::cpu
