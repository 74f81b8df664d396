#include "ops/statistics.h"

#include "ops/schemas.h"

namespace saelens_certify {

void check_targets_cpu(const PredictionArgs& args) {
  const int64_t* target = data_of<int64_t>(args.targets);
  for (int64_t row = 0; row < args.tokens(); ++row) {
    STD_TORCH_CHECK(target[row] >= 0 && target[row] < args.d_vocab, "target ", target[row],
                    " of row ", row, " lies outside the vocabulary of ", args.d_vocab);
  }
}

namespace {

TokenStats token_stats(Tensor logits, Tensor targets, double alpha, double softcap,
                       int64_t d_vocab) {
  const Real type = check_real("logits", logits, 2);
  const PredictionArgs args =
      checked_prediction(targets, logits, logits.size(1), alpha, softcap, d_vocab);
  check_targets_cpu(args);
  return token_stats_cpu(logits, type, args);
}

PairStats pair_stats(Tensor base_logits, Tensor logits, Tensor targets, double alpha,
                     double softcap, int64_t d_vocab) {
  const Real type = checked_pair(base_logits, logits);
  const PredictionArgs args =
      checked_prediction(targets, logits, logits.size(1), alpha, softcap, d_vocab);
  check_targets_cpu(args);
  return pair_stats_cpu(base_logits, logits, type, args);
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
