#include "ops/encode.h"

#include <algorithm>

#include "ops/cpu/screen.h"
#include "ops/schemas.h"

namespace saelens_certify {

namespace {

// 1024 rows amortise what the matrix product does per tile of weights; the tile of scores takes 8
// MiB in bfloat16, 16 MiB in float32.
constexpr int64_t kRowChunk = 1024;
constexpr int64_t kColumnTile = 4096;
constexpr int64_t kCandidateBytes = int64_t{1} << 25;

EncodeArgs checked(EncodeArgs args) {
  args = checked_encode(args);
  if (args.screen_weight.has_value()) {
    // float16 products are slow on every CPU; float16 screening is for GPUs.
    check_tensor("screen_weight", *args.screen_weight, ScalarType::BFloat16, 2);
  }
  if (args.row_chunk == 0) args.row_chunk = kRowChunk;
  if (args.column_tile == 0) args.column_tile = kColumnTile;
  args.row_chunk = std::max<int64_t>(1, std::min(args.row_chunk, args.tokens()));
  args.column_tile = std::min(args.column_tile, args.d_sae());
  return args;
}

// A large k takes fewer rows at a time, so that their candidate buffers stay small.
EncodeArgs within_memory(EncodeArgs args, int64_t k) {
  const int64_t row_bytes = candidate_capacity(k, args.d_sae()) * int64_t{sizeof(Candidate)};
  args.row_chunk = std::max<int64_t>(1, std::min(args.row_chunk, kCandidateBytes / row_bytes));
  return args;
}

TopCodes topk_encode(Tensor x, Tensor weight, Tensor bias, OptionalTensor scale,
                     OptionalTensor theta, OptionalTensor gate_bias, Tensor weight_norms,
                     OptionalTensor screen_weight, OptionalTensor screen_error,
                     OptionalTensor pool_bits, int64_t k, double gemm_error, int64_t row_chunk,
                     int64_t column_tile) {
  const EncodeArgs args =
      checked({x, weight, bias, scale, theta, gate_bias, weight_norms, screen_weight, screen_error,
               gemm_error, row_chunk, column_tile, Real::kFloat32});
  check_vector("pool_bits", pool_bits, ScalarType::Int, (args.d_sae() + 31) / 32);
  STD_TORCH_CHECK(k >= 1 && k <= args.d_sae(), "k = ", k, " must lie between 1 and ", args.d_sae());
  return topk_encode_cpu(within_memory(args, k), pool_bits, k);
}

Codes threshold_encode(Tensor x, Tensor weight, Tensor bias, OptionalTensor scale,
                       OptionalTensor theta, OptionalTensor gate_bias, Tensor weight_norms,
                       OptionalTensor screen_weight, OptionalTensor screen_error, int64_t capacity,
                       double gemm_error, int64_t row_chunk, int64_t column_tile) {
  const EncodeArgs args =
      checked({x, weight, bias, scale, theta, gate_bias, weight_norms, screen_weight, screen_error,
               gemm_error, row_chunk, column_tile, Real::kFloat32});
  STD_TORCH_CHECK(capacity >= 0, "capacity = ", capacity, " must not be negative");
  return threshold_encode_cpu(args, capacity);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saelens_certify, m) {
  m.def(schemas::kTopkEncode);
  m.def(schemas::kThresholdEncode);
}

STABLE_TORCH_LIBRARY_IMPL(saelens_certify, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("threshold_encode", TORCH_BOX(&threshold_encode));
}

}  // namespace saelens_certify
