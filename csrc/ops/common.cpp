#include "ops/common.h"

#include <array>
#include <exception>
#include <vector>

// Part of torch's stable interface since 2.13, whose headers hide it from a library built for an
// older torch; null where torch does not have it and prints the reason to stderr instead.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) const char*
torch_exception_get_what_without_backtrace();

namespace saelens_certify {

namespace {

void check_layout(const char* name, const Tensor& tensor, int64_t rank) {
  STD_TORCH_CHECK(tensor.is_cpu() || tensor.is_cuda(), name,
                  " must be on the CPU or a CUDA device");
  STD_TORCH_CHECK(tensor.dim() == rank, name, " has ", tensor.dim(), " dimensions, expected ",
                  rank);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous: call .contiguous()");
}

// Calls torch; what it throws names a line of torch's headers, not what went wrong.
template <typename Call>
auto with_reason(const char* name, Call&& call) {
  try {
    return call();
  } catch (const std::exception&) {
    const bool told = torch_exception_get_what_without_backtrace != nullptr;
    STD_TORCH_CHECK(
        false, name, " failed: ",
        told ? torch_exception_get_what_without_backtrace() : "torch printed the reason");
    throw;
  }
}

// Calls an overload of aten::mm whose result, the first of the stack, is its last argument.
template <size_t kArguments>
void call_mm(const char* overload, std::array<StableIValue, kArguments> stack) {
  with_reason("a matrix product", [&] {
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  });
}

Tensor allocated(std::initializer_list<int64_t> sizes, ScalarType type,
                 std::optional<torch::stable::Device> device) {
  const std::vector<int64_t> shape(sizes);
  return with_reason("allocating a tensor", [&] {
    return torch::stable::empty({shape.data(), shape.size()}, type, std::nullopt, device);
  });
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
  return allocated(sizes, type, std::nullopt);
}

Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  const torch::stable::Device device =
      like.is_cuda()
          ? torch::stable::Device(torch::stable::DeviceType::CUDA, like.get_device_index())
          : torch::stable::Device(torch::stable::DeviceType::CPU);
  return allocated(sizes, type, device);
}

void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  // The "out" form writes into a buffer that is used again, and autocast leaves it alone.
  using torch::stable::detail::from;
  call_mm<3>("out", {from(a), from(b), from(out)});
}

void matrix_product_float32(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() == ScalarType::Float) return matrix_product(a, b, out);
  if (a.is_cpu()) {
    // torch's CPU kernels for 16 bits round their results to 16 bits.
    return matrix_product(torch::stable::to(a, ScalarType::Float),
                          torch::stable::to(b, ScalarType::Float), out);
  }
  using torch::stable::detail::from;
  call_mm<4>("dtype_out", {from(a), from(b), from(ScalarType::Float), from(out)});
}

}  // namespace saelens_certify
