// One encoding call: exact scores, margins, and the loop over tiles of screened scores.
//
// With 16-bit screening the rows x are split into x = r + o, where o holds the few outlier
// dimensions and r the rest. The product is h . v for h = bfloat16(r) and v = screen_w_j, and
//   |x.w - (h.v + o.w)| <= |r - h| |w| + |h| |w - v| + (error of the product h.v) + roundings.
// The lengths are the actual ones: the margin is as wide as what rounding lost, not as what it
// could.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu/outliers.h"
#include "ops/cpu/screen.h"
#include "ops/encode.h"

namespace saelens_certify {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Roundings outside the matrix product (bias, scale, margin, comparison, the exact score's own),
// relative to |scale| (|x| |w| + |bias|); at most six of them in float32, and ten more where
// outliers are added.
constexpr double kOuterRoundings = 16 * 0x1p-24;

// A product stored as bfloat16 was rounded to nearest: half a unit in the last of eight bits, and
// a little, as the bound is taken relative to the rounded number.
constexpr float kStoredRounding = 0x1.02p-8f;

class Encoder {
 public:
  explicit Encoder(const EncodeArgs& args);

  int64_t tiles() const { return (args_.d_sae() + args_.column_tile - 1) / args_.column_tile; }

  float theta(int64_t column) const { return theta_ == nullptr ? 0.0f : theta_[column]; }

  // The canonical score of a feature for one row of the input if the feature is active, else -inf.
  float active_score(int64_t row, int32_t column) const {
    return activity(kernels_.dot(x_of(row), weight_of(column), args_.weight_type, args_.d_in()),
                    column);
  }

  // The same for many features of a row.
  void score(int64_t row, std::vector<Scored>& entries) const;

  // Shows a selection every column that may be active and reaches its floor. A selection has
  //   start(row, block, columns): look at a whole first tile, once per row, to find a floor;
  //   floor(row): scores below it are of no interest;
  //   visit(row, candidate): columns ascend;
  //   finish_tile(row, last): after a tile, the last of them or not.
  // Rows are visited in parallel, tiles in order; rows are counted from first_row.
  template <typename Selection>
  void show(int64_t first_row, int64_t rows, Selection& selection) {
    prepare_rows(first_row, rows);
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      const int64_t first = tile * args_.column_tile;
      const int64_t columns = std::min(args_.column_tile, args_.d_sae() - first);
      const char* product = multiply(first_row, rows, first, columns);
      outliers_.gather(args_, first, columns);
      const int64_t row_bytes = columns * (half() ? 2 : 4);
      torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          scan(row, block_of(row, tile, product + row * row_bytes), first, columns, selection);
          selection.finish_tile(row, tile + 1 == tiles());
        }
      });
    }
  }

 private:
  // What the margins of one row need: factors of |w|, of |w - v|, and a part for numbers flushed
  // to zero.
  struct RowMargin {
    double weight;
    double error;
    double absolute;
  };

  // The largest of what columns contribute to margins: |scale| |w|, |scale| |w - v|, offset and
  // 1 + |scale|; the same without the scale for the gate.
  struct TileMargin {
    double weight = 0, error = 0, offset = 0, size = 0;
    double gate_weight = 0, gate_error = 0, gate_offset = 0;
  };

  bool half() const { return args_.screen_weight.has_value(); }
  const float* x_of(int64_t row) const { return x_ + row * args_.d_in(); }
  const char* weight_of(int64_t column) const {
    return weight_ + column * args_.d_in() * bytes_of(args_.weight_type);
  }

  float activity(double sum, int64_t column) const {
    const double total = sum + static_cast<double>(bias_[column]);
    const auto score =
        static_cast<float>(scale_ == nullptr ? total : total * static_cast<double>(scale_[column]));
    if (!(score > theta(column))) return -kInfinity;
    if (gate_ != nullptr && !(static_cast<float>(sum + static_cast<double>(gate_[column])) > 0)) {
      return -kInfinity;
    }
    return score;
  }

  double size_of(int64_t column) const {
    return scale_ == nullptr ? 1.0 : std::fabs(static_cast<double>(scale_[column]));
  }

  double error_of(int64_t column) const { return errors_ == nullptr ? 0.0 : errors_[column]; }

  // The part of a margin that belongs to the column alone, before its scale.
  double offset_of(int64_t column, const float* bias) const {
    return kOuterRoundings * std::fabs(static_cast<double>(bias[column])) +
           underflow_ * norms_[column];
  }

  static float margin(const RowMargin& row, double weight, double error, double offset,
                      double size) {
    // Rounded up to float32.
    return static_cast<float>(
        (row.weight * weight + row.error * error + offset + row.absolute * size) * (1 + 0x1p-20));
  }

  void prepare_rows(int64_t first_row, int64_t rows);
  const char* multiply(int64_t first_row, int64_t rows, int64_t first, int64_t columns);
  Tensor weight_tile(int64_t first, int64_t columns);

  // What the filter needs of a row, for the first block of a tile.
  FilterRow block_of(int64_t row, int64_t tile, const char* product) const {
    const RowMargin& of_row = row_margins_[row];
    const TileMargin& most = tile_margins_[tile];
    const int64_t first = tile * args_.column_tile;
    FilterRow block = {};
    block.product = product;
    block.half = half();
    block.bias = bias_ + first;
    block.scale = scale_ == nullptr ? nullptr : scale_ + first;
    block.theta = theta_ == nullptr ? nullptr : theta_ + first;
    block.gate_bias = gate_ == nullptr ? nullptr : gate_ + first;
    block.outlier_x = outliers_.inputs(row);
    block.outlier_weight = outliers_.weights();
    block.outlier_stride = outliers_.stride();
    block.n_outliers = outliers_.count();
    block.slack = margin(of_row, most.weight, most.error, most.offset, most.size);
    block.gate_slack = margin(of_row, most.gate_weight, most.gate_error, most.gate_offset, 2);
    block.rounding = half() ? kStoredRounding : 0.0f;
    return block;
  }

  void advance(FilterRow& block) const {
    block.product = static_cast<const char*>(block.product) + kFilterBlock * (block.half ? 2 : 4);
    block.bias += kFilterBlock;
    if (block.scale != nullptr) block.scale += kFilterBlock;
    if (block.theta != nullptr) block.theta += kFilterBlock;
    if (block.gate_bias != nullptr) block.gate_bias += kFilterBlock;
    if (block.n_outliers > 0) block.outlier_weight += kFilterBlock;
  }

  template <typename Selection>
  void scan(int64_t row, FilterRow block, int64_t first, int64_t columns,
            Selection& selection) const {
    if (first == 0) selection.start(row, block, columns);
    FilterHit hits[kFilterBlock + 1];
    for (int64_t at = 0; at < columns; at += kFilterBlock, advance(block)) {
      const float least = selection.floor(row);
      block.floor = theta_ == nullptr ? std::max(least, 0.0f) : least;
      const int found = kernels_.filter(block, std::min(kFilterBlock, columns - at), hits);
      for (int hit = 0; hit < found; ++hit) {
        const int64_t column = first + at + hits[hit].column;
        visit_if_possible(row, block.rounding, hits[hit], column, selection);
      }
    }
  }

  // The filter used one margin for the whole tile; here the column's own one decides.
  template <typename Selection>
  void visit_if_possible(int64_t row, float rounding, const FilterHit& hit, int64_t column,
                         Selection& selection) const {
    const RowMargin& of_row = row_margins_[row];
    const double size = size_of(column), norm = norms_[column], error = error_of(column);
    const float stored = std::fabs(hit.product) * rounding;
    float score = hit.sum + bias_[column];
    if (scale_ != nullptr) score *= scale_[column];
    const float slack = margin(of_row, size * norm, size * error,
                               size * (offset_of(column, bias_) + stored), 1 + size);
    const float upper = score + slack;
    if (!(upper > theta(column))) return;
    float lower = score - slack;
    if (!(lower > theta(column))) lower = -kInfinity;
    if (gate_ != nullptr) {
      const float gate = hit.sum + gate_[column];
      const float room = margin(of_row, norm, error, offset_of(column, gate_) + stored, 2);
      if (!(gate + room > 0)) return;
      if (!(gate - room > 0)) lower = -kInfinity;
    }
    selection.visit(row, Candidate{lower, upper, static_cast<int32_t>(column)});
  }

  const EncodeArgs& args_;
  const RowKernels& kernels_;
  const float* x_;
  const char* weight_;
  const float* bias_;
  const float* scale_;
  const float* theta_;
  const float* gate_;
  const float* norms_;
  const float* errors_;
  double underflow_;
  Outliers outliers_;
  std::vector<RowMargin> row_margins_;
  std::vector<TileMargin> tile_margins_;
  // Products of a tile, rows of a chunk in bfloat16, weights of a tile in float32.
  OptionalTensor product_, narrowed_, widened_;
};

}  // namespace saelens_certify
