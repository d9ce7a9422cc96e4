// Typed pieces of an op's scratch memory. An op first names its pieces, then takes one buffer for all of them:
//
//   ArenaPlan plan;                                          buffer:
//   const auto lists = plan.shared<float>(n);                | lists | x, acc of task 0 | x, acc of task 1 | ...
//   const auto x = plan.per_task<T>(m);
//   const auto acc = plan.per_task<float>(k);                every piece begins at a multiple of 64 bytes
//   const Arena arena(plan, tasks);
//   if (arena.dry()) return;                                 only asked how much it would take (DryRun)
//   T* mine = arena.at(x, task);
//
// A piece knows its type, so that nothing is cast where it is used. The buffer itself comes from Workspace.
#pragma once

#include "simd.h"
#include "workspace.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

template <typename T> struct SharedPiece {
  int64_t offset = 0;
};
template <typename T> struct TaskPiece {
  int64_t offset = 0;
};

class ArenaPlan {
public:
  template <typename T> SPARSENET_INLINE SharedPiece<T> shared(int64_t count) {
    return {place(&shared_bytes, count * int64_t(sizeof(T)))};
  }
  template <typename T> SPARSENET_INLINE TaskPiece<T> per_task(int64_t count) {
    return {place(&task_bytes, count * int64_t(sizeof(T)))};
  }
  int64_t shared_bytes = 0, task_bytes = 0;

private:
  SPARSENET_INLINE static int64_t place(int64_t* end, int64_t bytes) {
    const int64_t offset = *end;
    *end += ceil_div(bytes, kLineBytes) * kLineBytes;
    return offset;
  }
};

// The buffer of a plan; throws std::bad_alloc.
class Arena {
public:
  SPARSENET_INLINE explicit Arena(const ArenaPlan& plan, int64_t tasks = 1)
      : buffer_(plan.shared_bytes + plan.task_bytes * tasks), shared_bytes_(plan.shared_bytes),
        task_bytes_(plan.task_bytes) {}
  SPARSENET_INLINE bool dry() const { return buffer_.dry(); }
  template <typename T> SPARSENET_INLINE T* at(SharedPiece<T> piece) const {
    return reinterpret_cast<T*>(buffer_.data() + piece.offset);
  }
  template <typename T> SPARSENET_INLINE T* at(TaskPiece<T> piece, int64_t task) const {
    return reinterpret_cast<T*>(buffer_.data() + shared_bytes_ + task * task_bytes_ + piece.offset);
  }

private:
  const Workspace buffer_;
  const int64_t shared_bytes_, task_bytes_;
};

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
