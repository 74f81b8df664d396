// Bodies of the row kernels, compiled once per instruction set into namespace
// SAELENS_CERTIFY_VARIANT. Vectors are the compiler's own (GCC, Clang): 64 bytes each, lowered to
// whatever registers the target has. Everything has internal linkage.

namespace saelens_certify::SAELENS_CERTIFY_VARIANT {
namespace {

#define SC_INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

template <typename V>
SC_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
SC_INLINE V splat(decltype(V{}[0] + 0) x) {
  return x - V{};
}

// --- storage types -------------------------------------------------------------------------

struct Float32 {
  typedef float type;
  SC_INLINE float one(const float* p) { return *p; }
  SC_INLINE f32x8 eight(const float* p) { return load<f32x8>(p); }
  SC_INLINE f32x16 sixteen(const float* p) { return load<f32x16>(p); }
};

// A bfloat16 is the upper half of a float32.
struct BFloat16 {
  typedef uint16_t type;
  SC_INLINE float one(const uint16_t* p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  SC_INLINE f32x8 eight(const uint16_t* p) {
    return (f32x8)(__builtin_convertvector(load<u16x8>(p), u32x8) << 16);
  }
  SC_INLINE f32x16 sixteen(const uint16_t* p) {
    return (f32x16)(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
  }
};

// A float16 is shifted into float32's fields; a product with 2^112 corrects the exponent's bias
// exactly, also for subnormal numbers. Infinities and NaN get the largest exponent.
struct Float16 {
  typedef uint16_t type;
  template <typename F, typename U>
  SC_INLINE F convert(U half) {
    const U sign = (half & 0x8000u) << 16;
    const F finite = (F)((half & 0x7fffu) << 13) * 0x1p112f;
    const U special = (U)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (F)((U)finite | special | sign);
  }
  SC_INLINE float one(const uint16_t* p) {
    u32x8 half = {*p};
    return convert<f32x8>(half)[0];
  }
  SC_INLINE f32x8 eight(const uint16_t* p) {
    return convert<f32x8>(__builtin_convertvector(load<u16x8>(p), u32x8));
  }
  SC_INLINE f32x16 sixteen(const uint16_t* p) {
    return convert<f32x16>(__builtin_convertvector(load<u16x16>(p), u32x16));
  }
};

// --- canonical float64 sums ----------------------------------------------------------------

constexpr int64_t kLanes = 32;

SC_INLINE double butterfly(const double* lanes) {
  double sum[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = lanes[i];
  for (int64_t width = kLanes / 2; width >= 1; width /= 2) {
    for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Products of two float32 numbers are exact in float64, so that a product followed by a sum is a
// fused multiply-add, whatever the machine has.
template <typename W>
SC_INLINE double dot_as(const float* x, const typename W::type* w, int64_t n) {
  f64x8 lane[4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + 8 * part;
      lane[part] += __builtin_convertvector(load<f32x8>(x + at), f64x8) *
                    __builtin_convertvector(W::eight(w + at), f64x8);
    }
  }
  double lanes[kLanes];
  std::memcpy(lanes, lane, sizeof(lanes));
  for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += double(x[i]) * double(W::one(w + i));
  return butterfly(lanes);
}

double dot(const float* x, const void* w, Real type, int64_t n) {
  switch (type) {
    case Real::kBFloat16:
      return dot_as<BFloat16>(x, static_cast<const uint16_t*>(w), n);
    case Real::kFloat16:
      return dot_as<Float16>(x, static_cast<const uint16_t*>(w), n);
    default:
      return dot_as<Float32>(x, static_cast<const float*>(w), n);
  }
}

// Eight lanes at a time, so that their sums stay in registers.
void moments(const float* x, const float* y, int64_t n, double* out) {
  double lanes[5][kLanes];
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < kLanes; at += 8) {
    f64x8 error = {}, xx = {}, yy = {}, xy = {}, x_sum = {};
    for (int64_t i = at; i < whole; i += kLanes) {
      const f64x8 a = __builtin_convertvector(load<f32x8>(x + i), f64x8);
      const f64x8 b = __builtin_convertvector(load<f32x8>(y + i), f64x8);
      error += (a - b) * (a - b);
      xx += a * a;
      yy += b * b;
      xy += a * b;
      x_sum += a;
    }
    const f64x8 sums[5] = {error, xx, yy, xy, x_sum};
    for (int s = 0; s < 5; ++s) std::memcpy(&lanes[s][at], &sums[s], sizeof(sums[s]));
  }
  for (int64_t i = whole, j = 0; i < n; ++i, ++j) {
    const double a = x[i], b = y[i];
    const double terms[5] = {(a - b) * (a - b), a * a, b * b, a * b, a};
    for (int s = 0; s < 5; ++s) lanes[s][j] += terms[s];
  }
  for (int s = 0; s < 5; ++s) out[s] = butterfly(lanes[s]);
}

// --- filter --------------------------------------------------------------------------------

template <bool kScale, bool kTheta>
SC_INLINE int filter_as(const FilterRow& row, int64_t n, int32_t* hits) {
  if (n == kFilterBlock) {
    i32x16 any = {};
    for (int at = 0; at < kFilterBlock; at += 16) {
      f32x16 score = load<f32x16>(row.product + at) + load<f32x16>(row.bias + at);
      if (kScale) score *= load<f32x16>(row.scale + at);
      f32x16 limit = splat<f32x16>(row.floor);
      if (kTheta) {
        const f32x16 theta = load<f32x16>(row.theta + at);
        limit = theta > limit ? theta : limit;
      }
      any |= score + row.slack >= limit;
    }
    uint64_t words[8], joined = 0;
    std::memcpy(words, &any, sizeof(words));
    for (uint64_t word : words) joined |= word;
    if (joined == 0) return 0;
  }
  int found = 0;
  for (int64_t at = 0; at < n; ++at) {
    float score = row.product[at] + row.bias[at];
    if (kScale) score *= row.scale[at];
    float limit = row.floor;
    if (kTheta && row.theta[at] > limit) limit = row.theta[at];
    hits[found] = int32_t(at);
    found += score + row.slack >= limit;
  }
  return found;
}

int filter(const FilterRow& row, int64_t n, int32_t* hits) {
  if (row.scale == nullptr) {
    return row.theta == nullptr ? filter_as<false, false>(row, n, hits)
                                : filter_as<false, true>(row, n, hits);
  }
  return row.theta == nullptr ? filter_as<true, false>(row, n, hits)
                              : filter_as<true, true>(row, n, hits);
}

// --- gather decoding -----------------------------------------------------------------------

#include "ops/cpu/gather.inl"

// --- conversion ----------------------------------------------------------------------------

template <typename W>
SC_INLINE void widen_as(const typename W::type* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 wide = W::sixteen(from + i);
    std::memcpy(to + i, &wide, sizeof(wide));
  }
  for (; i < n; ++i) to[i] = W::one(from + i);
}

void widen(const void* from, Real type, int64_t n, float* to) {
  switch (type) {
    case Real::kBFloat16:
      return widen_as<BFloat16>(static_cast<const uint16_t*>(from), n, to);
    case Real::kFloat16:
      return widen_as<Float16>(static_cast<const uint16_t*>(from), n, to);
    default:
      return widen_as<Float32>(static_cast<const float*>(from), n, to);
  }
}

#include "ops/cpu/softcap.inl"
#include "ops/cpu/softmax.inl"

#undef SC_INLINE

constexpr RowKernels kKernels = {dot,   filter,  gather,  moments,
                                 widen, softcap, softmax, softmax_pair};

}  // namespace
}  // namespace saelens_certify::SAELENS_CERTIFY_VARIANT

#undef SAELENS_CERTIFY_VARIANT
#undef SAELENS_CERTIFY_GATHER_WIDTH
