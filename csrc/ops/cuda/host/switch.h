// A fiber: a function on a stack of its own that hands control back and forth. On x86-64 the
// switch is a few instructions (ucontext takes a system call per switch, and AddressSanitizer
// distrusts it); elsewhere, or with SAELENS_CERTIFY_SHIM_UCONTEXT, it is ucontext.
#pragma once

#if defined(__x86_64__) && !defined(SAELENS_CERTIFY_SHIM_UCONTEXT)
#define SC_FAST_SWITCH 1
#else
#define SC_FAST_SWITCH 0
#endif

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>

#if !SC_FAST_SWITCH
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace saelens_certify::shim {

#if SC_FAST_SWITCH
// Saves the caller's registers on its stack and the stack pointer in *from, then goes on with the
// stack `to` where that one was left.
extern "C" __attribute__((visibility("hidden"))) void sc_switch_stack(void** from, void* to);
#endif

class Fiber {
 public:
  Fiber() = default;
  // Stacks stay until the process ends: fibers are used again from block to block.
  Fiber(Fiber&& other) noexcept = default;

  // The next enter() starts a run of the function.
  void prepare(const std::function<void()>* function) {
    function_ = function;
    if (stack_ == nullptr) allocate();
  }

  // From outside: runs until leave() or the end of the function.
  void enter();

  // From inside: goes back to where enter() was called.
  void leave();

  // Whether the last enter() came to the end of the function.
  bool finished() const { return finished_; }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;
  static constexpr size_t kGuardBytes = 64 * 1024;

  static void start(Fiber* self) { self->loop(); }
  [[noreturn]] void loop();
  void allocate();
  void arrived();

  const std::function<void()>* function_ = nullptr;
  char* stack_ = nullptr;
  bool finished_ = false;
#if SC_FAST_SWITCH
  void* inside_ = nullptr;
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outer_stack_ = nullptr;
  size_t outer_size_ = 0;
#endif
};

// Fills memory with ones, past what AddressSanitizer thinks of its parts.
void fill_uninstrumented(char* begin, char* end);

}  // namespace saelens_certify::shim
