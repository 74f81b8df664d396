// Row kernels of the active instruction set against plain loops.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "ops/cpu/row_kernels.h"

using namespace saelens_certify;

namespace {

double lane_sum(const std::vector<double>& terms) {
  double lanes[32] = {}, next[32];
  for (std::size_t i = 0; i < terms.size(); ++i) lanes[i % 32] += terms[i];
  for (int distance : {16, 8, 4, 2, 1}) {
    for (int lane = 0; lane < 32; ++lane) next[lane] = lanes[lane] + lanes[lane ^ distance];
    std::memcpy(lanes, next, sizeof(lanes));
  }
  return lanes[0];
}

std::vector<float> random_numbers(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(n);
  for (float& number : numbers) number = normal(random);
  return numbers;
}

void check_sums(int64_t n) {
  const auto x = random_numbers(n, 1), y = random_numbers(n, 2);
  std::vector<double> terms[6];
  for (int64_t i = 0; i < n; ++i) {
    const double a = x[i], b = y[i];
    const double all[6] = {a * b, (a - b) * (a - b), a * a, b * b, a * b, a};
    for (int s = 0; s < 6; ++s) terms[s].push_back(all[s]);
  }
  CHECK(row_kernels().dot(x.data(), y.data(), Real::kFloat32, n) == lane_sum(terms[0]));
  double moments[5];
  row_kernels().moments(x.data(), y.data(), n, moments);
  for (int s = 0; s < 5; ++s) CHECK(moments[s] == lane_sum(terms[s + 1]));
}

// A plain-loop FilterRow over random numbers, and what must pass.
struct FilterCase {
  explicit FilterCase(int64_t n, int mode) : n(n), mode(mode) {
    row.half = mode & 4;
    row.product = row.half ? static_cast<const void*>(stored.data()) : product.data();
    for (int64_t i = 0; i < n && row.half; ++i) {
      uint32_t word;
      std::memcpy(&word, &product[i], 4);
      stored[i] = static_cast<uint16_t>(word >> 16);
      word &= 0xffff0000u;
      std::memcpy(&product[i], &word, 4);
    }
    row.bias = bias.data();
    row.scale = mode & 1 ? scale.data() : nullptr;
    row.theta = mode & 2 ? theta.data() : nullptr;
    row.gate_bias = mode & 8 ? gate.data() : nullptr;
    row.outlier_x = outlier_x.data();
    row.outlier_weight = outliers.data();
    row.outlier_stride = 600;
    row.n_outliers = mode & 16 ? 2 : 0;
    row.slack = 0.1f;
    row.gate_slack = 0.2f;
    row.rounding = row.half ? 0x1p-8f : 0.0f;
  }

  float sum(int64_t i) const {
    float total = product[i];
    for (int o = 0; o < row.n_outliers; ++o) total += outlier_x[o] * outliers[600 * o + i];
    return total;
  }
  float score(int64_t i) const {
    return row.scale != nullptr ? (sum(i) + bias[i]) * scale[i] : sum(i) + bias[i];
  }
  float limit(int64_t i) const { return row.theta != nullptr ? theta[i] : 0.0f; }
  float rounding(int64_t i) const {
    return std::fabs(row.scale != nullptr ? product[i] * scale[i] : product[i]) * row.rounding;
  }
  float gate_rounding(int64_t i) const { return std::fabs(product[i]) * row.rounding; }

  int64_t n;
  int mode;
  std::vector<float> product = random_numbers(600, 3), bias = random_numbers(600, 4);
  std::vector<float> scale = random_numbers(600, 5), theta = random_numbers(600, 6);
  std::vector<float> gate = random_numbers(600, 10), outliers = random_numbers(1200, 11);
  std::vector<float> outlier_x = random_numbers(2, 12);
  std::vector<uint16_t> stored = std::vector<uint16_t>(600);
  FilterRow row = {};
};

void check_filter(int64_t n, int mode) {
  FilterCase c(n, mode);
  for (float floor : {-1e30f, -0.5f, 0.0f, 1.0f, 2.5f, 1e30f}) {
    c.row.floor = floor;
    std::vector<int32_t> wanted;
    for (int32_t i = 0; i < n; ++i) {
      const float least = c.row.theta != nullptr ? std::max(c.limit(i), floor) : floor;
      bool pass = c.score(i) + (c.rounding(i) + 0.1f) >= least;
      if (c.row.gate_bias != nullptr) {
        pass = pass && c.sum(i) + c.gate[i] + 0.2f + c.gate_rounding(i) > 0;
      }
      if (pass) wanted.push_back(i);
    }
    std::vector<FilterHit> hits(kFilterBlock + 1);
    const int found = row_kernels().filter(c.row, n, hits.data());
    CHECK(found == static_cast<int>(wanted.size()));
    for (int hit = 0; hit < found; ++hit) {
      CHECK(hits[hit].column == wanted[hit]);
      CHECK(hits[hit].product == c.product[wanted[hit]]);
      CHECK(hits[hit].sum == c.sum(wanted[hit]));
    }
  }
}

void check_groups(int64_t per_group, int mode, bool with_pool) {
  FilterCase c(512, mode);
  std::vector<int32_t> pool(16);
  for (int i = 0; i < 16; ++i) pool[i] = static_cast<int32_t>(0x9e3779b9u * (i + 1));
  std::vector<float> best(512 / per_group);
  row_kernels().best_of_groups(c.row, with_pool ? pool.data() : nullptr, 512, per_group,
                               best.data());
  std::vector<float> wanted(best.size(), -INFINITY);
  for (int64_t i = 0; i < 512; ++i) {
    const float lower = c.score(i) - (c.rounding(i) + 0.1f);
    bool counts = lower > c.limit(i);
    if (c.row.gate_bias != nullptr) {
      counts = counts && c.sum(i) + c.gate[i] - 0.2f - c.gate_rounding(i) > 0;
    }
    if (with_pool) counts = counts && ((pool[i / 32] >> (i % 32)) & 1);
    float& group = wanted[i / (16 * per_group) * 16 + i % 16];
    if (counts) group = std::max(group, lower);
  }
  CHECK(best == wanted);
}

// Rounding to bfloat16 against the nearest of two neighbours, and the three squared lengths.
void check_narrow(int64_t n) {
  const auto x = random_numbers(n, 13);
  std::vector<uint16_t> to(n);
  const std::vector<int32_t> outliers =
      n > 20 ? std::vector<int32_t>{0, 17, int32_t(n - 1)} : std::vector<int32_t>{};
  double squares[3], wanted[3] = {};
  row_kernels().narrow(x.data(), outliers.data(), static_cast<int>(outliers.size()), n, to.data(),
                       squares);
  for (int64_t i = 0; i < n; ++i) {
    const bool left_out = std::count(outliers.begin(), outliers.end(), i) > 0;
    const float kept = left_out ? 0.0f : x[i];
    uint32_t word;
    std::memcpy(&word, &kept, 4);
    const uint32_t below = word & 0xffff0000u, above = below + 0x10000u;
    float low, high;
    std::memcpy(&low, &below, 4);
    std::memcpy(&high, &above, 4);
    const double down = std::fabs(double(kept) - low), up = std::fabs(double(high) - kept);
    const bool even = ((below >> 16) & 1) == 0;
    const uint32_t nearest = down < up || (down == up && even) ? below : above;
    CHECK(to[i] == nearest >> 16);
    float rounded;
    std::memcpy(&rounded, &nearest, 4);
    wanted[0] += double(kept) * kept;
    wanted[1] += double(rounded) * rounded;
    wanted[2] += (double(kept) - rounded) * (double(kept) - rounded);
  }
  for (int s = 0; s < 3; ++s) CHECK(std::fabs(squares[s] - wanted[s]) <= 1e-12 * wanted[s]);
}

void check_pairs(int64_t n) {
  const auto x = random_numbers(n, 14), a = random_numbers(n, 15), b = random_numbers(n, 16);
  double sums[2];
  row_kernels().dot_pair(x.data(), a.data(), b.data(), Real::kFloat32, n, sums);
  CHECK(sums[0] == row_kernels().dot(x.data(), a.data(), Real::kFloat32, n));
  CHECK(sums[1] == row_kernels().dot(x.data(), b.data(), Real::kFloat32, n));
}

void check_gather(int64_t n, int32_t count, bool with_bias) {
  const auto weights = random_numbers(20 * n, 7), values = random_numbers(count, 8);
  const auto bias = random_numbers(n, 10);
  std::vector<int32_t> indices;
  for (int32_t slot = 0; slot < count; ++slot) indices.push_back((slot * 7) % 20);
  std::vector<float> out(n, 5.0f), wanted(n, 0.0f);
  row_kernels().gather(values.data(), indices.data(), count, weights.data(), Real::kFloat32, n,
                       with_bias ? bias.data() : nullptr, out.data());
  for (int32_t slot = 0; slot < count; ++slot) {
    for (int64_t i = 0; i < n; ++i) {
      wanted[i] = std::fma(values[slot], weights[indices[slot] * n + i], wanted[i]);
    }
  }
  for (int64_t i = 0; with_bias && i < n; ++i) wanted[i] += bias[i];
  CHECK(out == wanted);
}

void check_softcap(int64_t n, double cap) {
  auto logits = random_numbers(n, 11);
  for (float& logit : logits) logit *= 2 * cap;
  if (n > 2) logits[1] = INFINITY, logits[2] = -INFINITY;
  std::vector<double> capped(n);
  row_kernels().softcap(logits.data(), n, cap, capped.data());
  for (int64_t i = 0; i < n; ++i) {
    CHECK(std::fabs(capped[i] - cap * std::tanh(double(logits[i]) / cap)) <= 1e-12 * cap);
  }
}

// Every 16-bit pattern, against the definition of the format.
void check_widen() {
  std::vector<uint16_t> bits(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(65536);
  row_kernels().widen(bits.data(), Real::kBFloat16, 65536, wide.data());
  for (uint32_t i = 0; i < 65536; ++i) {
    uint32_t word;
    std::memcpy(&word, &wide[i], 4);
    CHECK(word == i << 16);
  }
  row_kernels().widen(bits.data(), Real::kFloat16, 65536, wide.data());
  for (int i = 0; i < 65536; ++i) {
    const int exponent = (i >> 10) & 31, fraction = i & 1023;
    double wanted =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) wanted = fraction == 0 ? INFINITY : NAN;
    if (i & 0x8000) wanted = -wanted;
    CHECK(std::isnan(wanted) ? std::isnan(wide[i]) : double(wide[i]) == wanted);
    CHECK(std::signbit(wide[i]) == ((i & 0x8000) != 0));
  }
}

void check_softmax(int64_t n, float spread) {
  auto logits = random_numbers(n, 9);
  for (float& logit : logits) logit *= spread;
  SoftmaxRow state = {-INFINITY, 0, 0.0};
  for (int64_t first = 0; first < n; first += kSoftmaxBlock) {
    const int64_t count = std::min(kSoftmaxBlock, n - first);
    row_kernels().softmax(logits.data() + first, count, first, 0.0, &state);
  }
  int32_t argmax = 0;
  for (int64_t i = 0; i < n; ++i) argmax = logits[i] > logits[argmax] ? int32_t(i) : argmax;
  double sum = 0;
  for (float logit : logits) sum += std::exp(double(logit) - double(logits[argmax]));
  CHECK(state.argmax == argmax);
  CHECK(state.top == logits[argmax]);
  CHECK(std::fabs(state.sum / sum - 1) < 2e-6);
}

}  // namespace

int main() {
  for (int64_t n : {0, 1, 7, 31, 32, 33, 63, 64, 100, 768}) check_sums(n);
  for (int mode = 0; mode < 32; ++mode) {
    for (int64_t n : {1, 31, 63, 64, 100, 512}) check_filter(n, mode);
    for (int64_t per_group : {1, 4, 16}) {
      check_groups(per_group, mode, false);
      check_groups(per_group, mode, true);
    }
  }
  for (int64_t n : {0, 1, 15, 16, 33, 300}) {
    check_narrow(n);
    check_pairs(n);
  }
  for (int64_t n : {1, 15, 16, 17, 100, 128, 300}) {
    for (int32_t count : {0, 1, 7, 8, 9, 30}) {
      check_gather(n, count, false);
      check_gather(n, count, true);
    }
  }
  for (int64_t n : {1, 7, 8, 9, 2048}) {
    for (double cap : {0.1, 30.0, 5000.0}) check_softcap(n, cap);
  }
  check_widen();
  for (int64_t n : {1, 63, 64, 65, 2048, 2049, 9000}) {
    for (float spread : {0.0f, 1.0f, 40.0f}) check_softmax(n, spread);
  }
  return check::failures;
}
