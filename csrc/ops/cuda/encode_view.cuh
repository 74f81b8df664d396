// What the encoder kernels know about a call: inputs, error margins, and the canonical score of one
// feature, computed by a warp.
#pragma once

#include "ops/cuda/device.h"

namespace saelens_certify {
namespace {

// Roundings outside the matrix product (bias, scale, margin, comparison, the exact score's own),
// relative to |scale| (|x| |w| + |bias|); at most six of them in float32.
constexpr double kOuterRoundings = 16 * 0x1p-24;

// Inputs of one encoding call. Optional vectors are null where absent.
struct EncodeView {
  const float* x;      // [tokens, d_in]
  const void* weight;  // [d_sae, d_in]
  Real weight_type;
  const float* bias;          // [d_sae], like all that follow
  const float* scale;         // 1 if null
  const float* theta;         // 0 if null
  const float* gate_bias;     // no gate if null
  const float* norms;         // at least |w_j|
  const float* screen_error;  // at least |w_j - screen_w_j|; 0 if null
  const int32_t* pool_bits;   // [ceil(d_sae / 32)]
  int64_t d_in;
  int64_t d_sae;
  double gemm_error;  // |product - exact| <= gemm_error |x16| |screen_w_j|
  double underflow;   // absolute error per unit when tiny numbers are flushed to zero

  __device__ float limit(int64_t column) const { return theta == nullptr ? 0.0f : theta[column]; }
};

// How far a row's screened products can lie from the exact ones: at most
// weight * |w_j| + error * screen_error_j + absolute.
struct RowMargin {
  double weight;
  double error;
  double absolute;
};

// What multiplies a row's terms, and what does not depend on the row. Of a score, everything
// carries |scale_j|; a gate has no scale.
struct ColumnMargin {
  double weight;
  double error;
  double absolute;
  double offset;
};

__device__ inline ColumnMargin column_margin(const EncodeView& view, double size, float bias,
                                             int64_t column) {
  const double norm = view.norms[column];
  const double error = view.screen_error == nullptr ? 0.0 : view.screen_error[column];
  const double rounding = kOuterRoundings * fabs(static_cast<double>(bias));
  return {size * norm, size * error, 1 + size, size * (rounding + view.underflow * norm)};
}

__device__ inline ColumnMargin score_margin(const EncodeView& view, int64_t column) {
  const double size = view.scale == nullptr ? 1.0 : fabs(static_cast<double>(view.scale[column]));
  return column_margin(view, size, view.bias[column], column);
}

__device__ inline ColumnMargin gate_margin(const EncodeView& view, int64_t column) {
  return column_margin(view, 1.0, view.gate_bias[column], column);
}

// The margin of a pair, rounded up to float32.
__device__ inline float slack_of(const RowMargin& row, const ColumnMargin& column) {
  const double margin = row.weight * column.weight + row.error * column.error +
                        row.absolute * column.absolute + column.offset;
  return static_cast<float>(margin * (1 + 0x1p-20));
}

// --- canonical scores ------------------------------------------------------------------------

// Lane = i mod 32, ascending inside a lane, then the butterfly. X is float or double.
template <int kUnroll, typename X, typename W>
__device__ inline double warp_dot(const X* x, const W* w, int64_t n) {
  double sum = 0.0;
#pragma unroll kUnroll
  for (int64_t i = lane_id(); i < n; i += kWarp) {
    sum = __fma_rn(static_cast<double>(x[i]), static_cast<double>(to_float(w[i])), sum);
  }
  return butterfly_sum(sum);
}

template <int kUnroll, typename X>
__device__ inline double exact_product(const EncodeView& view, const X* x, int64_t column) {
  const int64_t n = view.d_in, at = column * n;
  switch (view.weight_type) {
    case Real::kBFloat16:
      return warp_dot<kUnroll>(x, static_cast<const BFloat16*>(view.weight) + at, n);
    case Real::kFloat16:
      return warp_dot<kUnroll>(x, static_cast<const Float16*>(view.weight) + at, n);
    default:
      return warp_dot<kUnroll>(x, static_cast<const float*>(view.weight) + at, n);
  }
}

// The canonical score of a feature for a warp's row if the feature is active, else -inf. All lanes
// get it.
template <int kUnroll, typename X>
__device__ inline float active_score(const EncodeView& view, const X* x, int64_t column) {
  const double product = exact_product<kUnroll>(view, x, column);
  double total = __dadd_rn(product, static_cast<double>(view.bias[column]));
  if (view.scale != nullptr) total = __dmul_rn(total, static_cast<double>(view.scale[column]));
  const float score = __double2float_rn(total);
  bool active = score > view.limit(column);
  if (view.gate_bias != nullptr) {
    const double gate = __dadd_rn(product, static_cast<double>(view.gate_bias[column]));
    active = active && __double2float_rn(gate) > 0.0f;
  }
  return active ? score : -INFINITY;
}

// --- order -----------------------------------------------------------------------------------

// Unsigned integers in the order of the numbers; zeros of both signs are equal, as in comparisons.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
}

__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (key & 0x80000000u ? 0x80000000u : 0xffffffffu));
}

__device__ inline int warp_sum(int x) {
  return static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(x)));
}

// Lanes before this one, as a mask.
__device__ inline unsigned lanes_before() { return (1u << lane_id()) - 1; }

}  // namespace
}  // namespace saelens_certify
