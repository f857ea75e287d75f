// LayerNorm and RMSNorm as torch sees them: public operators, autograd, functorch.

#include <ATen/ops/movedim.h>
#include <torch/library.h>

#include "../checks.h"
#include "../ops.h"
#include "composition.h"
#include "function.h"

namespace normops {
namespace {

// What is saved beside tensors, in two entries: each costs as much time as the rows of a small input.
struct Settings {
  int64_t normalized_ndim;
  double eps;
  bool centered;
  bool has_bias = false;
  bool has_residual = false;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["layer"] =
        normalized_ndim << 3 | int64_t(has_residual) << 2 | int64_t(centered) << 1 | int64_t(has_bias);
  }

  static Settings saved(AutogradContext* ctx) {
    const int64_t layer = ctx->saved_data["layer"].toInt();
    return {layer >> 3, ctx->saved_data["eps"].toDouble(), (layer & 2) != 0, (layer & 1) != 0, (layer & 4) != 0};
  }
};

struct RowNorm : torch::autograd::Function<RowNorm> {
  static constexpr size_t kDifferentiable = 1;  // not the statistics

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, int64_t normalized_ndim,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                               double eps, bool centered, const Extras& extras, bool with_statistics) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, rstd] = ops::row_norm(input, normalized_ndim, weight, bias, eps, centered, extras);
    variable_list saved{input, weight.value_or(at::Tensor()), mean, rstd};
    save_for_activation(saved, extras, bias, output);
    if (const auto kept = inputs_to_keep(input, output, weight, bias, normalized_ndim, extras)) {
      save_for_restoring(saved, bias, output, *kept);
    }
    ctx->save_for_backward(std::move(saved));
    Settings{normalized_ndim, eps, centered, defined(bias), defined(residual)}.save(ctx);
    save_extras(ctx, extras);
    if (!with_statistics) return {output};
    return {output, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(9);
    const Settings layer = Settings::saved(ctx);
    BackwardExtras extras = saved_extras(ctx);
    restore_for_activation(extras, saved, 4);
    Mask4 wanted = gradients_wanted(ctx, saved[1].defined(), layer.has_bias, layer.has_residual);
    const bool same = wanted[3] && !extras.activation;  // a sum hands its gradient on as it is
    wanted[3] = wanted[3] && !same;
    at::Tensor input = saved[0], mean = saved[2];
    if (saved.size() == kSavedForRestoring) {
      std::tie(input, mean) = restored_rows(saved[0], layer.normalized_ndim, mean, saved[3], saved[1], saved[4],
                                            extras.activation, extras.weight_offset, kept_inputs(saved));
      connect_to_input(input);
      if (derivative_from_output(extras.activation))
        extras.output = saved[0];  // which knows the sign of what is near zero
    }
    const InPlaceOfOutput place(wanted[0] && !same, grads[0], at::MemoryFormat::Contiguous, saved);
    extras.in_place = bool(place);
    auto [dx, dweight, dbias, dresidual] = ops::row_norm_backward(
        grads[0], input, layer.normalized_ndim, mean, saved[3], saved[1], layer.eps, layer.centered, wanted, extras);
    return {place.own(dx), {}, dweight, dbias, same ? grads[0] : dresidual, {}, {}, {}, {}};
  }
};

// (output, sum, mean, rstd) of the sum of two inputs.
struct AddRowNorm : torch::autograd::Function<AddRowNorm> {
  static constexpr size_t kDifferentiable = 2;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& residual,
                               int64_t normalized_ndim, const OptionalTensor& weight, const OptionalTensor& bias,
                               double eps, bool centered, double weight_offset) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, sum, mean, rstd] =
        ops::add_row_norm(input, residual, normalized_ndim, weight, bias, eps, centered, weight_offset);
    ctx->save_for_backward({sum, weight.value_or(at::Tensor()), mean, rstd});
    Settings{normalized_ndim, eps, centered, defined(bias)}.save(ctx);
    save_extras(ctx, {{}, {}, weight_offset});
    return {output, sum, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return {grads[1], grads[1], {}, {}, {}, {}, {}, {}};
    const Settings layer = Settings::saved(ctx);
    BackwardExtras extras = saved_extras(ctx);
    extras.grad_sum = grads[1];
    const Mask4 wanted = gradients_wanted(ctx, saved[1].defined(), layer.has_bias, false, 2);
    const InPlaceOfOutput place(wanted[0], grads[0], at::MemoryFormat::Contiguous, saved);
    extras.in_place = bool(place);
    auto [dx, dweight, dbias, none] =
        ops::row_norm_backward(grads[0], saved[0], layer.normalized_ndim, saved[2], saved[3], saved[1], layer.eps,
                               layer.centered, wanted, extras);
    dx = place.own(dx);
    return {dx, dx, {}, dweight, dbias, {}, {}, {}};
  }
};

struct RowNormBackward : torch::autograd::Function<RowNormBackward> {
  static constexpr size_t kDifferentiable = 3;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               int64_t normalized_ndim, const at::Tensor& mean, const at::Tensor& rstd,
                               const OptionalTensor& weight, double eps, bool centered, Mask3 output_mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensors3 grads =
        ops::row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask);
    ctx->save_for_backward({grad_output, input, weight.value_or(at::Tensor())});
    Settings{normalized_ndim, eps, centered}.save(ctx);
    save_mask(ctx, output_mask);
    return only_wanted(grads, output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& input = saved[1];
    const Settings settings = Settings::saved(ctx);
    const Layer layer{row_frame(input, settings.normalized_ndim), settings.eps, settings.centered};
    auto [to_dy, to_x, to_weight] =
        compose_double_backward(layer, all_three(grads, saved_mask(ctx)), saved[0], input, saved[2]);
    return {to_dy, to_x, {}, {}, {}, to_weight, {}, {}, {}};
  }
};

Tensors4 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask4 output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
                           const OptionalTensor& output, OptionalName activation, double negative_slope,
                           double weight_offset, const OptionalTensor& grad_sum, int64_t varying) {
  const BackwardExtras extras{
      as_activation(activation, negative_slope), bias, residual, output, weight_offset, grad_sum, {}, varying};
  // The composition has derivatives of its own.
  if (composition_needed(grad_output, input, weight, bias, residual, output, grad_sum) ||
      (extras.any() && gradient_needed(grad_output, input, weight, bias, residual, output, grad_sum))) {
    return compose_backward({row_frame(input, normalized_ndim, varying), eps, centered}, grad_output, input, weight,
                            output_mask, extras);
  }
  if (gradient_needed(grad_output, input, weight)) {
    const Mask3 mask{output_mask[0], output_mask[1], output_mask[2]};
    auto [dx, dweight, dbias] = all_three(
        record<RowNormBackward>(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, mask), mask);
    return {dx, dweight, dbias, output_mask[3] ? grad_output.clone() : at::Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask,
                                extras);
}

// The statistics are left out of the graph, and out of the result, where they are not asked for.
Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, const Extras& extras, bool with_statistics) {
  if (composition_needed(input, weight, bias, extras.residual)) {
    return compose({row_frame(input, normalized_ndim, extras.varying), eps, centered}, input, weight, bias, extras);
  }
  if (gradient_needed(input, weight, bias, extras.residual)) {
    const variable_list results =
        record<RowNorm>(input, normalized_ndim, weight, bias, extras.residual, eps, centered, extras, with_statistics);
    if (!with_statistics) return {results[0], {}, {}};
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::row_norm(input, normalized_ndim, weight, bias, eps, centered, extras);
}

Tensors3 row_norm_and_statistics(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                                 const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                                 OptionalName activation, double negative_slope, double weight_offset,
                                 int64_t varying) {
  return row_norm(input, normalized_ndim, weight, bias, eps, centered,
                  {as_activation(activation, negative_slope), residual, weight_offset, false, {}, varying},
                  /*with_statistics=*/true);
}

Tensors4 add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                      double weight_offset) {
  if (composition_needed(input, residual, weight, bias)) {
    const at::Tensor sum = input + residual;
    auto [output, mean, rstd] =
        compose({row_frame(sum, normalized_ndim), eps, centered}, sum, weight, bias, {{}, {}, weight_offset});
    return {output, sum, mean, rstd};
  }
  if (gradient_needed(input, residual, weight, bias)) {
    const variable_list results =
        record<AddRowNorm>(input, residual, normalized_ndim, weight, bias, eps, centered, weight_offset);
    return {results[0], results[1], results[2], results[3]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::add_row_norm(input, residual, normalized_ndim, weight, bias, eps, centered, weight_offset);
}

void check_rows(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                const OptionalTensor& weight, const OptionalTensor& bias) {
  check_input(op, input);
  check_normalized_shape(op, input, normalized_shape);
  check_parameter(op, "weight", weight, input, normalized_shape, "normalized_shape");
  check_parameter(op, "bias", bias, input, normalized_shape, "normalized_shape");
}

// Parameters have the shape of a row, or, where one of them has more dimensions, one that is broadcast to the input's.
at::Tensor norm_rows(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                     const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                     Extras extras) {
  const size_t ndim = normalized_shape.size();
  if (!has_more_dimensions(weight, ndim) && !has_more_dimensions(bias, ndim)) {
    check_rows(op, input, normalized_shape, weight, bias);
    return std::get<0>(row_norm(input, ndim, weight, bias, eps, centered, extras, /*with_statistics=*/false));
  }
  check_rows(op, input, normalized_shape, {}, {});
  const Varying own = check_varying_rows(op, input, normalized_shape, weight, bias);
  extras.varying = own.varying;
  return std::get<0>(row_norm(input, ndim, own.weight, own.bias, eps, centered, extras, /*with_statistics=*/false));
}

at::Tensor fused_layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation, double negative_slope,
                            const OptionalTensor& residual, double weight_offset, bool memory_efficient) {
  return norm_rows(
      "layer_norm", input, normalized_shape, weight, bias, eps, /*centered=*/true,
      check_extras("layer_norm", input, activation, negative_slope, residual, weight_offset, memory_efficient));
}

at::Tensor fused_rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                          std::optional<double> eps, OptionalName activation, double negative_slope,
                          const OptionalTensor& residual, double weight_offset, bool memory_efficient,
                          const OptionalTensor& bias) {
  return norm_rows(
      "rms_norm", input, normalized_shape, weight, bias, eps.value_or(default_rms_eps(input)),
      /*centered=*/false,
      check_extras("rms_norm", input, activation, negative_slope, residual, weight_offset, memory_efficient));
}

// LayerNorm and RMSNorm over the channels: of rows, where channels lie side by side, and otherwise as they are.
at::Tensor norm_channels(const char* op, const at::Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool centered, Extras extras) {
  check_input(op, input);
  TORCH_CHECK_VALUE(input.dim() >= 2, op, ": expected input with at least 2 dimensions (N, C, ...), got shape ",
                    input.sym_sizes());
  check_channels(op, input, {{"weight", weight}, {"bias", bias}}, "num_channels");
  check_parameter(op, "weight", weight, input, input.sym_size(1), "channels of input");
  check_parameter(op, "bias", bias, input, input.sym_size(1), "channels of input");
  if (input.sym_stride(1) != 1 || input.sym_size(1) == 1) {
    extras.memory_efficient = false;
    return std::get<0>(row_norm(input, /*normalized_ndim=*/0, weight, bias, eps, centered, extras,
                                /*with_statistics=*/false));
  }
  if (defined(extras.residual)) extras.residual = extras.residual->movedim(1, -1);
  return std::get<0>(row_norm(input.movedim(1, -1), /*normalized_ndim=*/1, weight, bias, eps, centered, extras,
                              /*with_statistics=*/false))
      .movedim(-1, 1);
}

at::Tensor fused_channel_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                    double eps, OptionalName activation, double negative_slope,
                                    const OptionalTensor& residual, double weight_offset, bool memory_efficient) {
  return norm_channels(
      "channel_layer_norm", input, weight, bias, eps, /*centered=*/true,
      check_extras("channel_layer_norm", input, activation, negative_slope, residual, weight_offset, memory_efficient));
}

at::Tensor fused_channel_rms_norm(const at::Tensor& input, const OptionalTensor& weight, std::optional<double> eps,
                                  OptionalName activation, double negative_slope, const OptionalTensor& residual,
                                  double weight_offset, bool memory_efficient, const OptionalTensor& bias) {
  return norm_channels(
      "channel_rms_norm", input, weight, bias, eps.value_or(default_rms_eps(input)),
      /*centered=*/false,
      check_extras("channel_rms_norm", input, activation, negative_slope, residual, weight_offset, memory_efficient));
}

// The overloads without extras.
at::Tensor channel_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              double eps) {
  return fused_channel_layer_norm(input, weight, bias, eps, {}, Activation{}.negative_slope, {}, 0, false);
}

at::Tensor channel_rms_norm(const at::Tensor& input, const OptionalTensor& weight, std::optional<double> eps) {
  return fused_channel_rms_norm(input, weight, eps, {}, Activation{}.negative_slope, {}, 0, false, {});
}

at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  return fused_layer_norm(input, normalized_shape, weight, bias, eps, {}, Activation{}.negative_slope, {}, 0, false);
}

at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps) {
  return fused_rms_norm(input, normalized_shape, weight, eps, {}, Activation{}.negative_slope, {}, 0, false, {});
}

Tensors2 add_layer_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps, double weight_offset) {
  check_rows("add_layer_norm", input, normalized_shape, weight, bias);
  check_residual("add_layer_norm", residual, input);
  auto [output, sum, mean, rstd] = add_row_norm(input, residual, normalized_shape.size(), weight, bias, eps,
                                                /*centered=*/true, weight_offset);
  return {output, sum};
}

Tensors2 add_rms_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, std::optional<double> eps, double weight_offset) {
  check_rows("add_rms_norm", input, normalized_shape, weight, std::nullopt);
  check_residual("add_rms_norm", residual, input);
  auto [output, sum, mean, rstd] =
      add_row_norm(input, residual, normalized_shape.size(), weight, std::nullopt, eps.value_or(default_rms_eps(input)),
                   /*centered=*/false, weight_offset);
  return {output, sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CompositeImplicitAutograd, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm.fused", fused_layer_norm);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm.fused", fused_rms_norm);
  m.impl("channel_layer_norm", channel_layer_norm);
  m.impl("channel_layer_norm.fused", fused_channel_layer_norm);
  m.impl("channel_rms_norm", channel_rms_norm);
  m.impl("channel_rms_norm.fused", fused_channel_rms_norm);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_rms_norm", add_rms_norm);
}

TORCH_LIBRARY_IMPL(normops, FuncTorchBatched, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm.fused", fused_layer_norm);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm.fused", fused_rms_norm);
  m.impl("channel_layer_norm", channel_layer_norm);
  m.impl("channel_layer_norm.fused", fused_channel_layer_norm);
  m.impl("channel_rms_norm", channel_rms_norm);
  m.impl("channel_rms_norm.fused", fused_channel_rms_norm);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("_row_norm", row_norm_and_statistics);
  m.impl("_row_norm_backward", row_norm_backward);
  m.impl("_add_row_norm", add_row_norm);
}

TORCH_LIBRARY_IMPL(normops, Autograd, m) {
  m.impl("_row_norm", row_norm_and_statistics);
  m.impl("_row_norm_backward", row_norm_backward);
  m.impl("_add_row_norm", add_row_norm);
}

}  // namespace normops
