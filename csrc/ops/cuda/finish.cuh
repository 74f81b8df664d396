// From the states of a row's segments to the statistics of its prediction.
#pragma once

#include "ops/cuda/softmax.cuh"

namespace saelens_certify {

namespace {

constexpr int kFinishThreads = 128;
constexpr double kBitsPerNat = 1.4426950408889634074;

template <bool kPair, bool kCap>
struct Finish {
  const State<kPair>* states;  // [rows, states_per_row]
  const float* gold;           // [rows, 1 or 2]
  const int64_t* targets;      // [tokens]; rows repeat the tokens
  int64_t rows, tokens, states_per_row, d_vocab;
  double alpha;
  Cap<kCap> cap;
  // Of the one prediction; of a pair, bits, bits of the base, and the rest of PairStats.
  double *bits, *lse, *gold_logprob;
  int32_t* argmax;
  double *bits_base, *kl, *gap;
  bool* agree;
};

// Adds the state of later columns to that of earlier ones.
template <bool kCap>
__device__ void append(const Cap<kCap>& cap, TokenState later, TokenState* state) {
  if (later.base.top > state->base.top) state->base.argmax = later.base.argmax;
  const float top = fmaxf(later.base.top, state->base.top);
  raise<true>(cap, top, &state->base);
  raise<true>(cap, top, &later.base);
  state->base.sum = __dadd_rn(state->base.sum, later.base.sum);
}

template <bool kCap>
__device__ void append(const Cap<kCap>& cap, PairState later, PairState* state) {
  if (later.base.top > state->base.top) state->base.argmax = later.base.argmax;
  if (later.other.top > state->other.top) state->other.argmax = later.other.argmax;
  const float base_top = fmaxf(later.base.top, state->base.top);
  const float other_top = fmaxf(later.other.top, state->other.top);
  raise<true>(cap, base_top, other_top, state);
  raise<true>(cap, base_top, other_top, &later);
  state->base.sum = __dadd_rn(state->base.sum, later.base.sum);
  state->other.sum = __dadd_rn(state->other.sum, later.other.sum);
  state->gap = __dadd_rn(state->gap, later.gap);
}

__device__ inline double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// NaN where the logits are no distribution.
template <bool kCap>
__device__ double log_sum_exp(const Cap<kCap>& cap, const RowState& row) {
  const double lse = cap.exact(row.top) + log(row.sum);
  return fabs(lse) < static_cast<double>(kInfinity) ? lse : not_a_number();
}

__device__ inline double smoothed_bits(double gold, double alpha, int64_t d_vocab) {
  return -log2(__dadd_rn(__dmul_rn(1 - alpha, exp(gold)), alpha / static_cast<double>(d_vocab)));
}

template <bool kPair, bool kCap>
__device__ double gold_logit(const Finish<kPair, kCap>& args, int64_t row, int which) {
  const int64_t target = args.targets[row % args.tokens];
  if (target < 0 || target >= args.d_vocab) return not_a_number();
  const float logit = args.gold[row * (kPair ? 2 : 1) + which];
  return args.cap.exact(args.cap.prepared(logit));
}

// One warp per row.
template <bool kPair, bool kCap>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish<kPair, kCap> args) {
  const int64_t row = int64_t{blockIdx.x} * (kFinishThreads / kWarp) + warp_id();
  if (row >= args.rows) return;  // the whole warp
  State<kPair> state = empty_state<kPair>();
  for (int64_t i = lane_id(); i < args.states_per_row; i += kWarp) {
    append(args.cap, args.states[row * args.states_per_row + i], &state);
  }
  warp_join<true>(args.cap, &state);
  if (lane_id() != 0) return;
  const double total = log_sum_exp(args.cap, state.base);
  const double logprob = gold_logit(args, row, 0) - total;
  const double bits = smoothed_bits(logprob, args.alpha, args.d_vocab);
  if constexpr (kPair) {
    const double other_total = log_sum_exp(args.cap, state.other);
    const double other_logprob = gold_logit(args, row, 1) - other_total;
    const double offset = args.cap.exact(state.base.top) - args.cap.exact(state.other.top);
    const double nats = state.gap / state.base.sum + (offset - (total - other_total));
    args.bits_base[row] = bits;
    args.bits[row] = smoothed_bits(other_logprob, args.alpha, args.d_vocab);
    // Rounding may put the divergence of equal predictions just below zero (NaN stays).
    args.kl[row] = (nats < 0.0 ? 0.0 : nats) * kBitsPerNat;
    args.agree[row] = state.base.argmax == state.other.argmax;
    // Equal infinities (a masked gold token) are no gap.
    args.gap[row] = logprob == other_logprob ? 0.0 : fabs(logprob - other_logprob) * kBitsPerNat;
  } else {
    args.bits[row] = bits;
    args.lse[row] = total;
    args.gold_logprob[row] = logprob;
    args.argmax[row] = state.base.argmax;
  }
}

}  // namespace

}  // namespace saelens_certify
