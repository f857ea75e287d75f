// What autocast does to the public operators: what it does to torch's own. On CUDA, layer_norm, rms_norm and group_norm
// take their arguments to float32; everything else, and everything on the CPU, keeps its dtype. A sum is made in the
// dtype it comes in.

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../ops.h"

namespace normops {
namespace {

// What torch does of the same name, whose header takes as long to read as all of this folder to compile.
template <typename T>
const T& cast(const T& argument) {
  return argument;
}

at::Tensor cast(const at::Tensor& tensor) {
  const bool eligible = tensor.is_cuda() && tensor.is_floating_point() && tensor.scalar_type() != at::kDouble;
  return eligible ? tensor.to(at::kFloat) : tensor;
}

OptionalTensor cast(const OptionalTensor& tensor) { return defined(tensor) ? cast(*tensor) : tensor; }

template <auto* op>
struct InFloat32;
template <typename... Args, at::Tensor (*op)(Args...)>
struct InFloat32<op> {
  static at::Tensor call(Args... args) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return op(cast(args)...);
  }
};

// The overloads without extras are left to those with them.
at::Tensor cast_layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  return ops::fused_layer_norm(input, normalized_shape, weight, bias, eps);
}

at::Tensor cast_channel_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   double eps) {
  return ops::fused_channel_layer_norm(input, weight, bias, eps);
}

at::Tensor cast_rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         std::optional<double> eps) {
  return ops::fused_rms_norm(input, normalized_shape, weight, eps);
}

at::Tensor cast_group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  return ops::fused_group_norm(input, std::move(num_groups), weight, bias, eps);
}

Tensors2 layer_norm_of_sum(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps, double weight_offset) {
  const at::Tensor sum = input + residual;
  return {ops::fused_layer_norm(sum, normalized_shape, weight, bias, eps, {}, Activation{}.negative_slope, {},
                                weight_offset),
          sum};
}

Tensors2 rms_norm_of_sum(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                         const OptionalTensor& weight, std::optional<double> eps, double weight_offset) {
  const at::Tensor sum = input + residual;
  return {ops::fused_rms_norm(sum, normalized_shape, weight, eps, {}, Activation{}.negative_slope, {}, weight_offset),
          sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, AutocastCUDA, m) {
  m.impl("layer_norm", cast_layer_norm);
  m.impl("layer_norm.fused", TORCH_FN(InFloat32<ops::fused_layer_norm>::call));
  m.impl("channel_layer_norm", cast_channel_layer_norm);
  m.impl("channel_layer_norm.fused", TORCH_FN(InFloat32<ops::fused_channel_layer_norm>::call));
  m.impl("add_layer_norm", layer_norm_of_sum);
  m.impl("add_rms_norm", rms_norm_of_sum);
  m.impl("group_norm", cast_group_norm);
  m.impl("group_norm.fused", TORCH_FN(InFloat32<ops::fused_group_norm>::call));
  // Torch 2.11 leaves rms_norm in the dtype it comes in.
  const auto theirs = c10::Dispatcher::singleton().findSchemaOrThrow("aten::rms_norm", "");
  if (theirs.hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA)) {
    m.impl("rms_norm", cast_rms_norm);
    m.impl("rms_norm.fused", TORCH_FN(InFloat32<ops::fused_rms_norm>::call));
  }
}

}  // namespace normops
