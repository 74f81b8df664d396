// Gather decoding: each element of a reconstruction is a chain of float32 fused multiply-adds in
// slot order, starting from zero; the bias is added last.
#pragma once

#include <tuple>

#include "ops/common.h"

namespace saelens_certify {

struct DecodeArgs {
  Tensor values;                // float32 [tokens, slots]
  Tensor indices;               // int32 [tokens, slots]
  Tensor counts;                // int32 [tokens]
  Tensor weight;                // real [d_sae, d_out]
  OptionalTensor bias;          // float32 [d_out]
  OptionalTensor permutations;  // int32 [n_permutations, d_sae]
  OptionalTensor target;        // float32 [tokens, d_out]
  Real weight_type;

  int64_t tokens() const { return values.size(0); }
  int64_t repeats() const { return permutations.has_value() ? permutations->size(0) : 1; }
  int64_t d_out() const { return weight.size(1); }
};

// The arguments after the checks that every device makes; what indices hold is not looked at.
DecodeArgs checked_decode(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                          OptionalTensor bias, OptionalTensor permutations, OptionalTensor target);

// The reconstruction, and with a target the float64 sums over d_out, per row:
// |target - x|^2, |target|^2, |x|^2, target.x, sum of target. Without one: no rows.
std::tuple<Tensor, Tensor> decode_cpu(const DecodeArgs& args);

// For every permutation the reconstruction from renamed features [n_permutations, tokens, d_out],
// or its sums [n_permutations, tokens, 5] without the reconstructions.
Tensor decode_permuted_cpu(const DecodeArgs& args);
Tensor decode_permuted_stats_cpu(const DecodeArgs& args);

}  // namespace saelens_certify
