#pragma once

// What the engines' glue shares. Nothing here knows that the device is CUDA: the test suite registers the same
// functions for CPU tensors, over kernels that run in an emulator.

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "../tensors.h"
#include "arrays.h"
#include "scratch.h"

namespace normops::cuda {

// Makes a device current in the CUDA runtime of the kernels, which is a copy of its own beside that of torch.
void use_device(int index);

void add_row_kernels(torch::Library& library);
void add_channel_kernels(torch::Library& library);

// Makes the tensor's device current; knows its number and the stream to launch on.
class Here {
 public:
  explicit Here(const at::Tensor& tensor) : guard_(tensor.device()), device_(tensor.device()) { use_device(device()); }

  int device() const { return device_.is_cpu() ? 0 : device_.index(); }
  void* stream() const {
    if (device_.is_cpu()) return nullptr;
    const c10::impl::VirtualGuardImpl impl(device_.type());
    return impl.getStreamNativeHandle(impl.getStream(device_));
  }

 private:
  c10::DeviceGuard guard_;
  c10::Device device_;
};

// Device memory, freed when the tensor goes, which is safe in stream order.
inline at::Tensor allocate(const at::Tensor& like, size_t bytes) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte).memory_format(std::nullopt));
}

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ElementType::kFloat;
    case at::kDouble:
      return ElementType::kDouble;
    case at::kHalf:
      return ElementType::kHalf;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "normops: expected float16, bfloat16, float32 or float64, got ", type);
  }
}

// The gradient of a parameter, for kernels to write; undefined where it is not wanted.
inline AnyOutput any_output(const at::Tensor& tensor) {
  if (!tensor.defined()) return {nullptr, ElementType::kFloat};
  return {tensor.mutable_data_ptr(), element_type(tensor.scalar_type())};
}

template <typename A>
A* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<A>() : nullptr;
}

}  // namespace normops::cuda
