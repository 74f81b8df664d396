// Argument checks that operators on the CPU and on CUDA share.
#include <algorithm>
#include <utility>

#include "ops/decode.h"
#include "ops/encode.h"
#include "ops/head.h"

namespace saelens_certify {

EncodeArgs checked_encode(EncodeArgs args) {
  check_tensor("x", args.x, ScalarType::Float, 2);
  args.weight_type = check_real("weight", args.weight, 2);
  const int64_t d_sae = args.weight.size(0);
  check_size("weight", args.weight, 1, args.x.size(1));
  check_device("weight", args.weight, args.x);
  const std::pair<const char*, OptionalTensor> vectors[] = {{"bias", args.bias},
                                                            {"scale", args.scale},
                                                            {"theta", args.theta},
                                                            {"gate_bias", args.gate_bias},
                                                            {"weight_norms", args.weight_norms},
                                                            {"screen_error", args.screen_error}};
  for (const auto& [name, vector] : vectors) {
    check_vector(name, vector, ScalarType::Float, d_sae);
    check_device(name, vector, args.x);
  }
  STD_TORCH_CHECK(args.screen_weight.has_value() == args.screen_error.has_value(),
                  "screen_weight and screen_error must be given together");
  if (args.screen_weight.has_value()) {
    const Real type = check_real("screen_weight", *args.screen_weight, 2);
    STD_TORCH_CHECK(type != Real::kFloat32,
                    "screen_weight has type Float, expected BFloat16 or Half");
    check_size("screen_weight", *args.screen_weight, 0, d_sae);
    check_size("screen_weight", *args.screen_weight, 1, args.x.size(1));
    check_device("screen_weight", args.screen_weight, args.x);
  }
  STD_TORCH_CHECK(d_sae >= 1 && d_sae < (int64_t{1} << 31), "weight has ", d_sae,
                  " rows, expected 1 to 2^31 - 1 features");
  STD_TORCH_CHECK(args.gemm_error >= 0, "gemm_error = ", args.gemm_error, " must not be negative");
  STD_TORCH_CHECK(args.row_chunk >= 0 && args.column_tile >= 0, "row_chunk = ", args.row_chunk,
                  " and column_tile = ", args.column_tile, " must not be negative (0: default)");
  return args;
}

DecodeArgs checked_decode(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                          OptionalTensor bias, OptionalTensor permutations, OptionalTensor target) {
  check_tensor("values", values, ScalarType::Float, 2);
  check_tensor("indices", indices, ScalarType::Int, 2);
  check_tensor("counts", counts, ScalarType::Int, 1);
  check_size("indices", indices, 0, values.size(0));
  check_size("indices", indices, 1, values.size(1));
  check_size("counts", counts, 0, values.size(0));
  const Real type = check_real("weight", weight, 2);
  check_vector("bias", bias, ScalarType::Float, weight.size(1));
  if (permutations.has_value()) {
    check_tensor("permutations", *permutations, ScalarType::Int, 2);
    check_size("permutations", *permutations, 1, weight.size(0));
  }
  if (target.has_value()) {
    check_tensor("target", *target, ScalarType::Float, 2);
    check_size("target", *target, 0, values.size(0));
    check_size("target", *target, 1, weight.size(1));
  }
  const std::pair<const char*, OptionalTensor> others[] = {
      {"indices", indices},           {"counts", counts}, {"weight", weight}, {"bias", bias},
      {"permutations", permutations}, {"target", target}};
  for (const auto& [name, tensor] : others) check_device(name, tensor, values);
  return {values, indices, counts, weight, bias, permutations, target, type};
}

PredictionArgs checked_prediction(Tensor targets, const Tensor& like, int64_t columns, double alpha,
                                  double softcap, int64_t d_vocab) {
  check_tensor("targets", targets, ScalarType::Long, 1);
  check_size("targets", targets, 0, like.size(0));
  check_device("targets", targets, like);
  STD_TORCH_CHECK(alpha >= 0 && alpha < 1, "alpha = ", alpha, " must satisfy 0 <= alpha < 1");
  // Its inverse must be a float32.
  STD_TORCH_CHECK(softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30), "softcap = ", softcap,
                  " must lie between 1e-30 and 1e30 (0: none)");
  STD_TORCH_CHECK(d_vocab >= 1 && d_vocab <= columns && d_vocab < (int64_t{1} << 31),
                  "d_vocab = ", d_vocab, " does not fit logits of ", columns, " columns");
  return {targets, alpha, softcap, d_vocab};
}

Real checked_pair(const Tensor& base_logits, const Tensor& logits) {
  const Real type = check_real("base_logits", base_logits, 2);
  STD_TORCH_CHECK(check_real("logits", logits, 2) == type,
                  "logits differ in type from base_logits");
  check_size("logits", logits, 0, base_logits.size(0));
  check_size("logits", logits, 1, base_logits.size(1));
  check_device("logits", logits, base_logits);
  return type;
}

HeadArgs checked_head(const char* name, const Tensor& residual, Tensor weight, OptionalTensor bias,
                      Tensor targets, double alpha, double softcap, int64_t d_vocab,
                      int64_t column_tile, int64_t default_tile) {
  check_real(name, residual, 2);
  STD_TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions, expected 2");
  STD_TORCH_CHECK(weight.scalar_type() == residual.scalar_type(), "weight has type ",
                  torch::headeronly::toString(weight.scalar_type()), ", ", name, " has type ",
                  torch::headeronly::toString(residual.scalar_type()));
  check_size("weight", weight, 0, residual.size(1));
  check_vector("bias", bias, ScalarType::Float, weight.size(1));
  check_device("weight", weight, residual);
  check_device("bias", bias, residual);
  STD_TORCH_CHECK(column_tile >= 0, "column_tile = ", column_tile,
                  " must not be negative (0: default)");
  return {weight, bias,
          checked_prediction(targets, residual, weight.size(1), alpha, softcap, d_vocab),
          std::min(column_tile == 0 ? default_tile : column_tile, d_vocab)};
}

void check_other_residual(const Tensor& base, const Tensor& residual) {
  check_real("residual", residual, 2);
  STD_TORCH_CHECK(residual.scalar_type() == base.scalar_type(),
                  "residual differs in type from base_residual");
  const int64_t tokens = base.size(0), rows = residual.size(0);
  STD_TORCH_CHECK(tokens == 0 ? rows == 0 : rows % tokens == 0, "residual has ", rows,
                  " rows, expected a multiple of the ", tokens, " of base_residual");
  check_size("residual", residual, 1, base.size(1));
  check_device("residual", residual, base);
}

}  // namespace saelens_certify
