// Exact sparse encoding. For every row x the score of feature j is
//   s_j = float32(scale_j * (sum_i x_i W_ji + bias_j)),
// computed in float64 over 32 lanes and rounded once; feature j is active if s_j > theta_j and, in
// a gated SAE, float32(sum_i x_i W_ji + gate_bias_j) > 0.
#pragma once

#include <tuple>

#include "ops/common.h"

namespace saelens_certify {

// Inputs of both encoders, checked.
struct EncodeArgs {
  Tensor x;                      // float32 [tokens, d_in]
  Tensor weight;                 // real [d_sae, d_in]
  Tensor bias;                   // float32 [d_sae]
  OptionalTensor scale;          // float32 [d_sae], or 1
  OptionalTensor theta;          // float32 [d_sae], or 0
  OptionalTensor gate_bias;      // float32 [d_sae], or no gate
  Tensor weight_norms;           // float32 [d_sae], upper bounds on the row norms
  OptionalTensor screen_weight;  // 16 bit [d_sae, d_in], what tiles are multiplied with
  OptionalTensor screen_error;   // float32 [d_sae], upper bounds on |w_j - screen_w_j|
  double gemm_error;             // |product - exact| <= gemm_error |x| |w_j|, of what is multiplied
  int64_t row_chunk;             // rows per chunk
  int64_t column_tile;           // features per tile
  Real weight_type;

  int64_t tokens() const { return x.size(0); }
  int64_t d_in() const { return x.size(1); }
  int64_t d_sae() const { return weight.size(0); }
};

// The arguments after the checks that every device makes; sets the weights' type.
EncodeArgs checked_encode(EncodeArgs args);

// The slots of each row: scores, features, number in use.
using Codes = std::tuple<Tensor, Tensor, Tensor>;

// The k largest active features of each row (score descending, feature ascending), and the same
// among the features of a pool. Without a pool the last three tensors are empty.
using TopCodes = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
TopCodes topk_encode_cpu(const EncodeArgs& args, const OptionalTensor& pool_bits, int64_t k);

// All active features, ascending, as far as `capacity` slots go; the counts are exact.
Codes threshold_encode_cpu(const EncodeArgs& args, int64_t capacity);

}  // namespace saelens_certify
