#include <algorithm>
#include <vector>

#include "ops/cpu/prediction.h"
#include "ops/head.h"

namespace saelens_certify {

namespace {

// Rows for which a tile of weights is packed once; their logits take 8 MiB by default.
constexpr int64_t kRowChunk = 1024;

Tensor narrowed(Tensor tensor, int64_t dimension, int64_t first, int64_t count) {
  return torch::stable::narrow(tensor, dimension, first, count);
}

Tensor reshaped(const Tensor& flat, int64_t rows, int64_t columns) {
  const int64_t shape[2] = {rows, columns};
  return torch::stable::view(narrowed(flat, 0, 0, rows * columns), {shape, 2});
}

Tensor in_float32(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return tensor;
  Tensor wide = empty_tensor({tensor.size(0), tensor.size(1)}, ScalarType::Float);
  torch::stable::copy_(wide, tensor);
  return wide;
}

// A tile of columns of the head: its weights in float32, its bias, and room for logits.
class HeadTile {
 public:
  explicit HeadTile(const HeadArgs& args) : args_(args), weight_(args.weight) {}

  // Columns [first, first + count).
  void load(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    const Tensor part = narrowed(args_.weight, 1, first, count);
    if (part.scalar_type() == ScalarType::Float) {
      weight_ = part;
      return;
    }
    const int64_t d_model = part.size(0);
    if (!widened_.has_value()) {
      widened_ = empty_tensor({d_model * args_.column_tile}, ScalarType::Float);
    }
    // In the order in which the weights lie, which is the fast way to copy them.
    const bool tied = args_.weight.stride(0) == 1;
    Tensor wide = reshaped(*widened_, tied ? count : d_model, tied ? d_model : count);
    weight_ = tied ? torch::stable::transpose(wide, 0, 1) : wide;
    torch::stable::copy_(weight_, part);
  }

  // Logits of some rows of a residual into room number `which`.
  void multiply(const Tensor& residual, int64_t row, int64_t rows, int which) {
    if (!room_[which].has_value()) {
      room_[which] = empty_tensor({kRowChunk * args_.column_tile}, ScalarType::Float);
    }
    matrix_product(narrowed(residual, 0, row, rows), weight_,
                   reshaped(*room_[which], rows, count_));
    if (!args_.bias.has_value()) return;
    float* logits = mutable_data_of<float>(*room_[which]);
    const float* bias = data_of<float>(args_.bias) + first_;
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * count_; at < end * count_; at += count_) {
        for (int64_t i = 0; i < count_; ++i) logits[at + i] += bias[i];
      }
    });
  }

  // The logits of a row.
  const float* logits(int64_t row, int which) const {
    return data_of<float>(*room_[which]) + row * count_;
  }

  // Calls add(offset, count) for the blocks of a row that the softmax kernels take.
  template <typename Add>
  void for_each_block(const Add& add) const {
    for (int64_t at = 0; at < count_; at += kSoftmaxBlock) {
      add(at, std::min(kSoftmaxBlock, count_ - at));
    }
  }

  bool holds(int64_t column) const { return first_ <= column && column < first_ + count_; }
  int64_t first() const { return first_; }

 private:
  const HeadArgs& args_;
  int64_t first_ = 0, count_ = 0;
  Tensor weight_;
  OptionalTensor widened_, room_[2];
};

// Calls visit(tile, first row, rows) for chunks of rows and tiles of columns; tiles in order and
// outside, so that the weights are read and converted once.
template <typename Visit>
void for_each_tile(const HeadArgs& args, int64_t tokens, const Visit& visit) {
  const int64_t d_vocab = args.prediction.d_vocab;
  HeadTile tile(args);
  for (int64_t first = 0; tokens > 0 && first < d_vocab; first += args.column_tile) {
    tile.load(first, std::min(args.column_tile, d_vocab - first));
    for (int64_t start = 0; start < tokens; start += kRowChunk) {
      visit(tile, start, std::min(kRowChunk, tokens - start));
    }
  }
}

}  // namespace

TokenStats head_stats_cpu(const Tensor& residual, const HeadArgs& args) {
  const PredictionArgs& prediction = args.prediction;
  const int64_t tokens = residual.size(0);
  const int64_t* target = data_of<int64_t>(prediction.targets);
  std::vector<SoftmaxRow> states(tokens, kEmptyRow);
  std::vector<float> gold(tokens);
  const Tensor wide = in_float32(residual);
  const RowKernels& kernels = row_kernels();
  for_each_tile(args, tokens, [&](HeadTile& tile, int64_t start, int64_t rows) {
    tile.multiply(wide, start, rows, 0);
    torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t local = begin; local < end; ++local) {
        const int64_t row = start + local;
        const float* logits = tile.logits(local, 0);
        tile.for_each_block([&](int64_t at, int64_t count) {
          kernels.softmax(logits + at, count, tile.first() + at, prediction.softcap, &states[row]);
        });
        if (tile.holds(target[row])) gold[row] = logits[target[row] - tile.first()];
      }
    });
  });
  const TokenResults results(prediction);
  for (int64_t row = 0; row < tokens; ++row) results.write(row, states[row], gold[row]);
  return results.tensors();
}

PairStats head_pair_stats_cpu(const Tensor& base, const Tensor& other, const HeadArgs& args) {
  const PredictionArgs& prediction = args.prediction;
  const int64_t tokens = base.size(0), all = other.size(0);
  const int64_t* target = data_of<int64_t>(prediction.targets);
  std::vector<SoftmaxPair> states(all, kEmptyPair);
  std::vector<float> base_gold(tokens), gold(all);
  const Tensor wide_base = in_float32(base), wide = in_float32(other);
  const RowKernels& kernels = row_kernels();
  for_each_tile(args, tokens, [&](HeadTile& tile, int64_t start, int64_t rows) {
    tile.multiply(wide_base, start, rows, 0);
    for (int64_t variant = 0; variant < all; variant += tokens) {
      tile.multiply(wide, variant + start, rows, 1);
      torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
        for (int64_t local = begin; local < end; ++local) {
          const int64_t token = start + local, row = variant + token;
          const float *p = tile.logits(local, 0), *q = tile.logits(local, 1);
          tile.for_each_block([&](int64_t at, int64_t count) {
            kernels.softmax_pair(p + at, q + at, count, tile.first() + at, prediction.softcap,
                                 &states[row]);
          });
          if (tile.holds(target[token])) {
            base_gold[token] = p[target[token] - tile.first()];
            gold[row] = q[target[token] - tile.first()];
          }
        }
      });
    }
  });
  const PairResults results(prediction, all);
  for (int64_t row = 0; row < all; ++row) {
    results.write(row, states[row], base_gold[row % tokens], gold[row]);
  }
  return results.tensors();
}

}  // namespace saelens_certify
