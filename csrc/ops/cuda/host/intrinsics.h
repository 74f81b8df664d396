// Built-in functions and vector types of CUDA; part of shim.h.
#pragma once

// --- vector types --------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// --- barriers and warp collectives ---------------------------------------------------------

#define SC_WHERE ::saelens_certify::shim::Where where = ::saelens_certify::shim::Where::current()

inline void __syncthreads(SC_WHERE) { ::saelens_certify::shim::barrier(0, where); }
inline int __syncthreads_count(int p, SC_WHERE) {
  return ::saelens_certify::shim::barrier(p, where);
}
inline int __syncthreads_or(int p, SC_WHERE) {
  return ::saelens_certify::shim::barrier(p, where) != 0;
}
inline int __syncthreads_and(int p, SC_WHERE) {
  return ::saelens_certify::shim::barrier(p == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SC_WHERE) {
  ::saelens_certify::shim::collective(::saelens_certify::shim::Kind::kSyncwarp, mask, 0, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int p, SC_WHERE) {
  return static_cast<unsigned>(::saelens_certify::shim::collective(
      ::saelens_certify::shim::Kind::kBallot, mask, p != 0, 0, where));
}
inline int __any_sync(unsigned mask, int p, SC_WHERE) { return __ballot_sync(mask, p, where) != 0; }
inline int __all_sync(unsigned mask, int p, SC_WHERE) {
  return __ballot_sync(mask, p, where) == mask;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SC_WHERE) {
  const int first = ::saelens_certify::shim::lane() & ~(width - 1);
  return ::saelens_certify::shim::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SC_WHERE) {
  const int lane = ::saelens_certify::shim::lane(), other = lane ^ bits;
  // A lane of a later group is out of reach; one of an earlier group is not.
  const bool reached = other < (lane & ~(width - 1)) + width;
  return ::saelens_certify::shim::shuffle(mask, value, reached ? other : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, SC_WHERE) {
  const int lane = ::saelens_certify::shim::lane(), other = lane + static_cast<int>(distance);
  const bool reached = other < (lane & ~(width - 1)) + width;
  return ::saelens_certify::shim::shuffle(mask, value, reached ? other : lane, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, SC_WHERE) {
  const int lane = ::saelens_certify::shim::lane(), other = lane - static_cast<int>(distance);
  const bool reached = other >= (lane & ~(width - 1));
  return ::saelens_certify::shim::shuffle(mask, value, reached ? other : lane, where);
}

// Of 32-bit integers; like the real ones from sm_80 on.
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SC_WHERE) {
  return static_cast<unsigned>(::saelens_certify::shim::collective(
      ::saelens_certify::shim::Kind::kReduceAdd, mask, value, 0, where));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SC_WHERE) {
  return static_cast<unsigned>(::saelens_certify::shim::collective(
      ::saelens_certify::shim::Kind::kReduceMax, mask, value, 0, where));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SC_WHERE) {
  return static_cast<unsigned>(::saelens_certify::shim::collective(
      ::saelens_certify::shim::Kind::kReduceMin, mask, value, 0, where));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SC_WHERE) {
  return static_cast<unsigned>(::saelens_certify::shim::collective(
      ::saelens_certify::shim::Kind::kReduceOr, mask, value, 0, where));
}

#undef SC_WHERE

// Threads run one at a time and in program order, so that fences have nothing to do.
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- atomics -------------------------------------------------------------------------------

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T old) { return T(old | value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T old) { return T(old & value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return ::saelens_certify::shim::atomically(address,
                                             [=](T old) { return old == expected ? value : old; });
}

// --- bits ----------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

// --- arithmetic with a stated rounding -------------------------------------------------------

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline float __double2float_ru(double a) { return ::saelens_certify::shim::rounded_up(a); }
inline float __double2float_rd(double a) { return ::saelens_certify::shim::rounded_down(a); }
// A product of float32 numbers is exact in float64.
inline float __fmul_ru(float a, float b) {
  return ::saelens_certify::shim::rounded_up(static_cast<double>(a) * b);
}
inline float __fmul_rd(float a, float b) {
  return ::saelens_certify::shim::rounded_down(static_cast<double>(a) * b);
}
inline float __fadd_ru(float a, float b) {
  return ::saelens_certify::shim::rounded_up(::saelens_certify::shim::sum_towards(a, b));
}
inline float __fadd_rd(float a, float b) {
  return ::saelens_certify::shim::rounded_down(::saelens_certify::shim::sum_towards(a, b));
}
inline float __fsub_ru(float a, float b) { return __fadd_ru(a, -b); }
inline float __fsub_rd(float a, float b) { return __fadd_rd(a, -b); }

// --- loads and stores with a caching hint -----------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

// Visible without a namespace, as in CUDA.
using std::max;
using std::min;
