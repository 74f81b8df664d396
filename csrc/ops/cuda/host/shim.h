// CUDA on the CPU, for tests: what the kernels of csrc/ops/cuda use of the language and its
// built-ins, as plain C++. A block's threads are fibers (engine.cpp) that run one at a time and
// hand over at barriers, warp collectives and, now and then, atomics, in an order that a seed
// (environment variable SAELENS_CERTIFY_SHIM_SEED) determines. What is wrong on a GPU is made
// visible here: results that depend on the order differ between seeds, lanes that meet at
// different collectives and barriers that a thread misses abort the process, shared memory starts
// out as NaN, and AddressSanitizer knows the fibers and the ends of shared arrays.
//
// Kernels belong into anonymous namespaces: a __shared__ array is a static variable in a section
// of its own, which internal linkage allows in templates, too.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("saelens_certify_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace saelens_certify::shim {

using Where = std::source_location;

// Of the running thread.
extern dim3 thread_index, block_index, block_size, grid_size;
extern char* dynamic_memory;

enum class Kind {
  kBarrier,
  kSyncwarp,
  kBallot,
  kShuffle,
  kReduceAdd,
  kReduceMax,
  kReduceMin,
  kReduceOr
};

// Runs every block of the grid.
void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t dynamic_bytes);

// Waits until every thread of the block is here; the number of threads with `value` != 0.
int barrier(int value, const Where& where);

// Waits until all lanes of the mask are here. For a shuffle `source` is a lane, and the result
// the value it brought; for everything else all lanes get the same.
uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, const Where& where);

// Lets other threads run now and then.
void maybe_yield();

int lane();

template <typename T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  return unpack<T>(collective(Kind::kShuffle, mask, pack(value), source, where));
}

// One step of an atomic operation; threads only change over between steps.
template <typename T, typename F>
T atomically(T* address, F change) {
  maybe_yield();
  const T before = *address;
  *address = change(before);
  return before;
}

// The float64 number `value` rounded to float32, not below (above) it.
inline float rounded_up(double value) {
  const float nearest = static_cast<float>(value);
  return nearest < value ? std::nextafter(nearest, INFINITY) : nearest;
}
inline float rounded_down(double value) { return -rounded_up(-value); }

// Sum of two float32 numbers as a float64 number that rounds to float32 in the same direction: the
// error of the float64 sum, if any, moves it by one unit towards where the sum lies.
inline double sum_towards(float a, float b) {
  const double sum = static_cast<double>(a) + static_cast<double>(b);
  const double back = sum - a;
  const double error = (a - (sum - back)) + (b - back);
  if (error == 0 || std::isnan(error)) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

}  // namespace saelens_certify::shim

#define threadIdx (::saelens_certify::shim::thread_index)
#define blockIdx (::saelens_certify::shim::block_index)
#define blockDim (::saelens_certify::shim::block_size)
#define gridDim (::saelens_certify::shim::grid_size)
constexpr int warpSize = 32;

#include "ops/cuda/host/intrinsics.h"
