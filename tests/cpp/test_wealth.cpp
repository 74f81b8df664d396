// Wealth of bets: products whose values are known without a second implementation.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "stats/wealth.h"

using namespace saelens_certify;

namespace {

struct Found {
  std::vector<double> mantissas;
  std::vector<int64_t> exponents;
};

Found bets(const std::vector<double>& values, const std::vector<double>* limits, double mean,
           const std::vector<double>& caps) {
  Found found{std::vector<double>(caps.size()), std::vector<int64_t>(caps.size())};
  wealth(values.data(), limits == nullptr ? nullptr : limits->data(),
         static_cast<int64_t>(values.size()), mean, caps.data(), static_cast<int64_t>(caps.size()),
         found.mantissas.data(), found.exponents.data());
  return found;
}

}  // namespace

int main() {
  // Nothing seen: wealth 1.
  const Found none = bets({}, nullptr, 0.5, {0.5});
  CHECK(std::ldexp(none.mantissas[0], static_cast<int>(none.exponents[0])) == 1.0);
  // Half staked on values of twice and of no times the mean: factors 3/2 and 1/2.
  const Found two = bets({1.0, 0.0, 0.5}, nullptr, 0.5, {0.5});
  CHECK(two.mantissas[0] == 0.75 && two.exponents[0] == 0);
  // A million factors of 1/2 are exact, and neither over- nor underflow. More bets than lanes.
  const std::vector<double> caps(11, 0.5);
  const Found many = bets(std::vector<double>(1000003, 0.0), nullptr, 0.5, caps);
  for (std::size_t j = 0; j < caps.size(); ++j) {
    CHECK(many.mantissas[j] == 0.5 && many.exponents[j] == -1000002);
  }
  // Limits: stake 1/4 of the wealth (1/2 times the mean 1/2), nothing, or what the cap says.
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<double> limits{0.5, 0.0, infinity};
  const Found limited = bets({1.0, 0.0, 1.0}, &limits, 0.5, {0.75});
  CHECK(std::ldexp(limited.mantissas[0], static_cast<int>(limited.exponents[0])) == 1.25 * 1.75);
  // The extremes that are allowed: 16 factors of 1 + 0.98 (2^40 - 1).
  const Found rich = bets(std::vector<double>(100000, 1.0), nullptr, std::ldexp(1.0, -40), {0.98});
  CHECK(rich.mantissas[0] >= 0.5 && rich.mantissas[0] < 1.0);
  CHECK(std::abs(static_cast<double>(rich.exponents[0]) / 100000 - (40 + std::log2(0.98))) < 1e-4);
  return check::failures;
}
