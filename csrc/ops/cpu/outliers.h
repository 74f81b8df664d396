// The few input dimensions that dominate a chunk of rows. They would widen every margin of 16-bit
// screening, because rounding errors are relative to the whole row: so they are left out of the
// product and added in float32 where scores are compared.
#pragma once

#include <vector>

#include "ops/encode.h"

namespace saelens_certify {

class Outliers {
 public:
  static constexpr int kMost = 8;

  // Chooses the dimensions for a chunk of rows [rows, d_in]; none unless they hold most of the
  // rows' energy. Any choice gives the same codes.
  void choose(const float* x, int64_t rows, int64_t d_in);

  // Collects the weights of the chosen dimensions for the columns of a tile.
  void gather(const EncodeArgs& args, int64_t first, int64_t columns);

  int count() const { return static_cast<int>(dimensions_.size()); }
  const int32_t* dimensions() const { return dimensions_.data(); }  // ascending
  const float* inputs(int64_t row) const { return inputs_.data() + row * count(); }
  const float* weights() const { return weights_.data(); }  // [count, stride]
  int64_t stride() const { return stride_; }

 private:
  std::vector<int32_t> dimensions_;
  std::vector<float> inputs_;
  std::vector<float> weights_;
  int64_t stride_ = 0;
};

}  // namespace saelens_certify
