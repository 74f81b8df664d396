// The kernel of all decoders: one block per row (of one permutation), each thread the columns of
// one 16-byte vector, or as many single columns where vectors do not fit.
#pragma once

#include "ops/cuda/device.h"

namespace saelens_certify {

namespace {

constexpr int kGatherThreads = 256;
// Slots whose numbers lie ready in shared memory.
constexpr int kGatherSlots = 256;
constexpr int kMoments = 5;

template <typename T>
struct Gather {
  const float* values;          // [tokens, slots]
  const int32_t* indices;       // [tokens, slots]
  const int32_t* counts;        // [tokens]
  const T* weight;              // [features, d_out]
  const float* bias;            // [d_out], or null
  const int32_t* permutations;  // [repeats, features], or null
  const float* target;          // [tokens, d_out], or null
  float* x_hat;                 // [repeats, tokens, d_out], or null
  double* stats;                // [repeats, tokens, 5], or null
  int64_t tokens, slots, features, d_out;
};

// A thread's columns of one tile: kCount neighbours, or (kVector false) every blockDim.x-th.
template <typename T, bool kVector>
struct Columns {
  static constexpr int kCount = kPerVector<T>;
  // Rows of weights under way at a time: 32 or 16 registers.
  static constexpr int kDepth = kVector ? 8 : 16 / kCount;

  int first;  // of this thread
  int end;    // d_out

  __device__ int at(int i) const {
    return kVector ? first + i : first + i * static_cast<int>(blockDim.x);
  }
  __device__ bool inside(int i) const { return at(kVector ? 0 : i) < end; }

  __device__ void read(const float* from, float* to) const {
    if constexpr (kVector) {
      if (!inside(0)) return;
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 part = __ldg(reinterpret_cast<const float4*>(from + first + i));
        to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (inside(i)) to[i] = __ldg(from + at(i));
      }
    }
  }

  // Past the cache: nothing reads it soon, and weights shall stay.
  __device__ void write(const float* from, float* to) const {
    if constexpr (kVector) {
      if (!inside(0)) return;
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        __stcs(reinterpret_cast<float4*>(to + first + i),
               make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (inside(i)) __stcs(to + at(i), from[i]);
      }
    }
  }
};

// Numbers of one row of weights as they lie in memory, so that several loads can be under way
// before the first is converted.
template <typename T, bool kVector>
struct Raw;

template <typename T>
struct Raw<T, true> {
  uint4 bits;

  __device__ void read(const T* row, const Columns<T, true>& columns) {
    if (columns.inside(0)) bits = __ldg(reinterpret_cast<const uint4*>(row + columns.first));
  }
  __device__ float get(int i) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16) & 0xffffu)});
    }
  }
};

template <typename T>
struct Raw<T, false> {
  T numbers[Columns<T, false>::kCount];

  __device__ void read(const T* row, const Columns<T, false>& columns) {
#pragma unroll
    for (int i = 0; i < Columns<T, false>::kCount; ++i) {
      if (columns.inside(i)) numbers[i] = row[columns.at(i)];
    }
  }
  __device__ float get(int i) const { return to_float(numbers[i]); }
};

// total += values[s] * weight[rows[s]], s ascending, one fused multiply-add per element.
template <typename T, bool kVector>
__device__ void add_slots(const float* values, const int32_t* rows, int n, const Gather<T>& args,
                          const Columns<T, kVector>& columns, float* total) {
  constexpr int kDepth = Columns<T, kVector>::kDepth;
  for (int slot = 0; slot < n; slot += kDepth) {
    Raw<T, kVector> raw[kDepth] = {};
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      if (slot + s < n) raw[s].read(args.weight + int64_t{rows[slot + s]} * args.d_out, columns);
    }
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      if (slot + s < n) {
        const float value = values[slot + s];
#pragma unroll
        for (int i = 0; i < columns.kCount; ++i) {
          total[i] = __fmaf_rn(value, raw[s].get(i), total[i]);
        }
      }
    }
  }
}

// What column i adds to the sum of this number.
__device__ inline double add_moment(int sum, float x, float y, double total) {
  const double a = x, b = y;
  switch (sum) {
    case 0: {
      const double gap = __dsub_rn(a, b);
      return __dadd_rn(total, __dmul_rn(gap, gap));
    }
    // Products of float32 numbers are exact in float64, so that fusing changes nothing.
    case 1:
      return __fma_rn(a, a, total);
    case 2:
      return __fma_rn(b, b, total);
    case 3:
      return __fma_rn(a, b, total);
    default:
      return __dadd_rn(total, a);
  }
}

template <typename T, bool kVector, bool kStats>
__global__ void __launch_bounds__(kGatherThreads, 4) gather_kernel(const Gather<T> args) {
  constexpr int kCount = Columns<T, kVector>::kCount;
  __shared__ float slot_values[kGatherSlots];
  __shared__ int32_t slot_rows[kGatherSlots];
  // One tile of the reconstruction and of the target, for the sums.
  __shared__ float tile_x[kStats ? kGatherThreads * kCount : 1];
  __shared__ float tile_y[kStats ? kGatherThreads * kCount : 1];
  __shared__ double sums[kStats ? kMoments * kWarp : 1];

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t token = blockIdx.x % args.tokens, repeat = blockIdx.x / args.tokens;
  const int64_t row = blockIdx.x;
  const int tile = threads * kCount, d_out = static_cast<int>(args.d_out);
  const int64_t asked = args.counts[token] < args.slots ? args.counts[token] : args.slots;
  const int count = args.features > 0 && asked > 0 ? static_cast<int>(asked) : 0;
  const int first_tile = static_cast<int>(blockIdx.y) * tile;
  if constexpr (kStats) {
    for (int i = thread; i < kMoments * kWarp; i += threads) sums[i] = 0.0;
  }

  // `begin` stays below 2^31: the host sees to it.
  for (int begin = first_tile; begin < d_out; begin += static_cast<int>(gridDim.y) * tile) {
    const Columns<T, kVector> columns = {begin + (kVector ? thread * kCount : thread), d_out};
    float y[kCount] = {};
    for (int first = 0; first < count; first += kGatherSlots) {
      const int n = count - first < kGatherSlots ? count - first : kGatherSlots;
      // With few slots they are still there from the tile before.
      if (count > kGatherSlots || begin == first_tile) {
        __syncthreads();
        for (int s = thread; s < n; s += threads) {
          const int64_t slot = token * args.slots + first + s;
          int64_t feature = args.indices[slot];
          if (args.permutations != nullptr && feature >= 0 && feature < args.features) {
            feature = args.permutations[repeat * args.features + feature];
          }
          const bool fits = feature >= 0 && feature < args.features;
          slot_rows[s] = fits ? static_cast<int32_t>(feature) : 0;
          slot_values[s] = fits ? args.values[slot] : 0.0f;
        }
        __syncthreads();
      }
      add_slots<T, kVector>(slot_values, slot_rows, n, args, columns, y);
    }
    if (args.bias != nullptr) {
      float bias[kCount] = {};
      columns.read(args.bias, bias);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = __fadd_rn(y[i], bias[i]);
    }
    if (args.x_hat != nullptr) columns.write(y, args.x_hat + row * args.d_out);

    if constexpr (kStats) {
      float x[kCount] = {};
      columns.read(args.target + token * args.d_out, x);
      __syncthreads();  // the sums of the tile before are done
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        tile_x[columns.at(i) - begin] = x[i];
        tile_y[columns.at(i) - begin] = y[i];
      }
      __syncthreads();
      // Lane j adds the columns j, j + 32, ... in this order; tiles are whole multiples of 32. Each
      // warp has its share of the five sums.
      const int size = d_out - begin < tile ? d_out - begin : tile;
      for (int sum = warp_id(); sum < kMoments; sum += threads / kWarp) {
        double total = sums[sum * kWarp + lane_id()];
#pragma unroll 4
        for (int i = lane_id(); i < size; i += kWarp) {
          total = add_moment(sum, tile_x[i], tile_y[i], total);
        }
        sums[sum * kWarp + lane_id()] = total;
      }
    }
  }

  if constexpr (kStats) {
    __syncthreads();  // without any column the zeros are another thread's
    for (int sum = warp_id(); sum < kMoments; sum += threads / kWarp) {
      const double total = butterfly_sum(sums[sum * kWarp + lane_id()]);
      if (lane_id() == 0) args.stats[row * kMoments + sum] = total;
    }
  }
}

}  // namespace

}  // namespace saelens_certify
