// Softmax sums of rows of logits. Each block takes one segment of one row and leaves a state; the
// states of a row are then joined by one warp. Which logits are added to which in what order
// depends on their columns alone, so that a row gives the same bits in every batch.
#pragma once

#include "ops/cuda/device.h"

namespace saelens_certify {

namespace {

constexpr int kSegmentColumns = 4096;
constexpr int kSegmentThreads = 128;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.402823466e38f;

// Sums over some logits of a row, relative to the largest of them.
struct RowState {
  float top;       // -inf: no logit, or none but -inf
  int32_t argmax;  // the lowest column of the largest logit
  double sum;      // of exp(c(logit) - c(top)), c the cap
};

struct TokenState {
  RowState base;
};

// `gap` is the sum of exp(c(base) - c(base.top)) ((c(base) - c(base.top)) - (c(other) -
// c(other.top))): the difference of the tops is taken out, which keeps the sum accurate.
struct PairState {
  RowState base;
  RowState other;
  double gap;
};

template <bool kPair>
using State = std::conditional_t<kPair, PairState, TokenState>;

// c(x) = cap tanh(x / cap), or x itself.
template <bool kCap>
struct Cap {
  double whole;
  float cap, inverse;

  // Infinite logits count as very large ones: capped, they are nothing special.
  __device__ float prepared(float x) const {
    if constexpr (kCap) {
      x = x > kLargest ? kLargest : x;
      return x < -kLargest ? -kLargest : x;
    }
    return x;
  }

  // For each x, c(x) - c(top), with a relative error of a few roundings however large the cap is:
  // tanh a - tanh b = 2 expm1(2 (a - b)) / ((1 + exp(2 a)) (1 + exp(-2 b))).
  struct Below {
    float top, inverse, factor;

    __device__ float operator()(float x) const {
      if constexpr (kCap) {
        return factor * expm1f((x - top) * inverse) / (1.0f + expf(x * inverse));
      } else {
        return x - top;
      }
    }
  };
  __device__ Below below(float top) const {
    if constexpr (kCap) {
      const float twice = 2.0f * inverse;
      return {top, twice, 2.0f * cap / (1.0f + expf(-top * twice))};
    } else {
      // While every logit is -inf there is no maximum to subtract; exp(-inf) = 0 all the same.
      return {top == -kInfinity ? 0.0f : top, 0.0f, 0.0f};
    }
  }

  __device__ double exact(double x) const {
    if constexpr (kCap) return __dmul_rn(whole, tanh(x / whole));
    return x;
  }
  // c(x) - c(top), x <= top, for whole sums.
  template <bool kExact>
  __device__ double gap(float x, float top) const {
    if constexpr (kCap && !kExact) return static_cast<double>(below(top)(x));
    return __dsub_rn(exact(static_cast<double>(x)), exact(static_cast<double>(top)));
  }
};

__device__ inline RowState empty_row() { return {-kInfinity, 0, 0.0}; }

// exp(gap), gap <= 0. A sum is multiplied by few factors in its segment, where float32 does; what
// joins segments is exact.
template <bool kExact>
__device__ double factor_of(double gap) {
  if constexpr (kExact) return exp(gap);
  return static_cast<double>(expf(static_cast<float>(gap)));
}

// Multiplies a sum by exp(gap) and moves its top, gap = c(old top) - c(new top); returns the gap.
template <bool kExact, bool kCap>
__device__ double raise(const Cap<kCap>& cap, float top, RowState* row) {
  if (row->top == -kInfinity || row->top == top) {
    row->top = top;  // the sum is 0 (or NaN), or stays
    return 0.0;
  }
  const double gap = cap.template gap<kExact>(row->top, top);
  row->sum = __dmul_rn(row->sum, factor_of<kExact>(gap));
  row->top = top;
  return gap;
}

template <bool kExact, bool kCap>
__device__ void raise(const Cap<kCap>& cap, float base_top, float other_top, PairState* state) {
  const double before = state->base.sum;
  const double base_gap = raise<kExact>(cap, base_top, &state->base);
  const double other_gap = raise<kExact>(cap, other_top, &state->other);
  if (before == 0.0 || fabs(state->gap) == static_cast<double>(kInfinity)) return;
  // The terms gain base_gap - other_gap each; once infinite, the sum stays so.
  const double factor = base_gap == 0.0 ? 1.0 : factor_of<kExact>(base_gap);
  state->gap = __dadd_rn(__dmul_rn(state->gap, factor),
                         __dmul_rn(state->base.sum, __dsub_rn(base_gap, other_gap)));
}

// A number that compares as unsigned like x as float, -0 equal to 0; x is not NaN.
__device__ inline unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The largest top of a warp's lanes and its lowest column.
__device__ inline void warp_top(const RowState& row, float* top, int32_t* argmax) {
  const unsigned mine = ordered(row.top);
  const unsigned best = __reduce_max_sync(kAllLanes, mine);
  // Columns of lanes without a finite logit must not win against those of lanes that have one.
  *argmax = static_cast<int32_t>(
      __reduce_min_sync(kAllLanes, mine == best ? static_cast<unsigned>(row.argmax) : 0xffffffffu));
  const unsigned bits = best & 0x80000000u ? best ^ 0x80000000u : ~best;
  *top = __uint_as_float(bits);
}

// Joins the states of a warp's lanes; every lane gets the whole.
template <bool kExact, bool kCap>
__device__ void warp_join(const Cap<kCap>& cap, TokenState* state) {
  float top;
  int32_t argmax;
  warp_top(state->base, &top, &argmax);
  raise<kExact>(cap, top, &state->base);
  state->base.argmax = argmax;
  state->base.sum = butterfly_sum(state->base.sum);
}

template <bool kExact, bool kCap>
__device__ void warp_join(const Cap<kCap>& cap, PairState* state) {
  float base_top, other_top;
  int32_t base_argmax, other_argmax;
  warp_top(state->base, &base_top, &base_argmax);
  warp_top(state->other, &other_top, &other_argmax);
  raise<kExact>(cap, base_top, other_top, state);
  state->base.argmax = base_argmax;
  state->other.argmax = other_argmax;
  state->base.sum = butterfly_sum(state->base.sum);
  state->other.sum = butterfly_sum(state->other.sum);
  state->gap = butterfly_sum(state->gap);
}

// What the blocks of one launch read and write: columns [first_column, first_column + columns) of
// some rows, which lie in `logits` from element 0 of each row on.
template <typename T, bool kPair, bool kCap, bool kBias>
struct Segments {
  const T* logits[kPair ? 2 : 1];
  const float* bias;       // of these columns; null without kBias
  const int64_t* targets;  // of these rows
  int64_t stride;          // elements from row to row
  int64_t first_column, columns;
  State<kPair>* states;  // [rows, states_per_row], those of these rows and columns
  int64_t states_per_row;
  float* gold;  // [rows, 1 or 2]: logits of the targets, if they are among the columns
  Cap<kCap> cap;
};

// 16 logits in vectors of 16 bytes, as they lie in memory; -inf beyond the last.
template <typename T>
struct Chunk {
  static constexpr int kCount = kPerVector<T>;
  static constexpr int kDepth = 16 / kCount;
  uint4 bits[kDepth];

  static constexpr uint32_t kMasked = sizeof(T) == 4                ? 0xff800000u
                                      : std::is_same_v<T, BFloat16> ? 0xff80ff80u
                                                                    : 0xfc00fc00u;

  // Column of a number, relative to the first of the segment.
  __device__ static int column(int start, int v, int i) {
    return start + (v * kSegmentThreads + static_cast<int>(threadIdx.x)) * kCount + i;
  }

  __device__ void read(const T* from, int start, int end, bool vectors) {
#pragma unroll
    for (int v = 0; v < kDepth; ++v) {
      const int first = column(start, v, 0);
      if (vectors && first + kCount <= end) {
        bits[v] = __ldcs(reinterpret_cast<const uint4*>(from + first));
      } else {
        // Rows of an odd number of logits; the loads of one vector share its cache line.
        const bool whole = first + kCount <= end;
        uint32_t words[4] = {kMasked, kMasked, kMasked, kMasked};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (whole || first + i < end) set(words, i, from[first + i]);
        }
        bits[v] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  // Adds a number to each logit.
  __device__ void add(const float* bias, int start, int end) {
    static_assert(sizeof(T) == 4);
#pragma unroll
    for (int v = 0; v < kDepth; ++v) {
      const int first = column(start, v, 0);
      float sums[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // What lies beyond the last column gets that one's bias, and stays -inf unless the bias is
        // infinite, which spoils the row anyway.
        sums[i] = __fadd_rn(get(v, i), bias[min(first + i, end - 1)]);
      }
      bits[v] = make_uint4(__float_as_uint(sums[0]), __float_as_uint(sums[1]),
                           __float_as_uint(sums[2]), __float_as_uint(sums[3]));
    }
  }

  __device__ float get(int v, int i) const {
    const uint32_t words[4] = {bits[v].x, bits[v].y, bits[v].z, bits[v].w};
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16) & 0xffffu)});
    }
  }

 private:
  __device__ static void set(uint32_t* words, int i, float x) { words[i] = __float_as_uint(x); }
  template <typename Half>
  __device__ static void set(uint32_t* words, int i, Half x) {
    const uint32_t shift = i % 2 * 16;
    words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(x.bits) << shift;
  }
};

template <typename T, bool kPair, bool kCap, bool kBias>
class SegmentThread {
 public:
  static constexpr int kCount = Chunk<T>::kCount;

  __device__ SegmentThread(const Segments<T, kPair, kCap, kBias>& args, int64_t row, int64_t first)
      : args_(args), first_(first) {
    const int64_t rest = args.columns - first;
    end_ = static_cast<int>(rest < kSegmentColumns ? rest : kSegmentColumns);
    for (int r = 0; r < (kPair ? 2 : 1); ++r) {
      from_[r] = args.logits[r] + row * args.stride + first;
      vectors_[r] = reinterpret_cast<uintptr_t>(from_[r]) % 16 == 0;
    }
  }

  // Adds the columns from `start` on that are this thread's.
  __device__ void add(int start, State<kPair>* state) {
    Chunk<T> chunk[kPair ? 2 : 1];
#pragma unroll
    for (int r = 0; r < (kPair ? 2 : 1); ++r) {
      chunk[r].read(from_[r], start, end_, vectors_[r]);
      if constexpr (kBias) chunk[r].add(args_.bias + first_, start, end_);
    }
    if constexpr (kPair) {
      RowState base = state->base, other = state->other;
      find_top(chunk[0], start, &base);
      find_top(chunk[1], start, &other);
      raise<false>(args_.cap, base.top, other.top, state);
      state->base.argmax = base.argmax;
      state->other.argmax = other.argmax;
      add_pair(chunk[0], chunk[1], start, state);
    } else {
      RowState row = state->base;
      find_top(chunk[0], start, &row);
      raise<false>(args_.cap, row.top, &state->base);
      state->base.argmax = row.argmax;
      add_row(chunk[0], start, &state->base);
    }
  }

 private:
  // A logit, or -inf where there is none (as Chunk left it; but a cap would change that).
  __device__ float logit(const Chunk<T>& chunk, int start, int v, int i) const {
    if (kCap && Chunk<T>::column(start, v, i) >= end_) return -kInfinity;
    return args_.cap.prepared(chunk.get(v, i));
  }

  __device__ void find_top(const Chunk<T>& chunk, int start, RowState* row) const {
    float best = -kInfinity;
#pragma unroll
    for (int v = 0; v < Chunk<T>::kDepth; ++v) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) best = fmaxf(best, logit(chunk, start, v, i));
    }
    if (!(best > row->top)) return;
    row->top = best;
    int at = 0;
#pragma unroll
    for (int v = Chunk<T>::kDepth - 1; v >= 0; --v) {
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
        if (logit(chunk, start, v, i) == best) at = Chunk<T>::column(start, v, i);
      }
    }
    row->argmax = static_cast<int32_t>(args_.first_column + first_ + at);
  }

  // A capped logit is never -inf, so that -inf always weighs nothing.
  __device__ static float weight(float x, float below) {
    return x == -kInfinity ? 0.0f : expf(below);
  }

  // At most kCount terms in float32 per sum, then float64.
  __device__ void add_row(const Chunk<T>& chunk, int start, RowState* row) const {
    const auto below = args_.cap.below(row->top);
#pragma unroll
    for (int v = 0; v < Chunk<T>::kDepth; ++v) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float x = logit(chunk, start, v, i);
        sum = __fadd_rn(sum, weight(x, below(x)));
      }
      row->sum = __dadd_rn(row->sum, static_cast<double>(sum));
    }
  }

  __device__ void add_pair(const Chunk<T>& base, const Chunk<T>& other, int start,
                           PairState* state) const {
    const auto base_below = args_.cap.below(state->base.top);
    const auto other_below = args_.cap.below(state->other.top);
#pragma unroll
    for (int v = 0; v < Chunk<T>::kDepth; ++v) {
      float base_sum = 0.0f, other_sum = 0.0f, gap_sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float p = logit(base, start, v, i), q = logit(other, start, v, i);
        const float a = base_below(p), b = other_below(q);
        const float factor = weight(p, a);
        base_sum = __fadd_rn(base_sum, factor);
        other_sum = __fadd_rn(other_sum, weight(q, b));
        // A token that the base masks contributes nothing; one that only the other masks makes the
        // divergence infinite, however small its weight.
        float term = __fmul_rn(factor, __fsub_rn(a, b));
        term = q == -kInfinity ? kInfinity : term;
        gap_sum = __fadd_rn(gap_sum, p == -kInfinity ? 0.0f : term);
      }
      state->base.sum = __dadd_rn(state->base.sum, static_cast<double>(base_sum));
      state->other.sum = __dadd_rn(state->other.sum, static_cast<double>(other_sum));
      state->gap = __dadd_rn(state->gap, static_cast<double>(gap_sum));
    }
  }

  const Segments<T, kPair, kCap, kBias>& args_;
  const int64_t first_;
  const T* from_[kPair ? 2 : 1];
  bool vectors_[kPair ? 2 : 1];
  int end_;
};

template <bool kPair>
__device__ State<kPair> empty_state() {
  if constexpr (kPair) {
    return {empty_row(), empty_row(), 0.0};
  } else {
    return {empty_row()};
  }
}

// Grid: rows x segments.
template <typename T, bool kPair, bool kCap, bool kBias>
__global__ void __launch_bounds__(kSegmentThreads, kPair ? 5 : 8)
    segment_kernel(const Segments<T, kPair, kCap, kBias> args) {
  constexpr int kWarps = kSegmentThreads / kWarp;
  __shared__ State<kPair> joined[kWarps];
  const int64_t row = blockIdx.x, first = int64_t{blockIdx.y} * kSegmentColumns;
  SegmentThread<T, kPair, kCap, kBias> thread(args, row, first);
  State<kPair> state = empty_state<kPair>();
  constexpr int kStep = 16 * kSegmentThreads;
  const int64_t rest = args.columns - first;
  const int end = static_cast<int>(rest < kSegmentColumns ? rest : kSegmentColumns);
  for (int start = 0; start < end; start += kStep) thread.add(start, &state);

  if (threadIdx.x == 0) {
    const int64_t target = args.targets[row] - args.first_column - first;
    if (target >= 0 && target < end) {
      for (int r = 0; r < (kPair ? 2 : 1); ++r) {
        float x = to_float(args.logits[r][row * args.stride + first + target]);
        if (kBias) x = __fadd_rn(x, args.bias[first + target]);
        args.gold[row * (kPair ? 2 : 1) + r] = x;
      }
    }
  }

  warp_join<false>(args.cap, &state);
  if (lane_id() == 0) joined[warp_id()] = state;
  __syncthreads();
  if (warp_id() == 0) {
    state = lane_id() < kWarps ? joined[lane_id()] : empty_state<kPair>();
    warp_join<false>(args.cap, &state);
    if (lane_id() == 0) args.states[row * args.states_per_row + blockIdx.y] = state;
  }
}

}  // namespace

}  // namespace saelens_certify
