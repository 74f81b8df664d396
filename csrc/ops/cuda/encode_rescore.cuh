// After the last tile: the candidates that are left are scored exactly, a block per row and a warp
// per candidate, and the slots of the row are written.
#pragma once

#include "ops/cuda/encode_filter.cuh"

namespace saelens_certify {
namespace {

constexpr int kRescoreThreads = 256;
constexpr int kRescoreWarps = kRescoreThreads / kWarp;
// Rows up to this size are kept in shared memory as float64, sorting keys as long as they fit.
constexpr int64_t kSharedRowBytes = 32 * 1024;
constexpr int64_t kSharedKeys = 2048;

using Key = unsigned long long;

// The slots of a call, `slots` per token.
struct SlotView {
  float* values;
  int32_t* indices;
  int32_t* counts;
  int64_t slots;
};

// The row as the block reads it: float64 in shared memory, or float32 where it is.
__device__ inline const double* staged(const EncodeView& view, int64_t row, const double*) {
  double* to = dynamic_shared<double>();
  const float* from = view.x + row * view.d_in;
  for (int64_t i = threadIdx.x; i < view.d_in; i += kRescoreThreads) to[i] = from[i];
  __syncthreads();
  return to;
}

__device__ inline const float* staged(const EncodeView& view, int64_t row, const float*) {
  return view.x + row * view.d_in;
}

// --- top k ---------------------------------------------------------------------------------------

// Where the row's keys are sorted: shared memory past the row, or [rows, capacity] if they do not
// fit there.
struct KeySpace {
  Key* far;
  int64_t capacity;
};

template <typename X>
__device__ inline Key* keys_of(const KeySpace& space, const EncodeView& view) {
  if (space.far != nullptr) return space.far + int64_t{blockIdx.x} * space.capacity;
  return reinterpret_cast<Key*>(dynamic_shared<double>() + (sizeof(X) == 8 ? view.d_in : 0));
}

// Largest first; n is a power of two.
__device__ inline void sort_keys(Key* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kRescoreThreads) {
        const int a = 2 * i - (i & (stride - 1)), b = a + stride;
        const Key first = keys[a], second = keys[b];
        const bool falling = (a & size) == 0;
        if (falling ? first < second : first > second) {
          keys[a] = second;
          keys[b] = first;
        }
      }
      __syncthreads();
    }
  }
}

// Writes the k best of n scored columns: score descending, column ascending. Columns ascend in the
// list, so that the place in it stands for the column; key 0 is no column.
__device__ inline void write_best(const float* scores, const int32_t* columns, int n, Key* keys,
                                  const SlotView& out, int64_t row) {
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += kRescoreThreads) {
    const bool active = i < n && scores[i] > -INFINITY;
    keys[i] = active ? Key{ordered(scores[i])} << 32 | (0xffffffffu - static_cast<unsigned>(i)) : 0;
  }
  __syncthreads();
  sort_keys(keys, padded);
  const int64_t used = min(out.slots, int64_t{n});
  for (int64_t slot = threadIdx.x; slot < out.slots; slot += kRescoreThreads) {
    const Key key = slot < used ? keys[slot] : 0;
    const unsigned place = 0xffffffffu - static_cast<unsigned>(key);
    out.values[row * out.slots + slot] = key == 0 ? 0.0f : scores[place];
    out.indices[row * out.slots + slot] = key == 0 ? -1 : columns[place];
    // Keys fall: the number in use is where they turn to zero.
    const bool last = slot + 1 == used || (slot + 1 < used && keys[slot + 1] == 0);
    if (key != 0 && last) out.counts[row] = static_cast<int32_t>(slot + 1);
    if (key == 0 && slot == 0) out.counts[row] = 0;
  }
  __syncthreads();
}

// The place of a column in an ascending list, or -1.
__device__ inline int find(const int32_t* columns, int n, int32_t column) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (columns[middle] < column) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && columns[low] == column ? low : -1;
}

// `pooled` has no values if there is no pool. X: double for rows in shared memory, else float.
template <typename X>
__global__ void __launch_bounds__(kRescoreThreads)
    rescore_top_kernel(EncodeView view, TopLists lists, int64_t first_row, KeySpace space,
                       SlotView everything, SlotView pooled) {
  const int64_t row = first_row + blockIdx.x;
  const X* x = staged(view, row, static_cast<const X*>(nullptr));
  Key* keys = keys_of<X>(space, view);

  const int64_t at = int64_t{blockIdx.x} * lists.all.capacity;
  float* scores = lists.all.lower + at;
  const int32_t* columns = lists.all.column + at;
  const int n = lists.all.state[blockIdx.x].x;
  for (int i = warp_id(); i < n; i += kRescoreWarps) {
    const float score = active_score<8>(view, x, columns[i]);
    if (lane_id() == 0) scores[i] = score;
  }
  __syncthreads();
  write_best(scores, columns, n, keys, everything, row);
  if (pooled.values == nullptr) return;

  const int64_t pool_at = int64_t{blockIdx.x} * lists.pool.capacity;
  float* pool_scores = lists.pool.lower + pool_at;
  const int32_t* pool_columns = lists.pool.column + pool_at;
  const int n_pool = lists.pool.state[blockIdx.x].x;
  for (int i = warp_id(); i < n_pool; i += kRescoreWarps) {
    const int known = find(columns, n, pool_columns[i]);
    const float score = known >= 0 ? scores[known] : active_score<8>(view, x, pool_columns[i]);
    if (lane_id() == 0) pool_scores[i] = score;
  }
  __syncthreads();
  write_best(pool_scores, pool_columns, n_pool, keys, pooled, row);
}

// --- all active columns --------------------------------------------------------------------------

template <typename X>
__global__ void __launch_bounds__(kRescoreThreads)
    rescore_threshold_kernel(EncodeView view, ThresholdLists lists, int64_t first_row,
                             SlotView out) {
  __shared__ float scores[kPending];
  __shared__ int total;
  const int64_t row = first_row + blockIdx.x;
  const X* x = staged(view, row, static_cast<const X*>(nullptr));
  const int32_t* pending = lists.pending + int64_t{blockIdx.x} * kPending;
  const int n = lists.state[blockIdx.x].x;
  int found = lists.state[blockIdx.x].y;
  const bool full = found >= out.slots;
  for (int i = warp_id(); i < n; i += kRescoreWarps) {
    const int32_t entry = pending[i];
    // Past the last slot a certainly active column only counts.
    const float score =
        full && entry < 0 ? INFINITY : active_score<8>(view, x, entry < 0 ? ~entry : entry);
    if (lane_id() == 0) scores[i] = score;
  }
  __syncthreads();
  if (warp_id() == 0) {
    for (int start = 0; start < n; start += kWarp) {
      const int i = start + lane_id();
      const float score = i < n ? scores[i] : -INFINITY;
      const unsigned active = __ballot_sync(kAllLanes, score > -INFINITY);
      const int64_t slot = found + __popc(active & lanes_before());
      if (score > -INFINITY && slot < out.slots) {
        out.values[row * out.slots + slot] = score;
        out.indices[row * out.slots + slot] = pending[i] < 0 ? ~pending[i] : pending[i];
      }
      found += __popc(active);
    }
    if (lane_id() == 0) {
      total = found;
      out.counts[row] = found;
    }
  }
  __syncthreads();
  for (int64_t slot = total + int64_t{threadIdx.x}; slot < out.slots; slot += kRescoreThreads) {
    out.values[row * out.slots + slot] = 0.0f;
    out.indices[row * out.slots + slot] = -1;
  }
}

}  // namespace
}  // namespace saelens_certify
