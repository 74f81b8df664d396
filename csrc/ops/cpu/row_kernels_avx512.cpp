// Row kernels for AVX-512. System headers come before the target switch, so that no shared inline
// function is compiled for an instruction set that the machine may lack.
#include <cmath>
#include <cstring>

#include "common/isa.h"
#include "ops/cpu/row_kernels.h"

#if SAELENS_CERTIFY_X86_VARIANTS
#include <immintrin.h>
#if !defined(__clang__)
// Undefined registers in the intrinsics' own definitions.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#endif
#define SAELENS_CERTIFY_VARIANT avx512
#define SAELENS_CERTIFY_LANES(pass) _mm512_movepi32_mask((__m512i)(pass))
#define SAELENS_CERTIFY_WIDEN(p) \
  (f32x16) _mm512_slli_epi32(    \
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16)
#define SAELENS_CERTIFY_GATHER_WIDTH 16
#define SAELENS_CERTIFY_WIDEN_HALF(p) \
  (f32x16) _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
#define SAELENS_CERTIFY_FMA(a, b, c) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#include "ops/cpu/row_kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace saelens_certify {
const RowKernels kAvx512Kernels = avx512::kKernels;
}  // namespace saelens_certify
#endif
