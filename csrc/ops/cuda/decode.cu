// Gather decoding for CUDA tensors; see ops/decode.h for what is computed. Indices, counts and
// permutations that do not fit (the callers check for them) touch no memory outside the tensors.
#include <algorithm>

#include "ops/cuda/device.h"
#include "ops/cuda/gather.cuh"
#include "ops/decode.h"

namespace saelens_certify {

namespace {

DecodeArgs checked(Tensor values, Tensor indices, Tensor counts, Tensor weight, OptionalTensor bias,
                   OptionalTensor permutations, OptionalTensor target) {
  const DecodeArgs args =
      checked_decode(values, indices, counts, weight, bias, permutations, target);
  STD_TORCH_CHECK(weight.size(1) < (int64_t{1} << 30), "weight has ", weight.size(1), " columns");
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), "weight has ", weight.size(0),
                  " rows, more than int32 indices can name");
  return args;
}

// Either result may be missing.
void decode_into(const DecodeArgs& args, const OptionalTensor& x_hat, const OptionalTensor& stats) {
  const DeviceScope device(args.values);
  with_type(args.weight_type, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    Gather<T> gather;
    gather.values = data_of<float>(args.values);
    gather.indices = data_of<int32_t>(args.indices);
    gather.counts = data_of<int32_t>(args.counts);
    gather.weight = data_of<T>(args.weight);
    gather.bias = data_of<float>(args.bias);
    gather.permutations = data_of<int32_t>(args.permutations);
    gather.target = data_of<float>(args.target);
    gather.x_hat = x_hat.has_value() ? mutable_data_of<float>(*x_hat) : nullptr;
    gather.stats = stats.has_value() ? mutable_data_of<double>(*stats) : nullptr;
    gather.tokens = args.tokens();
    gather.slots = args.values.size(1);
    gather.features = args.weight.size(0);
    gather.d_out = args.d_out();

    constexpr int64_t kCount = kPerVector<T>;
    const bool aligned = gather.d_out % kCount == 0 && aligned16(gather.weight) &&
                         aligned16(gather.bias) && aligned16(gather.target) &&
                         aligned16(gather.x_hat);
    // As few tiles of columns as there can be, and those of about one size.
    const int64_t vectors = (gather.d_out + kCount - 1) / kCount;
    const int64_t tiles = std::max<int64_t>((vectors + kGatherThreads - 1) / kGatherThreads, 1);
    const int64_t threads = std::max<int64_t>((vectors + tiles - 1) / tiles, 1);
    const dim3 block(static_cast<unsigned>((threads + kWarp - 1) / kWarp * kWarp));
    // Sums over a row run through its columns in order; without them blocks can share a row.
    const dim3 grid(grid_size_of(args.repeats() * args.tokens()),
                    stats.has_value() ? 1 : static_cast<unsigned>(std::min<int64_t>(tiles, 65535)));
    auto* kernel = stats.has_value()
                       ? (aligned ? gather_kernel<T, true, true> : gather_kernel<T, false, true>)
                       : (aligned ? gather_kernel<T, true, false> : gather_kernel<T, false, false>);
    launch(kernel, grid, block, 0, device.stream(), gather);
  });
}

Tensor decode(Tensor values, Tensor indices, Tensor counts, Tensor weight, OptionalTensor bias) {
  const DecodeArgs args =
      checked(values, indices, counts, weight, bias, std::nullopt, std::nullopt);
  Tensor x_hat = empty_tensor({args.tokens(), args.d_out()}, ScalarType::Float, values);
  decode_into(args, x_hat, std::nullopt);
  return x_hat;
}

std::tuple<Tensor, Tensor> decode_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                                        OptionalTensor bias, Tensor target) {
  const DecodeArgs args = checked(values, indices, counts, weight, bias, std::nullopt, target);
  Tensor x_hat = empty_tensor({args.tokens(), args.d_out()}, ScalarType::Float, values);
  Tensor stats = empty_tensor({args.tokens(), 5}, ScalarType::Double, values);
  decode_into(args, x_hat, stats);
  return {x_hat, stats};
}

Tensor decode_permuted(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                       OptionalTensor bias, Tensor permutations) {
  const DecodeArgs args =
      checked(values, indices, counts, weight, bias, permutations, std::nullopt);
  Tensor x_hat =
      empty_tensor({args.repeats(), args.tokens(), args.d_out()}, ScalarType::Float, values);
  decode_into(args, x_hat, std::nullopt);
  return x_hat;
}

Tensor decode_permuted_stats(Tensor values, Tensor indices, Tensor counts, Tensor weight,
                             OptionalTensor bias, Tensor permutations, Tensor target) {
  const DecodeArgs args = checked(values, indices, counts, weight, bias, permutations, target);
  Tensor stats = empty_tensor({args.repeats(), args.tokens(), 5}, ScalarType::Double, values);
  decode_into(args, std::nullopt, stats);
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_stats", TORCH_BOX(&decode_stats));
  m.impl("decode_permuted", TORCH_BOX(&decode_permuted));
  m.impl("decode_permuted_stats", TORCH_BOX(&decode_permuted_stats));
}

}  // namespace saelens_certify
