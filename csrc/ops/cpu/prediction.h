// From the softmax sums of a row to the statistics of its prediction.
#pragma once

#include <limits>

#include "ops/statistics.h"

namespace saelens_certify {

constexpr SoftmaxRow kEmptyRow = {-std::numeric_limits<float>::infinity(), 0, 0.0};
constexpr SoftmaxPair kEmptyPair = {kEmptyRow, kEmptyRow, 0.0, 0.0};

// Results of token_stats; rows are written by several threads.
class TokenResults {
 public:
  explicit TokenResults(const PredictionArgs& args);
  // `gold` is the gold token's logit, before the cap.
  void write(int64_t row, const SoftmaxRow& state, float gold) const;
  TokenStats tensors() const { return {bits_, lse_, gold_, argmax_}; }

 private:
  const PredictionArgs& args_;
  Tensor bits_, lse_, gold_, argmax_;
};

// Results of pair_stats of some rows.
class PairResults {
 public:
  PairResults(const PredictionArgs& args, int64_t rows);
  void write(int64_t row, const SoftmaxPair& state, float base_gold, float gold) const;
  PairStats tensors() const { return {bits_base_, bits_, kl_, agree_, gap_}; }

 private:
  const PredictionArgs& args_;
  Tensor bits_base_, bits_, kl_, agree_, gap_;
};

}  // namespace saelens_certify
