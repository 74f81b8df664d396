// Which instruction set the CPU kernels use, decided once at run time. Torch-free.
#pragma once

namespace saelens_certify {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set that this CPU has and this build contains.
Isa detected_isa();

// The detected one, or a lower one if the environment variable SAELENS_CERTIFY_ISA asks for it
// (scalar, avx2, avx512). Read once; throws std::runtime_error if the name is another.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace saelens_certify

// Variants for newer x86 instruction sets are compiled into the same binary by GCC and Clang.
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define SAELENS_CERTIFY_X86_VARIANTS 1
#else
#define SAELENS_CERTIFY_X86_VARIANTS 0
#endif
