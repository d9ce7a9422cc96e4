#include "threads.h"

#include <atomic>
#include <dirent.h>
#include <pthread.h>

namespace sparsenet::cpu {
namespace {

std::atomic<bool> had_threads{true};          // of the process that forks, just before it does
std::atomic<bool> forked_from_threads{false}; // set in the child

void before_fork() {
  int entries = 0;
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
  }
  had_threads.store(entries != 3); // ".", ".." and the one thread; a folder that cannot be read counts as several
}

void after_fork_in_child() {
  if (had_threads.load()) forked_from_threads.store(true);
}

const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);

} // namespace

int usable_threads(int wanted) { return wanted <= 1 || forked_from_threads.load() ? 1 : wanted; }

} // namespace sparsenet::cpu
