// Argument checks and small helpers over the stable C++ interface of torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "ops/cpu/row_kernels.h"

namespace saelens_certify {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A dense, row-major CPU or CUDA tensor of this type and rank.
void check_tensor(const char* name, const Tensor& tensor, ScalarType type, int64_t rank);

// The same for float32, bfloat16 or float16; returns which.
Real check_real(const char* name, const Tensor& tensor, int64_t rank);

void check_size(const char* name, const Tensor& tensor, int64_t dimension, int64_t size);

// A vector of n numbers, or nothing.
void check_vector(const char* name, const OptionalTensor& tensor, ScalarType type, int64_t n);

// The dispatcher sends a call to the CUDA operators if any tensor is there: all must be, on one
// device.
void check_device(const char* name, const OptionalTensor& tensor, const Tensor& like);

// On the CPU, or on the device of another tensor.
Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType type);
Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like);

// out = a b, in the matrix product mode that torch is set to.
void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out);

// The same with a float32 result where a and b, of one type, may have 16 bits: products are
// accumulated in float32 and not rounded in between.
void matrix_product_float32(const Tensor& a, const Tensor& b, const Tensor& out);

inline int64_t bytes_of(Real type) { return type == Real::kFloat32 ? 4 : 2; }

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? data_of<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool in_pool(const int32_t* pool_bits, int32_t column) {
  return (static_cast<uint32_t>(pool_bits[column >> 5]) >> (column & 31)) & 1u;
}

}  // namespace saelens_certify
