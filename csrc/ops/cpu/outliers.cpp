#include "ops/cpu/outliers.h"

#include <algorithm>
#include <numeric>

namespace saelens_certify {

namespace {

// Rows looked at: dimensions that dominate do so in every sample.
constexpr int64_t kSample = 64;
// An outlier holds this many times the mean energy of a dimension; all of them together hold at
// least this share, or the margin would not shrink enough to pay for adding them.
constexpr double kFactor = 16;
constexpr double kShare = 0.5;

}  // namespace

void Outliers::choose(const float* x, int64_t rows, int64_t d_in) {
  std::vector<double> energy(d_in);
  const int64_t step = std::max<int64_t>(1, rows / kSample);
  for (int64_t row = 0; row < rows; row += step) {
    const float* from = x + row * d_in;
    double square = 0;
    for (int64_t i = 0; i < d_in; ++i) square += static_cast<double>(from[i]) * from[i];
    // Every row counts the same, however long it is.
    if (square == 0) continue;
    for (int64_t i = 0; i < d_in; ++i) {
      energy[i] += static_cast<double>(from[i]) * from[i] / square;
    }
  }
  const double total = std::accumulate(energy.begin(), energy.end(), 0.0);
  std::vector<int32_t> order(d_in);
  std::iota(order.begin(), order.end(), 0);
  const auto most = order.begin() + std::min<int64_t>(kMost, d_in);
  std::partial_sort(order.begin(), most, order.end(),
                    [&](int32_t a, int32_t b) { return energy[a] > energy[b]; });
  dimensions_.clear();
  double held = 0;
  for (auto dimension = order.begin(); dimension != most; ++dimension) {
    if (!(energy[*dimension] * static_cast<double>(d_in) > kFactor * total)) break;
    held += energy[*dimension];
    dimensions_.push_back(*dimension);
  }
  if (held < kShare * total) dimensions_.clear();
  std::sort(dimensions_.begin(), dimensions_.end());

  inputs_.resize(rows * dimensions_.size());
  auto to = inputs_.begin();
  for (int64_t row = 0; row < rows; ++row) {
    for (const int32_t dimension : dimensions_) *to++ = x[row * d_in + dimension];
  }
}

void Outliers::gather(const EncodeArgs& args, int64_t first, int64_t columns) {
  if (dimensions_.empty()) return;
  stride_ = columns;
  weights_.resize(dimensions_.size() * columns);
  const int64_t d_in = args.d_in(), bytes = bytes_of(args.weight_type);
  const char* weight = data_of<char>(args.weight) + first * d_in * bytes;
  torch::stable::parallel_for(0, columns, 256, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const char* row = weight + column * d_in * bytes;
      for (std::size_t o = 0; o < dimensions_.size(); ++o) {
        row_kernels().widen(row + dimensions_[o] * bytes, args.weight_type, 1,
                            &weights_[o * columns + column]);
      }
    }
  });
}

}  // namespace saelens_certify
