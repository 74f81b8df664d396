// Before the tiles of a chunk: rows rounded to the type of the screen, and the lengths that their
// margins are made of. With r the row without its outlier dimensions, h = 2^p x16 what r was
// rounded to and v = screen_w_j,
//   |x.w - (h.v + outliers)| <= |r - h| |w| + |h| |w - v| + gemm_error |h| |v| + roundings,
// where |v| <= |w| + |w - v|. The lengths are the actual ones, not worst cases.
#pragma once

#include "ops/cuda/encode_filter.cuh"

namespace saelens_certify {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / kWarp;

// Written for each row of a chunk; only the margins if tiles are float32.
struct RowOutputs {
  RowMargin* margins;
  void* x16;              // [rows, d_in]
  float* row_scale;       // 2^p
  float* outlier_inputs;  // [rows, kMost]
};

__device__ inline BFloat16 narrowed(float x, const BFloat16*) { return to_bfloat16(x); }
__device__ inline Float16 narrowed(float x, const Float16*) { return to_float16(x); }

// 2^p as float64.
__device__ inline double power_of_two(int p) {
  return __longlong_as_double(static_cast<long long>(1023 + p) << 52);
}

__device__ inline void start_row(const TopLists& lists, int64_t row) {
  lists.all.state[row] = WarpList::fresh(lists.all.capacity, lists.k);
  if (lists.pool.state != nullptr) lists.pool.state[row] = lists.all.state[row];
}

__device__ inline void start_row(const ThresholdLists& lists, int64_t row) {
  lists.state[row] = {0, 0};
}

// --- outlier dimensions --------------------------------------------------------------------------

// Rows looked at: dimensions that dominate do so in every sample.
constexpr int kSampleRows = 32;
// An outlier holds this many times the mean energy of a dimension; all of them together hold at
// least this share, or the margin would not shrink enough to pay for adding them.
constexpr float kOutlierFactor = 16;
constexpr float kOutlierShare = 0.5f;
constexpr int kChooseThreads = 1024;

// The larger of all threads' keys, for all of them.
__device__ inline unsigned long long block_max(unsigned long long key) {
  __shared__ unsigned long long largest[kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    key = max(key, __shfl_xor_sync(kAllLanes, key, distance));
  }
  __syncthreads();
  if (lane_id() == 0) largest[warp_id()] = key;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    key = max(key, largest[warp]);
  }
  return key;
}

// Chooses the dimensions that hold most of the energy of the rows of a call, each row counting the
// same; none unless they pay. Any choice gives the same codes. One block; `energy` is [d_in],
// `chosen` the number of dimensions, then the dimensions.
__global__ void __launch_bounds__(kChooseThreads)
    choose_outliers_kernel(EncodeView view, int64_t rows, float* energy, int32_t* chosen) {
  __shared__ float inverse[kSampleRows];
  const int64_t step = max(int64_t{1}, rows / kSampleRows);
  const int samples = static_cast<int>(min(int64_t{kSampleRows}, rows / step));
  for (int sample = warp_id(); sample < samples; sample += kChooseThreads / kWarp) {
    const float* from = view.x + sample * step * view.d_in;
    const double length = sqrt(warp_dot<8>(from, from, view.d_in));
    if (lane_id() == 0) inverse[sample] = length > 1e-30 ? static_cast<float>(1 / length) : 0.0f;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < view.d_in; i += kChooseThreads) {
    float sum = 0;
    for (int sample = 0; sample < samples; ++sample) {
      const float part = view.x[sample * step * view.d_in + i] * inverse[sample];
      sum += part * part;
    }
    energy[i] = sum;
  }

  // Shares add up to the number of samples that are not zero.
  const float least = kOutlierFactor * static_cast<float>(samples) / static_cast<float>(view.d_in);
  float held = 0;
  int count = 0;
  for (; count < Outliers::kMost; ++count) {
    unsigned long long key = 0;
    for (int64_t i = threadIdx.x; i < view.d_in; i += kChooseThreads) {
      // Not so for NaN.
      if (!(energy[i] > least)) continue;
      key = max(key, static_cast<unsigned long long>(__float_as_uint(energy[i])) << 32 |
                         static_cast<unsigned>(i));
    }
    key = block_max(key);
    if (key == 0) break;
    const auto dimension = static_cast<int32_t>(key);
    held += __uint_as_float(static_cast<unsigned>(key >> 32));
    if (dimension % kChooseThreads == static_cast<int>(threadIdx.x)) {
      energy[dimension] = 0;
      chosen[1 + count] = dimension;
    }
  }
  if (threadIdx.x == 0) {
    chosen[0] = held < kOutlierShare * static_cast<float>(samples) ? 0 : count;
  }
}

// Collects the weights of the chosen dimensions for all columns: [kMost, stride].
template <typename W>
__global__ void gather_outliers_kernel(EncodeView view, Outliers outliers, float* weights) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= outliers.stride) return;
  const W* row = static_cast<const W*>(view.weight) + column * view.d_in;
  for (int o = 0; o < *outliers.count; ++o) {
    const bool inside = column < view.d_sae;
    weights[o * outliers.stride + column] = inside ? to_float(row[outliers.count[1 + o]]) : 0.0f;
  }
}

// --- rows ----------------------------------------------------------------------------------------

// Rounds a warp's row; returns the squares of h and of r - h, summed over lanes.
template <typename S>
__device__ inline double2 round_row(const EncodeView& view, const Outliers& outliers,
                                    const float* x, int64_t row, const RowOutputs& out) {
  int32_t left_out[Outliers::kMost];
  const int count = outliers.count == nullptr ? 0 : *outliers.count;
#pragma unroll
  for (int o = 0; o < Outliers::kMost; ++o) left_out[o] = o < count ? outliers.count[1 + o] : -1;
  const auto kept = [&](int64_t i) {
    bool keep = true;
#pragma unroll
    for (int o = 0; o < Outliers::kMost; ++o) keep = keep && left_out[o] != i;
    return keep;
  };

  // A power of two brings the largest number near 1, so that float16 neither overflows nor loses
  // much to its smallest exponents.
  uint32_t top = 0;
  for (int64_t i = lane_id(); i < view.d_in; i += kWarp) {
    if (kept(i)) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
  }
  top = __reduce_max_sync(kAllLanes, top);
  const int p = min(max(static_cast<int>(top >> 23) - 127, -100), 126);
  const double scale = power_of_two(p), inverse = power_of_two(-p);

  S* to = static_cast<S*>(out.x16) + row * view.d_in;
  double rounded_square = 0, rest_square = 0;
  for (int64_t i = lane_id(); i < view.d_in; i += kWarp) {
    const double r = kept(i) ? x[i] : 0.0f;
    const S narrow = narrowed(static_cast<float>(r * inverse), static_cast<const S*>(nullptr));
    to[i] = narrow;
    const double h = to_float(narrow) * scale, rest = r - h;
    rounded_square += h * h;
    rest_square += rest * rest;
  }
  if (lane_id() == 0) out.row_scale[row] = static_cast<float>(scale);
  if (lane_id() < count) {
    out.outlier_inputs[row * Outliers::kMost + lane_id()] = x[outliers.count[1 + lane_id()]];
  }
  return {butterfly_sum(rounded_square), butterfly_sum(rest_square)};
}

// A warp per row. S is the type of the screen, float if there is none.
template <typename S, typename Lists>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows_kernel(EncodeView view, Lists lists, Outliers outliers, RowOutputs out,
                        int64_t first_row, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kPrepareWarps + warp_id();
  if (row >= rows) return;
  const float* x = view.x + (first_row + row) * view.d_in;
  const double norm = sqrt(warp_dot<8>(x, x, view.d_in));
  // Adding outliers rounds as often again.
  const bool has_outliers = outliers.count != nullptr && *outliers.count > 0;
  const double outer = kOuterRoundings * (has_outliers ? 2 : 1) * norm;
  RowMargin margin = {view.gemm_error * norm + outer, 0.0, view.underflow * (1 + norm)};
  if constexpr (sizeof(S) == 2) {
    const double2 squares = round_row<S>(view, outliers, x, row, out);
    const double length = sqrt(squares.x);
    margin.weight = sqrt(squares.y) + view.gemm_error * length + outer;
    margin.error = (1 + view.gemm_error + kOuterRoundings) * length;
  }
  if (lane_id() == 0) {
    out.margins[row] = margin;
    start_row(lists, row);
  }
}

// --- columns
// ---------------------------------------------------------------------------------------

constexpr int kMarginThreads = 256;

__device__ inline ColumnMargin larger(const ColumnMargin& a, const ColumnMargin& b) {
  return {fmax(a.weight, b.weight), fmax(a.error, b.error), fmax(a.absolute, b.absolute),
          fmax(a.offset, b.offset)};
}

__device__ inline ColumnMargin warp_max(ColumnMargin margin) {
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    margin = larger(margin, {__shfl_xor_sync(kAllLanes, margin.weight, distance),
                             __shfl_xor_sync(kAllLanes, margin.error, distance),
                             __shfl_xor_sync(kAllLanes, margin.absolute, distance),
                             __shfl_xor_sync(kAllLanes, margin.offset, distance)});
  }
  return margin;
}

// The largest margins of each tile's columns, a block per tile.
__global__ void __launch_bounds__(kMarginThreads)
    tile_margins_kernel(EncodeView view, int64_t tile_columns, TileMargin* tiles) {
  __shared__ TileMargin parts[kMarginThreads / kWarp];
  const int64_t first = int64_t{blockIdx.x} * tile_columns;
  const int64_t end = min(first + tile_columns, view.d_sae);
  TileMargin most = {};
  for (int64_t column = first + threadIdx.x; column < end; column += kMarginThreads) {
    most.score = larger(most.score, score_margin(view, column));
    if (view.gate_bias != nullptr) most.gate = larger(most.gate, gate_margin(view, column));
  }
  most = {warp_max(most.score), warp_max(most.gate)};
  if (lane_id() == 0) parts[warp_id()] = most;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (const TileMargin& part : parts) {
    most = {larger(most.score, part.score), larger(most.gate, part.gate)};
  }
  tiles[blockIdx.x] = most;
}

// Converts n numbers to float32.
template <typename W>
__global__ void widen_kernel(const W* from, int64_t n, float* to) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    to[i] = to_float(from[i]);
  }
}

}  // namespace
}  // namespace saelens_certify
