// Small kernels, right and wrong, that show what the host shim notices. The first argument names
// the case; what it prints must not depend on SAELENS_CERTIFY_SHIM_SEED where the kernel is right.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/cuda/host/shim.h"

namespace {

namespace shim = saelens_certify::shim;

constexpr unsigned kAll = 0xffffffffu;

// Reverses each block's part through shared memory.
template <bool kWait>
__global__ void reverse(const int* from, int* to) {
  __shared__ int part[256];
  part[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  if (kWait) __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}

// A chain of numbers in which each thread reads what its neighbour wrote before the last barrier.
template <bool kWait>
__global__ void shift(int* to) {
  __shared__ int value[128];
  const int i = static_cast<int>(threadIdx.x);
  value[i] = i;
  __syncthreads();
  for (int round = 0; round < 8; ++round) {
    const int next = value[(i + 1) % 128];
    if (kWait) __syncthreads();
    value[i] = next;
    __syncthreads();
  }
  to[i] = value[i];
}

__global__ void missed_barrier(int* to) {
  if (threadIdx.x < 40) return;
  __syncthreads();
  to[threadIdx.x] = 1;
}

__global__ void different_barriers(int* to) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  to[threadIdx.x] = 1;
}

__global__ void divergent(int* to) {
  unsigned got;
  if (threadIdx.x % 2 == 0) {
    got = __ballot_sync(kAll, 1);
  } else {
    got = static_cast<unsigned>(__shfl_sync(kAll, 1, 0));
  }
  to[threadIdx.x] = static_cast<int>(got);
}

__global__ void missing_lane(int* to) {
  if (threadIdx.x == 5) return;
  to[threadIdx.x] = __any_sync(kAll, 1);
}

__global__ void foreign_mask(int* to) { to[threadIdx.x] = __any_sync(0x0000ffffu, 1); }

__global__ void shuffle_from_outside(int* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = __shfl_sync(0x0000ffffu, 7, 20);
}

__global__ void barrier_in_half_a_warp(int* to) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  to[threadIdx.x] = 1;
}

__global__ void uninitialised(float* to) {
  __shared__ float value[64];
  if (threadIdx.x == 0) value[0] = 1.0f;
  __syncthreads();
  to[threadIdx.x] = value[threadIdx.x] + reinterpret_cast<float*>(shim::dynamic_memory)[0];
}

__global__ void beyond_shared(int* to) {
  __shared__ int value[33];
  value[threadIdx.x + (to == nullptr)] = 1;
  __syncthreads();
  const int* behind = value + 2;
  to[threadIdx.x] = behind[threadIdx.x];
}

__global__ void beyond_dynamic(int* to) {
  int* value = reinterpret_cast<int*>(shim::dynamic_memory);
  value[threadIdx.x + 1] = 1;
  to[threadIdx.x] = 0;
}

// Two atomics that are right one by one; whoever comes first sees 0.
__global__ void arrivals(unsigned* counter, int* to) {
  to[threadIdx.x] = static_cast<int>(atomicAdd(counter, 1u));
}

__global__ void lost_update(int* counter) {
  const int before = *counter;
  atomicAdd(counter + 1, 1);
  *counter = before + 1;
}

__global__ void collectives(int* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned low = 0x0000ffffu, mask = lane < 16 ? low : ~low;
  int* out = to + threadIdx.x * 16;
  out[0] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[1] = __shfl_sync(kAll, lane * lane, lane / 2);
  out[2] = __shfl_xor_sync(kAll, lane, 5);
  out[3] = __shfl_down_sync(kAll, lane, 3u);
  out[4] = __shfl_up_sync(kAll, lane, 2u);
  out[5] = __shfl_xor_sync(kAll, lane, 6, 8);
  out[6] = __shfl_sync(kAll, lane, 3, 8);
  out[7] = static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(lane)));
  out[8] = static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(lane ^ 9)));
  out[9] = __any_sync(mask, lane == 20);
  out[10] = __all_sync(mask, lane >= 16);
  out[11] = static_cast<int>(1000 * __shfl_xor_sync(kAll, 0.5 * lane, 1));
  out[12] = __syncthreads_count(threadIdx.x % 5 == 0);
  out[13] = __syncthreads_or(threadIdx.x == 70);
  out[14] = __syncthreads_and(threadIdx.x != 70);
  if (lane < 7) out[15] = static_cast<int>(__ballot_sync(0x7fu, lane & 1));
}

__global__ void roundings(const float* a, const float* b, float* to) {
  const float x = a[threadIdx.x], y = b[threadIdx.x];
  float* out = to + threadIdx.x * 6;
  out[0] = __fadd_ru(x, y);
  out[1] = __fadd_rd(x, y);
  out[2] = __fmul_ru(x, y);
  out[3] = __fmul_rd(x, y);
  out[4] = __double2float_ru(static_cast<double>(x) / y);
  out[5] = __double2float_rd(static_cast<double>(x) / y);
}

template <typename T>
void print(const std::vector<T>& values) {
  for (const T& value : values) std::printf("%.12g ", static_cast<double>(value));
  std::printf("\n");
}

// Runs `kernel(out)` with one block and prints `count` results per thread.
template <typename T, typename F>
void show(F kernel, unsigned threads, int count = 1, size_t dynamic_bytes = 0) {
  std::vector<T> out(threads * count, T(-1));
  shim::run([&] { kernel(out.data()); }, 1, threads, dynamic_bytes);
  print(out);
}

void show_reversed(void (*kernel)(const int*, int*)) {
  std::vector<int> from(768), to(768);
  for (int i = 0; i < 768; ++i) from[i] = i;
  shim::run([&] { kernel(from.data(), to.data()); }, 3, 256, 0);
  print(to);
}

void show_roundings() {
  std::vector<float> a, b, to(6 * 64);
  for (int i = 0; i < 64; ++i) {
    a.push_back(std::ldexp(1.0f + static_cast<float>(i) / 97, i % 60 - 30));
    b.push_back((i % 2 ? -1.0f : 1.0f) * (0.3f + static_cast<float>(i % 11) / 13));
  }
  shim::run([&] { roundings(a.data(), b.data(), to.data()); }, 1, 64, 0);
  print(a);
  print(b);
  print(to);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  if (name == "reverse") show_reversed(reverse<true>);
  if (name == "reverse_unsynchronised") show_reversed(reverse<false>);
  if (name == "shift") show<int>(shift<true>, 128);
  if (name == "shift_unsynchronised") show<int>(shift<false>, 128);
  if (name == "missed_barrier") show<int>(missed_barrier, 64);
  if (name == "different_barriers") show<int>(different_barriers, 64);
  if (name == "divergent") show<int>(divergent, 32);
  if (name == "missing_lane") show<int>(missing_lane, 32);
  if (name == "foreign_mask") show<int>(foreign_mask, 32);
  if (name == "shuffle_from_outside") show<int>(shuffle_from_outside, 32);
  if (name == "barrier_in_half_a_warp") show<int>(barrier_in_half_a_warp, 32);
  if (name == "uninitialised") show<float>(uninitialised, 64, 1, 4);
  if (name == "beyond_shared") show<int>(beyond_shared, 32);
  if (name == "beyond_dynamic") show<int>(beyond_dynamic, 32, 1, 128);
  if (name == "collectives") show<int>(collectives, 96, 16);
  if (name == "roundings") show_roundings();
  if (name == "arrivals") {
    unsigned counter = 0;
    show<int>([&](int* out) { arrivals(&counter, out); }, 64);
  }
  if (name == "lost_update") {
    int counter[2] = {0, 0};
    shim::run([&] { lost_update(counter); }, 1, 64, 0);
    std::printf("%d %d\n", counter[0], counter[1]);
  }
  return 0;
}
