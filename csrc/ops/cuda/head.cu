// Statistics of the predictions of a linear head for CUDA tensors; see ops/head.h. A tile of logits
// at a time is written by a matrix product in float32 and read once, while it is in the L2 cache;
// what stays is 16 bytes (a pair: 40) per row and 4096 columns. Float32 inputs are multiplied in
// the mode that torch is set to: with TF32 allowed, losses are as inexact as TF32 logits are.
#include <algorithm>
#include <array>
#include <vector>

#include "ops/cuda/prediction.cuh"

namespace saelens_certify {

namespace {

// 16 MiB of logits: with the weights under way they fit into the L2 cache of an A100 or H100, and
// the products are large enough to fill the device.
constexpr int64_t kRowChunk = 1024;
constexpr int64_t kColumnTile = kSegmentColumns;

struct Head {
  Tensor weight;        // real [d_model, columns], any strides
  OptionalTensor bias;  // float32 [columns]
  PredictionArgs prediction;
  int64_t column_tile;
};

Head checked(const char* name, const Tensor& residual, Tensor weight, OptionalTensor bias,
             Tensor targets, double alpha, double softcap, int64_t d_vocab, int64_t column_tile) {
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
          std::min(column_tile == 0 ? kColumnTile : column_tile, d_vocab)};
}

Tensor narrowed(Tensor tensor, int64_t dimension, int64_t first, int64_t count) {
  return torch::stable::narrow(tensor, dimension, first, count);
}

Tensor reshaped(const Tensor& flat, int64_t rows, int64_t columns) {
  const int64_t shape[2] = {rows, columns};
  return torch::stable::view(narrowed(flat, 0, 0, rows * columns), {shape, 2});
}

// States of all tiles: their number per row.
int64_t states_of(const Head& head) {
  const int64_t d_vocab = head.prediction.d_vocab, whole = d_vocab / head.column_tile;
  return whole * segments_of(head.column_tile) + segments_of(d_vocab - whole * head.column_tile);
}

// The weights of each tile of columns.
std::vector<Tensor> tiles_of(const Head& head) {
  const int64_t d_vocab = head.prediction.d_vocab;
  std::vector<Tensor> tiles;
  for (int64_t first = 0; first < d_vocab; first += head.column_tile) {
    tiles.push_back(narrowed(head.weight, 1, first, std::min(head.column_tile, d_vocab - first)));
  }
  return tiles;
}

template <size_t kResiduals>
auto head_stats_of(const std::array<Tensor, kResiduals>& residuals, const Head& head) {
  constexpr bool kPair = kResiduals == 2;
  const DeviceScope device(residuals[0]);
  const PredictionArgs& prediction = head.prediction;
  const int64_t tokens = residuals[0].size(0);
  const int64_t row_chunk = std::min(kRowChunk, std::max<int64_t>(tokens, 1));
  const States<kPair> states(tokens, states_of(head), residuals[0]);
  // Views take a dispatcher call each, so they are made once for all tiles of all rows.
  const std::vector<Tensor> weights = tiles_of(head);
  const int64_t last_columns = weights.back().size(1);
  std::array<OptionalTensor, kResiduals> rooms, whole, last, x;
  for (OptionalTensor& room : rooms) {
    room = empty_tensor({row_chunk * head.column_tile}, ScalarType::Float, residuals[0]);
  }
  // Fills the states of all rows and columns.
  const auto fill = [&](auto capped, auto biased) {
    constexpr bool kBias = decltype(biased)::value;
    constexpr bool kCap = decltype(capped)::value;
    Segments<float, kPair, kCap, kBias> segments = {};
    segments.states_per_row = states.per_row();
    segments.cap = cap_of<kCap>(prediction);
    for (int64_t start = 0; start < tokens; start += row_chunk) {
      const int64_t rows = std::min(row_chunk, tokens - start);
      segments.targets = data_of<int64_t>(prediction.targets) + start;
      segments.gold = states.gold(start);
      segments.states = states.at(start, 0);
      for (size_t which = 0; which < kResiduals; ++which) {
        x[which] = narrowed(residuals[which], 0, start, rows);
        whole[which] = reshaped(*rooms[which], rows, head.column_tile);
        last[which] = reshaped(*rooms[which], rows, last_columns);
        segments.logits[which] = data_of<float>(rooms[which]);
      }
      int64_t first = 0;
      for (const Tensor& weight : weights) {
        const int64_t count = weight.size(1);
        for (size_t which = 0; which < kResiduals; ++which) {
          matrix_product_float32(*x[which], weight,
                                 *(&weight == &weights.back() ? last : whole)[which]);
        }
        if (kBias) segments.bias = data_of<float>(head.bias) + first;
        segments.stride = count;
        segments.first_column = first;
        segments.columns = count;
        launch_segments(segments, rows, device.stream());
        segments.states += segments_of(count);
        first += count;
      }
    }
  };
  return with_choice(prediction.softcap != 0, [&](auto capped) {
    with_choice(head.bias.has_value(), [&](auto biased) { fill(capped, biased); });
    return finish<kPair, decltype(capped)::value>(prediction, states, device.stream());
  });
}

TokenStats head_stats(Tensor residual, Tensor weight, OptionalTensor bias, Tensor targets,
                      double alpha, double softcap, int64_t d_vocab, int64_t column_tile) {
  return head_stats_of<1>({residual}, checked("residual", residual, weight, bias, targets, alpha,
                                              softcap, d_vocab, column_tile));
}

PairStats head_pair_stats(Tensor base_residual, Tensor residual, Tensor weight, OptionalTensor bias,
                          Tensor targets, double alpha, double softcap, int64_t d_vocab,
                          int64_t column_tile) {
  const Head head = checked("base_residual", base_residual, weight, bias, targets, alpha, softcap,
                            d_vocab, column_tile);
  check_real("residual", residual, 2);
  STD_TORCH_CHECK(residual.scalar_type() == base_residual.scalar_type(),
                  "residual differs in type from base_residual");
  check_size("residual", residual, 0, base_residual.size(0));
  check_size("residual", residual, 1, base_residual.size(1));
  check_device("residual", residual, base_residual);
  return head_stats_of<2>({base_residual, residual}, head);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("head_stats", TORCH_BOX(&head_stats));
  m.impl("head_pair_stats", TORCH_BOX(&head_pair_stats));
}

}  // namespace saelens_certify
