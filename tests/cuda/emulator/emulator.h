// A CTA on the host. Each CUDA thread is a fiber; fibers run one at a time and give way only at barriers and warp-wide
// operations, in an order drawn from a seed. What is checked, and stops the launch with an EmulatorError:
//   - shared memory: bounds, alignment, reads of bytes nobody wrote (memory starts poisoned, too);
//   - races on shared memory: two accesses to the same 2 bytes, one a write, with no barrier between them, whatever
//     order the seed gave (happens-before by block and warp barriers; warp shuffles, ldmatrix and mma order nothing);
//   - cp.async: the destination is poison until the issuing thread waited for its group; touching it before is an
//     error, and other threads need a barrier after that wait;
//   - barriers: not all threads arrive, threads wait at different barriers, a warp-wide operation lacks lanes;
//   - global memory, where the test registered it: bounds, alignment, writes to inputs, one CTA touching what another
//     CTA of the same launch wrote.
// Counted, on request: shared-memory bank conflicts. Not modelled: the memory model between CTAs and time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"

namespace sparsenet::emulator {

class EmulatorError : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

enum class ThreadOrder : int { random = 0, forward = 1, backward = 2 };

struct Options {
  uint64_t seed = 0;
  ThreadOrder order = ThreadOrder::random;
  bool detect_races = true;
  bool count_bank_conflicts = false;
};

struct BankReport {
  int64_t instructions = 0; // warp-wide shared accesses
  int64_t wavefronts = 0;   // cycles they take; the least is one per 128 bytes
  int64_t conflicts = 0;    // wavefronts above the least
  int64_t unmatched = 0;    // accesses of lanes whose warp diverged: not evaluated
};

// The sizes of a problem, for the report: batch, n and k of a product, else the number of CTAs.
using Sizes = std::tuple<int64_t, int64_t, int64_t>;

struct Launch {
  std::string kernel;
  const void* function = nullptr; // tells the instantiations of a template apart
  Sizes sizes = {};
  int64_t ctas = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
};

struct LaunchRecord {
  Launch launch;
  BankReport banks;
};

// All launches of one instantiation.
struct Total {
  std::string kernel;
  int64_t launches = 0;
  int64_t ctas = 0;
  int threads = 0;          // of a CTA, the most
  int64_t shared_bytes = 0; // of a CTA, the most
  std::set<uint64_t> seeds;
  std::set<Sizes> sizes;
};

// What a lane hands to a warp-wide operation. `kind` names the operation; lanes of one warp must agree on it.
struct WarpArgument {
  const char* kind = "";
  uint64_t value = 0;  // shuffles and ballot: in and out
  int lane = 0;        // shuffles: source lane
  uint32_t offset = 0; // ldmatrix: row address
  uint32_t* out = nullptr;
  const uint32_t* a = nullptr;
  uint32_t b[2] = {0, 0};
  float* d = nullptr;
};

class Emulator {
public:
  static Emulator& instance();

  Options options;
  std::vector<LaunchRecord> launches;  // since somebody took them
  std::map<const void*, Total> totals; // by function, of the whole process

  // Runs body() once per thread of each CTA, CTAs in random order, one after the other.
  void run(const Launch& launch, const std::function<void()>& body);

  // Called by the intrinsics, on a fiber ---------------------------------------------------------------------------
  int thread_index() const { return current_->index; }
  int64_t block_index() const { return block_index_; }

  void sync_block(const std::source_location& where);
  void sync_warp(const std::source_location& where);
  // Blocks until all 32 lanes came with the same kind; the last one runs combine over the 32 arguments.
  void warp_operation(WarpArgument& mine, void (*combine)(Emulator&, WarpArgument* const* lanes),
                      const std::source_location& where);

  void read_shared(uint32_t offset, void* destination, uint32_t bytes) {
    record_shared(offset, bytes, false, current_);
    __builtin_memcpy(destination, shared_.data() + offset, bytes);
  }
  void write_shared(uint32_t offset, const void* source, uint32_t bytes) {
    record_shared(offset, bytes, true, current_);
    __builtin_memcpy(shared_.data() + offset, source, bytes);
  }
  // A read by a given lane of the current warp (ldmatrix spreads one row over four lanes).
  uint16_t read_shared_as_lane(uint32_t offset, int lane);
  void check_matrix_row(uint32_t offset);

  void async_copy(uint32_t offset, const void* source, int valid_bytes);
  void async_commit();
  void async_wait(int pending_groups);

  void check_global(const void* address, size_t bytes, bool write, bool atomic = false);

  // Called by the tests ----------------------------------------------------------------------------------------------
  void add_memory(const void* address, size_t bytes, bool writable, const std::string& name);
  void clear_memory();

  [[noreturn]] void fail(const std::string& what) const;

private:
  // Last accesses to two bytes of shared memory since the last write, in epochs of the CTA and of the warp.
  struct Cell {
    int32_t writer = -1;
    uint32_t write_block = 0, write_warp = 0;
    int32_t reader = -1; // thread; kOneWarp - warp; kManyWarps
    uint32_t read_block = 0, read_warp = 0;
    uint8_t state = 0; // 0 never written, 1 valid, 2 awaiting a cp.async
  };
  static constexpr int32_t kManyWarps = -2;
  static constexpr int32_t kOneWarp = -3;

  struct AsyncCopy {
    uint32_t offset;
    unsigned char data[16];
  };
  struct LoggedAccess {
    uint32_t offset;
    uint32_t bytes;
  };
  enum class State : uint8_t { ready, at_block_barrier, at_warp_operation, finished };
  struct Thread {
    Fiber fiber;
    int index = 0;
    State state = State::ready;
    std::source_location where;
    std::vector<std::vector<AsyncCopy>> groups; // committed, oldest first
    std::vector<AsyncCopy> open_group;
    std::vector<LoggedAccess> log;
  };
  struct Warp {
    int arrived = 0;
    uint32_t epoch = 1;
    WarpArgument* lanes[32] = {};
    const char* kind = "";
  };
  struct Range {
    uintptr_t begin;
    uintptr_t end;
    bool writable;
    std::string name;
    std::vector<uint64_t> writers; // of outputs, per 2 bytes: launch << 32 | cta + 1
  };

  static void thread_main(void* thread);
  void run_cta(int64_t cta, const std::function<void()>& body);
  void give_way(State state, const std::source_location& where);
  void make_ready(int thread);
  void report_deadlock();
  void record_shared(uint32_t offset, uint32_t bytes, bool write, const Thread* thread);
  void touch(uint32_t granule, bool write, int thread);
  void check_shared_range(uint32_t offset, uint32_t bytes, const char* what) const;
  void flush_bank_log(int warp);
  int64_t count_wavefronts(const LoggedAccess* const* lanes, int count) const;
  Range* find_range(uintptr_t address);

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  std::vector<unsigned char> shared_;
  std::vector<Cell> cells_;
  std::vector<Range> ranges_;
  Range* last_range_ = nullptr;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::string kernel_;
  std::string error_;
  std::mt19937_64 random_;
  uint32_t epoch_ = 1;
  uint32_t launch_number_ = 0;
  int num_threads_ = 0;
  int finished_ = 0;
  int at_barrier_ = 0;
  int64_t block_index_ = 0;
  int64_t num_ctas_ = 0;
  BankReport banks_;
};

} // namespace sparsenet::emulator
