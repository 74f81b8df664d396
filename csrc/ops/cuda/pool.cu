// Pool membership and activation counts, for CUDA tensors; see ops/pool.h. Unused slots hold -1;
// indices without a bit or a total (the callers check for them) are left out.
#include <algorithm>

#include "ops/cuda/device.h"

namespace saelens_certify {

namespace {

constexpr int kRestrictThreads = 128;
constexpr int kCountThreads = 256;

__device__ bool is_in_pool(const int32_t* pool_bits, int64_t n_features, int32_t index) {
  return index >= 0 && index < n_features &&
         (static_cast<uint32_t>(pool_bits[index >> 5]) >> (index & 31) & 1u);
}

// One warp per row: 32 slots at a time, kept slots moved up by the rank of their lane.
__global__ void __launch_bounds__(kRestrictThreads)
    restrict_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
                    const int32_t* __restrict__ pool_bits, int64_t n_features, int64_t tokens,
                    int64_t slots, float* __restrict__ kept_values,
                    int32_t* __restrict__ kept_indices, int32_t* __restrict__ kept_counts) {
  const int64_t row = int64_t{blockIdx.x} * (kRestrictThreads / kWarp) + warp_id();
  if (row >= tokens) return;  // the whole warp
  const int lane = lane_id();
  int64_t kept = row * slots;
  for (int64_t first = 0; first < slots; first += kWarp) {
    const int64_t slot = first + lane;
    int32_t index = -1;
    float value = 0.0f;
    if (slot < slots) {
      index = indices[row * slots + slot];
      value = values[row * slots + slot];
    }
    const bool keep = is_in_pool(pool_bits, n_features, index);
    const unsigned ballot = __ballot_sync(kAllLanes, keep);
    if (keep) {
      const int64_t to = kept + __popc(ballot & ((1u << lane) - 1));
      kept_values[to] = value;
      kept_indices[to] = index;
    }
    kept += __popc(ballot);
  }
  for (int64_t to = kept + lane; to < (row + 1) * slots; to += kWarp) {
    kept_values[to] = 0.0f;
    kept_indices[to] = -1;
  }
  if (lane == 0) kept_counts[row] = static_cast<int32_t>(kept - row * slots);
}

// Integer sums do not depend on their order.
__global__ void __launch_bounds__(kCountThreads)
    pool_count_kernel(const int32_t* __restrict__ indices, int64_t n, int64_t n_features,
                      unsigned long long* __restrict__ totals) {
  const int64_t step = int64_t{gridDim.x} * kCountThreads;
  for (int64_t i = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; i < n; i += step) {
    const int32_t index = indices[i];
    if (index >= 0 && index < n_features) atomicAdd(totals + index, 1ull);
  }
}

// One warp per row.
__global__ void __launch_bounds__(kRestrictThreads)
    count_outside_kernel(const int32_t* __restrict__ indices, const int32_t* __restrict__ pool_bits,
                         int64_t n_features, int64_t tokens, int64_t slots,
                         int32_t* __restrict__ counts) {
  const int64_t row = int64_t{blockIdx.x} * (kRestrictThreads / kWarp) + warp_id();
  if (row >= tokens) return;  // the whole warp
  int outside = 0;
  for (int64_t slot = lane_id(); slot < slots; slot += kWarp) {
    const int32_t index = indices[row * slots + slot];
    outside += index >= 0 && !is_in_pool(pool_bits, n_features, index);
  }
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    outside += __shfl_xor_sync(kAllLanes, outside, distance);
  }
  if (lane_id() == 0) counts[row] = outside;
}

unsigned warps_grid(int64_t tokens) {
  return grid_size_of((tokens + kRestrictThreads / kWarp - 1) / (kRestrictThreads / kWarp));
}

std::tuple<Tensor, Tensor, Tensor> restrict_codes(Tensor values, Tensor indices, Tensor pool_bits) {
  check_tensor("values", values, ScalarType::Float, 2);
  check_tensor("indices", indices, ScalarType::Int, 2);
  check_tensor("pool_bits", pool_bits, ScalarType::Int, 1);
  check_size("values", values, 0, indices.size(0));
  check_size("values", values, 1, indices.size(1));
  check_device("indices", indices, values);
  check_device("pool_bits", pool_bits, values);
  const int64_t tokens = indices.size(0), slots = indices.size(1);
  const DeviceScope device(values);
  Tensor kept_values = empty_tensor({tokens, slots}, ScalarType::Float, values);
  Tensor kept_indices = empty_tensor({tokens, slots}, ScalarType::Int, values);
  Tensor kept_counts = empty_tensor({tokens}, ScalarType::Int, values);
  launch(restrict_kernel, warps_grid(tokens), kRestrictThreads, 0, device.stream(),
         data_of<float>(values), data_of<int32_t>(indices), data_of<int32_t>(pool_bits),
         32 * pool_bits.size(0), tokens, slots, mutable_data_of<float>(kept_values),
         mutable_data_of<int32_t>(kept_indices), mutable_data_of<int32_t>(kept_counts));
  return {kept_values, kept_indices, kept_counts};
}

void pool_count(Tensor totals, Tensor indices) {
  check_tensor("totals", totals, ScalarType::Long, 1);
  check_tensor("indices", indices, ScalarType::Int, 2);
  check_device("indices", indices, totals);
  const int64_t n = indices.numel();
  const DeviceScope device(totals);
  // Eight blocks fill a multiprocessor; threads stride over the rest.
  const int64_t blocks =
      std::min((n + kCountThreads - 1) / kCountThreads, int64_t{8} * device.multiprocessors());
  launch(pool_count_kernel, grid_size_of(blocks), kCountThreads, 0, device.stream(),
         data_of<int32_t>(indices), n, totals.size(0), mutable_data_of<unsigned long long>(totals));
}

Tensor count_outside(Tensor indices, Tensor pool_bits) {
  check_tensor("indices", indices, ScalarType::Int, 2);
  check_tensor("pool_bits", pool_bits, ScalarType::Int, 1);
  check_device("pool_bits", pool_bits, indices);
  const int64_t tokens = indices.size(0);
  const DeviceScope device(indices);
  Tensor counts = empty_tensor({tokens}, ScalarType::Int, indices);
  launch(count_outside_kernel, warps_grid(tokens), kRestrictThreads, 0, device.stream(),
         data_of<int32_t>(indices), data_of<int32_t>(pool_bits), 32 * pool_bits.size(0), tokens,
         indices.size(1), mutable_data_of<int32_t>(counts));
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("restrict", TORCH_BOX(&restrict_codes));
  m.impl("pool_count_", TORCH_BOX(&pool_count));
  m.impl("count_outside", TORCH_BOX(&count_outside));
}

}  // namespace saelens_certify
