#include "ops/cpu/encoder.h"

namespace saelens_certify {

namespace {
// Rows of weights asked for before they are needed: they lie anywhere in memory. The processor
// itself goes on from the beginning of a row; to ask for all of it holds up the loads.
constexpr int64_t kAhead = 4;
constexpr int64_t kBeginning = 512;  // bytes
}  // namespace

Encoder::Encoder(const EncodeArgs& args)
    : args_(args),
      kernels_(row_kernels()),
      x_(data_of<float>(args.x)),
      weight_(data_of<char>(args.weight)),
      bias_(data_of<float>(args.bias)),
      scale_(data_of<float>(args.scale)),
      theta_(data_of<float>(args.theta)),
      gate_(data_of<float>(args.gate_bias)),
      norms_(data_of<float>(args.weight_norms)),
      errors_(data_of<float>(args.screen_error)),
      underflow_(4 * (args.d_in() + 8) * 0x1p-126) {
  row_margins_.resize(args.row_chunk);
  tile_margins_.resize(tiles());
  for (int64_t column = 0; column < args.d_sae(); ++column) {
    TileMargin& tile = tile_margins_[column / args.column_tile];
    const double size = size_of(column), norm = norms_[column], error = error_of(column);
    tile.weight = std::max(tile.weight, size * norm);
    tile.error = std::max(tile.error, size * error);
    tile.offset = std::max(tile.offset, size * offset_of(column, bias_));
    tile.size = std::max(tile.size, 1 + size);
    if (gate_ == nullptr) continue;
    tile.gate_weight = std::max(tile.gate_weight, norm);
    tile.gate_error = std::max(tile.gate_error, error);
    tile.gate_offset = std::max(tile.gate_offset, offset_of(column, gate_));
  }
}

void Encoder::score(int64_t row, std::vector<Scored>& entries) const {
  const auto size = static_cast<int64_t>(entries.size());
  const int64_t bytes = std::min(kBeginning, args_.d_in() * bytes_of(args_.weight_type));
  const auto fetch = [&](int64_t entry) {
    if (entry >= size) return;
    const char* weight = weight_of(entries[entry].column);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(weight + at, 0, 2);
  };
  for (int64_t entry = 0; entry < std::min(size, kAhead); ++entry) fetch(entry);
  int64_t i = 0;
  for (; i + 2 <= size; i += 2) {
    fetch(i + kAhead);
    fetch(i + kAhead + 1);
    double sums[2];
    kernels_.dot_pair(x_of(row), weight_of(entries[i].column), weight_of(entries[i + 1].column),
                      args_.weight_type, args_.d_in(), sums);
    entries[i].score = activity(sums[0], entries[i].column);
    entries[i + 1].score = activity(sums[1], entries[i + 1].column);
  }
  if (i < size) entries[i].score = active_score(row, entries[i].column);
}

void Encoder::prepare_rows(int64_t first_row, int64_t rows) {
  const int64_t d_in = args_.d_in();
  if (half() && !narrowed_.has_value()) {
    narrowed_ = empty_tensor({args_.row_chunk, d_in}, ScalarType::BFloat16);
  }
  if (half()) outliers_.choose(x_of(first_row), rows, d_in);
  const int n_outliers = outliers_.count();
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = x_of(first_row + row);
      const double norm = std::sqrt(kernels_.dot(x, x, Real::kFloat32, d_in));
      const double outer = kOuterRoundings * (n_outliers > 0 ? 2 : 1) * norm;
      RowMargin& margin = row_margins_[row];
      margin.absolute = underflow_ * (1 + norm);
      if (!half()) {
        margin.weight = args_.gemm_error * norm + outer;
        margin.error = 0;
        continue;
      }
      double squares[3];  // of r, h and r - h
      auto* to = mutable_data_of<uint16_t>(*narrowed_) + row * d_in;
      kernels_.narrow(x, outliers_.dimensions(), n_outliers, d_in, to, squares);
      const double length = std::sqrt(squares[1]);
      margin.weight = std::sqrt(squares[2]) + args_.gemm_error * length + outer;
      margin.error = length * (1 + args_.gemm_error);
    }
  });
}

// Scores of a tile before bias and scale, [rows, columns].
const char* Encoder::multiply(int64_t first_row, int64_t rows, int64_t first, int64_t columns) {
  if (!product_.has_value()) {
    product_ = empty_tensor({args_.row_chunk * args_.column_tile},
                            half() ? ScalarType::BFloat16 : ScalarType::Float);
  }
  const int64_t shape[2] = {rows, columns};
  Tensor flat = torch::stable::narrow(*product_, 0, 0, rows * columns);
  Tensor out = torch::stable::view(flat, {shape, 2});
  Tensor x = args_.x;
  Tensor input = half() ? torch::stable::narrow(*narrowed_, 0, 0, rows)
                        : torch::stable::narrow(x, 0, first_row, rows);
  matrix_product(input, torch::stable::transpose(weight_tile(first, columns), 0, 1), out);
  return data_of<char>(*product_);
}

// Rows of the weights that are multiplied with: those of the screen, or float32.
Tensor Encoder::weight_tile(int64_t first, int64_t columns) {
  Tensor weight = half() ? *args_.screen_weight : args_.weight;
  if (half() || args_.weight_type == Real::kFloat32) {
    return torch::stable::narrow(weight, 0, first, columns);
  }
  const int64_t d_in = args_.d_in();
  if (!widened_.has_value()) {
    widened_ = empty_tensor({args_.column_tile, d_in}, ScalarType::Float);
  }
  float* to = mutable_data_of<float>(*widened_);
  const char* from = weight_of(first);
  torch::stable::parallel_for(0, columns, 64, [&](int64_t begin, int64_t end) {
    kernels_.widen(from + begin * d_in * bytes_of(args_.weight_type), args_.weight_type,
                   (end - begin) * d_in, to + begin * d_in);
  });
  return torch::stable::narrow(*widened_, 0, 0, columns);
}

}  // namespace saelens_certify
