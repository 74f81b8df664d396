#include "ops/statistics.h"

#include <cmath>

#include "ops/schemas.h"

namespace saelens_certify {

PredictionArgs checked_prediction(Tensor targets, int64_t tokens, int64_t columns, double alpha,
                                  double softcap, int64_t d_vocab) {
  check_tensor("targets", targets, ScalarType::Long, 1);
  check_size("targets", targets, 0, tokens);
  STD_TORCH_CHECK(alpha >= 0 && alpha < 1, "alpha = ", alpha, " must satisfy 0 <= alpha < 1");
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap = ", softcap,
                  " must be positive and finite (0: none)");
  STD_TORCH_CHECK(d_vocab >= 1 && d_vocab <= columns && d_vocab < (int64_t{1} << 31),
                  "d_vocab = ", d_vocab, " does not fit logits of ", columns, " columns");
  const int64_t* target = data_of<int64_t>(targets);
  for (int64_t row = 0; row < tokens; ++row) {
    STD_TORCH_CHECK(target[row] >= 0 && target[row] < d_vocab, "target ", target[row], " of row ",
                    row, " lies outside the vocabulary of ", d_vocab);
  }
  return {targets, alpha, softcap, d_vocab};
}

namespace {

TokenStats token_stats(Tensor logits, Tensor targets, double alpha, double softcap,
                       int64_t d_vocab) {
  const Real type = check_real("logits", logits, 2);
  return token_stats_cpu(
      logits, type,
      checked_prediction(targets, logits.size(0), logits.size(1), alpha, softcap, d_vocab));
}

PairStats pair_stats(Tensor base_logits, Tensor logits, Tensor targets, double alpha,
                     double softcap, int64_t d_vocab) {
  const Real type = check_real("base_logits", base_logits, 2);
  STD_TORCH_CHECK(check_real("logits", logits, 2) == type,
                  "logits differ in type from base_logits");
  check_size("logits", logits, 0, base_logits.size(0));
  check_size("logits", logits, 1, base_logits.size(1));
  return pair_stats_cpu(
      base_logits, logits, type,
      checked_prediction(targets, logits.size(0), logits.size(1), alpha, softcap, d_vocab));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saelens_certify, m) {
  m.def(schemas::kTokenStats);
  m.def(schemas::kPairStats);
}

STABLE_TORCH_LIBRARY_IMPL(saelens_certify, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("pair_stats", TORCH_BOX(&pair_stats));
}

}  // namespace saelens_certify
