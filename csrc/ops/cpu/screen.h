// Selection of the k best columns of one row from screened scores, without ever dropping a column
// that may belong to them. Torch-free.
//
// Every candidate carries bounds lower <= exact score <= upper. The k-th largest lower bound seen
// so far is a floor: a column whose upper bound lies below it cannot be among the k best. When the
// buffer is full it is compacted: candidates below the floor go, and if too many remain (ties, flat
// rows), they are scored exactly and only the k best stay. So the buffer is bounded and nothing is
// lost.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <vector>

namespace saelens_certify {

struct Candidate {
  float lower;  // -inf unless the column is certainly active
  float upper;
  int32_t column;
};

struct Scored {
  float score;
  int32_t column;
};

// Score first (largest first), column second (smallest first); an object, which sorting inlines.
inline constexpr auto better = [](const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.column < b.column;
};

// Buffer size for selecting k of n columns: two selections and some room between compactions, or
// one entry more than there are columns (then the buffer never fills).
inline int64_t candidate_capacity(int64_t k, int64_t n) { return std::min(2 * k + 256, n + 1); }

class TopCandidates {
 public:
  // `buffer` holds `capacity` entries (see candidate_capacity) and outlives this object.
  TopCandidates(Candidate* buffer, int64_t capacity, int64_t k)
      : buffer_(buffer), k_(static_cast<int32_t>(k)), capacity_(static_cast<int32_t>(capacity)) {}

  float floor() const { return floor_; }
  int32_t size() const { return size_; }
  const Candidate* begin() const { return buffer_; }
  const Candidate* end() const { return buffer_ + size_; }

  // Adds a candidate; columns must arrive in ascending order. `exact(column)` gives a column's
  // canonical score, or -inf if it is not active.
  template <typename Exact>
  void add(const Candidate& candidate, const Exact& exact, std::vector<float>& scratch) {
    if (!(candidate.upper >= floor_)) return;
    buffer_[size_++] = candidate;
    if (size_ < full_) return;
    tighten(scratch);
    if (size_ > capacity_ - kRoom) score_all(exact);
    full_ = std::min(capacity_, size_ + k_ + kRoom / 2);
  }

  // Takes over a floor known from elsewhere: k columns score at least this much.
  void raise_floor(float floor) { floor_ = std::max(floor_, floor); }

  // Raises the floor as far as the bounds allow and forgets the candidates below it. `fewest` new
  // candidates make it worth while.
  void tighten(std::vector<float>& scratch, int32_t fewest = 1) {
    if (size_ < k_ || size_ - tightened_ < fewest) return;
    scratch.resize(size_);
    for (int32_t i = 0; i < size_; ++i) scratch[i] = buffer_[i].lower;
    std::nth_element(scratch.begin(), scratch.begin() + (k_ - 1), scratch.end(),
                     std::greater<float>());
    floor_ = std::max(floor_, scratch[k_ - 1]);
    forget_below();
  }

 private:
  // Entries that must be free after a compaction; at most 256 + k, so that exact scoring does it.
  static constexpr int32_t kRoom = 128;

  void forget_below() {
    const float floor = floor_;
    const auto keep = std::remove_if(buffer_, buffer_ + size_, [floor](const Candidate& candidate) {
      return candidate.upper < floor;
    });
    size_ = tightened_ = static_cast<int32_t>(keep - buffer_);
  }

  // Replaces bounds by exact scores, of which only the k best stay.
  template <typename Exact>
  void score_all(const Exact& exact) {
    std::vector<Scored> scored;
    for (int32_t i = 0; i < size_; ++i) {
      const float score = exact(buffer_[i].column);
      if (score > -std::numeric_limits<float>::infinity()) {
        scored.push_back({score, buffer_[i].column});
      }
    }
    if (static_cast<int32_t>(scored.size()) > k_) {
      std::nth_element(scored.begin(), scored.begin() + (k_ - 1), scored.end(), better);
      floor_ = std::max(floor_, scored[k_ - 1].score);
      scored.resize(k_);
    }
    std::sort(scored.begin(), scored.end(),
              [](const Scored& a, const Scored& b) { return a.column < b.column; });
    size_ = tightened_ = 0;
    for (const Scored& entry : scored) buffer_[size_++] = {entry.score, entry.score, entry.column};
  }

  Candidate* buffer_;
  int32_t k_;
  int32_t capacity_;
  // Compact when this many are held: an early floor spares many later candidates.
  int32_t full_ = std::min(capacity_, 2 * k_ + kRoom / 2);
  int32_t size_ = 0;
  int32_t tightened_ = 0;  // size after the last compaction: nothing to gain until it grows
  float floor_ = -std::numeric_limits<float>::infinity();
};

// Exact scores of the active ones among the candidates that may be among the k best, with few
// others. Columns that `known` holds (ascending) are not scored again; if they do not already set a
// floor, the most promising others do. `score(entries)` fills in the canonical scores of columns,
// -inf if they are not active.
template <typename Score>
std::vector<Scored> scored_candidates(const TopCandidates& candidates, int64_t k,
                                      const std::vector<Scored>& known, const Score& score) {
  std::vector<Scored> scored, batch;
  std::vector<Candidate> unknown;
  auto next = known.begin();
  for (const Candidate& candidate : candidates) {
    while (next != known.end() && next->column < candidate.column) ++next;
    if (next != known.end() && next->column == candidate.column) {
      scored.push_back(*next);
    } else {
      unknown.push_back(candidate);
    }
  }
  const auto add = [&](auto first, auto last) {
    batch.clear();
    for (auto at = first; at != last; ++at) batch.push_back({0.0f, at->column});
    score(batch);
    for (const Scored& entry : batch) {
      if (entry.score > -std::numeric_limits<float>::infinity()) scored.push_back(entry);
    }
  };
  const auto promising = std::clamp<std::ptrdiff_t>(k - std::ssize(scored), 0, std::ssize(unknown));
  const auto rest = unknown.begin() + promising;
  std::nth_element(unknown.begin(), rest, unknown.end(),
                   [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
  add(unknown.begin(), rest);
  auto last = unknown.end();
  if (std::ssize(scored) >= k) {
    std::nth_element(scored.begin(), scored.begin() + (k - 1), scored.end(), better);
    const float floor = scored[k - 1].score;
    last = std::remove_if(rest, last, [floor](const Candidate& c) { return c.upper < floor; });
  }
  add(rest, last);
  return scored;
}

}  // namespace saelens_certify
