#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>

#include "ops/cpu/encoder.h"
#include "ops/cpu/screen.h"

namespace saelens_certify {

namespace {

// The output slots of a call.
struct Slots {
  Slots(int64_t tokens, int64_t slots)
      : values(empty_tensor({tokens, slots}, ScalarType::Float)),
        indices(empty_tensor({tokens, slots}, ScalarType::Int)),
        counts(empty_tensor({tokens}, ScalarType::Int)),
        slots(slots) {}

  void write(int64_t row, const std::vector<Scored>& entries) {
    float* value = mutable_data_of<float>(values) + row * slots;
    int32_t* index = mutable_data_of<int32_t>(indices) + row * slots;
    const auto n = static_cast<int64_t>(entries.size());
    for (int64_t slot = 0; slot < slots; ++slot) {
      value[slot] = slot < n ? entries[slot].score : 0.0f;
      index[slot] = slot < n ? entries[slot].column : -1;
    }
    mutable_data_of<int32_t>(counts)[row] = static_cast<int32_t>(n);
  }

  // Adds an entry to a row, or only counts it when the row is full.
  void append(int64_t row, const Scored& entry) {
    const int64_t slot = mutable_data_of<int32_t>(counts)[row]++;
    if (slot >= slots) return;
    mutable_data_of<float>(values)[row * slots + slot] = entry.score;
    mutable_data_of<int32_t>(indices)[row * slots + slot] = entry.column;
  }

  Tensor values, indices, counts;
  int64_t slots;
};

constexpr auto by_column = [](const Scored& a, const Scored& b) { return a.column < b.column; };

// Orders scored columns and keeps the k best.
void keep_best(std::vector<Scored>& scored, int64_t k) {
  const auto kept = std::min<int64_t>(k, static_cast<int64_t>(scored.size()));
  std::nth_element(scored.begin(), scored.begin() + kept, scored.end(), better);
  scored.resize(kept);
  std::sort(scored.begin(), scored.end(), better);
}

// Candidates for the k best of all features, or of the pool's, for a chunk of rows.
struct Candidates {
  Candidates(int64_t rows, int64_t k, int64_t columns)
      : capacity(candidate_capacity(k, columns)), k(k), buffers(new Candidate[rows * capacity]) {}

  void restart(int64_t count) {
    rows.clear();
    for (int64_t row = 0; row < count; ++row) {
      rows.emplace_back(buffers.get() + row * capacity, capacity, k);
    }
  }

  int64_t capacity;
  int64_t k;
  std::unique_ptr<Candidate[]> buffers;
  std::vector<TopCandidates> rows;
};

// The k best of all features and of the pool's, from one pass.
class TopSelection {
 public:
  TopSelection(const Encoder& encoder, const EncodeArgs& args, const int32_t* pool_bits, int64_t k)
      : encoder_(encoder),
        pool_bits_(pool_bits),
        k_(k),
        all_(args.row_chunk, k, args.d_sae()),
        pooled_(pool_bits == nullptr ? 0 : args.row_chunk, k, args.d_sae()) {}

  void restart(int64_t first_row, int64_t rows) {
    first_row_ = first_row;
    all_.restart(rows);
    pooled_.restart(pool_bits_ == nullptr ? 0 : rows);
  }

  const TopCandidates& all(int64_t row) const { return all_.rows[row]; }
  const TopCandidates& pooled(int64_t row) const { return pooled_.rows[row]; }

  // The k-th best of the groups of a first tile is a floor: without it, hundreds of columns would
  // pass before a floor means anything.
  void start(int64_t row, const FilterRow& block, int64_t columns) {
    int64_t per_group = 16;
    while (per_group > 1 && columns / per_group < 4 * k_) per_group /= 2;
    const int64_t whole = columns / (16 * per_group) * (16 * per_group);
    const int64_t groups = whole / per_group;
    if (groups < k_ || groups > kMostGroups) return;
    float best[kMostGroups];
    const auto floor_of = [&](const int32_t* pool_bits) {
      row_kernels().best_of_groups(block, pool_bits, whole, per_group, best);
      std::nth_element(best, best + (k_ - 1), best + groups, std::greater<float>());
      return best[k_ - 1];
    };
    all_.rows[row].raise_floor(floor_of(nullptr));
    if (pool_bits_ != nullptr) pooled_.rows[row].raise_floor(floor_of(pool_bits_));
  }

  float floor(int64_t row) const {
    const float least = all_.rows[row].floor();
    return pool_bits_ == nullptr ? least : std::min(least, pooled_.rows[row].floor());
  }

  void visit(int64_t row, const Candidate& candidate) {
    const auto exact = [&](int32_t column) {
      return encoder_.active_score(first_row_ + row, column);
    };
    all_.rows[row].add(candidate, exact, scratch());
    if (pool_bits_ != nullptr && in_pool(pool_bits_, candidate.column)) {
      pooled_.rows[row].add(candidate, exact, scratch());
    }
  }

  // After the last tile exact scores do better than another look at the bounds.
  void finish_tile(int64_t row, bool last) {
    if (last) return;
    all_.rows[row].tighten(scratch(), kFewest);
    if (pool_bits_ != nullptr) pooled_.rows[row].tighten(scratch(), kFewest);
  }

 private:
  static constexpr int64_t kMostGroups = 4096;
  // New candidates of a tile for which a higher floor pays.
  static constexpr int32_t kFewest = 16;

  static std::vector<float>& scratch() {
    thread_local std::vector<float> numbers;
    return numbers;
  }

  const Encoder& encoder_;
  const int32_t* pool_bits_;
  int64_t k_;
  int64_t first_row_ = 0;
  Candidates all_, pooled_;
};

// Every active feature, appended in ascending order as far as there are slots; all are counted.
class ThresholdSelection {
 public:
  ThresholdSelection(const Encoder& encoder, Slots& slots, int64_t first_row, int64_t rows)
      : encoder_(encoder), slots_(slots), first_row_(first_row), found_(rows) {}

  void start(int64_t, const FilterRow&, int64_t) {}
  float floor(int64_t) const { return -kInfinity; }
  void visit(int64_t row, const Candidate& candidate) {
    found_[row].push_back({0.0f, candidate.column});
  }

  void finish_tile(int64_t row, bool) {
    encoder_.score(first_row_ + row, found_[row]);
    for (const Scored& entry : found_[row]) {
      if (entry.score > -kInfinity) slots_.append(first_row_ + row, entry);
    }
    found_[row].clear();
  }

 private:
  const Encoder& encoder_;
  Slots& slots_;
  int64_t first_row_;
  std::vector<std::vector<Scored>> found_;
};

}  // namespace

TopCodes topk_encode_cpu(const EncodeArgs& args, const OptionalTensor& pool_bits, int64_t k) {
  Encoder encoder(args);
  const int32_t* pool = data_of<int32_t>(pool_bits);
  const int64_t pool_tokens = pool == nullptr ? 0 : args.tokens();
  Slots everything(args.tokens(), k), pooled(pool_tokens, pool == nullptr ? 0 : k);
  TopSelection selection(encoder, args, pool, k);
  for (int64_t start = 0; start < args.tokens(); start += args.row_chunk) {
    const int64_t rows = std::min(args.row_chunk, args.tokens() - start);
    selection.restart(start, rows);
    encoder.show(start, rows, selection);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto score = [&](std::vector<Scored>& entries) {
          encoder.score(start + row, entries);
        };
        std::vector<Scored> best = scored_candidates(selection.all(row), k, {}, score);
        if (pool != nullptr) {
          std::sort(best.begin(), best.end(), by_column);
          std::vector<Scored> members = scored_candidates(selection.pooled(row), k, best, score);
          keep_best(members, k);
          pooled.write(start + row, members);
        }
        keep_best(best, k);
        everything.write(start + row, best);
      }
    });
  }
  return {everything.values, everything.indices, everything.counts,
          pooled.values,     pooled.indices,     pooled.counts};
}

Codes threshold_encode_cpu(const EncodeArgs& args, int64_t capacity) {
  Encoder encoder(args);
  Slots slots(args.tokens(), capacity);
  std::fill_n(mutable_data_of<float>(slots.values), args.tokens() * capacity, 0.0f);
  std::fill_n(mutable_data_of<int32_t>(slots.indices), args.tokens() * capacity, -1);
  std::fill_n(mutable_data_of<int32_t>(slots.counts), args.tokens(), 0);
  for (int64_t start = 0; start < args.tokens(); start += args.row_chunk) {
    const int64_t rows = std::min(args.row_chunk, args.tokens() - start);
    ThresholdSelection selection(encoder, slots, start, rows);
    encoder.show(start, rows, selection);
  }
  return {slots.values, slots.indices, slots.counts};
}

}  // namespace saelens_certify
