// Selection from screened scores: nothing that belongs to the k best is ever dropped.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <random>
#include <vector>

#include "check.h"
#include "ops/cpu/screen.h"

using namespace saelens_certify;

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();

// Feeds exact scores with random errors up to `slack` and checks the survivors.
void check_selection(const std::vector<float>& exact, int64_t k, float slack, unsigned seed) {
  const auto n = static_cast<int64_t>(exact.size());
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> error(-slack / 2, slack / 2);
  const int64_t capacity = candidate_capacity(k, n);
  std::vector<Candidate> buffer(capacity + 1, Candidate{0, 0, -7});
  std::vector<float> scratch;
  TopCandidates best(buffer.data(), capacity, k);
  const auto score = [&](int32_t column) { return exact[column] > 0 ? exact[column] : -kInfinity; };
  for (int32_t column = 0; column < n; ++column) {
    const float screened = exact[column] + (slack > 0 ? error(random) : 0.0f);
    const float upper = screened + slack, lower = screened - slack;
    if (!(upper > 0)) continue;
    best.add({lower > 0 ? lower : -kInfinity, upper, column}, score, scratch);
    CHECK(best.size() < capacity || capacity > n);
    if (column % 97 == 0) best.tighten(scratch);
  }
  best.tighten(scratch);
  CHECK(buffer[capacity].column == -7);

  std::vector<Scored> wanted, kept;
  for (int32_t column = 0; column < n; ++column) {
    if (exact[column] > 0) wanted.push_back({exact[column], column});
  }
  int32_t last = -1;
  for (const Candidate& candidate : best) {
    CHECK(candidate.column > last);
    last = candidate.column;
    if (exact[last] > 0) kept.push_back({exact[last], last});
  }
  std::sort(wanted.begin(), wanted.end(), better);
  std::sort(kept.begin(), kept.end(), better);
  if (static_cast<int64_t>(wanted.size()) > k) wanted.resize(k);
  CHECK(kept.size() >= wanted.size());
  for (std::size_t i = 0; i < wanted.size() && i < kept.size(); ++i) {
    CHECK(kept[i].score == wanted[i].score);
    CHECK(kept[i].column == wanted[i].column);
  }
}

// The k best among even columns, once those of all columns are scored: what is known is not scored
// again, and it alone sets the floor where it holds k even columns.
void check_pool(const std::vector<float>& exact, int64_t k, float slack) {
  const auto n = static_cast<int32_t>(exact.size());
  std::vector<Candidate> all_buffer(n + 1), pool_buffer(n + 1);
  std::vector<float> scratch;
  TopCandidates all(all_buffer.data(), n + 1, k), pool(pool_buffer.data(), n + 1, k);
  const auto one = [&](int32_t column) { return exact[column]; };
  std::vector<Scored> wanted;
  for (int32_t column = 0; column < n; ++column) {
    const Candidate candidate = {exact[column] - slack, exact[column] + slack, column};
    all.add(candidate, one, scratch);
    if (column % 2 != 0) continue;
    pool.add(candidate, one, scratch);
    wanted.push_back({exact[column], column});
  }
  std::vector<int> times(n, 0);
  const auto score = [&](std::vector<Scored>& entries) {
    for (Scored& entry : entries) {
      entry.score = exact[entry.column];
      ++times[entry.column];
    }
  };
  std::vector<Scored> known = scored_candidates(all, k, {}, score);
  std::sort(known.begin(), known.end(),
            [](const Scored& a, const Scored& b) { return a.column < b.column; });
  std::vector<Scored> even = known;
  std::erase_if(even, [](const Scored& entry) { return entry.column % 2 != 0; });
  std::sort(even.begin(), even.end(), better);
  const float floor = std::ssize(even) < k ? -kInfinity : even[k - 1].score;
  const std::vector<int> before = times;
  std::vector<Scored> found = scored_candidates(pool, k, known, score);
  for (int32_t column = 0; column < n; ++column) {
    CHECK(times[column] <= 1);
    if (times[column] > before[column]) CHECK(exact[column] + slack >= floor);
  }
  std::sort(wanted.begin(), wanted.end(), better);
  std::sort(found.begin(), found.end(), better);
  CHECK(std::ssize(found) >= k);
  for (int64_t i = 0; i < k && i < std::ssize(found); ++i) {
    CHECK(found[i].column == wanted[i].column);
  }
}

std::vector<float> random_scores(int64_t n, unsigned seed, int levels) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> scores(n);
  for (float& score : scores) {
    score = normal(random);
    if (levels > 0) score = std::round(score * levels) / levels;
  }
  return scores;
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 20; ++seed) {
    for (int64_t k : {1, 2, 31, 64, 300}) {
      for (int levels : {0, 1, 4}) {
        for (float slack : {0.0f, 1e-6f, 0.3f, 10.0f}) {
          check_pool(random_scores(3000, seed, levels), k, slack);
          check_selection(random_scores(3000, seed, levels), k, slack, seed);
        }
      }
    }
  }
  std::vector<float> rising(5000), flat(5000, 1.0f), falling(5000), near(5000, 1.0f);
  for (int i = 0; i < 5000; ++i) {
    rising[i] = 1.0f + float(i);
    falling[i] = 6000.0f - float(i);
    near[i] = 1.0f + float(i) * 0x1p-23f;
  }
  for (float slack : {0.0f, 0.5f, 1e4f}) {
    for (int64_t k : {1, 9, 4999, 5000}) {
      check_selection(rising, k, slack, 1);
      check_selection(flat, k, slack, 2);
      check_selection(falling, k, slack, 3);
      check_selection(near, k, slack, 4);
    }
  }
  check_selection({}, 3, 1.0f, 5);
  check_selection({-1.0f, 0.0f}, 3, 0.5f, 6);
  return check::failures;
}
