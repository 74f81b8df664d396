// Schemas of all operators, in one place: the CPU library defines them, the CUDA library adds
// implementations, and the tests' emulation of the CUDA library defines them under another name.
#pragma once

namespace saelens_certify::schemas {

// Encoders. `screen_weight` (bfloat16 or float16 [d_sae, d_in], rounded from `weight`) and
// `screen_error` (float32 [d_sae], upper bounds on |w_j - screen_w_j|) come together or not at all.
constexpr const char* kTopkEncode =
    "topk_encode(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? theta, "
    "Tensor? gate_bias, Tensor weight_norms, Tensor? screen_weight, Tensor? screen_error, "
    "Tensor? pool_bits, int k, float gemm_error, int row_chunk, int column_tile) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kThresholdEncode =
    "threshold_encode(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? theta, "
    "Tensor? gate_bias, Tensor weight_norms, Tensor? screen_weight, Tensor? screen_error, "
    "int capacity, float gemm_error, int row_chunk, int column_tile) -> (Tensor, Tensor, Tensor)";

// Pools.
constexpr const char* kRestrict =
    "restrict(Tensor values, Tensor indices, Tensor pool_bits) -> (Tensor, Tensor, Tensor)";
constexpr const char* kPoolCount = "pool_count_(Tensor(a!) totals, Tensor indices) -> ()";
constexpr const char* kCountOutside = "count_outside(Tensor indices, Tensor pool_bits) -> Tensor";

// Decoders; permutations are int32 [n_permutations, d_sae].
constexpr const char* kDecode =
    "decode(Tensor values, Tensor indices, Tensor counts, Tensor weight, Tensor? bias) -> Tensor";
constexpr const char* kDecodeStats =
    "decode_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight, Tensor? bias, "
    "Tensor target) -> (Tensor, Tensor)";
constexpr const char* kDecodePermuted =
    "decode_permuted(Tensor values, Tensor indices, Tensor counts, Tensor weight, Tensor? bias, "
    "Tensor permutations) -> Tensor";
constexpr const char* kDecodePermutedStats =
    "decode_permuted_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight, "
    "Tensor? bias, Tensor permutations, Tensor target) -> Tensor";

// Predictions; softcap 0 means none. `weight` of a head is [d_model, d_vocab_out], any strides.
constexpr const char* kTokenStats =
    "token_stats(Tensor logits, Tensor targets, float alpha, float softcap, int d_vocab) "
    "-> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kPairStats =
    "pair_stats(Tensor base_logits, Tensor logits, Tensor targets, float alpha, float softcap, "
    "int d_vocab) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kHeadStats =
    "head_stats(Tensor residual, Tensor weight, Tensor? bias, Tensor targets, float alpha, "
    "float softcap, int d_vocab, int column_tile) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kHeadPairStats =
    "head_pair_stats(Tensor base_residual, Tensor residual, Tensor weight, Tensor? bias, "
    "Tensor targets, float alpha, float softcap, int d_vocab, int column_tile) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)";

}  // namespace saelens_certify::schemas
