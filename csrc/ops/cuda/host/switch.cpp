#include "ops/cuda/host/switch.h"

#include <cstdint>

namespace saelens_certify::shim {

#if SC_FAST_SWITCH
asm(R"(
.text
.globl sc_switch_stack
.hidden sc_switch_stack
.type sc_switch_stack, @function
sc_switch_stack:
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
.size sc_switch_stack, .-sc_switch_stack

.hidden sc_start_fiber
.type sc_start_fiber, @function
sc_start_fiber:
  movq %r12, %rdi
  callq *%r13
  ud2
.size sc_start_fiber, .-sc_start_fiber
)");

extern "C" __attribute__((visibility("hidden"))) void sc_start_fiber();
#endif

void Fiber::allocate() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("CUDA host shim: no memory for the stack of a thread");
    std::abort();
  }
  // A stack that grows too long ends the process instead of writing elsewhere.
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
#if SC_FAST_SWITCH
  // What sc_switch_stack pops: r15, r14, r13 = start, r12 = this, rbx, rbp, return address. The
  // stack pointer is a multiple of 16 when the first function is called.
  uint64_t* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes) - 9;
  for (int i = 0; i < 9; ++i) top[i] = 0;
  top[2] = reinterpret_cast<uint64_t>(&Fiber::start);
  top[3] = reinterpret_cast<uint64_t>(this);
  top[6] = reinterpret_cast<uint64_t>(&sc_start_fiber);
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  const uint64_t self = reinterpret_cast<uint64_t>(this);
  void (*const unpack)(unsigned, unsigned) = [](unsigned high, unsigned low) {
    start(reinterpret_cast<Fiber*>(uint64_t{high} << 32 | low));
  };
  makecontext(&inside_, reinterpret_cast<void (*)()>(unpack), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
#endif
}

void Fiber::enter() {
  finished_ = false;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_outside_, stack_, kStackBytes);
#endif
#if SC_FAST_SWITCH
  sc_switch_stack(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_inside_, outer_stack_, outer_size_);
#endif
#if SC_FAST_SWITCH
  sc_switch_stack(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
  arrived();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_inside_, &outer_stack_, &outer_size_);
#endif
}

void Fiber::loop() {
  arrived();
  for (;;) {
    (*function_)();
    finished_ = true;
    leave();
  }
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize_address))
#endif
void fill_uninstrumented(char* begin, char* end) {
  for (volatile char* at = begin; at < end; ++at) *at = static_cast<char>(0xff);
}

}  // namespace saelens_certify::shim
