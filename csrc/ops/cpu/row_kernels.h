// Loops over one row, one version per instruction set. All versions give the same bits: sums run
// over a fixed number of lanes, products and sums are rounded separately (no contraction), and
// fused multiply-adds appear only where the contract asks for them. Torch-free.
#pragma once

#include <cstdint>

namespace saelens_certify {

// Storage type of weights and logits.
enum class Real { kFloat32, kBFloat16, kFloat16 };

// What the streaming filter compares, for every column of a block:
//   score + slack + rounding |product scale| >= max(theta, floor), with
//   score = (product + outliers + bias) * scale, and, if there is a gate,
//   product + outliers + gate_bias + gate_slack + rounding |product| > 0.
struct FilterRow {
  const void* product;  // float32, or bfloat16 if `half`
  bool half;
  const float* bias;
  const float* scale;      // null: 1
  const float* theta;      // null: 0
  const float* gate_bias;  // null: no gate
  // Dimensions left out of the product: their inputs, and their weights [n_outliers, stride].
  const float* outlier_x;
  const float* outlier_weight;
  int64_t outlier_stride;
  int n_outliers;
  float slack;
  float gate_slack;
  float rounding;  // relative rounding of the stored product
  float floor;
};

// A column that passed the filter.
struct FilterHit {
  int32_t column;  // within the block
  float product;   // as stored
  float sum;       // with the outliers added
};

// Running state of softmax sums over one row.
struct SoftmaxRow {
  float top;       // largest logit so far, not capped, -inf at the start
  int32_t argmax;  // its lowest column
  double sum;      // sum of exp(logit - top), both capped if there is a cap
};

// Running state over a pair of rows: softmax sums, and the weighted difference of logits
// sum of exp(base - base.top) * ((base - other) - offset), offset = base.top - other.top, all of
// them capped if there is a cap; an infinite maximum counts as 0 in the offset.
struct SoftmaxPair {
  SoftmaxRow base;
  SoftmaxRow other;
  double gap;
  double offset;
};

struct RowKernels {
  // Sum over i of x_i w_i in float64: 32 lanes, then the butterfly 16, 8, 4, 2, 1.
  double (*dot)(const float* x, const void* w, Real type, int64_t n);

  // The same for two rows at once, which shares the work on x.
  void (*dot_pair)(const float* x, const void* w0, const void* w1, Real type, int64_t n,
                   double* out);

  // Rounds x to bfloat16 (ties to even), dropping the outlier dimensions (ascending); returns the
  // squared lengths of x without them, of the result and of their difference.
  void (*narrow)(const float* x, const int32_t* outliers, int n_outliers, int64_t n, uint16_t* to,
                 double* squares);

  // Lower bounds on the best scores of groups of columns: column i belongs to group
  // i / (16 per_group) * 16 + i % 16. Only certainly active columns count, and only those of the
  // pool if there is one (a bit each); -inf where there is none. n is a multiple of 16 per_group,
  // and the block's first column a multiple of 32.
  void (*best_of_groups)(const FilterRow& row, const int32_t* pool_bits, int64_t n,
                         int64_t per_group, float* best);

  // Writes the columns of [0, n), n <= kFilterBlock, that pass the filter; returns their number.
  int (*filter)(const FilterRow& row, int64_t n, FilterHit* hits);

  // out = sum over s of values[s] * W[indices[s]], s ascending from zero, one float32 fused
  // multiply-add per element and slot; then + bias, if not null.
  void (*gather)(const float* values, const int32_t* indices, int32_t count, const void* w,
                 Real type, int64_t n, const float* bias, float* out);

  // |x - y|^2, |x|^2, |y|^2, x.y, sum of x in float64 lanes.
  void (*moments)(const float* x, const float* y, int64_t n, double* out);

  // Converts n numbers to float32.
  void (*widen)(const void* from, Real type, int64_t n, float* to);

  // cap * tanh(logit / cap) of n logits.
  void (*softcap)(const float* logits, int64_t n, double cap, double* out);

  // Adds n logits (at most kSoftmaxBlock), the first of them column `column`, to the state; soft-
  // capped before, unless the cap is 0.
  void (*softmax)(const float* logits, int64_t n, int64_t column, double cap, SoftmaxRow* state);
  void (*softmax_pair)(const float* base, const float* other, int64_t n, int64_t column, double cap,
                       SoftmaxPair* state);
};

constexpr int64_t kFilterBlock = 512;
constexpr int64_t kSoftmaxBlock = 2048;

// The version for the active instruction set (see active_isa). Operators ask before they run in
// parallel, where the message of an error would be lost.
const RowKernels& row_kernels();

extern const RowKernels kBaselineKernels;
#if defined(__x86_64__) || defined(__i386__)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

}  // namespace saelens_certify
