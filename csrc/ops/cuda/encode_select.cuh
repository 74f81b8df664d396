// Selection of the k best columns of one row by a warp, without ever dropping one that may belong
// to them; the algorithm is that of ops/cpu/screen.h.
//
// Every candidate carries bounds lower <= exact score <= upper. The k-th largest lower bound seen
// so far is a floor: a column whose upper bound lies below it cannot be among the k best. When the
// buffer is full, candidates below the floor go, and if too many remain (ties, flat rows), the warp
// scores them exactly and only the k best stay. So the buffer is bounded and nothing is lost.
#pragma once

#include "ops/cuda/encode_view.cuh"

namespace saelens_certify {
namespace {

// Candidates of one selection for a chunk of rows: `capacity` entries per row, columns ascending.
struct CandidateLists {
  float* lower;  // -inf unless the column is certainly active
  float* upper;
  int32_t* column;
  int4* state;  // per row: size, size after the last compaction, ordered floor, size to compact at
  int64_t capacity;
};

// A lane's column, if it may be active.
struct LaneCandidate {
  bool possible;
  float lower;
  float upper;
  int32_t column;  // ascending with the lanes
};

// One row's list, held by a warp. All lanes agree on every member.
class WarpList {
 public:
  __device__ WarpList(const CandidateLists& lists, int64_t row, int k)
      : lists_(lists), row_(row), k_(k) {
    const int4 state = lists.state[row];
    size_ = state.x;
    tightened_ = state.y;
    floor_ = from_ordered(static_cast<uint32_t>(state.z));
    full_ = state.w;
  }

  // An empty list's state.
  static __device__ int4 fresh(int64_t capacity, int k) {
    const int full = static_cast<int>(min(capacity, int64_t{2} * k + kRoom));
    return {0, 0, static_cast<int>(ordered(-INFINITY)), full};
  }

  // At the end of a tile: saves the state; after the last one only what may be best stays.
  __device__ void finish_tile(bool last) {
    if (last) tighten(0);
    if (lane_id() == 0)
      lists_.state[row_] = {size_, tightened_, static_cast<int>(ordered(floor_)), full_};
  }

  __device__ float floor() const { return floor_; }
  __device__ int size() const { return size_; }

  // Adds the lanes' candidates; columns arrive in ascending order. `exact` gives a column's
  // canonical score, or -inf if it is not active.
  template <typename Exact>
  __device__ void add(const LaneCandidate& candidate, const Exact& exact) {
    unsigned lanes = reaching(candidate);
    if (size_ + __popc(lanes) > capacity()) {
      make_room(__popc(lanes), exact);
      lanes = reaching(candidate);
    }
    if (lanes >> lane_id() & 1) {
      const int at = size_ + __popc(lanes & lanes_before());
      lowers()[at] = candidate.lower;
      uppers()[at] = candidate.upper;
      columns()[at] = candidate.column;
    }
    size_ += __popc(lanes);
    __syncwarp();
    if (size_ >= full_) {
      tighten(k_ / 8);
      full_ = min(capacity(), size_ + k_ + kRoom);
    }
  }

  // Raises the floor to the n-th largest lower bound, k <= n <= k + spare, and forgets the
  // candidates below it.
  __device__ void tighten(int spare) {
    if (size_ < k_ || size_ == tightened_) return;
    floor_ = fmaxf(floor_, from_ordered(select(spare)));
    const float floor = floor_;
    keep_if([&](int, float upper) { return upper >= floor; });
    tightened_ = size_;
  }

 private:
  __device__ int capacity() const { return static_cast<int>(lists_.capacity); }
  __device__ float* lowers() const { return lists_.lower + row_ * lists_.capacity; }
  __device__ float* uppers() const { return lists_.upper + row_ * lists_.capacity; }
  __device__ int32_t* columns() const { return lists_.column + row_ * lists_.capacity; }

  // An early floor spares many later candidates: compact after k + kRoom new ones.
  static constexpr int kRoom = 64;

  __device__ unsigned reaching(const LaneCandidate& candidate) const {
    return __ballot_sync(kAllLanes, candidate.possible && candidate.upper >= floor_);
  }

  // A buffer that cannot hold all columns has 2k + 256 entries, of which scoring leaves k.
  template <typename Exact>
  __device__ void make_room(int needed, const Exact& exact) {
    tighten(0);
    if (size_ + needed > capacity()) score_all(exact);
  }

  // Replaces bounds by exact scores, of which only the k best stay.
  template <typename Exact>
  __device__ void score_all(const Exact& exact) {
    for (int i = 0; i < size_; ++i) {
      const float score = exact(columns()[i]);
      if (lane_id() == 0) lowers()[i] = uppers()[i] = score;
    }
    __syncwarp();
    keep_if([](int, float upper) { return upper > -INFINITY; });
    if (size_ > k_) {
      const uint32_t last = select(0);
      floor_ = fmaxf(floor_, from_ordered(last));
      // Of the columns that tie for the last places, the first ones stay.
      int ties = k_ - count_from(last + 1);
      keep_if([&](int, float upper) {
        const uint32_t key = ordered(upper);
        const unsigned tied = __ballot_sync(kAllLanes, key == last);
        const bool kept = key > last || (key == last && __popc(tied & lanes_before()) < ties);
        ties -= min(ties, __popc(tied));
        return kept;
      });
    }
    tightened_ = size_;
  }

  // Entries whose lower bound has at least this key.
  __device__ int count_from(uint32_t key) const {
    int count = 0;
    for (int i = lane_id(); i < size_; i += kWarp) count += ordered(lowers()[i]) >= key;
    return warp_sum(count);
  }

  // The key of the n-th largest lower bound, n = k or, of spare > 0, anything up to k + spare.
  // There are at least k entries.
  __device__ uint32_t select(int spare) const {
    uint32_t low = smallest_from(0), high = low;
    for (int i = lane_id(); i < size_; i += kWarp) high = max(high, ordered(lowers()[i]));
    high = __reduce_max_sync(kAllLanes, high) + 1;
    // At least k entries reach `low`; fewer reach `high`.
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const int count = count_from(middle);
      if (count < k_) {
        high = middle;
      } else if (count <= k_ + spare) {
        return smallest_from(middle);
      } else {
        low = middle;
      }
    }
    return low;
  }

  // The smallest key, of those that are at least this one.
  __device__ uint32_t smallest_from(uint32_t least) const {
    uint32_t inverted = 0;
    for (int i = lane_id(); i < size_; i += kWarp) {
      const uint32_t key = ordered(lowers()[i]);
      if (key >= least) inverted = max(inverted, ~key);
    }
    return ~__reduce_max_sync(kAllLanes, inverted);
  }

  // Keeps the entries that `wanted(entry, upper)` names, in order. All lanes call it together,
  // with -inf for an entry past the end.
  template <typename Wanted>
  __device__ void keep_if(const Wanted& wanted) {
    int kept = 0;
    for (int start = 0; start < size_; start += kWarp) {
      const int i = start + lane_id();
      const bool inside = i < size_;
      const float lower = inside ? lowers()[i] : -INFINITY;
      const float upper = inside ? uppers()[i] : -INFINITY;
      const int32_t column = inside ? columns()[i] : 0;
      const bool keep = wanted(i, upper) && inside;
      const unsigned lanes = __ballot_sync(kAllLanes, keep);
      // Everybody has read before anybody writes.
      __syncwarp();
      if (keep) {
        const int to = kept + __popc(lanes & lanes_before());
        lowers()[to] = lower;
        uppers()[to] = upper;
        columns()[to] = column;
      }
      kept += __popc(lanes);
    }
    size_ = kept;
    __syncwarp();
  }

  const CandidateLists& lists_;
  int64_t row_;
  int k_;
  int size_;
  int tightened_;
  int full_;
  float floor_;
};

}  // namespace
}  // namespace saelens_certify
