// Row kernels for AVX2. System headers come before the target switch, so that no shared inline
// function is compiled for an instruction set that the machine may lack.
#include <cmath>
#include <cstring>

#include "common/isa.h"
#include "ops/cpu/row_kernels.h"

#if SAELENS_CERTIFY_X86_VARIANTS
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define SAELENS_CERTIFY_VARIANT avx2
#define SAELENS_CERTIFY_LANES(pass)                                            \
  ((uint32_t)_mm256_movemask_ps(reinterpret_cast<const __m256*>(&(pass))[0]) | \
   (uint32_t)_mm256_movemask_ps(reinterpret_cast<const __m256*>(&(pass))[1]) << 8)
#define SAELENS_CERTIFY_GATHER_WIDTH 8
#define SAELENS_CERTIFY_FMA(a, b, c) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#include "ops/cpu/row_kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace saelens_certify {
const RowKernels kAvx2Kernels = avx2::kKernels;
}  // namespace saelens_certify
#endif
