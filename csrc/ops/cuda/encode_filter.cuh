// The filter: one warp per row reads a tile of screened products once, 16 bytes per lane, and hands
// on the columns that may be active and, for a top k, may be among the best. Columns ascend, and
// nothing is atomic: timing has no influence.
#pragma once

#include "ops/cuda/encode_select.cuh"

namespace saelens_certify {
namespace {

constexpr int kFilterThreads = 128;
constexpr int kFilterRows = kFilterThreads / kWarp;
// Columns that a warp takes at a time, and such groups whose loads are in flight together.
constexpr int kGroup = 4 * kWarp;
constexpr int kGroups = 4;

// Outlier dimensions of the rows of a call: left out of the product, added here in float32.
struct Outliers {
  static constexpr int kMost = 8;
  const int32_t* count;  // null: there are none
  const float* inputs;   // [rows, kMost]
  const float* weights;  // [kMost, stride], of all columns
  int64_t stride;        // a multiple of 4
};

// The largest margins of the columns in a tile.
struct TileMargin {
  ColumnMargin score;
  ColumnMargin gate;
};

// Products of a chunk of rows with a tile of columns.
struct Tile {
  const float* product;      // [rows, stride]; it and all its rows are aligned to 16 bytes
  const float* row_scale;    // [rows], or 1
  const RowMargin* margins;  // [rows]
  const TileMargin* most;
  Outliers outliers;
  int64_t stride;
  int64_t rows;
  int64_t first_row;  // in x
  int32_t first;      // column
  int32_t columns;
  bool last;
};

// Four consecutive numbers; zeros past the end.
__device__ inline float4 load4(const float* from, int32_t at, int32_t n) {
  const float* p = from + at;
  if (n - at >= 4 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    return *reinterpret_cast<const float4*>(p);
  }
  return {n - at > 0 ? p[0] : 0.0f, n - at > 1 ? p[1] : 0.0f, n - at > 2 ? p[2] : 0.0f,
          n - at > 3 ? p[3] : 0.0f};
}

// Four products of a row. What lies past the end is NaN, which passes no comparison.
__device__ inline float4 load_products(const float* product, int32_t at, int32_t columns) {
  if (at >= columns) return {NAN, NAN, NAN, NAN};
  float4 four = *reinterpret_cast<const float4*>(product + at);
  if (at + 1 >= columns) four.y = NAN;
  if (at + 2 >= columns) four.z = NAN;
  if (at + 3 >= columns) four.w = NAN;
  return four;
}

// Turns products of one row into the screened sums over i of x_i w_i.
class RowSums {
 public:
  __device__ RowSums(const Tile& tile, int64_t row)
      : outliers_(tile.outliers),
        scale_(tile.row_scale == nullptr ? 1.0f : tile.row_scale[row]),
        count_(tile.outliers.count == nullptr ? 0 : *tile.outliers.count),
        inputs_(count_ == 0 ? nullptr : tile.outliers.inputs + row * Outliers::kMost) {}

  // Four columns per group, from columns[group] on.
  __device__ void sum(float4 (&four)[kGroups], const int32_t (&columns)[kGroups]) const {
#pragma unroll
    for (float4& f : four) f = {f.x * scale_, f.y * scale_, f.z * scale_, f.w * scale_};
#pragma unroll 1
    for (int o = 0; o < count_; ++o) {
      const float x = inputs_[o];
      const float* weights = outliers_.weights + o * outliers_.stride;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float4 w = *reinterpret_cast<const float4*>(weights + columns[g]);
        float4& f = four[g];
        f = {__fmaf_rn(x, w.x, f.x), __fmaf_rn(x, w.y, f.y), __fmaf_rn(x, w.z, f.z),
             __fmaf_rn(x, w.w, f.w)};
      }
    }
  }

 private:
  const Outliers& outliers_;
  float scale_;
  int count_;
  const float* inputs_;
};

// What the fast comparison of one row uses: margins of the whole tile.
struct Screen {
  float slack;
  float gate_slack;
  float floor;        // for columns of the pool
  float other_floor;  // for all others, where there is a pool
};

// The pool's bits of four columns.
__device__ inline unsigned members(const EncodeView& view, int32_t column) {
  return static_cast<uint32_t>(view.pool_bits[column >> 5]) >> (column & 31) & 15;
}

// Of four columns, those that may be active and reach their floor. The first one is a multiple
// of 4.
template <bool kExtras, bool kPool>
__device__ inline unsigned passing(const EncodeView& view, const Screen& screen, float4 sums,
                                   int32_t column) {
  const auto d_sae = static_cast<int32_t>(view.d_sae);
  const float4 bias = load4(view.bias, column, d_sae);
  float score[4] = {sums.x + bias.x, sums.y + bias.y, sums.z + bias.z, sums.w + bias.w};
  const float least = kExtras && view.theta != nullptr ? screen.floor : fmaxf(screen.floor, 0.0f);
  float limit[4] = {least, least, least, least};
  bool open[4] = {true, true, true, true};
  if (kExtras) {
    if (view.scale != nullptr) {
      const float4 scale = load4(view.scale, column, d_sae);
      score[0] *= scale.x, score[1] *= scale.y, score[2] *= scale.z, score[3] *= scale.w;
    }
    if (view.theta != nullptr) {
      const float4 theta = load4(view.theta, column, d_sae);
      limit[0] = fmaxf(limit[0], theta.x), limit[1] = fmaxf(limit[1], theta.y);
      limit[2] = fmaxf(limit[2], theta.z), limit[3] = fmaxf(limit[3], theta.w);
    }
    if (view.gate_bias != nullptr) {
      const float4 gate = load4(view.gate_bias, column, d_sae);
      open[0] = sums.x + gate.x + screen.gate_slack > 0;
      open[1] = sums.y + gate.y + screen.gate_slack > 0;
      open[2] = sums.z + gate.z + screen.gate_slack > 0;
      open[3] = sums.w + gate.w + screen.gate_slack > 0;
    }
  }
  const unsigned pool = kPool ? members(view, column) : 15;
  unsigned mask = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float upper = score[c] + screen.slack;
    const bool reaches = upper >= limit[c] && (pool >> c & 1 || upper >= screen.other_floor);
    mask |= (open[c] && reaches ? 1u : 0u) << c;
  }
  return mask;
}

// A column that passed, with bounds from its own margin.
__device__ inline LaneCandidate candidate_at(const EncodeView& view, const RowMargin& margin,
                                             float sum, int32_t column) {
  float score = sum + view.bias[column];
  if (view.scale != nullptr) score *= view.scale[column];
  const float slack = slack_of(margin, score_margin(view, column));
  const float upper = score + slack, lower = score - slack, limit = view.limit(column);
  bool possible = upper > limit, certain = lower > limit;
  if (view.gate_bias != nullptr) {
    const float gate = sum + view.gate_bias[column];
    const float room = slack_of(margin, gate_margin(view, column));
    possible = possible && gate + room > 0;
    certain = certain && gate - room > 0;
  }
  return {possible, certain ? lower : -INFINITY, upper, column};
}

// Columns of a row that passed, ascending. They wait here until there is one for every lane, as
// what follows takes a warp as long for one column as for 32.
struct Hit {
  float sum;
  int32_t column;
};

class HitQueue {
 public:
  // Room for what a step of the filter may add to an incomplete warp.
  static constexpr int kCapacity = kWarp + kGroups * kGroup;

  __device__ explicit HitQueue(Hit* entries) : entries_(entries) {}

  __device__ int size() const { return size_; }

  // Adds columns `column` to `column` + 3 of every lane where the mask has them.
  __device__ void add(unsigned mask, const float4& sums, int32_t column) {
    int at = size_;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const unsigned lanes = __ballot_sync(kAllLanes, mask >> c & 1);
      at += __popc(lanes & lanes_before());
      size_ += __popc(lanes);
    }
    if (mask & 1) entries_[at++] = {sums.x, column};
    if (mask & 2) entries_[at++] = {sums.y, column + 1};
    if (mask & 4) entries_[at++] = {sums.z, column + 2};
    if (mask & 8) entries_[at] = {sums.w, column + 3};
  }

  // Calls visit(hit, whether there is one) on all lanes while there are at least `least` hits, one
  // or a warp.
  template <typename Visit>
  __device__ void drain(int least, const Visit& visit) {
    __syncwarp();
    int done = 0;
#pragma unroll 1
    while (size_ - done >= least) {
      const int at = done + lane_id();
      const Hit hit = at < size_ ? entries_[at] : Hit{};
      visit(hit, at < size_);
      done = min(done + kWarp, size_);
    }
    // What is left moves to the front; everybody has read before anybody writes.
    const int at = done + lane_id();
    const Hit hit = at < size_ ? entries_[at] : Hit{};
    __syncwarp();
    if (at < size_) entries_[lane_id()] = hit;
    size_ -= done;
    __syncwarp();
  }

 private:
  Hit* entries_;
  int size_ = 0;
};

// A sink takes the candidates of a row; there are several (below).
template <typename Sink, bool kExtras>
__global__ void __launch_bounds__(kFilterThreads, 4)
    filter_kernel(EncodeView view, Tile tile, typename Sink::Lists lists) {
  __shared__ Hit hits[kFilterRows][HitQueue::kCapacity];
  const int64_t row = int64_t{blockIdx.x} * kFilterRows + warp_id();
  if (row >= tile.rows) return;
  Sink sink(view, lists, row, tile.first_row);
  HitQueue queue(hits[warp_id()]);
  const RowMargin margin = tile.margins[row];
  const RowSums sums(tile, row);
  Screen screen = {slack_of(margin, tile.most->score), 0.0f, 0.0f, 0.0f};
  if (kExtras) screen.gate_slack = slack_of(margin, tile.most->gate);
  const float* product = tile.product + row * tile.stride;

  for (int32_t start = 0; start < tile.columns; start += kGroups * kGroup) {
    const int32_t mine = start + 4 * lane_id();
    float4 four[kGroups];
    int32_t columns[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int32_t at = mine + g * kGroup;
      four[g] = load_products(product, at, tile.columns);
      // Lanes past the end look at the last columns once more: their products are NaN.
      columns[g] = tile.first + min(at, (tile.columns - 1) & ~3);
    }
    sums.sum(four, columns);
    screen.floor = sink.floor();
    screen.other_floor = sink.other_floor();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const unsigned mask = passing<kExtras, Sink::kPool>(view, screen, four[g], columns[g]);
      if (__any_sync(kAllLanes, mask)) queue.add(mask, four[g], columns[g]);
    }
    const bool last = start + kGroups * kGroup >= tile.columns;
    if (queue.size() < (last ? 1 : kWarp)) continue;
    queue.drain(last ? 1 : kWarp, [&](const Hit& hit, bool present) {
      LaneCandidate candidate = {false, -INFINITY, -INFINITY, 0};
      if (present) candidate = candidate_at(view, margin, hit.sum, hit.column);
      sink.take(candidate);
    });
  }
  sink.close(tile.last);
}

// --- top k -------------------------------------------------------------------------------------

// Lists over all columns and, if there is a pool, over its columns.
struct TopLists {
  CandidateLists all;
  CandidateLists pool;
  int k;
};

template <bool kHasPool>
class TopSink {
 public:
  static constexpr bool kPool = kHasPool;
  using Lists = TopLists;

  __device__ TopSink(const EncodeView& view, const TopLists& lists, int64_t row, int64_t first_row)
      : view_(view),
        x_(view.x + (first_row + row) * view.d_in),
        all_(lists.all, row, lists.k),
        pool_(kPool ? lists.pool : lists.all, row, lists.k) {}

  __device__ float floor() const {
    return kPool ? fminf(all_.floor(), pool_.floor()) : all_.floor();
  }
  __device__ float other_floor() const { return all_.floor(); }

  __device__ void take(LaneCandidate candidate) {
    const auto exact = [this](int32_t j) { return active_score<4>(view_, x_, j); };
    all_.add(candidate, exact);
    if (kPool) {
      candidate.possible = candidate.possible && (members(view_, candidate.column) & 1);
      pool_.add(candidate, exact);
    }
  }

  __device__ void close(bool last) {
    all_.finish_tile(last);
    if (kPool) pool_.finish_tile(last);
  }

 private:
  const EncodeView& view_;
  const float* x_;
  WarpList all_;
  WarpList pool_;
};

// --- all active columns --------------------------------------------------------------------------

// Candidates waiting to be scored: at most this many per row.
constexpr int kPending = 1024;

struct ThresholdLists {
  int32_t* pending;  // [rows, kPending]: columns, inverted if they are certainly active
  int2* state;       // per row: number pending, number found active
  float* values;     // [tokens, capacity], like indices
  int32_t* indices;
  int64_t capacity;
};

// Writes the active columns of a row in ascending order.
class ThresholdSink {
 public:
  static constexpr bool kPool = false;
  using Lists = ThresholdLists;

  __device__ ThresholdSink(const EncodeView& view, const ThresholdLists& lists, int64_t row,
                           int64_t first_row)
      : view_(view),
        lists_(lists),
        x_(view.x + (first_row + row) * view.d_in),
        pending_(lists.pending + row * kPending),
        slots_((first_row + row) * lists.capacity),
        state_(lists.state + row),
        size_(state_->x),
        found_(state_->y) {}

  __device__ float floor() const { return -INFINITY; }
  __device__ float other_floor() const { return -INFINITY; }

  __device__ void take(const LaneCandidate& candidate) {
    const unsigned lanes = __ballot_sync(kAllLanes, candidate.possible);
    if (size_ + __popc(lanes) > kPending) flush();
    if (candidate.possible) {
      const bool certain = candidate.lower > -INFINITY;
      pending_[size_ + __popc(lanes & lanes_before())] =
          certain ? ~candidate.column : candidate.column;
    }
    size_ += __popc(lanes);
    __syncwarp();
  }

  __device__ void close(bool) {
    if (lane_id() == 0) *state_ = {size_, found_};
  }

 private:
  // A busy row: the warp scores what is pending. Past the last slot only the number counts.
  __device__ void flush() {
    for (int i = 0; i < size_; ++i) {
      const int32_t entry = pending_[i];
      const bool certain = entry < 0;
      if (certain && found_ >= lists_.capacity) {
        ++found_;
        continue;
      }
      const int32_t column = certain ? ~entry : entry;
      const float score = active_score<4>(view_, x_, column);
      if (score == -INFINITY) continue;
      if (found_ < lists_.capacity && lane_id() == 0) {
        lists_.values[slots_ + found_] = score;
        lists_.indices[slots_ + found_] = column;
      }
      ++found_;
    }
    size_ = 0;
    // Everybody has read before anybody writes.
    __syncwarp();
  }

  const EncodeView& view_;
  const ThresholdLists& lists_;
  const float* x_;
  int32_t* pending_;
  int64_t slots_;
  int2* state_;
  int size_;
  int found_;
};

}  // namespace
}  // namespace saelens_certify
