// A second device without a second device: tensors of torch's spare device type ("privateuseone")
// whose memory is the host's. Each operator runs as its CPU kernel on the same memory, after the
// check that a GPU's operators make: all tensors on one device.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kCount = 2;

// ---- Memory -----------------------------------------------------------------------------------

// The same bytes under another device's name; `owner` lives as long as they do.
template <class Owner>
at::DataPtr renamed(void* data, Owner owner, Device device) {
  auto* kept = new Owner(std::move(owner));
  return {data, kept, [](void* context) { delete static_cast<Owner*>(context); }, device};
}

c10::Storage renamed(const c10::Storage& storage, Device device) {
  return {c10::Storage::use_byte_size_t(), storage.nbytes(),
          renamed(storage.mutable_data(), storage, device), c10::GetAllocator(device.type()), true};
}

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    at::DataPtr memory = c10::GetAllocator(at::kCPU)->allocate(bytes);
    void* data = memory.get();
    return renamed(data, std::move(memory), Device(kSecond, 0));
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kSecond, &allocator);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kSecond> {
  static inline thread_local c10::DeviceIndex current = 0;

  Device getDevice() const override { return {kSecond, current}; }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Device exchangeDevice(Device device) const override {
    return {kSecond, std::exchange(current, device.index())};
  }
  c10::Stream getStream(Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

Device with_index(Device device) {
  return device.has_index() ? device : Device(device.type(), Guard::current);
}

bool second(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSecond; }

// A tensor of the same shape, strides and dtype in this storage; `keys` are those of a view's base.
Tensor twin(const Tensor& tensor, c10::Storage storage,
            std::optional<c10::DispatchKeySet> keys = std::nullopt) {
  const auto key =
      storage.device_type() == kSecond ? c10::DispatchKey::PrivateUse1 : c10::DispatchKey::CPU;
  Tensor made = keys ? at::detail::make_tensor<c10::TensorImpl>(
                           c10::TensorImpl::VIEW, std::move(storage), *keys, tensor.dtype())
                     : at::detail::make_tensor<c10::TensorImpl>(
                           std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  return made;
}

// ---- One operator -----------------------------------------------------------------------------

// The CPU twins of an operator's arguments, and the way back for its results.
class Call {
 public:
  explicit Call(Device home) : home_(home) {}

  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isStorage()) return to_cpu(value.toStorage());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& item : value.toTensorVector()) list.push_back(to_cpu(item));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& item : value.toOptionalTensorVector())
        list.push_back(item ? std::optional<Tensor>(to_cpu(*item)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kSecond) return Device(at::kCPU);
    return value;
  }

  // What in-place operators did to shapes and storages.
  void write_back() {
    for (auto& [storage, cpu] : storages_) {
      if (cpu.data() == storage.data() && cpu.nbytes() == storage.nbytes()) continue;
      c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
      void* data = cpu.mutable_data();
      at::DataPtr memory = cpu.set_data_ptr(at::DataPtr());
      impl->set_data_ptr_noswap(renamed(data, std::move(memory), storage.device()));
      impl->set_nbytes(cpu.nbytes());
    }
    for (auto& [tensor, cpu] : tensors_) {
      c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
      const c10::Storage storage = to_home(cpu.storage());
      if (!storage.is_alias_of(tensor.storage())) impl->set_storage_keep_dtype(storage);
      if (cpu.sizes() != tensor.sizes() || cpu.strides() != tensor.strides() ||
          cpu.storage_offset() != tensor.storage_offset())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  IValue to_home(const IValue& value) {
    if (value.isTensor()) return to_home(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& item : value.toTensorVector()) list.push_back(to_home(item));
      return list;
    }
    return value;
  }

 private:
  c10::Storage to_cpu(const c10::Storage& storage) {
    if (storage.device().type() != kSecond) return storage;
    for (const auto& [known, cpu] : storages_)
      if (known.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return cpu;
    return storages_.emplace_back(storage, renamed(storage, at::kCPU)).second;
  }

  Tensor to_cpu(const Tensor& tensor) {
    if (!second(tensor)) {
      if (tensor.defined()) foreign_.push_back(tensor);
      return tensor;
    }
    for (const auto& [known, cpu] : tensors_)
      if (known.is_same(tensor)) return cpu;
    Tensor cpu = twin(tensor, to_cpu(tensor.storage()));
    return tensors_.emplace_back(tensor, std::move(cpu)).second;
  }

  c10::Storage to_home(const c10::Storage& storage) {
    for (const auto& [known, cpu] : storages_)
      if (cpu.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return known;
    c10::Storage made = renamed(storage, home_);
    storages_.emplace_back(made, storage);
    return made;
  }

  Tensor to_home(const Tensor& tensor) {
    if (!tensor.defined() || home_.type() != kSecond) return tensor;
    for (const auto& [known, cpu] : tensors_)
      if (cpu.is_same(tensor)) return known;
    for (const Tensor& given : foreign_)
      if (given.is_same(tensor)) return tensor;
    const c10::Storage storage = to_home(tensor.storage());
    for (const auto& [known, cpu] : tensors_)
      // A view is as much a part of autograd, or of inference mode, as what it is a view of.
      if (known.storage().is_alias_of(storage)) return twin(tensor, storage, known.key_set());
    return twin(tensor, storage);
  }

  Device home_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<Tensor> foreign_;
};

// ---- What a GPU's operators check -------------------------------------------------------------

bool indexes(const std::string& name) {
  return name == "aten::index" || name == "aten::_unsafe_index" || name == "aten::index_put_" ||
         name == "aten::index_put" || name == "aten::_index_put_impl_";
}

// The device of an operator's tensors; raises if they are on several.
Device common_device(const c10::OperatorHandle& op, at::ArrayRef<IValue> arguments) {
  const auto& schema = op.schema();
  std::optional<Device> asked, common;
  std::vector<Device> scalars;
  const auto look = [&](const Tensor& tensor, bool may_stay) {
    if (!tensor.defined()) return;
    const Device device = tensor.device();
    if (may_stay && device.is_cpu()) {
      scalars.push_back(device);
      return;
    }
    TORCH_CHECK(!common || *common == device,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                common->str(), " and ", device.str(), "! (when checking arguments of ",
                schema.name(), ")");
    common = device;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& value = arguments[i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (value.isTensor()) {
      // A number in a tensor may come from the CPU, where an operator works element by element.
      const Tensor& tensor = value.toTensor();
      const bool number = tensor.defined() && tensor.dim() == 0 && !written;
      look(tensor, number && op.hasTag(at::Tag::pointwise));
    } else if (value.isTensorList()) {
      for (const Tensor& item : value.toTensorVector()) look(item, false);
    } else if (value.isOptionalTensorList()) {
      for (const auto& item : value.toOptionalTensorVector())
        if (item) look(*item, indexes(schema.name()));
    } else if (value.isDevice()) {
      asked = with_index(value.toDevice());
    }
  }
  const Device home = asked ? *asked : common ? *common : Device(at::kCPU);
  for (const IValue& value : arguments)
    TORCH_CHECK(!value.isGenerator() || value.toGenerator().device().type() == home.type(),
                "Expected a '", c10::DeviceTypeName(home.type(), true),
                "' device type for generator but found '",
                c10::DeviceTypeName(value.toGenerator().device().type(), true), "'");
  return home;
}

std::mutex mutex;
std::set<std::string> seen;

std::vector<std::string> operators() {
  const std::lock_guard lock(mutex);
  return {seen.begin(), seen.end()};
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK_NOT_IMPLEMENTED(schema.name().rfind("aten::", 0) == 0, schema.name(),
                              " has no kernel for the second device");
  const size_t n = schema.arguments().size();
  const auto arguments = torch::jit::last(*stack, n);
  Call call(common_device(op, arguments));
  torch::jit::Stack inner;
  for (const IValue& value : arguments) inner.push_back(call.to_cpu(value));
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(inner);
  }
  call.write_back();
  torch::jit::drop(*stack, n);
  for (const IValue& value : inner) stack->push_back(call.to_home(value));
  const std::lock_guard lock(mutex);
  seen.insert(toString(op.operator_name()));
}

// From anywhere to anywhere: the one operator that is for two devices.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Call call(at::kCPU);
  const IValue source = call.to_cpu(IValue(from)), target = call.to_cpu(IValue(to));
  at::AutoDispatchBelowADInplaceOrView below;
  target.toTensor().copy_(source.toTensor());
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("_copy_from", &copy_from); }

// Names of the operators that have run on the second device.
TORCH_LIBRARY(second_device, m) { m.def("operators() -> str[]", &operators); }
