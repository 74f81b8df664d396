// topk_encode and threshold_encode on CUDA. Rows are taken in chunks and features in tiles whose
// products stay in the L2 cache: a matrix product and a filter per tile, and per chunk a kernel
// that rounds the rows and one that scores the remaining candidates exactly. Nothing waits for the
// device.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "ops/cuda/encode_filter.cuh"
#include "ops/cuda/encode_prepare.cuh"
#include "ops/cuda/encode_rescore.cuh"
#include "ops/encode.h"

namespace saelens_certify {

namespace {

// A tile of 2048 x 2048 float32 products takes 16 MiB of the L2 cache and one wave of an H100.
constexpr int64_t kRowChunk = 2048;
constexpr int64_t kTileProducts = int64_t{1} << 22;
constexpr int64_t kMostColumns = 16384;
// Limits of the other buffers of a chunk.
constexpr int64_t kListBytes = int64_t{24} << 20;
constexpr int64_t kRowBytes = int64_t{16} << 20;
constexpr int64_t kOutlierBytes = int64_t{4} << 20;
constexpr int kGatherThreads = 256;

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Rows and features at a time, so that no buffer exceeds its limit.
EncodeArgs within_memory(EncodeArgs args, int64_t list_bytes) {
  int64_t rows = args.row_chunk == 0 ? kRowChunk : args.row_chunk;
  rows = std::min({rows, args.tokens(), kListBytes / list_bytes});
  if (args.screen_weight.has_value() && args.d_in() > 0) {
    rows = std::min(rows, kRowBytes / (2 * args.d_in()));
  }
  // Matrix products like whole blocks of rows.
  if (rows > kGroup && rows < args.tokens()) rows = rows / kGroup * kGroup;
  args.row_chunk = std::max<int64_t>(1, rows);
  int64_t columns = args.column_tile;
  if (columns == 0) {
    columns = std::min(kMostColumns, kTileProducts / args.row_chunk);
    const bool widens = !args.screen_weight.has_value() && args.weight_type != Real::kFloat32;
    if (widens && args.d_in() > 0) columns = std::min(columns, kRowBytes / (4 * args.d_in()));
    columns = std::max<int64_t>(kGroup, columns / kGroup * kGroup);
  }
  // Rows of products, and groups of four features, are aligned to 16 bytes.
  args.column_tile = rounded_up(std::min(columns, args.d_sae()), 4);
  return args;
}

// One call: views of its inputs, working memory, and the loop over chunks and tiles.
class CudaEncoder {
 public:
  CudaEncoder(const EncodeArgs& args, const OptionalTensor& pool_bits)
      : args_(args), scope_(args.x), stream_(scope_.stream()) {
    view_ = {data_of<float>(args.x),
             args.weight.const_data_ptr(),
             args.weight_type,
             data_of<float>(args.bias),
             data_of<float>(args.scale),
             data_of<float>(args.theta),
             data_of<float>(args.gate_bias),
             data_of<float>(args.weight_norms),
             data_of<float>(args.screen_error),
             data_of<int32_t>(pool_bits),
             args.d_in(),
             args.d_sae(),
             args.gemm_error,
             4 * (args.d_in() + 8) * 0x1p-126};
  }

  const EncodeView& view() const { return view_; }
  Stream stream() const { return stream_; }
  bool plain() const {
    return view_.scale == nullptr && view_.theta == nullptr && view_.gate_bias == nullptr;
  }

  // Memory of this many T that lives as long as this object; kernels of a stream run in order.
  template <typename T>
  T* reserve(int64_t count) {
    buffers_.push_back(empty_tensor({count * int64_t{sizeof(T)}}, ScalarType::Byte, args_.x));
    return mutable_data_of<T>(buffers_.back());
  }

  // Calls filter(tile) for every tile of a chunk, after its lists have been started, and then
  // rescore(first row, rows).
  template <typename Lists, typename Filter, typename Rescore>
  void run(const Lists& lists, const Filter& filter, const Rescore& rescore) {
    if (args_.tokens() == 0) return;
    reserve_chunk();
    view_tiles();
    launch(tile_margins_kernel, grid_size_of(tiles()), kMarginThreads, 0, stream_, view_,
           args_.column_tile, tile_margins_);
    choose_outliers();
    for (int64_t start = 0; start < args_.tokens(); start += args_.row_chunk) {
      const int64_t rows = std::min(args_.row_chunk, args_.tokens() - start);
      prepare(lists, start, rows);
      view_chunk(start, rows);
      for (int64_t tile = 0; tile < tiles(); ++tile) filter(multiply(start, rows, tile));
      rescore(start, rows);
    }
  }

 private:
  bool screened() const { return args_.screen_weight.has_value(); }
  int64_t tiles() const { return (args_.d_sae() + args_.column_tile - 1) / args_.column_tile; }

  void reserve_chunk() {
    const int64_t rows = args_.row_chunk, d_in = args_.d_in();
    tile_margins_ = reserve<TileMargin>(tiles());
    product_ = empty_tensor({rows * args_.column_tile}, ScalarType::Float, args_.x);
    outputs_.margins = reserve<RowMargin>(rows);
    if (!screened()) {
      if (args_.weight_type != Real::kFloat32) {
        widened_ = empty_tensor({args_.column_tile, d_in}, ScalarType::Float, args_.x);
      }
      return;
    }
    narrowed_ = empty_tensor({rows, d_in}, args_.screen_weight->scalar_type(), args_.x);
    outputs_.x16 = narrowed_->mutable_data_ptr();
    outputs_.row_scale = reserve<float>(rows);
    const int64_t stride = rounded_up(args_.d_sae(), 4);
    if (stride * Outliers::kMost * int64_t{sizeof(float)} > kOutlierBytes) return;
    outputs_.outlier_inputs = reserve<float>(rows * Outliers::kMost);
    energy_ = reserve<float>(d_in);
    chosen_ = reserve<int32_t>(1 + Outliers::kMost);
    outlier_weights_ = reserve<float>(stride * Outliers::kMost);
    outliers_ = {chosen_, outputs_.outlier_inputs, outlier_weights_, stride};
  }

  // Those of the rows of all chunks: any choice gives the same codes, and one block chooses while
  // the rest of the device waits.
  void choose_outliers() {
    if (outliers_.count == nullptr) return;
    launch(choose_outliers_kernel, 1, kChooseThreads, 0, stream_, view_, args_.tokens(), energy_,
           chosen_);
    with_type(args_.weight_type, [&](auto type) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const int64_t blocks = (outliers_.stride + kGatherThreads - 1) / kGatherThreads;
      launch(gather_outliers_kernel<W>, grid_size_of(blocks), kGatherThreads, 0, stream_, view_,
             outliers_, outlier_weights_);
    });
  }

  template <typename Lists>
  void prepare(const Lists& lists, int64_t start, int64_t rows) {
    const Real type = !screened()                                              ? Real::kFloat32
                      : args_.screen_weight->scalar_type() == ScalarType::Half ? Real::kFloat16
                                                                               : Real::kBFloat16;
    with_type(type, [&](auto pointer) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(pointer)>>;
      launch(prepare_rows_kernel<S, Lists>,
             grid_size_of((rows + kPrepareWarps - 1) / kPrepareWarps), kPrepareThreads, 0, stream_,
             view_, lists, outliers_, outputs_, start, rows);
    });
  }

  int64_t columns_of(int64_t tile) const {
    return std::min(args_.column_tile, args_.d_sae() - tile * args_.column_tile);
  }
  // Products of a tile with empty rows need no matrix product.
  bool multiplies() const { return args_.d_in() > 0; }

  // Views of tensors cost more than a small matrix product takes: those that the tiles of all
  // chunks, or all tiles of a chunk, have in common are made once.
  void view_tiles() {
    if (!multiplies()) return;
    Tensor weights = screened()             ? *args_.screen_weight
                     : widened_.has_value() ? *widened_
                                            : args_.weight;
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      // A tile of widened weights takes the place of the one before.
      const int64_t first = widened_.has_value() ? 0 : tile * args_.column_tile;
      Tensor rows = torch::stable::narrow(weights, 0, first, columns_of(tile));
      transposed_.push_back(torch::stable::transpose(rows, 0, 1));
    }
  }

  void view_chunk(int64_t start, int64_t rows) {
    if (!multiplies()) return;
    Tensor x = screened() ? *narrowed_ : args_.x;
    x_ = torch::stable::narrow(x, 0, screened() ? 0 : start, rows);
    last_product_ = product(rows, columns_of(tiles() - 1));
    whole_product_ = tiles() > 1 ? product(rows, args_.column_tile) : last_product_;
  }

  Tensor product(int64_t rows, int64_t columns) {
    const int64_t stride = rounded_up(columns, 4);
    const int64_t shape[2] = {rows, stride};
    Tensor flat = torch::stable::narrow(*product_, 0, 0, rows * stride);
    Tensor padded = torch::stable::view(flat, {shape, 2});
    return stride == columns ? padded : torch::stable::narrow(padded, 1, 0, columns);
  }

  Tile multiply(int64_t start, int64_t rows, int64_t tile) {
    const bool last = tile + 1 == tiles();
    const int64_t first = tile * args_.column_tile;
    const int64_t columns = columns_of(tile);
    const int64_t stride = rounded_up(columns, 4);
    if (multiplies()) {
      if (widened_.has_value()) widen(first, columns);
      matrix_product_float32(*x_, transposed_[tile], last ? *last_product_ : *whole_product_);
    } else {
      zero_async(product_->mutable_data_ptr(), rows * stride * sizeof(float), stream_);
    }
    return {data_of<float>(*product_),
            outputs_.row_scale,
            outputs_.margins,
            tile_margins_ + tile,
            outliers_,
            stride,
            rows,
            start,
            static_cast<int32_t>(first),
            static_cast<int32_t>(columns),
            last};
  }

  // 16-bit weights of some columns in float32.
  void widen(int64_t first, int64_t columns) {
    const int64_t d_in = args_.d_in();
    with_type(args_.weight_type, [&](auto type) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const unsigned blocks = 8 * static_cast<unsigned>(scope_.multiprocessors());
      launch(widen_kernel<W>, blocks, 256, 0, stream_, data_of<W>(args_.weight) + first * d_in,
             columns * d_in, mutable_data_of<float>(*widened_));
    });
  }

  const EncodeArgs& args_;
  DeviceScope scope_;
  Stream stream_;
  EncodeView view_;
  std::vector<Tensor> buffers_;
  OptionalTensor product_, narrowed_, widened_;
  std::vector<Tensor> transposed_;  // weights of each tile
  OptionalTensor x_, whole_product_, last_product_;
  TileMargin* tile_margins_ = nullptr;
  RowOutputs outputs_ = {};
  Outliers outliers_ = {};
  float* energy_ = nullptr;
  int32_t* chosen_ = nullptr;
  float* outlier_weights_ = nullptr;
};

// The output slots of a call.
struct Slots {
  Slots(int64_t tokens, int64_t slots, const Tensor& like)
      : values(empty_tensor({tokens, slots}, ScalarType::Float, like)),
        indices(empty_tensor({tokens, slots}, ScalarType::Int, like)),
        counts(empty_tensor({tokens}, ScalarType::Int, like)) {}

  SlotView view() const {
    return {mutable_data_of<float>(values), mutable_data_of<int32_t>(indices),
            mutable_data_of<int32_t>(counts), values.size(1)};
  }

  Tensor values, indices, counts;
};

unsigned filter_blocks(const Tile& tile) {
  return grid_size_of((tile.rows + kFilterRows - 1) / kFilterRows);
}

template <typename Sink>
void filter(const CudaEncoder& encoder, const Tile& tile, const typename Sink::Lists& lists) {
  const auto kernel = encoder.plain() ? filter_kernel<Sink, false> : filter_kernel<Sink, true>;
  launch(kernel, filter_blocks(tile), kFilterThreads, 0, encoder.stream(), encoder.view(), tile,
         lists);
}

int64_t staged_bytes(const EncodeArgs& args) {
  const int64_t bytes = args.d_in() * int64_t{sizeof(double)};
  return bytes <= kSharedRowBytes ? bytes : 0;
}

// Buffer size for selecting k of n columns: two selections and room between compactions, or all
// columns (then the buffer never overflows).
int64_t list_capacity(int64_t k, int64_t n) { return std::min(2 * k + 256, n); }

TopCodes topk_encode(Tensor x, Tensor weight, Tensor bias, OptionalTensor scale,
                     OptionalTensor theta, OptionalTensor gate_bias, Tensor weight_norms,
                     OptionalTensor screen_weight, OptionalTensor screen_error,
                     OptionalTensor pool_bits, int64_t k, double gemm_error, int64_t row_chunk,
                     int64_t column_tile) {
  EncodeArgs args =
      checked_encode({x, weight, bias, scale, theta, gate_bias, weight_norms, screen_weight,
                      screen_error, gemm_error, row_chunk, column_tile, Real::kFloat32});
  check_vector("pool_bits", pool_bits, ScalarType::Int, (args.d_sae() + 31) / 32);
  check_device("pool_bits", pool_bits, x);
  STD_TORCH_CHECK(k >= 1 && k <= args.d_sae(), "k = ", k, " must lie between 1 and ", args.d_sae());

  const bool has_pool = pool_bits.has_value();
  const int64_t capacity = list_capacity(k, args.d_sae());
  const int64_t keys = power_of_two_from(capacity);
  const bool far_keys = keys > kSharedKeys;
  const int64_t entry_bytes = 2 * int64_t{sizeof(float)} + int64_t{sizeof(int32_t)};
  args = within_memory(args, (has_pool ? 2 : 1) * capacity * entry_bytes +
                                 (far_keys ? keys * int64_t{sizeof(Key)} : 0));
  CudaEncoder encoder(args, pool_bits);
  const int64_t rows = args.row_chunk;
  const auto reserve_lists = [&] {
    return CandidateLists{
        encoder.reserve<float>(rows * capacity), encoder.reserve<float>(rows * capacity),
        encoder.reserve<int32_t>(rows * capacity), encoder.reserve<int4>(rows), capacity};
  };
  TopLists lists = {reserve_lists(), {}, static_cast<int>(k)};
  if (has_pool) lists.pool = reserve_lists();
  const KeySpace space = {far_keys ? encoder.reserve<Key>(rows * keys) : nullptr, keys};

  const Slots all(args.tokens(), k, x);
  const Slots pooled(has_pool ? args.tokens() : 0, has_pool ? k : 0, x);
  const int64_t row_bytes = staged_bytes(args);
  const int64_t shared = row_bytes + (far_keys ? 0 : keys * int64_t{sizeof(Key)});
  encoder.run(
      lists,
      [&](const Tile& tile) {
        if (has_pool) {
          filter<TopSink<true>>(encoder, tile, lists);
        } else {
          filter<TopSink<false>>(encoder, tile, lists);
        }
      },
      [&](int64_t start, int64_t count) {
        const auto kernel = row_bytes > 0 ? rescore_top_kernel<double> : rescore_top_kernel<float>;
        launch(kernel, grid_size_of(count), kRescoreThreads, shared, encoder.stream(),
               encoder.view(), lists, start, space, all.view(),
               has_pool ? pooled.view() : SlotView{});
      });
  return {all.values, all.indices, all.counts, pooled.values, pooled.indices, pooled.counts};
}

Codes threshold_encode(Tensor x, Tensor weight, Tensor bias, OptionalTensor scale,
                       OptionalTensor theta, OptionalTensor gate_bias, Tensor weight_norms,
                       OptionalTensor screen_weight, OptionalTensor screen_error, int64_t capacity,
                       double gemm_error, int64_t row_chunk, int64_t column_tile) {
  EncodeArgs args =
      checked_encode({x, weight, bias, scale, theta, gate_bias, weight_norms, screen_weight,
                      screen_error, gemm_error, row_chunk, column_tile, Real::kFloat32});
  STD_TORCH_CHECK(capacity >= 0, "capacity = ", capacity, " must not be negative");
  args = within_memory(args, kPending * int64_t{sizeof(int32_t)});
  CudaEncoder encoder(args, std::nullopt);
  const Slots slots(args.tokens(), capacity, x);
  const SlotView out = slots.view();
  const ThresholdLists lists = {encoder.reserve<int32_t>(args.row_chunk * kPending),
                                encoder.reserve<int2>(args.row_chunk), out.values, out.indices,
                                capacity};
  const int64_t row_bytes = staged_bytes(args);
  encoder.run(
      lists, [&](const Tile& tile) { filter<ThresholdSink>(encoder, tile, lists); },
      [&](int64_t start, int64_t count) {
        const auto kernel =
            row_bytes > 0 ? rescore_threshold_kernel<double> : rescore_threshold_kernel<float>;
        launch(kernel, grid_size_of(count), kRescoreThreads, row_bytes, encoder.stream(),
               encoder.view(), lists, start, out);
      });
  return {slots.values, slots.indices, slots.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SC_NAMESPACE, SC_DISPATCH, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("threshold_encode", TORCH_BOX(&threshold_encode));
}

}  // namespace saelens_certify
