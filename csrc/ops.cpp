#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

// Public operators have torch.nn.functional's arguments. A second overload of each, "fused", takes more behind the
// star: an operator spends time on every argument, and most calls need none of these. They are made of the private
// ones, which do the work and are what torch.compile sees. Statistics travel in float64.
#define NORMOPS_EXTRAS ", *, str? activation=None, float negative_slope=0.01, Tensor? residual=None"
#define NORMOPS_OFFSET ", float weight_offset=0.0"
#define NORMOPS_MEMORY ", bool memory_efficient=False"
#define NORMOPS_MASK ", Tensor? mask=None"
#define NORMOPS_VARYING ", int varying=0"

TORCH_LIBRARY(normops, m) {
  const auto public_operator = [&](const std::string& name, const std::string& arguments, const char* extras) {
    m.def((name + "(" + arguments + ") -> Tensor").c_str());
    m.def((name + ".fused(" + arguments + extras + ") -> Tensor").c_str());
  };
  public_operator("layer_norm",
                  "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05",
                  NORMOPS_EXTRAS NORMOPS_OFFSET NORMOPS_MEMORY);
  public_operator("rms_norm", "Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None",
                  NORMOPS_EXTRAS NORMOPS_OFFSET NORMOPS_MEMORY ", Tensor? bias=None");
  public_operator("batch_norm",
                  "Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None,"
                  " Tensor? bias=None, bool training=False, float momentum=0.1, float eps=1e-05",
                  NORMOPS_EXTRAS NORMOPS_MEMORY NORMOPS_MASK);
  public_operator("instance_norm",
                  "Tensor input, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor? weight=None,"
                  " Tensor? bias=None, bool use_input_stats=True, float momentum=0.1, float eps=1e-05",
                  NORMOPS_EXTRAS NORMOPS_MEMORY NORMOPS_MASK);
  public_operator("group_norm",
                  "Tensor input, SymInt num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05",
                  NORMOPS_EXTRAS NORMOPS_MEMORY NORMOPS_MASK);
  public_operator("channel_layer_norm", "Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-05",
                  NORMOPS_EXTRAS NORMOPS_OFFSET NORMOPS_MEMORY);
  public_operator("channel_rms_norm", "Tensor input, Tensor? weight=None, float? eps=None",
                  NORMOPS_EXTRAS NORMOPS_OFFSET NORMOPS_MEMORY ", Tensor? bias=None");
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None,"
      " Tensor? bias=None, float eps=1e-05, *, float weight_offset=0.0) -> (Tensor output, Tensor sum)");
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None,"
      " *, float weight_offset=0.0) -> (Tensor output, Tensor sum)");

  // Of the backward: where there is an activation, its derivative is taken from `output`, if that is given, or from
  // what the input, bias and residual make anew. The last result is the gradient of the residual.
#define NORMOPS_BACKWARD_EXTRAS \
  "Tensor? bias=None, Tensor? residual=None, Tensor? output=None, str? activation=None, float negative_slope=0.01"
  // A second operator of each writes the gradient of the input where that of the output was.
  const auto backward_operator = [&](const std::string& name, const std::string& arguments) {
    m.def((name + "(Tensor grad_output, " + arguments + ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
    m.def((name + "_(Tensor(a!) grad_output, " + arguments + ") -> (Tensor(a!), Tensor, Tensor, Tensor)").c_str());
  };
  // `normalized_ndim` is how many dimensions at the end are a row, or 0: then dimension 1, the channels, is.
  m.def(
      "_row_norm(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps, bool centered,"
      " Tensor? residual=None, str? activation=None, float negative_slope=0.01, float weight_offset=0.0" NORMOPS_VARYING
      ")"
      " -> (Tensor output, Tensor mean, Tensor rstd)");
  backward_operator(
      "_row_norm_backward",
      "Tensor input, int normalized_ndim, Tensor mean, Tensor rstd, Tensor? weight, float eps, bool centered,"
      " bool[4] output_mask, " NORMOPS_BACKWARD_EXTRAS
      ", float weight_offset=0.0, Tensor? grad_sum=None" NORMOPS_VARYING);
  m.def(
      "_add_row_norm(Tensor input, Tensor residual, int normalized_ndim, Tensor? weight, Tensor? bias, float eps,"
      " bool centered, float weight_offset=0.0) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "_channel_norm(Tensor input, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, SymInt num_groups,"
      " bool over_batch, float eps, Tensor? residual=None, str? activation=None, float negative_slope=0.01,"
      " Tensor? mask=None" NORMOPS_VARYING
      ")"
      " -> (Tensor output, Tensor mean, Tensor var)");
  // The same with statistics of the input, a group for each channel, which also moves the running statistics.
  m.def(
      "_channel_norm_tracked(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor? weight,"
      " Tensor? bias, bool over_batch, float momentum, float eps, Tensor? residual=None, str? activation=None,"
      " float negative_slope=0.01) -> (Tensor output, Tensor mean, Tensor var)");
  backward_operator(
      "_channel_norm_backward",
      "Tensor input, Tensor mean, Tensor var, Tensor? weight, SymInt num_groups, bool over_batch, float eps,"
      " bool input_stats, bool[4] output_mask, " NORMOPS_BACKWARD_EXTRAS NORMOPS_MASK NORMOPS_VARYING);
  m.def("_channel_moments(Tensor input" NORMOPS_MASK ") -> (Tensor mean, Tensor var)");
  m.def("_merge_moments(Tensor count, Tensor mean, Tensor var) -> (Tensor mean, Tensor var)");
  m.def("_channel_grad_sums(Tensor grad_output, Tensor input, Tensor mean, Tensor var, float eps" NORMOPS_MASK
        ") -> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "_channel_grad_apply(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor sum_dy,"
      " Tensor sum_dy_xhat, SymInt count, float eps" NORMOPS_MASK ") -> Tensor");
  m.def(
      "_update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum,"
      " SymInt count) -> ()");
  // Of masked inputs: a count for each statistic, of which those of nothing are left out.
  m.def(
      "_update_running_stats.counted(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var,"
      " float momentum, Tensor count) -> ()");
}

namespace normops::ops {
namespace {

template <typename Signature>
auto find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

OptionalName name_of(const Activation& activation) { return activation_name(activation.kind); }

Tensors3 first_three(Tensors4 grads) {
  return {std::move(std::get<0>(grads)), std::move(std::get<1>(grads)), std::move(std::get<2>(grads))};
}

}  // namespace

at::Tensor fused_layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation, double negative_slope,
                            const OptionalTensor& residual, double weight_offset, bool memory_efficient) {
  static const auto op = find<decltype(fused_layer_norm)>("normops::layer_norm", "fused");
  return op.call(input, normalized_shape, weight, bias, eps, activation, negative_slope, residual, weight_offset,
                 memory_efficient);
}

at::Tensor fused_rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                          std::optional<double> eps, OptionalName activation, double negative_slope,
                          const OptionalTensor& residual, double weight_offset, bool memory_efficient,
                          const OptionalTensor& bias) {
  static const auto op = find<decltype(fused_rms_norm)>("normops::rms_norm", "fused");
  return op.call(input, normalized_shape, weight, eps, activation, negative_slope, residual, weight_offset,
                 memory_efficient, bias);
}

at::Tensor fused_group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation, double negative_slope,
                            const OptionalTensor& residual, bool memory_efficient, const OptionalTensor& mask) {
  static const auto op = find<decltype(fused_group_norm)>("normops::group_norm", "fused");
  return op.call(input, std::move(num_groups), weight, bias, eps, activation, negative_slope, residual,
                 memory_efficient, mask);
}

at::Tensor fused_channel_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                    double eps, OptionalName activation, double negative_slope,
                                    const OptionalTensor& residual, double weight_offset, bool memory_efficient) {
  static const auto op = find<decltype(fused_channel_layer_norm)>("normops::channel_layer_norm", "fused");
  return op.call(input, weight, bias, eps, activation, negative_slope, residual, weight_offset, memory_efficient);
}

Tensors2 add_layer_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps, double weight_offset) {
  static const auto op = find<decltype(add_layer_norm)>("normops::add_layer_norm");
  return op.call(input, residual, normalized_shape, weight, bias, eps, weight_offset);
}

Tensors2 add_rms_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, std::optional<double> eps, double weight_offset) {
  static const auto op = find<decltype(add_rms_norm)>("normops::add_rms_norm");
  return op.call(input, residual, normalized_shape, weight, eps, weight_offset);
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, const Extras& extras) {
  static const auto op =
      find<Tensors3(const at::Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, double, bool,
                    const OptionalTensor&, OptionalName, double, double, int64_t)>("normops::_row_norm");
  return op.call(input, normalized_ndim, weight, bias, eps, centered, extras.residual, name_of(extras.activation),
                 extras.activation.negative_slope, extras.weight_offset, extras.varying);
}

Tensors4 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask4 output_mask, const BackwardExtras& extras) {
  using Signature = Tensors4(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&,
                             const OptionalTensor&, double, bool, Mask4, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, OptionalName, double, double, const OptionalTensor&, int64_t);
  static const auto op = find<Signature>("normops::_row_norm_backward");
  static const auto in_place = find<Signature>("normops::_row_norm_backward_");
  return (extras.in_place ? in_place : op)
      .call(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask, extras.bias,
            extras.residual, extras.output, name_of(extras.activation), extras.activation.negative_slope,
            extras.weight_offset, extras.grad_sum, extras.varying);
}

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 mask) {
  return first_three(row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered,
                                       {mask[0], mask[1], mask[2], false}, {}));
}

Tensors4 add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                      double weight_offset) {
  static const auto op = find<decltype(add_row_norm)>("normops::_add_row_norm");
  return op.call(input, residual, normalized_ndim, weight, bias, eps, centered, weight_offset);
}

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, c10::SymInt num_groups, bool over_batch,
                      double eps, const Extras& extras) {
  static const auto op =
      find<Tensors3(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, c10::SymInt, bool, double, const OptionalTensor&, OptionalName, double,
                    const OptionalTensor&, int64_t)>("normops::_channel_norm");
  return op.call(input, mean, var, weight, bias, std::move(num_groups), over_batch, eps, extras.residual,
                 name_of(extras.activation), extras.activation.negative_slope, extras.mask, extras.varying);
}

Tensors3 channel_norm_tracked(const at::Tensor& input, const Tracking& tracking, const OptionalTensor& weight,
                              const OptionalTensor& bias, bool over_batch, double eps, const Extras& extras) {
  static const auto op =
      find<Tensors3(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                    const OptionalTensor&, bool, double, double, const OptionalTensor&, OptionalName, double)>(
          "normops::_channel_norm_tracked");
  return op.call(input, tracking.running_mean, tracking.running_var, weight, bias, over_batch, tracking.momentum, eps,
                 extras.residual, name_of(extras.activation), extras.activation.negative_slope);
}

Tensors4 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask4 output_mask,
                               const BackwardExtras& extras) {
  using Signature =
      Tensors4(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
               c10::SymInt, bool, double, bool, Mask4, const OptionalTensor&, const OptionalTensor&,
               const OptionalTensor&, OptionalName, double, const OptionalTensor&, int64_t);
  static const auto op = find<Signature>("normops::_channel_norm_backward");
  static const auto in_place = find<Signature>("normops::_channel_norm_backward_");
  return (extras.in_place ? in_place : op)
      .call(grad_output, input, mean, var, weight, std::move(num_groups), over_batch, eps, input_stats, output_mask,
            extras.bias, extras.residual, extras.output, name_of(extras.activation), extras.activation.negative_slope,
            extras.mask, extras.varying);
}

Tensors3 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask3 mask) {
  return first_three(channel_norm_backward(grad_output, input, mean, var, weight, std::move(num_groups), over_batch,
                                           eps, input_stats, {mask[0], mask[1], mask[2], false}, {}));
}

void update_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, c10::SymInt count) {
  static const auto op = find<decltype(update_running_stats)>("normops::_update_running_stats");
  op.call(running_mean, running_var, mean, var, momentum, std::move(count));
}

void update_counted_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, const at::Tensor& count) {
  static const auto op = find<decltype(update_counted_stats)>("normops::_update_running_stats", "counted");
  op.call(running_mean, running_var, mean, var, momentum, count);
}

}  // namespace normops::ops
