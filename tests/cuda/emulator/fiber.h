// Cooperative threads with their own stacks: one per CUDA thread of the CTA being run. A switch is a dozen
// instructions on x86-64; elsewhere it goes through ucontext. Under AddressSanitizer every switch is announced.
#pragma once

#include <cstddef>
#include <cstdint>
#ifndef __x86_64__
  #include <ucontext.h>
#endif

namespace sparsenet::emulator {

class Fiber {
public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Prepares entry(argument) on this fiber's stack (allocated on first use). entry must end in finish_to.
  void prepare(void (*entry)(void*), void* argument);
  // Leaves the caller's context in *this and continues in next. Returns when someone switches back.
  void switch_to(Fiber& next);
  // The same, but *this is over: its stack may be reused.
  [[noreturn]] void finish_to(Fiber& next);

private:
  static void start(Fiber* self);
  void switch_context(Fiber& next);
  void arrived();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  unsigned char* stack_ = nullptr; // null: the thread's own stack (the scheduler)
  size_t stack_bytes_ = 0;
  void* saved_stack_pointer_ = nullptr;
#ifndef __x86_64__
  ucontext_t context_{};
#endif
  void* sanitizer_state_ = nullptr;
  const void* sanitizer_bottom_ = nullptr;
  size_t sanitizer_bytes_ = 0;
};

} // namespace sparsenet::emulator
