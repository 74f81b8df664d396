#include <algorithm>

#include "ops/cpu/prediction.h"

namespace saelens_certify {

namespace {

// Rows of logits, handed out in blocks of float32.
class Logits {
 public:
  Logits(const Tensor& tensor, Real type)
      : data_(data_of<char>(tensor)), stride_(tensor.size(1)), type_(type) {}

  // `count` logits from column `first` on, converted into `buffer` if need be.
  const float* block(int64_t row, int64_t first, int64_t count, float* buffer) const {
    const char* from = data_ + (row * stride_ + first) * bytes_of(type_);
    if (type_ == Real::kFloat32) return reinterpret_cast<const float*>(from);
    row_kernels().widen(from, type_, count, buffer);
    return buffer;
  }

  float one(int64_t row, int64_t column) const {
    float value;
    return *block(row, column, 1, &value);
  }

 private:
  const char* data_;
  int64_t stride_;
  Real type_;
};

}  // namespace

TokenStats token_stats_cpu(const Tensor& logits, Real type, const PredictionArgs& args) {
  const TokenResults results(args);
  const Logits rows(logits, type);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    float buffer[kSoftmaxBlock];
    for (int64_t row = begin; row < end; ++row) {
      SoftmaxRow state = kEmptyRow;
      for (int64_t first = 0; first < args.d_vocab; first += kSoftmaxBlock) {
        const int64_t count = std::min(kSoftmaxBlock, args.d_vocab - first);
        kernels.softmax(rows.block(row, first, count, buffer), count, first, args.softcap, &state);
      }
      results.write(row, state, rows.one(row, data_of<int64_t>(args.targets)[row]));
    }
  });
  return results.tensors();
}

PairStats pair_stats_cpu(const Tensor& base, const Tensor& other, Real type,
                         const PredictionArgs& args) {
  const PairResults results(args, base.size(0));
  const Logits base_rows(base, type), other_rows(other, type);
  const RowKernels& kernels = row_kernels();
  torch::stable::parallel_for(0, base.size(0), 1, [&](int64_t begin, int64_t end) {
    float base_buffer[kSoftmaxBlock], other_buffer[kSoftmaxBlock];
    for (int64_t row = begin; row < end; ++row) {
      SoftmaxPair state = kEmptyPair;
      for (int64_t first = 0; first < args.d_vocab; first += kSoftmaxBlock) {
        const int64_t count = std::min(kSoftmaxBlock, args.d_vocab - first);
        kernels.softmax_pair(base_rows.block(row, first, count, base_buffer),
                             other_rows.block(row, first, count, other_buffer), count, first,
                             args.softcap, &state);
      }
      const int64_t target = data_of<int64_t>(args.targets)[row];
      results.write(row, state, base_rows.one(row, target), other_rows.one(row, target));
    }
  });
  return results.tensors();
}

}  // namespace saelens_certify
