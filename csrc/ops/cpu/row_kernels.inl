// Bodies of the row kernels, compiled once per instruction set into namespace
// SAELENS_CERTIFY_VARIANT. Vectors are the compiler's own (GCC, Clang): 64 bytes each, lowered to
// whatever registers the target has; a variant may define SAELENS_CERTIFY_LANES, _WIDEN,
// _WIDEN_HALF, _FMA and _GATHER_WIDTH where the compiler's lowering is poor. Everything has
// internal linkage.

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
#ifdef SAELENS_CERTIFY_WIDEN
    return SAELENS_CERTIFY_WIDEN(p);
#else
    return (f32x16)(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
#endif
  }
};

// A float16 is shifted into float32's fields, and the exponent's bias corrected: by an addition to
// the exponent, or where that is 0 (subnormal numbers and 0) by one to the bits and a subtraction,
// which is exact. No operand is a subnormal float32, which processors may be set to take for 0.
// Infinities and NaN get the largest exponent.
struct Float16 {
  typedef uint16_t type;
  template <typename F, typename U>
  SC_INLINE F convert(U half) {
    const U sign = (half & 0x8000u) << 16;
    const U bits = (half & 0x7fffu) << 13;
    const F subnormal = (F)(bits + (113u << 23)) - 0x1p-14f;
    const F finite = (half & 0x7c00u) == 0 ? subnormal : (F)(bits + (112u << 23));
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
#ifdef SAELENS_CERTIFY_WIDEN_HALF
    return SAELENS_CERTIFY_WIDEN_HALF(p);
#else
    return convert<f32x16>(__builtin_convertvector(load<u16x16>(p), u32x16));
#endif
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

template <typename W>
SC_INLINE void dot_pair_as(const float* x, const typename W::type* w0, const typename W::type* w1,
                           int64_t n, double* out) {
  f64x8 lane0[4] = {}, lane1[4] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + 8 * part;
      const f64x8 wide = __builtin_convertvector(load<f32x8>(x + at), f64x8);
      lane0[part] += wide * __builtin_convertvector(W::eight(w0 + at), f64x8);
      lane1[part] += wide * __builtin_convertvector(W::eight(w1 + at), f64x8);
    }
  }
  double lanes[2][kLanes];
  std::memcpy(lanes[0], lane0, sizeof(lane0));
  std::memcpy(lanes[1], lane1, sizeof(lane1));
  for (int64_t j = 0; i < n; ++i, ++j) {
    lanes[0][j] += double(x[i]) * double(W::one(w0 + i));
    lanes[1][j] += double(x[i]) * double(W::one(w1 + i));
  }
  out[0] = butterfly(lanes[0]);
  out[1] = butterfly(lanes[1]);
}

void dot_pair(const float* x, const void* w0, const void* w1, Real type, int64_t n, double* out) {
  switch (type) {
    case Real::kBFloat16:
      return dot_pair_as<BFloat16>(x, static_cast<const uint16_t*>(w0),
                                   static_cast<const uint16_t*>(w1), n, out);
    case Real::kFloat16:
      return dot_pair_as<Float16>(x, static_cast<const uint16_t*>(w0),
                                  static_cast<const uint16_t*>(w1), n, out);
    default:
      return dot_pair_as<Float32>(x, static_cast<const float*>(w0), static_cast<const float*>(w1),
                                  n, out);
  }
}

// Nearest bfloat16, ties to even; x is finite.
SC_INLINE u32x16 nearest_bfloat16(f32x16 x) {
  const u32x16 bits = (u32x16)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

void narrow(const float* x, const int32_t* outliers, int n_outliers, int64_t n, uint16_t* to,
            double* squares) {
  f64x8 sums[3][2] = {};
  for (int64_t i = 0; i < n; i += 16) {
    float part[16] = {};
    const int64_t count = n - i < 16 ? n - i : 16;
    for (int64_t j = 0; j < count; ++j) part[j] = x[i + j];
    for (; n_outliers > 0 && *outliers < i + count; ++outliers, --n_outliers) {
      part[*outliers - i] = 0.0f;
    }
    const u32x16 rounded = nearest_bfloat16(load<f32x16>(part));
    const u16x16 stored = __builtin_convertvector(rounded >> 16, u16x16);
    std::memcpy(to + i, &stored, 2 * count);
    float wide[16];
    std::memcpy(wide, &rounded, sizeof(wide));
    for (int half = 0; half < 2; ++half) {
      const f64x8 a = __builtin_convertvector(load<f32x8>(part + 8 * half), f64x8);
      const f64x8 b = __builtin_convertvector(load<f32x8>(wide + 8 * half), f64x8);
      sums[0][half] += a * a;
      sums[1][half] += b * b;
      sums[2][half] += (a - b) * (a - b);
    }
  }
  for (int s = 0; s < 3; ++s) {
    squares[s] = 0.0;
    for (int j = 0; j < 8; ++j) squares[s] += sums[s][0][j] + sums[s][1][j];
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

SC_INLINE f32x16 magnitude(f32x16 x) { return (f32x16)((u32x16)x & 0x7fffffffu); }

// Nothing but products and biases to look at.
SC_INLINE bool plain(const FilterRow& row) {
  return row.scale == nullptr && row.theta == nullptr && row.gate_bias == nullptr &&
         row.n_outliers == 0;
}

template <bool kHalf>
SC_INLINE f32x16 stored_product(const FilterRow& row, int64_t at) {
  if (kHalf) return BFloat16::sixteen(static_cast<const uint16_t*>(row.product) + at);
  return Float32::sixteen(static_cast<const float*>(row.product) + at);
}

// Scores of 16 columns from their products, and how far products can lie from the exact ones
// because they are stored rounded. The same arithmetic whatever the column's place in its block.
struct Screened {
  f32x16 product;
  f32x16 sum;  // with the outliers added
  f32x16 score;
  f32x16 rounding;
  f32x16 theta;
};

template <bool kHalf, bool kPlain>
SC_INLINE Screened screened(const FilterRow& row, int64_t at) {
  Screened s;
  s.product = s.sum = stored_product<kHalf>(row, at);
  if (!kPlain) {
    for (int o = 0; o < row.n_outliers; ++o) {
      s.sum += row.outlier_x[o] * load<f32x16>(row.outlier_weight + o * row.outlier_stride + at);
    }
  }
  s.score = s.sum + load<f32x16>(row.bias + at);
  s.rounding = splat<f32x16>(0.0f);
  s.theta = splat<f32x16>(0.0f);
  if (kHalf) s.rounding = magnitude(s.product) * row.rounding;
  if (!kPlain && row.scale != nullptr) {
    const f32x16 scale = load<f32x16>(row.scale + at);
    s.score *= scale;
    if (kHalf) s.rounding = magnitude(s.product * scale) * row.rounding;
  }
  if (!kPlain && row.theta != nullptr) s.theta = load<f32x16>(row.theta + at);
  return s;
}

// Whether each of 16 columns passes the filter.
template <bool kHalf, bool kPlain>
SC_INLINE i32x16 passes(const FilterRow& row, int64_t at, const Screened& s) {
  f32x16 limit = splat<f32x16>(row.floor);
  if (!kPlain && row.theta != nullptr) limit = s.theta > limit ? s.theta : limit;
  i32x16 pass = s.score + (s.rounding + row.slack) >= limit;
  if (!kPlain && row.gate_bias != nullptr) {
    const f32x16 gate = s.sum + load<f32x16>(row.gate_bias + at) + row.gate_slack;
    pass &= gate + magnitude(s.product) * row.rounding > splat<f32x16>(0.0f);
  }
  return pass;
}

SC_INLINE i32x16 lane_bits() {
  return i32x16{1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
}

template <bool kHalf, bool kPlain>
SC_INLINE void best_of_groups_as(const FilterRow& row, const int32_t* pool_bits, int64_t n,
                                 int64_t per_group, float* best) {
  const f32x16 none = splat<f32x16>(-__builtin_inff());
  for (int64_t group = 0; group < n; group += 16 * per_group) {
    f32x16 most = none;
    for (int64_t at = group; at < group + 16 * per_group; at += 16) {
      const Screened s = screened<kHalf, kPlain>(row, at);
      f32x16 lower = s.score - (s.rounding + row.slack);
      i32x16 counts = lower > s.theta;
      if (!kPlain && row.gate_bias != nullptr) {
        const f32x16 gate = s.sum + load<f32x16>(row.gate_bias + at) - row.gate_slack;
        counts &= gate - magnitude(s.product) * row.rounding > splat<f32x16>(0.0f);
      }
      if (pool_bits != nullptr) {
        const int32_t bits = int32_t(uint32_t(pool_bits[at >> 5]) >> (at & 31));
        counts &= (lane_bits() & bits) != 0;
      }
      lower = counts ? lower : none;
      most = lower > most ? lower : most;
    }
    std::memcpy(best, &most, sizeof(most));
    best += 16;
  }
}

template <bool kHalf>
SC_INLINE void best_of_groups_stored(const FilterRow& row, const int32_t* pool_bits, int64_t n,
                                     int64_t per_group, float* best) {
  if (plain(row)) {
    best_of_groups_as<kHalf, true>(row, pool_bits, n, per_group, best);
  } else {
    best_of_groups_as<kHalf, false>(row, pool_bits, n, per_group, best);
  }
}

void best_of_groups(const FilterRow& row, const int32_t* pool_bits, int64_t n, int64_t per_group,
                    float* best) {
  if (row.half) {
    best_of_groups_stored<true>(row, pool_bits, n, per_group, best);
  } else {
    best_of_groups_stored<false>(row, pool_bits, n, per_group, best);
  }
}

// One bit per lane that passes (all bits of such a lane are set).
SC_INLINE uint32_t mask_of(i32x16 pass) {
#ifdef SAELENS_CERTIFY_LANES
  return SAELENS_CERTIFY_LANES(pass);
#else
  const i32x16 bits = pass & lane_bits();
  uint64_t words[8], joined = 0;
  std::memcpy(words, &bits, sizeof(words));
  for (uint64_t word : words) joined |= word;
  return uint32_t(joined) | uint32_t(joined >> 32);
#endif
}

SC_INLINE int append_hits(int64_t at, uint32_t mask, const Screened& s, FilterHit* hits) {
  int found = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    hits[found++] = {int32_t(at + lane), s.product[lane], s.sum[lane]};
  }
  return found;
}

SC_INLINE bool any_of(i32x16 pass) {
  uint64_t words[8], joined = 0;
  std::memcpy(words, &pass, sizeof(words));
  for (uint64_t word : words) joined |= word;
  return joined != 0;
}

template <bool kHalf, bool kPlain>
SC_INLINE int filter_as(const FilterRow& row, int64_t n, FilterHit* hits) {
  int found = 0;
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) {
    i32x16 pass[4];
    Screened columns[4];
    for (int v = 0; v < 4; ++v) {
      columns[v] = screened<kHalf, kPlain>(row, at + 16 * v);
      pass[v] = passes<kHalf, kPlain>(row, at + 16 * v, columns[v]);
    }
    if (mask_of(pass[0] | pass[1] | pass[2] | pass[3]) == 0) continue;
    for (int v = 0; v < 4; ++v) {
      found += append_hits(at + 16 * v, mask_of(pass[v]), columns[v], hits + found);
    }
  }
  return found;
}

// The last columns of a row, fewer than 64: copied, so that nothing beyond the row is read.
template <bool kHalf>
SC_INLINE int filter_tail(const FilterRow& row, int64_t first, int64_t n, FilterHit* hits) {
  float product[16] = {}, bias[16] = {}, scale[16] = {}, theta[16] = {}, gate[16] = {};
  float outliers[8][16] = {};
  uint16_t half[16] = {};
  int found = 0;
  for (int64_t at = first; at < n; at += 16) {
    const int64_t count = n - at < 16 ? n - at : 16;
    const auto copy = [&](const float* from, float* to) -> const float* {
      if (from == nullptr) return nullptr;
      std::memcpy(to, from + at, 4 * count);
      return to;
    };
    FilterRow part = row;
    if (kHalf) {
      std::memcpy(half, static_cast<const uint16_t*>(row.product) + at, 2 * count);
      part.product = half;
    } else {
      part.product = copy(static_cast<const float*>(row.product), product);
    }
    part.bias = copy(row.bias, bias);
    part.scale = copy(row.scale, scale);
    part.theta = copy(row.theta, theta);
    part.gate_bias = copy(row.gate_bias, gate);
    for (int o = 0; o < row.n_outliers; ++o) {
      copy(row.outlier_weight + o * row.outlier_stride, outliers[o]);
    }
    part.outlier_weight = outliers[0];
    part.outlier_stride = 16;
    const Screened columns = screened<kHalf, false>(part, 0);
    i32x16 pass = passes<kHalf, false>(part, 0, columns);
    for (int64_t j = count; j < 16; ++j) pass[j] = 0;
    found += append_hits(at, mask_of(pass), columns, hits + found);
  }
  return found;
}

template <bool kHalf>
SC_INLINE int filter_stored(const FilterRow& row, int64_t n, FilterHit* hits) {
  const int64_t whole = n / 64 * 64;
  const int found = plain(row) ? filter_as<kHalf, true>(row, whole, hits)
                               : filter_as<kHalf, false>(row, whole, hits);
  return whole == n ? found : found + filter_tail<kHalf>(row, whole, n, hits + found);
}

int filter(const FilterRow& row, int64_t n, FilterHit* hits) {
  return row.half ? filter_stored<true>(row, n, hits) : filter_stored<false>(row, n, hits);
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

constexpr RowKernels kKernels = {dot,     dot_pair, narrow,  best_of_groups, filter,      gather,
                                 moments, widen,    softcap, softmax,        softmax_pair};

}  // namespace
}  // namespace saelens_certify::SAELENS_CERTIFY_VARIANT

#undef SAELENS_CERTIFY_VARIANT
#undef SAELENS_CERTIFY_LANES
#undef SAELENS_CERTIFY_WIDEN
#undef SAELENS_CERTIFY_WIDEN_HALF
#undef SAELENS_CERTIFY_FMA
#undef SAELENS_CERTIFY_GATHER_WIDTH
