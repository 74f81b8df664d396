#include "ops/pool.h"

#include <algorithm>

#include "ops/schemas.h"

namespace saelens_certify {

namespace {

// Every index must have its bit or its total: features [0, limit), or -1.
void check_indices(const Tensor& indices, int64_t limit) {
  check_tensor("indices", indices, ScalarType::Int, 2);
  const int32_t* index = data_of<int32_t>(indices);
  const int64_t n = indices.numel();
  if (n == 0) return;
  const auto [low, high] = std::minmax_element(index, index + n);
  STD_TORCH_CHECK(*low >= -1 && *high < limit, "indices span ", *low, " to ", *high,
                  ", expected features 0 to ", limit - 1, " or -1");
}

std::tuple<Tensor, Tensor, Tensor> restrict_codes(Tensor values, Tensor indices, Tensor pool_bits) {
  check_tensor("values", values, ScalarType::Float, 2);
  check_tensor("pool_bits", pool_bits, ScalarType::Int, 1);
  check_indices(indices, 32 * pool_bits.size(0));
  check_size("values", values, 0, indices.size(0));
  check_size("values", values, 1, indices.size(1));
  return restrict_cpu(values, indices, pool_bits);
}

void pool_count(Tensor totals, Tensor indices) {
  check_tensor("totals", totals, ScalarType::Long, 1);
  check_indices(indices, totals.size(0));
  pool_count_cpu(totals, indices);
}

Tensor count_outside(Tensor indices, Tensor pool_bits) {
  check_tensor("pool_bits", pool_bits, ScalarType::Int, 1);
  check_indices(indices, 32 * pool_bits.size(0));
  return count_outside_cpu(indices, pool_bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saelens_certify, m) {
  m.def(schemas::kRestrict);
  m.def(schemas::kPoolCount);
  m.def(schemas::kCountOutside);
}

STABLE_TORCH_LIBRARY_IMPL(saelens_certify, CPU, m) {
  m.impl("restrict", TORCH_BOX(&restrict_codes));
  m.impl("pool_count_", TORCH_BOX(&pool_count));
  m.impl("count_outside", TORCH_BOX(&count_outside));
}

}  // namespace saelens_certify
