// What every CUDA source includes first: launching, streams, storage types, and names that differ
// between the real library and the tests' emulation (SAELENS_CERTIFY_HOST_SHIM, host/shim.h).
//
// Rules for kernels: anonymous namespace; no `extern __shared__` (use dynamic_shared); full warps
// at every collective, every thread at every barrier; explicit _rn intrinsics wherever the numeric
// contract fixes the bits, as nvcc may fuse an ordinary product and sum; int64 offsets into
// tensors.
#pragma once

#if defined(SAELENS_CERTIFY_HOST_SHIM)
#include "ops/cuda/host/shim.h"
#define SC_NAMESPACE saelens_certify_emulated
#define SC_DISPATCH CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SC_NAMESPACE saelens_certify
#define SC_DISPATCH CUDA
#endif

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <utility>

#include "ops/common.h"

namespace saelens_certify {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- launching -----------------------------------------------------------------------------

#if defined(SAELENS_CERTIFY_HOST_SHIM)

using Stream = int;

// Makes the device of a tensor the current one; its stream is where all work goes.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  Stream stream() const { return 0; }
  // Few, so that grids sized by it have several rounds in tests.
  int multiprocessors() const { return 3; }
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_bytes, Stream,
            Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  STD_TORCH_CHECK(grid.y < 65536 && grid.z < 65536, "CUDA grid of ", grid.y, " x ", grid.z);
  shim::run([&] { kernel(static_cast<Params>(args)...); }, grid, block, dynamic_bytes);
}

inline void zero_async(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

template <typename T>
__device__ T* dynamic_shared() {
  return reinterpret_cast<T*>(shim::dynamic_memory);
}

#else

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}

  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<Stream>(stream);
  }

  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_),
               "cudaDeviceGetAttribute");
    return count;
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Nothing happens for an empty grid.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_bytes, Stream stream,
            Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (dynamic_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(dynamic_bytes)),
               "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...),
             "launching a CUDA kernel");
}

inline void zero_async(void* memory, size_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
}

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char saelens_certify_dynamic_memory[];
  return reinterpret_cast<T*>(saelens_certify_dynamic_memory);
}

#endif

// A grid dimension; x reaches 2^31 - 1.
inline unsigned grid_size_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks >= 0 && blocks < (int64_t{1} << 31), "a CUDA grid of ", blocks,
                  " blocks is too large: split the batch");
  return static_cast<unsigned>(blocks);
}

// --- storage types -------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__host__ __device__ inline float to_float(float x) { return x; }

// A bfloat16 is the upper half of a float32.
__host__ __device__ inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// A float16 is shifted into float32's fields; a product with 2^112 corrects the exponent's bias
// exactly, also for subnormal numbers. Infinities and NaN get the largest exponent.
__host__ __device__ inline float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// To nearest, ties to even; NaN stays NaN, too large gives infinity.
__host__ __device__ inline BFloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

__host__ __device__ inline Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  uint32_t half;
  if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  } else {
    // Below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded by the sum.
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// Numbers in 16 bytes, the most that one load can fetch.
template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls f with a null pointer to the storage type.
template <typename F>
auto with_type(Real type, F&& f) {
  switch (type) {
    case Real::kBFloat16:
      return f(static_cast<const BFloat16*>(nullptr));
    case Real::kFloat16:
      return f(static_cast<const Float16*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

// --- lanes ---------------------------------------------------------------------------------

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum that the contract prescribes for 32 lanes: distances 16, 8, 4, 2, 1; all lanes get it.
__device__ inline double butterfly_sum(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    x = __dadd_rn(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

}  // namespace saelens_certify
