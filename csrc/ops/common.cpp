#include "ops/common.h"

#include <array>
#include <vector>

namespace saelens_certify {

namespace {

void check_layout(const char* name, const Tensor& tensor, int64_t rank) {
  STD_TORCH_CHECK(tensor.is_cpu() || tensor.is_cuda(), name,
                  " must be on the CPU or a CUDA device");
  STD_TORCH_CHECK(tensor.dim() == rank, name, " has ", tensor.dim(), " dimensions, expected ",
                  rank);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous: call .contiguous()");
}

}  // namespace

void check_tensor(const char* name, const Tensor& tensor, ScalarType type, int64_t rank) {
  check_layout(name, tensor, rank);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has type ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(type));
}

Real check_real(const char* name, const Tensor& tensor, int64_t rank) {
  check_layout(name, tensor, rank);
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Real::kFloat32;
    case ScalarType::BFloat16:
      return Real::kBFloat16;
    case ScalarType::Half:
      return Real::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has type ", torch::headeronly::toString(tensor.scalar_type()),
                      ", expected Float, BFloat16 or Half");
      return Real::kFloat32;
  }
}

void check_size(const char* name, const Tensor& tensor, int64_t dimension, int64_t size) {
  STD_TORCH_CHECK(tensor.size(dimension) == size, name, " has size ", tensor.size(dimension),
                  " in dimension ", dimension, ", expected ", size);
}

void check_vector(const char* name, const OptionalTensor& tensor, ScalarType type, int64_t n) {
  if (!tensor.has_value()) return;
  check_tensor(name, *tensor, type, 1);
  check_size(name, *tensor, 0, n);
}

void check_device(const char* name, const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(
      tensor->is_cuda() == like.is_cuda() && tensor->get_device_index() == like.get_device_index(),
      name, " is on another device than the other inputs: move it there");
}

Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty({shape.data(), shape.size()}, type);
}

Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  const std::vector<int64_t> shape(sizes);
  const torch::stable::Device device =
      like.is_cuda()
          ? torch::stable::Device(torch::stable::DeviceType::CUDA, like.get_device_index())
          : torch::stable::Device(torch::stable::DeviceType::CPU);
  return torch::stable::empty({shape.data(), shape.size()}, type, std::nullopt, device);
}

void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  // The "out" form writes into a buffer that is used again, and autocast leaves it alone.
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  const AOTITorchError error =
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "aten::mm.out failed; torch printed the reason");
  torch::stable::detail::to<Tensor>(stack[0]);
}

void matrix_product_float32(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() == ScalarType::Float) return matrix_product(a, b, out);
  if (a.is_cpu()) {
    // torch's CPU kernels for 16 bits round their results to 16 bits.
    return matrix_product(torch::stable::to(a, ScalarType::Float),
                          torch::stable::to(b, ScalarType::Float), out);
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float),
                                    torch::stable::detail::from(out)};
  const AOTITorchError error =
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS,
                  "aten::mm.dtype_out failed; torch printed the reason");
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace saelens_certify
