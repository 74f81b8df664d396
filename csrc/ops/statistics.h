// Loss statistics of next-token predictions, one read of the logits. The smoothed loss of a token
// with gold probability p is -log2((1 - alpha) p + alpha / d_vocab) bits. With a softcap (0: none)
// logits are softcap * tanh(logit / softcap), as TransformerLens applies it: -inf becomes -softcap.
// The most likely token is that of the logits before the cap, which keeps their order.
#pragma once

#include <tuple>

#include "ops/common.h"

namespace saelens_certify {

struct PredictionArgs {
  Tensor targets;  // int64 [tokens]
  double alpha;
  double softcap;
  int64_t d_vocab;

  int64_t tokens() const { return targets.size(0); }
};

// Checks what all operators on predictions share; `columns` is the width of the logits, and `like`
// has a row per token. What the targets are is not looked at: it may lie on a device.
PredictionArgs checked_prediction(Tensor targets, const Tensor& like, int64_t columns, double alpha,
                                  double softcap, int64_t d_vocab);

// The type of the logits of a pair of predictions.
Real checked_pair(const Tensor& base_logits, const Tensor& logits);

// That every target lies inside the vocabulary.
void check_targets_cpu(const PredictionArgs& args);

// Loss (bits), log-sum-exp (nats), gold log-probability (nats), most likely token. A row with NaN
// or, without a cap, with +inf or only -inf, gives NaN.
using TokenStats = std::tuple<Tensor, Tensor, Tensor, Tensor>;
TokenStats token_stats_cpu(const Tensor& logits, Real type, const PredictionArgs& args);

// Both losses (bits), KL(base || other) (bits), agreement of the most likely tokens, absolute gap
// of the gold log-probabilities (bits).
using PairStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
PairStats pair_stats_cpu(const Tensor& base, const Tensor& other, Real type,
                         const PredictionArgs& args);

}  // namespace saelens_certify
