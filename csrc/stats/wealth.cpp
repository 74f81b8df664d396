#include "stats/wealth.h"

#include <algorithm>
#include <array>
#include <bit>

namespace saelens_certify {

namespace {

constexpr int kLanes = 8;        // bets computed side by side
constexpr int64_t kFactors = 16;  // factors between two normalisations
constexpr int64_t kGroup = 256;   // normalised products that are multiplied before the next one

using Lanes = std::array<double, kLanes>;

// Leaves the mantissa of a positive normal number and adds its exponent.
inline void normalise(double& x, int64_t& exponent) {
  const auto bits = std::bit_cast<uint64_t>(x);
  exponent += static_cast<int64_t>((bits >> 52) & 0x7ff) - 1022;
  x = std::bit_cast<double>((bits & ~(uint64_t{0x7ff} << 52)) | (uint64_t{1022} << 52));
}

void normalise(Lanes& x, std::array<int64_t, kLanes>& exponents) {
  for (int j = 0; j < kLanes; ++j) normalise(x[j], exponents[j]);
}

void multiply(Lanes& x, const Lanes& by) {
  for (int j = 0; j < kLanes; ++j) x[j] *= by[j];
}

template <bool kLimited>
void eight_bets(const double* values, const double* limits, int64_t n, double mean,
                const Lanes& caps, Lanes& mantissas, std::array<int64_t, kLanes>& exponents) {
  Lanes kept, all;
  for (int j = 0; j < kLanes; ++j) kept[j] = 1.0 - caps[j];
  mantissas.fill(1.0);
  exponents.fill(0);
  for (int64_t group = 0; group < n; group += kFactors * kGroup) {
    const int64_t group_end = std::min(n, group + kFactors * kGroup);
    all.fill(1.0);
    for (int64_t begin = group; begin < group_end; begin += kFactors) {
      const int64_t end = std::min(group_end, begin + kFactors);
      Lanes product;
      product.fill(1.0);
      for (int64_t i = begin; i < end; ++i) {
        const double ratio = values[i] / mean;
        if constexpr (kLimited) {
          const double limit = limits[i] * mean;
          for (int j = 0; j < kLanes; ++j) {
            const double share = limit < caps[j] ? limit : caps[j];
            product[j] *= (1.0 - share) + share * ratio;
          }
        } else {
          for (int j = 0; j < kLanes; ++j) product[j] *= kept[j] + caps[j] * ratio;
        }
      }
      normalise(product, exponents);
      multiply(all, product);
    }
    normalise(all, exponents);
    multiply(mantissas, all);
    normalise(mantissas, exponents);
  }
}

}  // namespace

void wealth(const double* values, const double* limits, int64_t n, double mean, const double* caps,
            int64_t n_caps, double* mantissas, int64_t* exponents) {
  for (int64_t first = 0; first < n_caps; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n_caps - first);
    Lanes some, found;
    std::array<int64_t, kLanes> powers;
    some.fill(0.5);  // lanes without a bet compute one that nobody reads
    std::copy_n(caps + first, count, some.begin());
    if (limits == nullptr) {
      eight_bets<false>(values, limits, n, mean, some, found, powers);
    } else {
      eight_bets<true>(values, limits, n, mean, some, found, powers);
    }
    std::copy_n(found.begin(), count, mantissas + first);
    std::copy_n(powers.begin(), count, exponents + first);
  }
}

}  // namespace saelens_certify
