#include "ops/head.h"

#include "ops/schemas.h"

namespace saelens_certify {

namespace {

// Whole blocks of the softmax kernels, so that the sums are grouped as those of logits are.
constexpr int64_t kColumnTile = kSoftmaxBlock;

HeadArgs checked(const char* name, const Tensor& residual, Tensor weight, OptionalTensor bias,
                 Tensor targets, double alpha, double softcap, int64_t d_vocab,
                 int64_t column_tile) {
  const HeadArgs args = checked_head(name, residual, weight, bias, targets, alpha, softcap, d_vocab,
                                     column_tile, kColumnTile);
  check_targets_cpu(args.prediction);
  return args;
}

TokenStats head_stats(Tensor residual, Tensor weight, OptionalTensor bias, Tensor targets,
                      double alpha, double softcap, int64_t d_vocab, int64_t column_tile) {
  return head_stats_cpu(residual, checked("residual", residual, weight, bias, targets, alpha,
                                          softcap, d_vocab, column_tile));
}

PairStats head_pair_stats(Tensor base_residual, Tensor residual, Tensor weight, OptionalTensor bias,
                          Tensor targets, double alpha, double softcap, int64_t d_vocab,
                          int64_t column_tile) {
  const HeadArgs args = checked("base_residual", base_residual, weight, bias, targets, alpha,
                                softcap, d_vocab, column_tile);
  check_other_residual(base_residual, residual);
  return head_pair_stats_cpu(base_residual, residual, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saelens_certify, m) {
  m.def(schemas::kHeadStats);
  m.def(schemas::kHeadPairStats);
}

STABLE_TORCH_LIBRARY_IMPL(saelens_certify, CPU, m) {
  m.impl("head_stats", TORCH_BOX(&head_stats));
  m.impl("head_pair_stats", TORCH_BOX(&head_pair_stats));
}

}  // namespace saelens_certify
