// Statistics of predictions for CUDA tensors; see ops/statistics.h for what is computed. One read
// of the logits; float32 sums of at most 8 terms, float64 beyond.
#include "ops/cuda/prediction.cuh"

namespace saelens_certify {

namespace {

template <bool kPair>
auto stats_of(const Tensor& base, const Tensor* other, Real type, const PredictionArgs& args) {
  const DeviceScope device(base);
  const int64_t rows = base.size(0);
  const States<kPair> states(rows, segments_of(args.d_vocab), base);
  return with_choice(args.softcap != 0, [&](auto capped) {
    constexpr bool kCap = decltype(capped)::value;
    with_type(type, [&](auto* typed) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
      Segments<T, kPair, kCap, false> segments = {};
      segments.logits[0] = data_of<T>(base);
      if constexpr (kPair) segments.logits[1] = data_of<T>(*other);
      segments.targets = data_of<int64_t>(args.targets);
      segments.stride = base.size(1);
      segments.columns = args.d_vocab;
      segments.states = states.at(0, 0);
      segments.states_per_row = states.per_row();
      segments.gold = states.gold(0);
      segments.cap = cap_of<kCap>(args);
      launch_segments(segments, rows, device.stream());
    });
    return finish<kPair, kCap>(args, states, rows, device.stream());
  });
}

TokenStats token_stats(Tensor logits, Tensor targets, double alpha, double softcap,
                       int64_t d_vocab) {
  const Real type = check_real("logits", logits, 2);
  return stats_of<false>(
      logits, nullptr, type,
      checked_prediction(targets, logits, logits.size(1), alpha, softcap, d_vocab));
}

PairStats pair_stats(Tensor base_logits, Tensor logits, Tensor targets, double alpha,
                     double softcap, int64_t d_vocab) {
  const Real type = checked_pair(base_logits, logits);
  return stats_of<true>(
      base_logits, &logits, type,
      checked_prediction(targets, logits, logits.size(1), alpha, softcap, d_vocab));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("pair_stats", TORCH_BOX(&pair_stats));
}

}  // namespace saelens_certify
