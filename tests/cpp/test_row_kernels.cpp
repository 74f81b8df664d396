// Row kernels of the active instruction set against plain loops.
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

void check_filter(int64_t n, bool with_scale, bool with_theta) {
  auto product = random_numbers(64, 3), bias = random_numbers(64, 4);
  auto scale = random_numbers(64, 5), theta = random_numbers(64, 6);
  for (float floor : {-1e30f, -0.5f, 0.0f, 1.0f, 2.5f, 1e30f}) {
    const FilterRow row = {product.data(),
                           bias.data(),
                           with_scale ? scale.data() : nullptr,
                           with_theta ? theta.data() : nullptr,
                           0.1f,
                           floor};
    std::vector<int32_t> hits(64, -1), wanted;
    const int found = row_kernels().filter(row, n, hits.data());
    for (int32_t i = 0; i < n; ++i) {
      float score = product[i] + bias[i];
      if (with_scale) score *= scale[i];
      const float limit = with_theta ? std::max(theta[i], floor) : floor;
      if (score + 0.1f >= limit) wanted.push_back(i);
    }
    hits.resize(found);
    CHECK(hits == wanted);
  }
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
  for (int64_t n : {1, 31, 63, 64}) {
    for (int mode = 0; mode < 4; ++mode) check_filter(n, mode & 1, mode & 2);
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
