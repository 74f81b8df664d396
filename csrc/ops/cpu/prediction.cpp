#include "ops/cpu/prediction.h"

#include <algorithm>
#include <cmath>

namespace saelens_certify {

namespace {

constexpr double kBitsPerNat = 1.4426950408889634074;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double capped(float logit, double softcap) {
  double value = logit;
  if (softcap > 0) row_kernels().softcap(&logit, 1, softcap, &value);
  return value;
}

double log_sum_exp(const SoftmaxRow& row, double softcap) {
  const double lse = capped(row.top, softcap) + std::log(row.sum);
  return std::isfinite(lse) ? lse : kNan;
}

double smoothed_bits(double gold, double alpha, int64_t d_vocab) {
  return -std::log2((1 - alpha) * std::exp(gold) + alpha / static_cast<double>(d_vocab));
}

// Equal infinities (a masked gold token) are no gap.
double gap_bits(double gold_base, double gold) {
  return gold_base == gold ? 0.0 : std::fabs(gold_base - gold) * kBitsPerNat;
}

Tensor doubles(int64_t rows) { return empty_tensor({rows}, ScalarType::Double); }

}  // namespace

TokenResults::TokenResults(const PredictionArgs& args)
    : args_(args),
      bits_(doubles(args.targets.size(0))),
      lse_(doubles(args.targets.size(0))),
      gold_(doubles(args.targets.size(0))),
      argmax_(empty_tensor({args.targets.size(0)}, ScalarType::Int)) {}

void TokenResults::write(int64_t row, const SoftmaxRow& state, float gold) const {
  const double total = log_sum_exp(state, args_.softcap);
  const double logprob = capped(gold, args_.softcap) - total;
  mutable_data_of<double>(lse_)[row] = total;
  mutable_data_of<double>(gold_)[row] = logprob;
  mutable_data_of<double>(bits_)[row] = smoothed_bits(logprob, args_.alpha, args_.d_vocab);
  mutable_data_of<int32_t>(argmax_)[row] = state.argmax;
}

PairResults::PairResults(const PredictionArgs& args, int64_t rows)
    : args_(args),
      bits_base_(doubles(rows)),
      bits_(doubles(rows)),
      kl_(doubles(rows)),
      agree_(empty_tensor({rows}, ScalarType::Bool)),
      gap_(doubles(rows)) {}

void PairResults::write(int64_t row, const SoftmaxPair& state, float base_gold, float gold) const {
  const double base_total = log_sum_exp(state.base, args_.softcap);
  const double total = log_sum_exp(state.other, args_.softcap);
  const double base_logprob = capped(base_gold, args_.softcap) - base_total;
  const double logprob = capped(gold, args_.softcap) - total;
  const double nats = state.gap / state.base.sum + state.offset - (base_total - total);
  mutable_data_of<double>(bits_base_)[row] =
      smoothed_bits(base_logprob, args_.alpha, args_.d_vocab);
  mutable_data_of<double>(bits_)[row] = smoothed_bits(logprob, args_.alpha, args_.d_vocab);
  // Rounding may put the divergence of equal predictions just below zero (NaN stays).
  mutable_data_of<double>(kl_)[row] = std::max(nats, 0.0) * kBitsPerNat;
  mutable_data_of<bool>(agree_)[row] = state.base.argmax == state.other.argmax;
  mutable_data_of<double>(gap_)[row] = gap_bits(base_logprob, logprob);
}

}  // namespace saelens_certify
