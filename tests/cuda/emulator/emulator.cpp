#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <sstream>

namespace sparsenet::emulator {

namespace {

std::string line_of(const std::source_location& where) {
  const std::string path = where.file_name();
  const size_t slash = path.find_last_of('/');
  return path.substr(slash == std::string::npos ? 0 : slash + 1) + ":" + std::to_string(where.line());
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

constexpr unsigned char kPoison = 0xff; // NaN in every floating type, -1 in every integer

} // namespace

Emulator& Emulator::instance() {
  static Emulator emulator;
  return emulator;
}

void Emulator::fail(const std::string& what) const {
  throw EmulatorError(
      text(kernel_, ", CTA ", block_index_, ", thread ", current_ == nullptr ? -1 : current_->index, ": ", what));
}

// Scheduling --------------------------------------------------------------------------------------------------------

void Emulator::run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_launch_at_a_time; // the bindings release the GIL
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  kernel_ = launch.kernel;
  current_ = nullptr;
  if (launch.threads <= 0 || launch.threads > 1024 || launch.threads % 32 != 0)
    throw EmulatorError(text(kernel_, ": a CTA must have 32..1024 threads in whole warps, got ", launch.threads));
  num_threads_ = launch.threads;
  num_ctas_ = launch.ctas;
  while (static_cast<int>(threads_.size()) < num_threads_) threads_.push_back(std::make_unique<Thread>());
  shared_.assign(static_cast<size_t>(launch.shared_bytes), kPoison);
  random_.seed(options.seed * 0x9e3779b97f4a7c15ull + (++launch_number_));
  banks_ = {};
  std::vector<int64_t> order(static_cast<size_t>(num_ctas_));
  for (int64_t i = 0; i < num_ctas_; ++i) order[static_cast<size_t>(i)] = i;
  if (options.order == ThreadOrder::random) std::shuffle(order.begin(), order.end(), random_);
  if (options.order == ThreadOrder::backward) std::reverse(order.begin(), order.end());
  for (const int64_t cta : order) run_cta(cta, body);
  launches.push_back({launch, banks_});
  Total& total = totals[launch.function];
  total.kernel = launch.kernel;
  ++total.launches;
  total.ctas += launch.ctas;
  total.threads = std::max(total.threads, launch.threads);
  total.shared_bytes = std::max(total.shared_bytes, launch.shared_bytes);
  total.seeds.insert(options.seed);
  total.sizes.insert(launch.sizes);
}

void Emulator::run_cta(int64_t cta, const std::function<void()>& body) {
  block_index_ = cta;
  body_ = &body;
  error_.clear();
  epoch_ = 1;
  finished_ = 0;
  at_barrier_ = 0;
  std::fill(shared_.begin(), shared_.end(), kPoison);
  cells_.assign((shared_.size() + 1) / 2, Cell{});
  warps_.assign(static_cast<size_t>(num_threads_ / 32), Warp{});
  ready_.clear();
  for (int i = 0; i < num_threads_; ++i) {
    Thread& thread = *threads_[static_cast<size_t>(i)];
    thread.index = i;
    thread.groups.clear();
    thread.open_group.clear();
    thread.log.clear();
    thread.fiber.prepare(&Emulator::thread_main, &thread);
    make_ready(i);
  }
  while (!ready_.empty() && error_.empty()) {
    size_t pick = 0;
    if (options.order == ThreadOrder::random) {
      pick = static_cast<size_t>(random_() % ready_.size());
    } else {
      const auto by_index = options.order == ThreadOrder::forward ? std::min_element(ready_.begin(), ready_.end())
                                                                  : std::max_element(ready_.begin(), ready_.end());
      pick = static_cast<size_t>(by_index - ready_.begin());
    }
    const int next = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    current_ = threads_[static_cast<size_t>(next)].get();
    scheduler_.switch_to(current_->fiber);
  }
  current_ = nullptr;
  if (!error_.empty()) throw EmulatorError(error_);
  if (finished_ != num_threads_) report_deadlock();
}

void Emulator::thread_main(void* argument) {
  Emulator& emulator = instance();
  auto* thread = static_cast<Thread*>(argument);
  // An exception may not leave the fiber: its text travels to run_cta instead, and the other fibers are abandoned.
  try {
    (*emulator.body_)();
    for (const auto& group : thread->groups)
      if (!group.empty()) emulator.fail("ended with cp.async copies that nobody waited for");
    if (!thread->open_group.empty()) emulator.fail("ended with cp.async copies that were never committed");
  } catch (const std::exception& error) {
    if (emulator.error_.empty()) emulator.error_ = error.what();
  }
  thread->state = State::finished;
  ++emulator.finished_;
  if (emulator.options.count_bank_conflicts && emulator.error_.empty() && emulator.finished_ == emulator.num_threads_)
    for (int warp = 0; warp < emulator.num_threads_ / 32; ++warp) emulator.flush_bank_log(warp);
  thread->fiber.finish_to(emulator.scheduler_);
}

void Emulator::make_ready(int thread) {
  threads_[static_cast<size_t>(thread)]->state = State::ready;
  ready_.push_back(thread);
}

void Emulator::give_way(State state, const std::source_location& where) {
  Thread* self = current_;
  self->state = state;
  self->where = where;
  self->fiber.switch_to(scheduler_);
}

void Emulator::report_deadlock() {
  int waiting_block = 0, waiting_warp = 0;
  const Thread* at_block = nullptr;
  const Thread* at_warp = nullptr;
  for (int i = 0; i < num_threads_; ++i) {
    const Thread* thread = threads_[static_cast<size_t>(i)].get();
    if (thread->state == State::at_block_barrier) ++waiting_block, at_block = thread;
    if (thread->state == State::at_warp_operation) ++waiting_warp, at_warp = thread;
  }
  std::string message = text("barrier misuse: ", finished_, " of ", num_threads_, " threads have returned");
  if (at_block != nullptr)
    message += text(", ", waiting_block, " wait at the block barrier of ", line_of(at_block->where));
  if (at_warp != nullptr)
    message += text(", ", waiting_warp, " wait in ", warps_[static_cast<size_t>(at_warp->index / 32)].kind, " of ",
                    line_of(at_warp->where));
  fail(message);
}

// Barriers and warp-wide operations -----------------------------------------------------------------------------------

void Emulator::sync_block(const std::source_location& where) {
  Thread* self = current_;
  self->where = where;
  if (++at_barrier_ < num_threads_) {
    give_way(State::at_block_barrier, where);
    return;
  }
  for (int i = 0; i < num_threads_; ++i) {
    const Thread& other = *threads_[static_cast<size_t>(i)];
    if (other.where.line() != where.line() || std::strcmp(other.where.file_name(), where.file_name()) != 0)
      fail(text("barrier misuse: thread ", other.index, " waits at ", line_of(other.where), ", thread ", self->index,
                " at ", line_of(where)));
  }
  at_barrier_ = 0;
  ++epoch_;
  if (options.count_bank_conflicts)
    for (int warp = 0; warp < num_threads_ / 32; ++warp) flush_bank_log(warp);
  for (int i = 0; i < num_threads_; ++i)
    if (i != self->index) make_ready(i);
}

void Emulator::warp_operation(WarpArgument& mine, void (*combine)(Emulator&, WarpArgument* const* lanes),
                              const std::source_location& where) {
  const int warp_number = current_->index / 32;
  Warp& warp = warps_[static_cast<size_t>(warp_number)];
  if (warp.arrived > 0 && std::strcmp(warp.kind, mine.kind) != 0)
    fail(text("barrier misuse: lane ", current_->index % 32, " calls ", mine.kind, " at ", line_of(where),
              " while others of its warp wait in ", warp.kind));
  warp.kind = mine.kind;
  warp.lanes[current_->index % 32] = &mine;
  if (++warp.arrived < 32) {
    give_way(State::at_warp_operation, where);
    return;
  }
  const int self = current_->index;
  combine(*this, warp.lanes);
  warp.arrived = 0;
  if (options.count_bank_conflicts) flush_bank_log(warp_number);
  for (int lane = 0; lane < 32; ++lane)
    if (warp_number * 32 + lane != self) make_ready(warp_number * 32 + lane);
}

void Emulator::sync_warp(const std::source_location& where) {
  WarpArgument mine;
  mine.kind = "sync_warp";
  warp_operation(
      mine,
      [](Emulator& self, WarpArgument* const*) { ++self.warps_[static_cast<size_t>(self.current_->index / 32)].epoch; },
      where);
}

// Shared memory -----------------------------------------------------------------------------------------------------

void Emulator::check_shared_range(uint32_t offset, uint32_t bytes, const char* what) const {
  if (static_cast<uint64_t>(offset) + bytes > shared_.size())
    fail(text("shared memory out of bounds: ", what, " of ", bytes, " bytes at offset ", static_cast<int32_t>(offset),
              " of ", shared_.size()));
  if (offset % bytes != 0) fail(text("shared memory misaligned: ", what, " of ", bytes, " bytes at offset ", offset));
}

void Emulator::record_shared(uint32_t offset, uint32_t bytes, bool write, const Thread* thread) {
  check_shared_range(offset, bytes, write ? "write" : "read");
  for (uint32_t granule = offset / 2; granule < (offset + bytes) / 2; ++granule) touch(granule, write, thread->index);
  if (options.count_bank_conflicts) const_cast<Thread*>(thread)->log.push_back({offset, bytes});
}

void Emulator::touch(uint32_t granule, bool write, int thread) {
  Cell& cell = cells_[granule];
  const int warp = thread / 32;
  const uint32_t warp_epoch = warps_[static_cast<size_t>(warp)].epoch;
  if (cell.state == 2)
    fail(text("shared offset ", granule * 2, " is the destination of a cp.async that was not waited for"));
  if (!write && cell.state == 0) fail(text("read of shared offset ", granule * 2, " that nobody wrote"));
  if (options.detect_races) {
    const bool after_write = cell.writer < 0 || cell.writer == thread || cell.write_block < epoch_ ||
                             (cell.writer / 32 == warp && cell.write_warp < warp_epoch);
    if (!after_write)
      fail(text("race on shared offset ", granule * 2, ": thread ", thread, write ? " writes" : " reads",
                " what thread ", cell.writer, " wrote with no barrier between"));
    if (write && cell.reader != -1 && cell.read_block == epoch_) {
      const bool same_warp = cell.reader >= 0 ? cell.reader / 32 == warp : cell.reader == kOneWarp - warp;
      const bool after_read = cell.reader == thread || (same_warp && cell.read_warp < warp_epoch);
      if (!after_read)
        fail(text("race on shared offset ", granule * 2, ": thread ", thread, " writes what ",
                  cell.reader >= 0 ? text("thread ", cell.reader) : std::string("several threads"),
                  " read with no barrier between"));
    }
  }
  if (write) {
    cell.writer = thread;
    cell.write_block = epoch_;
    cell.write_warp = warp_epoch;
    cell.reader = -1;
    cell.state = 1;
    return;
  }
  if (cell.reader == -1 || cell.read_block < epoch_) {
    cell.reader = thread;
  } else if (cell.reader != thread) {
    const bool same_warp = cell.reader >= 0 ? cell.reader / 32 == warp : cell.reader == kOneWarp - warp;
    cell.reader = same_warp ? kOneWarp - warp : kManyWarps;
  }
  cell.read_block = epoch_;
  cell.read_warp = warp_epoch;
}

uint16_t Emulator::read_shared_as_lane(uint32_t offset, int lane) {
  touch(offset / 2, false, current_->index / 32 * 32 + lane);
  uint16_t value;
  std::memcpy(&value, shared_.data() + offset, 2);
  return value;
}

void Emulator::check_matrix_row(uint32_t offset) {
  check_shared_range(offset, 16, "ldmatrix row");
  if (options.count_bank_conflicts) current_->log.push_back({offset, 16});
}

// cp.async ----------------------------------------------------------------------------------------------------------

void Emulator::async_copy(uint32_t offset, const void* source, int valid_bytes) {
  if (valid_bytes < 0 || valid_bytes > 16) fail(text("cp.async of ", valid_bytes, " valid bytes, must be 0..16"));
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async source is not 16-byte aligned");
  record_shared(offset, 16, true, current_);
  AsyncCopy copy{offset, {}};
  if (valid_bytes > 0) {
    check_global(source, static_cast<size_t>(valid_bytes), false);
    std::memcpy(copy.data, source, static_cast<size_t>(valid_bytes));
  }
  std::memset(shared_.data() + offset, kPoison, 16);
  for (uint32_t granule = offset / 2; granule < offset / 2 + 8; ++granule) cells_[granule].state = 2;
  current_->open_group.push_back(copy);
}

void Emulator::async_commit() {
  current_->groups.push_back(std::move(current_->open_group));
  current_->open_group.clear();
}

void Emulator::async_wait(int pending_groups) {
  auto& groups = current_->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memcpy(shared_.data() + copy.offset, copy.data, 16);
      for (uint32_t granule = copy.offset / 2; granule < copy.offset / 2 + 8; ++granule) {
        cells_[granule].state = 1; // lands now: a write by this thread at its present epoch
        cells_[granule].writer = current_->index;
        cells_[granule].write_block = epoch_;
        cells_[granule].write_warp = warps_[static_cast<size_t>(current_->index / 32)].epoch;
      }
    }
    groups.erase(groups.begin());
  }
}

// Global memory ------------------------------------------------------------------------------------------------------

void Emulator::add_memory(const void* address, size_t bytes, bool writable, const std::string& name) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  ranges_.push_back({begin, begin + bytes, writable, name, std::vector<uint64_t>(writable ? bytes / 2 + 2 : 0, 0)});
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  last_range_ = nullptr;
}

void Emulator::clear_memory() {
  ranges_.clear();
  last_range_ = nullptr;
}

Emulator::Range* Emulator::find_range(uintptr_t address) {
  if (last_range_ != nullptr && address >= last_range_->begin && address < last_range_->end) return last_range_;
  auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                [](uintptr_t value, const Range& range) { return value < range.begin; });
  if (after == ranges_.begin()) return nullptr;
  Range* range = &*(after - 1);
  if (address >= range->end) return nullptr;
  last_range_ = range;
  return range;
}

void Emulator::check_global(const void* pointer, size_t bytes, bool write, bool atomic) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (pointer == nullptr) fail("access through a null pointer to global memory");
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes != 0)
    fail(text("global memory misaligned: ", bytes, " bytes at an address that is ", address % bytes, " past"));
  if (ranges_.empty()) return;
  Range* range = find_range(address);
  if (range == nullptr || address + bytes > range->end) {
    std::string near = "no registered array";
    for (const Range& other : ranges_) // sorted: the last one that starts at or below the address
      if (other.begin <= address)
        near = text("byte ", address - other.begin, " of '", other.name, "', which has ", other.end - other.begin);
    fail(text("global memory out of bounds: ", write ? "write" : "read", " of ", bytes, " bytes at ", near));
  }
  if (write && !range->writable) fail(text("write to the input '", range->name, "'"));
  if (!range->writable) return;
  const uint64_t mine = (static_cast<uint64_t>(launch_number_) << 32) | static_cast<uint64_t>(block_index_ + 1);
  const size_t first = (address - range->begin) / 2, last = (address - range->begin + bytes - 1) / 2;
  for (size_t i = first; i <= last && options.detect_races && !atomic; ++i) {
    const uint64_t writer = range->writers[i];
    if (writer != mine && writer >> 32 == launch_number_ && bytes > 1)
      fail(text("race on global memory: byte ", i * 2, " of '", range->name, "' was written by CTA ",
                (writer & 0xffffffffu) - 1, " of this launch"));
    if (write) range->writers[i] = mine;
  }
}

// Bank conflicts -----------------------------------------------------------------------------------------------------

int64_t Emulator::count_wavefronts(const LoggedAccess* const* lanes, int count) const {
  std::vector<uint32_t> words[32];
  int64_t most = 1;
  for (int i = 0; i < count; ++i)
    for (uint32_t word = lanes[i]->offset / 4; word <= (lanes[i]->offset + lanes[i]->bytes - 1) / 4; ++word) {
      auto& bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      most = std::max<int64_t>(most, static_cast<int64_t>(bank.size()));
    }
  return most;
}

void Emulator::flush_bank_log(int warp) {
  size_t shortest = SIZE_MAX, longest = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const size_t n = threads_[static_cast<size_t>(warp * 32 + lane)]->log.size();
    shortest = std::min(shortest, n);
    longest = std::max(longest, n);
  }
  for (size_t i = 0; i < longest; ++i) {
    const LoggedAccess* lanes[32];
    bool together = shortest == longest;
    for (int lane = 0; lane < 32 && together; ++lane) {
      lanes[lane] = &threads_[static_cast<size_t>(warp * 32 + lane)]->log[i];
      together = lanes[lane]->bytes == lanes[0]->bytes;
    }
    if (!together) {
      ++banks_.unmatched;
      continue;
    }
    // 8-byte accesses go by half warps, 16-byte accesses by quarters: 128 bytes a wavefront at best.
    const int lanes_per_phase = lanes[0]->bytes <= 4 ? 32 : static_cast<int>(128 / lanes[0]->bytes);
    ++banks_.instructions;
    for (int first = 0; first < 32; first += lanes_per_phase) {
      const int64_t wavefronts = count_wavefronts(lanes + first, lanes_per_phase);
      banks_.wavefronts += wavefronts;
      banks_.conflicts += wavefronts - 1;
    }
  }
  for (int lane = 0; lane < 32; ++lane) threads_[static_cast<size_t>(warp * 32 + lane)]->log.clear();
}

} // namespace sparsenet::emulator
