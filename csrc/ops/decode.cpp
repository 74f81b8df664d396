#include "ops/decode.h"

#include <algorithm>

#include "ops/schemas.h"

namespace saelens_certify {

namespace {

DecodeArgs checked(Tensor values, Tensor indices, Tensor counts, Tensor weight, OptionalTensor bias,
                   OptionalTensor permutations, OptionalTensor target) {
  const DecodeArgs args =
      checked_decode(values, indices, counts, weight, bias, permutations, target);
  const int32_t* index = data_of<int32_t>(indices);
  const int32_t* count = data_of<int32_t>(counts);
  for (int64_t row = 0; row < values.size(0); ++row) {
    STD_TORCH_CHECK(count[row] >= 0 && count[row] <= values.size(1), "counts hold ", count[row],
                    " in row ", row, ", but there are ", values.size(1), " slots");
    for (int32_t slot = 0; slot < count[row]; ++slot) {
      const int32_t feature = index[row * values.size(1) + slot];
      STD_TORCH_CHECK(feature >= 0 && feature < weight.size(0), "indices hold ", feature,
                      " in row ", row, ", but there are ", weight.size(0), " features");
    }
  }
  if (permutations.has_value() && permutations->numel() > 0) {
    const int32_t* feature = data_of<int32_t>(*permutations);
    const auto [low, high] = std::minmax_element(feature, feature + permutations->numel());
    STD_TORCH_CHECK(*low >= 0 && *high < weight.size(0), "permutations span ", *low, " to ", *high,
                    ", expected features 0 to ", weight.size(0) - 1);
  }
  return args;
}

Tensor decode(Tensor values, Tensor indices, Tensor counts, Tensor weight, OptionalTensor bias) {
  return std::get<0>(
      decode_cpu(checked(values, indices, counts, weight, bias, std::nullopt, std::nullopt)));
}

std::tuple<Tensor, Tensor> decode_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                                        OptionalTensor bias, Tensor target) {
  return decode_cpu(checked(values, indices, counts, weight, bias, std::nullopt, target));
}

Tensor decode_permuted(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                       OptionalTensor bias, Tensor permutations) {
  return decode_permuted_cpu(
      checked(values, indices, counts, weight, bias, permutations, std::nullopt));
}

Tensor decode_permuted_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                             OptionalTensor bias, Tensor permutations, Tensor target) {
  return decode_permuted_stats_cpu(
      checked(values, indices, counts, weight, bias, permutations, target));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saelens_certify, m) {
  m.def(schemas::kDecode);
  m.def(schemas::kDecodeStats);
  m.def(schemas::kDecodePermuted);
  m.def(schemas::kDecodePermutedStats);
}

STABLE_TORCH_LIBRARY_IMPL(saelens_certify, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_stats", TORCH_BOX(&decode_stats));
  m.impl("decode_permuted", TORCH_BOX(&decode_permuted));
  m.impl("decode_permuted_stats", TORCH_BOX(&decode_permuted_stats));
}

}  // namespace saelens_certify
