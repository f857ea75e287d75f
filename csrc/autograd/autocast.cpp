// What autocast does to the public operators: what it does to torch's own. On CUDA, layer_norm, rms_norm and group_norm
// take their arguments to float32; everything else, and everything on the CPU, keeps its dtype. A sum is made in the
// dtype it comes in.

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../ops.h"

namespace normops {
namespace {

template <auto* op, typename Signature = std::remove_pointer_t<decltype(op)>>
using InFloat32 = typename at::autocast::WrapFunction<at::autocast::CastPolicy::fp32, c10::DeviceType::CUDA, Signature,
                                                      Signature, op>::type;

Tensors2 layer_norm_of_sum(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps, double weight_offset) {
  const at::Tensor sum = input + residual;
  return {ops::layer_norm(sum, normalized_shape, weight, bias, eps, std::nullopt, Activation{}.negative_slope,
                          std::nullopt, weight_offset),
          sum};
}

Tensors2 rms_norm_of_sum(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                         const OptionalTensor& weight, std::optional<double> eps, double weight_offset) {
  const at::Tensor sum = input + residual;
  return {ops::rms_norm(sum, normalized_shape, weight, eps, std::nullopt, Activation{}.negative_slope, std::nullopt,
                        weight_offset),
          sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, AutocastCUDA, m) {
  m.impl("layer_norm", TORCH_FN(InFloat32<ops::layer_norm>::call));
  m.impl("add_layer_norm", layer_norm_of_sum);
  m.impl("add_rms_norm", rms_norm_of_sum);
  m.impl("group_norm", TORCH_FN(InFloat32<ops::group_norm>::call));
  // Torch 2.11 leaves rms_norm in the dtype it comes in.
  const auto theirs = c10::Dispatcher::singleton().findSchemaOrThrow("aten::rms_norm", "");
  if (theirs.hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA)) {
    m.impl("rms_norm", TORCH_FN(InFloat32<ops::rms_norm>::call));
  }
}

}  // namespace normops
