#pragma once

// A stack of its own and a place to go on from: what a thread of a kernel is here. On x86-64 a switch is fifteen
// instructions; elsewhere ucontext does it, with a system call each time. The sanitizers are told of every switch.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>
#include <utility>

#if !defined(__x86_64__) && !defined(NORMOPS_EMULATOR_UCONTEXT)
#define NORMOPS_EMULATOR_UCONTEXT
#endif
#ifdef NORMOPS_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
#ifdef NORMOPS_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef NORMOPS_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace normops::emulator {

#ifndef NORMOPS_EMULATOR_UCONTEXT
// Saves the registers that a function call keeps and the stack pointer, and takes up another stack's. Weak, as every
// file that includes this has it.
extern "C" void normops_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden normops_emulator_switch
.weak normops_emulator_switch
.type normops_emulator_switch, @function
normops_emulator_switch:
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
.size normops_emulator_switch, .-normops_emulator_switch
.popsection
)");
#endif

class Fiber {
 public:
  using Entry = void (*)();

  // The fiber of whoever runs already: the scheduler.
  Fiber() = default;

  // Whether the address is on this stack.
  bool holds(uint64_t address) const { return address - reinterpret_cast<uint64_t>(bottom_) < bytes_; }

  // A stack, with a page below it that faults when it overflows. The stack is used again by every `start`.
  explicit Fiber(size_t stack_bytes) : owns_(true), bytes_(stack_bytes) {
    void* memory = mmap(nullptr, bytes_ + page(), PROT_READ | PROT_WRITE, kMapping, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page(), PROT_NONE);
    bottom_ = static_cast<char*>(memory) + page();
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (!owns_) return;
    stop();
    munmap(bottom_ - page(), bytes_ + page());
  }

  // The next switch here begins `entry`, which must never return. Whatever ran here before is forgotten.
  void start(Entry entry) {
#ifdef NORMOPS_EMULATOR_ASAN
    __asan_unpoison_memory_region(bottom_, bytes_);
    fake_stack_ = nullptr;
#endif
#ifdef NORMOPS_EMULATOR_TSAN
    // Fresh memory: to ThreadSanitizer, the traces of whatever ran here before would be another thread's.
    stop();
    mmap(bottom_, bytes_, PROT_READ | PROT_WRITE, kMapping | MAP_FIXED, -1, 0);
    tsan_ = __tsan_create_fiber(0);
#endif
#ifdef NORMOPS_EMULATOR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack = {.ss_sp = bottom_, .ss_flags = 0, .ss_size = bytes_};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(bottom_ + bytes_);
    *--top = nullptr;                              // a call would have left its return address here
    *--top = reinterpret_cast<void*>(entry);       // where `ret` goes
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that are popped before it
    stack_ = top;
#endif
  }

  // Nothing will switch here before the next `start`.
  void stop() {
#ifdef NORMOPS_EMULATOR_TSAN
    if (tsan_) __tsan_destroy_fiber(std::exchange(tsan_, nullptr));
#endif
  }

  // Leaves `this`, which is running, for `to`; returns when someone switches back.
  void switch_to(Fiber& to) {
#ifdef NORMOPS_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.bytes_);
#endif
#ifdef NORMOPS_EMULATOR_TSAN
    if (!tsan_) tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef NORMOPS_EMULATOR_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    normops_emulator_switch(&stack_, to.stack_);
#endif
#ifdef NORMOPS_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // The first thing `entry` does, given the fiber that switched to it.
  static void arrived(Fiber& from) {
#ifdef NORMOPS_EMULATOR_ASAN
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.bytes_);
    from.bottom_ = static_cast<char*>(const_cast<void*>(bottom));
#endif
    (void)from;
  }

 private:
  static constexpr int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

  bool owns_ = false;
  char* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* stack_ = nullptr;
#ifdef NORMOPS_EMULATOR_UCONTEXT
  ucontext_t context_;
#endif
#ifdef NORMOPS_EMULATOR_ASAN
  void* fake_stack_ = nullptr;
#endif
#ifdef NORMOPS_EMULATOR_TSAN
  void* tsan_ = nullptr;
#endif
};

// ThreadSanitizer is told what orders memory: a release of `place` and the acquires that follow it.
inline void release(const void* place) {
#ifdef NORMOPS_EMULATOR_TSAN
  __tsan_release(const_cast<void*>(place));
#endif
  (void)place;
}
inline void acquire(const void* place) {
#ifdef NORMOPS_EMULATOR_TSAN
  __tsan_acquire(const_cast<void*>(place));
#endif
  (void)place;
}

}  // namespace normops::emulator
