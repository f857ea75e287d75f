#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

// Public operators have torch.nn.functional's arguments and are made of the private ones, which do the work and are
// what torch.compile sees. Statistics travel in float64. Later arguments (activation, residual, mask) go behind the
// star.
TORCH_LIBRARY(normops, m) {
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05)"
      " -> Tensor");
  m.def("rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor");
  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None,"
      " Tensor? bias=None, bool training=False, float momentum=0.1, float eps=1e-05) -> Tensor");
  m.def(
      "instance_norm(Tensor input, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor? weight=None,"
      " Tensor? bias=None, bool use_input_stats=True, float momentum=0.1, float eps=1e-05) -> Tensor");
  m.def(
      "group_norm(Tensor input, SymInt num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor");

  m.def(
      "_row_norm(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps, bool centered)"
      " -> (Tensor output, Tensor mean, Tensor rstd)");
  m.def(
      "_row_norm_backward(Tensor grad_output, Tensor input, int normalized_ndim, Tensor mean, Tensor rstd,"
      " Tensor? weight, float eps, bool centered, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_channel_norm(Tensor input, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, SymInt num_groups,"
      " bool over_batch, float eps) -> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "_channel_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? weight,"
      " SymInt num_groups, bool over_batch, float eps, bool input_stats, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("_channel_moments(Tensor input) -> (Tensor mean, Tensor var)");
  m.def("_merge_moments(Tensor count, Tensor mean, Tensor var) -> (Tensor mean, Tensor var)");
  m.def(
      "_channel_grad_sums(Tensor grad_output, Tensor input, Tensor mean, Tensor var, float eps)"
      " -> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "_channel_grad_apply(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor sum_dy,"
      " Tensor sum_dy_xhat, SymInt count, float eps) -> Tensor");
  m.def(
      "_update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum,"
      " SymInt count) -> ()");
}

namespace normops::ops {
namespace {

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  static const auto op = find<decltype(layer_norm)>("normops::layer_norm");
  return op.call(input, normalized_shape, weight, bias, eps);
}

at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps) {
  static const auto op = find<decltype(rms_norm)>("normops::rms_norm");
  return op.call(input, normalized_shape, weight, eps);
}

at::Tensor group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  static const auto op = find<decltype(group_norm)>("normops::group_norm");
  return op.call(input, std::move(num_groups), weight, bias, eps);
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered) {
  static const auto op = find<decltype(row_norm)>("normops::_row_norm");
  return op.call(input, normalized_ndim, weight, bias, eps, centered);
}

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask) {
  static const auto op = find<decltype(row_norm_backward)>("normops::_row_norm_backward");
  return op.call(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask);
}

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, c10::SymInt num_groups, bool over_batch,
                      double eps) {
  static const auto op = find<decltype(channel_norm)>("normops::_channel_norm");
  return op.call(input, mean, var, weight, bias, std::move(num_groups), over_batch, eps);
}

Tensors3 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask3 output_mask) {
  static const auto op = find<decltype(channel_norm_backward)>("normops::_channel_norm_backward");
  return op.call(grad_output, input, mean, var, weight, std::move(num_groups), over_batch, eps, input_stats,
                 output_mask);
}

void update_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, c10::SymInt count) {
  static const auto op = find<decltype(update_running_stats)>("normops::_update_running_stats");
  op.call(running_mean, running_var, mean, var, momentum, std::move(count));
}

}  // namespace normops::ops
