// Host side of the operators on predictions: the buffer of states, launches. Whether targets lie
// inside the vocabulary is the callers' to check; here one that does not gives NaN.
#pragma once

#include "ops/cuda/finish.cuh"
#include "ops/statistics.h"

namespace saelens_certify {

namespace {

template <bool kCap>
Cap<kCap> cap_of(const PredictionArgs& args) {
  return {args.softcap, static_cast<float>(args.softcap), static_cast<float>(1.0 / args.softcap)};
}

// Calls f(std::bool_constant<choice>).
template <typename F>
auto with_choice(bool choice, F&& f) {
  return choice ? f(std::true_type()) : f(std::false_type());
}

inline int64_t segments_of(int64_t columns) {
  return (columns + kSegmentColumns - 1) / kSegmentColumns;
}

// Working memory: 16 bytes (a pair: 40) per row and segment.
template <bool kPair>
class States {
 public:
  States(int64_t rows, int64_t per_row, const Tensor& like)
      : states_(empty_tensor({rows * per_row * kDoubles}, ScalarType::Double, like)),
        gold_(empty_tensor({rows * (kPair ? 2 : 1)}, ScalarType::Float, like)),
        per_row_(per_row) {}

  State<kPair>* at(int64_t row, int64_t segment) const {
    return reinterpret_cast<State<kPair>*>(mutable_data_of<double>(states_)) + row * per_row_ +
           segment;
  }
  float* gold(int64_t row) const { return mutable_data_of<float>(gold_) + row * (kPair ? 2 : 1); }
  int64_t per_row() const { return per_row_; }

 private:
  static constexpr int64_t kDoubles = sizeof(State<kPair>) / sizeof(double);
  static_assert(sizeof(State<kPair>) % sizeof(double) == 0);
  Tensor states_, gold_;
  int64_t per_row_;
};

// Blocks of a row run next to each other in time, rows in launches of what a grid takes.
template <typename T, bool kPair, bool kCap, bool kBias>
void launch_segments(const Segments<T, kPair, kCap, kBias>& args, int64_t rows, Stream stream) {
  launch(segment_kernel<T, kPair, kCap, kBias>,
         dim3(grid_size_of(rows), grid_size_of(segments_of(args.columns))), kSegmentThreads, 0,
         stream, args);
}

// Statistics of rows that repeat the tokens of the targets as often as it takes.
template <bool kPair, bool kCap>
auto finish(const PredictionArgs& prediction, const States<kPair>& states, int64_t rows,
            Stream stream) {
  const Tensor& like = prediction.targets;
  Finish<kPair, kCap> args = {};
  args.states = states.at(0, 0);
  args.gold = states.gold(0);
  args.targets = data_of<int64_t>(prediction.targets);
  args.rows = rows;
  args.tokens = prediction.tokens();
  args.states_per_row = states.per_row();
  args.d_vocab = prediction.d_vocab;
  args.alpha = prediction.alpha;
  args.cap = cap_of<kCap>(prediction);
  Tensor bits = empty_tensor({rows}, ScalarType::Double, like);
  args.bits = mutable_data_of<double>(bits);
  const auto run = [&] {
    const int64_t rows_per_block = kFinishThreads / kWarp;
    launch(finish_kernel<kPair, kCap>, grid_size_of((rows + rows_per_block - 1) / rows_per_block),
           kFinishThreads, 0, stream, args);
  };
  if constexpr (kPair) {
    Tensor bits_base = empty_tensor({rows}, ScalarType::Double, like);
    Tensor kl = empty_tensor({rows}, ScalarType::Double, like);
    Tensor agree = empty_tensor({rows}, ScalarType::Bool, like);
    Tensor gap = empty_tensor({rows}, ScalarType::Double, like);
    args.bits_base = mutable_data_of<double>(bits_base);
    args.kl = mutable_data_of<double>(kl);
    args.agree = mutable_data_of<bool>(agree);
    args.gap = mutable_data_of<double>(gap);
    run();
    return PairStats{bits_base, bits, kl, agree, gap};
  } else {
    Tensor lse = empty_tensor({rows}, ScalarType::Double, like);
    Tensor gold = empty_tensor({rows}, ScalarType::Double, like);
    Tensor argmax = empty_tensor({rows}, ScalarType::Int, like);
    args.lse = mutable_data_of<double>(lse);
    args.gold_logprob = mutable_data_of<double>(gold);
    args.argmax = mutable_data_of<int32_t>(argmax);
    run();
    return TokenStats{bits, lse, gold, argmax};
  }
}

}  // namespace

}  // namespace saelens_certify
