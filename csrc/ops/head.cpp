#include "ops/head.h"

#include <algorithm>

#include "ops/schemas.h"

namespace saelens_certify {

namespace {

// Whole blocks of the softmax kernels, so that the sums are grouped as those of logits are.
constexpr int64_t kColumnTile = kSoftmaxBlock;

HeadArgs checked(const char* name, const Tensor& residual, Tensor weight, OptionalTensor bias,
                 Tensor targets, double alpha, double softcap, int64_t d_vocab,
                 int64_t column_tile) {
  check_real(name, residual, 2);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2, "weight has ", weight.dim(),
                  " dimensions, expected a CPU tensor of 2");
  STD_TORCH_CHECK(weight.scalar_type() == residual.scalar_type(), "weight has type ",
                  torch::headeronly::toString(weight.scalar_type()), ", ", name, " has type ",
                  torch::headeronly::toString(residual.scalar_type()));
  check_size("weight", weight, 0, residual.size(1));
  check_vector("bias", bias, ScalarType::Float, weight.size(1));
  STD_TORCH_CHECK(column_tile >= 0, "column_tile = ", column_tile,
                  " must not be negative (0: default)");
  const int64_t columns = column_tile == 0 ? kColumnTile : column_tile;
  return {weight, bias,
          checked_prediction(targets, residual.size(0), weight.size(1), alpha, softcap, d_vocab),
          std::min(columns, d_vocab)};
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
  check_real("residual", residual, 2);
  STD_TORCH_CHECK(residual.scalar_type() == base_residual.scalar_type(),
                  "residual differs in type from base_residual");
  const int64_t tokens = base_residual.size(0), rows = residual.size(0);
  STD_TORCH_CHECK(tokens == 0 ? rows == 0 : rows % tokens == 0, "residual has ", rows,
                  " rows, expected a multiple of the ", tokens, " of base_residual");
  check_size("residual", residual, 1, base_residual.size(1));
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
