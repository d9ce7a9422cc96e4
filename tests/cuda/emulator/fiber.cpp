#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
  #include <sanitizer/common_interface_defs.h>
  #define SPARSENET_FIBER_ASAN 1
#endif

namespace sparsenet::emulator {

namespace {
#ifdef SPARSENET_FIBER_ASAN
constexpr size_t kStackBytes = 256 * 1024; // instrumented frames carry red zones
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
thread_local Fiber* leaving = nullptr; // who made the switch under way
} // namespace

#ifdef __x86_64__
// Saves the callee-saved registers on the current stack, stores its pointer, loads the other one.
extern "C" void sparsenet_fiber_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl sparsenet_fiber_switch
.type sparsenet_fiber_switch, @function
sparsenet_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sparsenet_fiber_switch, .-sparsenet_fiber_switch
.globl sparsenet_fiber_begin
.type sparsenet_fiber_begin, @function
sparsenet_fiber_begin:
  movq %rbx, %rdi
  call *%r12
  hlt
.size sparsenet_fiber_begin, .-sparsenet_fiber_begin
)");
extern "C" void sparsenet_fiber_begin();
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, stack_bytes_);
}

void Fiber::start(Fiber* self) {
  self->arrived();
  self->entry_(self->argument_);
  std::abort(); // entry ends in finish_to
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  sanitizer_state_ = nullptr;
  if (stack_ == nullptr) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    stack_bytes_ = kStackBytes + page;
    void* memory = mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE); // an overflow faults instead of reaching the neighbour
    stack_ = static_cast<unsigned char*>(memory);
    sanitizer_bottom_ = stack_ + page;
    sanitizer_bytes_ = kStackBytes;
  }
#ifdef SPARSENET_FIBER_ASAN
  __asan_unpoison_memory_region(sanitizer_bottom_, sanitizer_bytes_); // frames of an abandoned fiber
#endif
#ifdef __x86_64__
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + stack_bytes_);
  // The stack must be 16-byte aligned after begin's own `call`.
  *--top = 0;
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&sparsenet_fiber_begin); // return address of the first switch
  *--top = 0;                                                   // rbp
  *--top = reinterpret_cast<uintptr_t>(this);                   // rbx
  *--top = reinterpret_cast<uintptr_t>(&Fiber::start);          // r12
  *--top = 0;                                                   // r13
  *--top = 0;                                                   // r14
  *--top = 0;                                                   // r15
  saved_stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  using Entry = void (*)();
  auto trampoline = +[](unsigned high, unsigned low) {
    start(reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | static_cast<uintptr_t>(low)));
  };
  makecontext(&context_, reinterpret_cast<Entry>(trampoline), 2, static_cast<unsigned>(address >> 32),
              static_cast<unsigned>(address & 0xffffffffu));
#endif
}

void Fiber::switch_context(Fiber& next) {
#ifdef __x86_64__
  sparsenet_fiber_switch(&saved_stack_pointer_, next.saved_stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
}

void Fiber::switch_to(Fiber& next) {
  leaving = this;
#ifdef SPARSENET_FIBER_ASAN
  __sanitizer_start_switch_fiber(&sanitizer_state_, next.sanitizer_bottom_, next.sanitizer_bytes_);
#endif
  switch_context(next);
  arrived();
}

void Fiber::arrived() {
#ifdef SPARSENET_FIBER_ASAN
  const void* from_bottom = nullptr;
  size_t from_bytes = 0;
  __sanitizer_finish_switch_fiber(sanitizer_state_, &from_bottom, &from_bytes);
  // The scheduler runs on the thread's own stack, whose place is learnt when it is left.
  if (leaving->stack_ == nullptr) {
    leaving->sanitizer_bottom_ = from_bottom;
    leaving->sanitizer_bytes_ = from_bytes;
  }
#endif
}

void Fiber::finish_to(Fiber& next) {
  leaving = this;
#ifdef SPARSENET_FIBER_ASAN
  __sanitizer_start_switch_fiber(nullptr, next.sanitizer_bottom_, next.sanitizer_bytes_);
#endif
  switch_context(next);
  std::abort(); // a finished fiber is never resumed
}

} // namespace sparsenet::emulator
