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

// Checks of a head and what it is applied to, which errors call `name`; a column_tile of 0 is the
// default one.
HeadArgs checked_head(const char* name, const Tensor& residual, Tensor weight, OptionalTensor bias,
                      Tensor targets, double alpha, double softcap, int64_t d_vocab,
                      int64_t column_tile, int64_t default_tile);

// Checks the other residual of a pair: as many rows as the base has, or several times as many.
void check_other_residual(const Tensor& base, const Tensor& residual);

// As token_stats and pair_stats of the logits; residuals are real [tokens, d_model], of the
// weight's type. `other` may hold several predictions, [variants * tokens, d_model]: each is
// compared with the base, whose logits are computed once.
TokenStats head_stats_cpu(const Tensor& residual, const HeadArgs& args);
PairStats head_pair_stats_cpu(const Tensor& base, const Tensor& other, const HeadArgs& args);

}  // namespace saelens_certify
