// Statistics of the predictions of a linear head, without the logits: tiles of
// residual @ weight + bias in float32, each read once while it is in the cache.
#pragma once

#include "ops/statistics.h"

namespace saelens_certify {

struct HeadArgs {
  Tensor weight;        // real [d_model, columns], any strides
  OptionalTensor bias;  // float32 [columns]
  PredictionArgs prediction;
  int64_t column_tile;  // columns per tile
};

// As token_stats and pair_stats of the logits; residuals are real [tokens, d_model], of the
// weight's type. `other` may hold several predictions, [variants * tokens, d_model]: each is
// compared with the base, whose logits are computed once.
TokenStats head_stats_cpu(const Tensor& residual, const HeadArgs& args);
PairStats head_pair_stats_cpu(const Tensor& base, const Tensor& other, const HeadArgs& args);

}  // namespace saelens_certify
