#include <vector>

#include "ops/decode.h"

namespace saelens_certify {

namespace {

// Reconstructs one row at a time, from the codes as they are or from renamed features.
class RowDecoder {
 public:
  RowDecoder(const DecodeArgs& args, const RowKernels& kernels)
      : args_(args),
        kernels_(kernels),
        slots_(args.values.size(1)),
        d_sae_(args.weight.size(0)),
        d_out_(args.weight.size(1)),
        renamed_(slots_) {}

  void decode(int64_t row, float* out) {
    gather(row, data_of<int32_t>(args_.indices) + row * slots_, out);
  }

  // Renamed by a permutation.
  void decode(int64_t permutation, int64_t row, float* out) {
    const int32_t* name = data_of<int32_t>(args_.permutations) + permutation * d_sae_;
    const int32_t* index = data_of<int32_t>(args_.indices) + row * slots_;
    const int32_t count = data_of<int32_t>(args_.counts)[row];
    for (int32_t slot = 0; slot < count; ++slot) renamed_[slot] = name[index[slot]];
    gather(row, renamed_.data(), out);
  }

  void moments(int64_t row, const float* x_hat, double* out) const {
    kernels_.moments(data_of<float>(args_.target) + row * d_out_, x_hat, d_out_, out);
  }

 private:
  void gather(int64_t row, const int32_t* indices, float* out) const {
    kernels_.gather(data_of<float>(args_.values) + row * slots_, indices,
                    data_of<int32_t>(args_.counts)[row], args_.weight.const_data_ptr(),
                    args_.weight_type, d_out_, data_of<float>(args_.bias), out);
  }

  const DecodeArgs& args_;
  const RowKernels& kernels_;
  int64_t slots_, d_sae_, d_out_;
  std::vector<int32_t> renamed_;
};

// Calls visit(decoder, permutation, row) for all pairs: permutations outside, so that the rows that
// are frequent under one of them stay in the cache.
template <typename Visit>
void for_each_permuted(const DecodeArgs& args, const Visit& visit) {
  const int64_t tokens = args.values.size(0);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, args.permutations->size(0) * tokens, 16,
                              [&](int64_t begin, int64_t end) {
                                RowDecoder decoder(args, kernels);
                                for (int64_t item = begin; item < end; ++item) {
                                  visit(decoder, item / tokens, item % tokens);
                                }
                              });
}

}  // namespace

std::tuple<Tensor, Tensor> decode_cpu(const DecodeArgs& args) {
  const int64_t tokens = args.values.size(0), d_out = args.weight.size(1);
  Tensor x_hat = empty_tensor({tokens, d_out}, ScalarType::Float);
  Tensor stats = empty_tensor({args.target.has_value() ? tokens : 0, 5}, ScalarType::Double);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    RowDecoder decoder(args, kernels);
    for (int64_t row = begin; row < end; ++row) {
      float* out = mutable_data_of<float>(x_hat) + row * d_out;
      decoder.decode(row, out);
      if (args.target.has_value()) {
        decoder.moments(row, out, mutable_data_of<double>(stats) + row * 5);
      }
    }
  });
  return {x_hat, stats};
}

Tensor decode_permuted_cpu(const DecodeArgs& args) {
  const int64_t tokens = args.values.size(0), d_out = args.weight.size(1);
  Tensor x_hat = empty_tensor({args.permutations->size(0), tokens, d_out}, ScalarType::Float);
  for_each_permuted(args, [&](RowDecoder& decoder, int64_t permutation, int64_t row) {
    decoder.decode(permutation, row,
                   mutable_data_of<float>(x_hat) + (permutation * tokens + row) * d_out);
  });
  return x_hat;
}

Tensor decode_permuted_stats_cpu(const DecodeArgs& args) {
  const int64_t tokens = args.values.size(0), d_out = args.weight.size(1);
  Tensor stats = empty_tensor({args.permutations->size(0), tokens, 5}, ScalarType::Double);
  for_each_permuted(args, [&](RowDecoder& decoder, int64_t permutation, int64_t row) {
    thread_local std::vector<float> x_hat;
    x_hat.resize(d_out);
    decoder.decode(permutation, row, x_hat.data());
    decoder.moments(row, x_hat.data(),
                    mutable_data_of<double>(stats) + (permutation * tokens + row) * 5);
  });
  return stats;
}

}  // namespace saelens_certify
