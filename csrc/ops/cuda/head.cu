// Statistics of the predictions of a linear head for CUDA tensors; see ops/head.h. A tile of logits
// at a time is written by a matrix product in float32 and read once, while it is in the L2 cache;
// what stays is 16 bytes (a pair: 40) per row and 4096 columns. Float32 inputs are multiplied in
// the mode that torch is set to: with TF32 allowed, losses are as inexact as TF32 logits are.
#include <algorithm>
#include <vector>

#include "ops/cuda/prediction.cuh"
#include "ops/head.h"

namespace saelens_certify {

namespace {

// 16 MiB of logits: with the weights under way they fit into the L2 cache of an A100 or H100, and
// the products are large enough to fill the device.
constexpr int64_t kRowChunk = 1024;
constexpr int64_t kColumnTile = kSegmentColumns;

Tensor narrowed(Tensor tensor, int64_t dimension, int64_t first, int64_t count) {
  return torch::stable::narrow(tensor, dimension, first, count);
}

Tensor reshaped(const Tensor& flat, int64_t rows, int64_t columns) {
  const int64_t shape[2] = {rows, columns};
  return torch::stable::view(narrowed(flat, 0, 0, rows * columns), {shape, 2});
}

// States of all tiles: their number per row.
int64_t states_of(const HeadArgs& head) {
  const int64_t d_vocab = head.prediction.d_vocab, whole = d_vocab / head.column_tile;
  return whole * segments_of(head.column_tile) + segments_of(d_vocab - whole * head.column_tile);
}

// Tiles of the head's columns, and room for the logits of some rows in one of them. Views take a
// dispatcher call each, so they are made once for all tiles and rows that share them.
class Tiles {
 public:
  // Rows at most, in `rooms` rooms.
  Tiles(const HeadArgs& head, int64_t rows, size_t rooms, const Tensor& like) : rooms_(rooms) {
    const int64_t d_vocab = head.prediction.d_vocab;
    for (int64_t first = 0; first < d_vocab; first += head.column_tile) {
      const int64_t columns = std::min(head.column_tile, d_vocab - first);
      weights_.push_back(narrowed(head.weight, 1, first, columns));
    }
    for (Room& room : rooms_) {
      room.memory = empty_tensor({rows * head.column_tile}, ScalarType::Float, like);
    }
  }

  int64_t count() const { return static_cast<int64_t>(weights_.size()); }
  int64_t columns(int64_t tile) const { return weights_[tile].size(1); }

  // For that many rows from now on.
  void take(int64_t rows) {
    for (Room& room : rooms_) {
      room.last = reshaped(*room.memory, rows, columns(count() - 1));
      room.whole = count() > 1 ? reshaped(*room.memory, rows, columns(0)) : room.last;
    }
  }

  // The logits of these rows in a tile, without bias.
  const float* multiply(const Tensor& x, int64_t tile, size_t room) const {
    const Room& to = rooms_[room];
    matrix_product_float32(x, weights_[tile], tile + 1 == count() ? *to.last : *to.whole);
    return data_of<float>(to.memory);
  }

 private:
  struct Room {
    OptionalTensor memory, whole, last;
  };

  std::vector<Tensor> weights_;
  std::vector<Room> rooms_;
};

// A residual has `tokens` rows for each of several predictions; of a pair, each is compared with
// the base, whose logits in a tile are computed once for all of them.
template <bool kPair>
auto head_stats_of(const Tensor* base, const Tensor& residual, const HeadArgs& head) {
  const DeviceScope device(residual);
  const PredictionArgs& prediction = head.prediction;
  const int64_t tokens = prediction.tokens(), all = residual.size(0);
  const int64_t row_chunk = std::min(kRowChunk, std::max<int64_t>(tokens, 1));
  const States<kPair> states(all, states_of(head), residual);
  constexpr size_t kRoom = kPair ? 1 : 0;
  Tiles tiles(head, row_chunk, kRoom + 1, residual);
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
      tiles.take(rows);
      OptionalTensor base_rows;
      if constexpr (kPair) base_rows = narrowed(*base, 0, start, rows);
      std::vector<Tensor> variants;
      for (int64_t row = start; row < all; row += tokens) {
        variants.push_back(narrowed(residual, 0, row, rows));
      }
      segments.first_column = 0;
      int64_t segment = 0;
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        segments.columns = segments.stride = tiles.columns(tile);
        if (kBias) segments.bias = data_of<float>(head.bias) + segments.first_column;
        if constexpr (kPair) segments.logits[0] = tiles.multiply(*base_rows, tile, 0);
        int64_t row = start;
        for (const Tensor& variant : variants) {
          segments.logits[kRoom] = tiles.multiply(variant, tile, kRoom);
          segments.gold = states.gold(row);
          segments.states = states.at(row, segment);
          launch_segments(segments, rows, device.stream());
          row += tokens;
        }
        segments.first_column += segments.columns;
        segment += segments_of(segments.columns);
      }
    }
  };
  return with_choice(prediction.softcap != 0, [&](auto capped) {
    with_choice(head.bias.has_value(), [&](auto biased) { fill(capped, biased); });
    return finish<kPair, decltype(capped)::value>(prediction, states, all, device.stream());
  });
}

TokenStats head_stats(Tensor residual, Tensor weight, OptionalTensor bias, Tensor targets,
                      double alpha, double softcap, int64_t d_vocab, int64_t column_tile) {
  const HeadArgs head = checked_head("residual", residual, weight, bias, targets, alpha, softcap,
                                     d_vocab, column_tile, kColumnTile);
  return head_stats_of<false>(nullptr, residual, head);
}

PairStats head_pair_stats(Tensor base_residual, Tensor residual, Tensor weight, OptionalTensor bias,
                          Tensor targets, double alpha, double softcap, int64_t d_vocab,
                          int64_t column_tile) {
  const HeadArgs head = checked_head("base_residual", base_residual, weight, bias, targets, alpha,
                                     softcap, d_vocab, column_tile, kColumnTile);
  check_other_residual(base_residual, residual);
  return head_stats_of<true>(&base_residual, residual, head);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("head_stats", TORCH_BOX(&head_stats));
  m.impl("head_pair_stats", TORCH_BOX(&head_pair_stats));
}

}  // namespace saelens_certify
