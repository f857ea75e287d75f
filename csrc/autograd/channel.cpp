// BatchNorm, InstanceNorm and GroupNorm as torch sees them: public operators, autograd, functorch.

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../checks.h"
#include "../ops.h"
#include "composition.h"
#include "function.h"

namespace normops {
namespace {

// What the statistics say of the layer: their shape is (num_groups) over the batch, (N, num_groups) per sample.
c10::SymInt groups_of(const at::Tensor& mean) { return mean.sym_size(-1); }
bool is_over_batch(const at::Tensor& mean) { return mean.dim() == 1; }

Tensors3 below_autograd(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                        const OptionalTensor& weight, const OptionalTensor& bias, const c10::SymInt& num_groups,
                        bool over_batch, double eps, const Extras& extras, const Tracking* tracking) {
  if (tracking) {
    const at::AutoDispatchBelowAutograd below;  // versions have yet to be told
    return ops::channel_norm_tracked(input, *tracking, weight, bias, over_batch, eps, extras);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::channel_norm(input, given_mean, given_var, weight, bias, num_groups, over_batch, eps, extras);
}

struct ChannelNorm : torch::autograd::Function<ChannelNorm> {
  static constexpr size_t kDifferentiable = 1;  // not the statistics

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               const OptionalTensor& given_mean, const OptionalTensor& given_var,
                               const c10::SymInt& num_groups, bool over_batch, double eps, const Extras& extras,
                               const Tracking* tracking) {
    auto [output, mean, var] =
        below_autograd(input, given_mean, given_var, weight, bias, num_groups, over_batch, eps, extras, tracking);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{input, weight.value_or(at::Tensor()), mean, var};
    save_for_activation(saved, extras, bias, output);
    if (const auto kept = inputs_to_keep(input, output, weight, bias, /*normalized_ndim=*/0, extras)) {
      save_for_restoring(saved, bias, output, *kept);
    }
    if (defined(extras.mask)) saved.push_back(*extras.mask);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["eps"] = eps;
    save_mask(ctx, {!defined(given_mean), defined(bias), defined(residual)});
    save_extras(ctx, extras);
    return {output, mean, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(11);
    const auto [input_stats, has_bias, has_residual] = saved_mask(ctx);
    BackwardExtras extras = saved_extras(ctx);
    restore_for_activation(extras, saved, 4);
    const size_t next = extras.activation ? 7 : 4;
    if (saved.size() > next && saved.size() != kSavedForRestoring) extras.mask = saved[next];
    Mask4 wanted = gradients_wanted(ctx, saved[1].defined(), has_bias, has_residual);
    const bool same = wanted[3] && !extras.activation && !defined(extras.mask);  // a sum hands its gradient on as it is
    wanted[3] = wanted[3] && !same;
    const double eps = ctx->saved_data["eps"].toDouble();
    at::Tensor input = saved[0], mean = saved[2];
    if (saved.size() == kSavedForRestoring) {
      std::tie(input, mean) =
          restored_channels(saved[0], mean, saved[3], saved[1], saved[4], eps, extras.activation, kept_inputs(saved));
      connect_to_input(input);
      if (derivative_from_output(extras.activation))
        extras.output = saved[0];  // which knows the sign of what is near zero
    }
    const InPlaceOfOutput place(wanted[0] && !same, grads[0], input.suggest_memory_format(), saved);
    extras.in_place = bool(place);
    auto [dx, dweight, dbias, dresidual] =
        ops::channel_norm_backward(grads[0], input, mean, saved[3], saved[1], groups_of(mean), is_over_batch(mean), eps,
                                   input_stats, wanted, extras);
    return {place.own(dx), dweight, dbias, same ? grads[0] : dresidual, {}, {}, {}, {}, {}, {}, {}};
  }
};

Layer channel_layer(const at::Tensor& input, const c10::SymInt& num_groups, bool over_batch, double eps,
                    const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& mask = {},
                    int64_t varying = 0) {
  return {channel_frame(input, num_groups, over_batch, varying), eps, /*centered=*/true, mean, var, mask};
}

struct ChannelNormBackward : torch::autograd::Function<ChannelNormBackward> {
  static constexpr size_t kDifferentiable = 3;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                               const c10::SymInt& num_groups, bool over_batch, double eps, bool input_stats,
                               Mask3 output_mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensors3 grads = ops::channel_norm_backward(grad_output, input, mean, var, weight, num_groups, over_batch,
                                                      eps, input_stats, output_mask);
    ctx->save_for_backward({grad_output, input, weight.value_or(at::Tensor()), mean, var});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["input_stats"] = input_stats;
    save_mask(ctx, output_mask);
    return only_wanted(grads, output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool input_stats = ctx->saved_data["input_stats"].toBool();
    const at::Tensor none;
    const Layer layer =
        channel_layer(saved[1], groups_of(saved[3]), is_over_batch(saved[3]), ctx->saved_data["eps"].toDouble(),
                      input_stats ? none : saved[3], input_stats ? none : saved[4]);
    auto [to_dy, to_x, to_weight] =
        compose_double_backward(layer, all_three(grads, saved_mask(ctx)), saved[0], saved[1], saved[2]);
    return {to_dy, to_x, {}, {}, to_weight, {}, {}, {}, {}, {}};
  }
};

Tensors4 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask4 output_mask,
                               const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& output,
                               OptionalName activation, double negative_slope, const OptionalTensor& mask,
                               int64_t varying) {
  const BackwardExtras extras{as_activation(activation, negative_slope), bias, residual, output, 0, {}, mask, varying};
  // The composition has derivatives of its own.
  if (composition_needed(grad_output, input, weight, bias, residual, output) ||
      (extras.any() && gradient_needed(grad_output, input, weight, bias, residual, output))) {
    const OptionalTensor none;
    const Layer layer = channel_layer(input, num_groups, over_batch, eps, input_stats ? none : mean,
                                      input_stats ? none : var, mask, varying);
    return compose_backward(layer, grad_output, input, weight, output_mask, extras);
  }
  if (gradient_needed(grad_output, input, weight)) {
    const Mask3 mask{output_mask[0], output_mask[1], output_mask[2]};
    auto [dx, dweight, dbias] = all_three(record<ChannelNormBackward>(grad_output, input, mean, var, weight, num_groups,
                                                                      over_batch, eps, input_stats, mask),
                                          mask);
    return {dx, dweight, dbias, output_mask[3] ? grad_output.clone() : at::Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::channel_norm_backward(grad_output, input, mean, var, weight, num_groups, over_batch, eps, input_stats,
                                    output_mask, extras);
}

void move_running_stats(const Tracking& tracking, const at::Tensor& input, const at::Tensor& mean,
                        const at::Tensor& var) {
  const c10::SymInt samples = is_over_batch(mean) ? c10::SymInt(1) : input.sym_size(0);
  const c10::SymInt count = input.sym_numel() / (input.sym_size(1) * samples);
  ops::update_running_stats(tracking.running_mean, tracking.running_var, mean, var, tracking.momentum, count);
}

// (output, mean, var)
Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, c10::SymInt num_groups, bool over_batch,
                      double eps, const Extras& extras, const Tracking* tracking = nullptr) {
  if (composition_needed(input, weight, bias, extras.residual)) {
    const Tensors3 results =
        compose(channel_layer(input, num_groups, over_batch, eps, given_mean, given_var, extras.mask, extras.varying),
                input, weight, bias, extras);
    if (tracking) move_running_stats(*tracking, input, std::get<1>(results), std::get<2>(results));
    return results;
  }
  if (gradient_needed(input, weight, bias, extras.residual)) {
    const variable_list results = record<ChannelNorm>(input, weight, bias, extras.residual, given_mean, given_var,
                                                      num_groups, over_batch, eps, extras, tracking);
    return {results[0], results[1], results[2]};
  }
  return below_autograd(input, given_mean, given_var, weight, bias, num_groups, over_batch, eps, extras, tracking);
}

Tensors3 private_channel_norm(const at::Tensor& input, const OptionalTensor& given_mean,
                              const OptionalTensor& given_var, const OptionalTensor& weight, const OptionalTensor& bias,
                              c10::SymInt num_groups, bool over_batch, double eps, const OptionalTensor& residual,
                              OptionalName activation, double negative_slope, const OptionalTensor& mask,
                              int64_t varying) {
  return channel_norm(input, given_mean, given_var, weight, bias, std::move(num_groups), over_batch, eps,
                      {as_activation(activation, negative_slope), residual, 0, false, mask, varying});
}

Tensors3 private_channel_norm_tracked(const at::Tensor& input, const at::Tensor& running_mean,
                                      const at::Tensor& running_var, const OptionalTensor& weight,
                                      const OptionalTensor& bias, bool over_batch, double momentum, double eps,
                                      const OptionalTensor& residual, OptionalName activation, double negative_slope) {
  const Tracking tracking{running_mean, running_var, momentum};
  return channel_norm(input, std::nullopt, std::nullopt, weight, bias, input.sym_size(1), over_batch, eps,
                      {as_activation(activation, negative_slope), residual}, &tracking);
}

// Batch- and InstanceNorm with statistics of the input, which also move the running statistics.
at::Tensor norm_and_track(const at::Tensor& input, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                          bool over_batch, double momentum, double eps, const Extras& extras) {
  const c10::SymInt channels = input.sym_size(1);
  const bool tracks = defined(running_mean) && input.sym_numel() != 0;
  if (tracks && !defined(extras.mask) && !extras.varying) {
    const Tracking tracking{*running_mean, *running_var, momentum};
    return std::get<0>(
        channel_norm(input, std::nullopt, std::nullopt, weight, bias, channels, over_batch, eps, extras, &tracking));
  }
  const auto [output, mean, var] =
      channel_norm(input, std::nullopt, std::nullopt, weight, bias, channels, over_batch, eps, extras);
  if (!tracks) return output;
  if (defined(extras.mask)) {
    const at::Tensor counts = extras.mask->reshape_symint({over_batch ? 1 : input.sym_size(0), -1}).sum(1);
    ops::update_counted_stats(*running_mean, *running_var, mean, var, momentum, counts);
  } else {
    move_running_stats({*running_mean, *running_var, momentum}, input, mean, var);
  }
  return output;
}

// Weight and bias, checked: the arguments, unless samples have parameters of their own.
class Affine {
  Varying own_;

 public:
  const OptionalTensor &weight, &bias;
  const int64_t varying;

  Affine(const char* op, const at::Tensor& input, const OptionalTensor& given_weight, const OptionalTensor& given_bias)
      : own_(check(op, input, given_weight, given_bias)),
        weight(defined(own_.weight) ? own_.weight : given_weight),
        bias(defined(own_.bias) ? own_.bias : given_bias),
        varying(own_.varying) {}
  Affine(const Affine&) = delete;

 private:
  static Varying check(const char* op, const at::Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias) {
    if (has_more_dimensions(weight, 1) || has_more_dimensions(bias, 1)) {
      return check_varying_channels(op, input, weight, bias);
    }
    const c10::SymInt channels = input.sym_size(1);
    check_parameter(op, "weight", weight, input, channels, "channels of input");
    check_parameter(op, "bias", bias, input, channels, "channels of input");
    return {};
  }
};

std::string too_few_dimensions(const char* op, const at::Tensor& input) {
  return c10::str(op, ": expected input with at least 2 dimensions (N, C, ...), got shape ", input.sym_sizes());
}

// Torch takes a one-dimensional input without elements, whatever it is to be normalized with, and returns another,
// which depends on the parameters as far as autograd knows.
at::Tensor batch_norm_of_nothing(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  at::Tensor output = input.clone();
  for (const OptionalTensor* parameter : {&weight, &bias}) {
    if (defined(*parameter)) output = output + (*parameter)->sum();
  }
  return output;
}

at::Tensor fused_batch_norm(const at::Tensor& input, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                            bool training, double momentum, double eps, OptionalName activation, double negative_slope,
                            const OptionalTensor& residual, bool memory_efficient, const OptionalTensor& mask) {
  check_input("batch_norm", input);
  Extras extras =
      check_extras("batch_norm", input, activation, negative_slope, residual, /*weight_offset=*/0, memory_efficient);
  if (input.dim() == 1 && input.sym_numel() == 0) return batch_norm_of_nothing(input, weight, bias);
  // Torch looks for the size of a dimension that is not there, unless it misses running statistics first.
  TORCH_CHECK_INDEX(input.dim() >= 2 || !training || defined(running_mean), too_few_dimensions("batch_norm", input));
  TORCH_CHECK(input.dim() >= 2, too_few_dimensions("batch_norm", input));
  check_channels("batch_norm", input,
                 {{"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}},
                 "num_features");
  const Affine affine("batch_norm", input, weight, bias);
  extras.varying = affine.varying;
  extras.mask = check_mask("batch_norm", input, mask);
  if (!training) {
    TORCH_CHECK(defined(running_mean) && defined(running_var),
                "batch_norm: expected running_mean and running_var in evaluation (training=False), got None");
    TORCH_CHECK_VALUE(eps >= 0, "batch_norm: expected eps >= 0, got ", eps);
    check_running_stats("batch_norm", running_mean, running_var, input);
    return std::get<0>(channel_norm(input, running_mean, running_var, affine.weight, affine.bias, input.sym_size(1),
                                    /*over_batch=*/true, eps, extras));
  }
  TORCH_CHECK_VALUE(eps > 0, "batch_norm: expected eps > 0 in training, got ", eps);
  check_running_stats("batch_norm", running_mean, running_var, input);
  TORCH_CHECK_VALUE(input.sym_numel() != input.sym_size(1) || input.sym_size(1) == 0,
                    "batch_norm: expected more than 1 value per channel when training, got input of shape ",
                    input.sym_sizes());
  return norm_and_track(input, running_mean, running_var, affine.weight, affine.bias, /*over_batch=*/true, momentum,
                        eps, extras);
}

at::Tensor fused_instance_norm(const at::Tensor& input, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& weight,
                               const OptionalTensor& bias, bool use_input_stats, double momentum, double eps,
                               OptionalName activation, double negative_slope, const OptionalTensor& residual,
                               bool memory_efficient, const OptionalTensor& mask) {
  check_input("instance_norm", input);
  Extras extras =
      check_extras("instance_norm", input, activation, negative_slope, residual, /*weight_offset=*/0, memory_efficient);
  TORCH_CHECK_VALUE(input.dim() >= 2 || !use_input_stats, too_few_dimensions("instance_norm", input));
  TORCH_CHECK_INDEX(input.dim() >= 2, too_few_dimensions("instance_norm", input));
  check_channels("instance_norm", input,
                 {{"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}},
                 "num_features");
  const Affine affine("instance_norm", input, weight, bias);
  extras.varying = affine.varying;
  extras.mask = check_mask("instance_norm", input, mask);
  check_running_stats("instance_norm", running_mean, running_var, input);
  if (!use_input_stats) {
    TORCH_CHECK(defined(running_mean) && defined(running_var),
                "instance_norm: expected running_mean and running_var with use_input_stats=False, got None");
    return std::get<0>(channel_norm(input, running_mean, running_var, affine.weight, affine.bias, input.sym_size(1),
                                    /*over_batch=*/true, eps, extras));
  }
  c10::SymInt positions = 1;
  for (const c10::SymInt& size : input.sym_sizes().slice(2)) positions *= size;
  TORCH_CHECK_VALUE(positions != 1,
                    "instance_norm: expected more than 1 spatial element when training, got input of shape ",
                    input.sym_sizes());
  return norm_and_track(input, running_mean, running_var, affine.weight, affine.bias, /*over_batch=*/false, momentum,
                        eps, extras);
}

at::Tensor fused_group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation, double negative_slope,
                            const OptionalTensor& residual, bool memory_efficient, const OptionalTensor& mask) {
  check_input("group_norm", input);
  Extras extras =
      check_extras("group_norm", input, activation, negative_slope, residual, /*weight_offset=*/0, memory_efficient);
  TORCH_CHECK(input.dim() >= 2, too_few_dimensions("group_norm", input));
  TORCH_CHECK(num_groups > 0, "group_norm: expected num_groups > 0, got ", num_groups);
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK(channels % num_groups == 0, "group_norm: expected num_groups to divide the channels of input, got ",
              num_groups, " groups and input of shape ", input.sym_sizes());
  check_channels("group_norm", input, {{"weight", weight}, {"bias", bias}}, "num_channels");
  const Affine affine("group_norm", input, weight, bias);
  extras.varying = affine.varying;
  extras.mask = check_mask("group_norm", input, mask);
  TORCH_CHECK_VALUE(input.sym_numel() != num_groups,
                    "group_norm: expected more than 1 value per group, got input of shape ", input.sym_sizes(), " in ",
                    num_groups, " groups");
  return std::get<0>(channel_norm(input, std::nullopt, std::nullopt, affine.weight, affine.bias, num_groups,
                                  /*over_batch=*/false, eps, extras));
}

// The overloads without extras.
at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, bool training, double momentum,
                      double eps) {
  return fused_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, {},
                          Activation{}.negative_slope, {}, false, {});
}

at::Tensor instance_norm(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& weight, const OptionalTensor& bias, bool use_input_stats,
                         double momentum, double eps) {
  return fused_instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, {},
                             Activation{}.negative_slope, {}, false, {});
}

at::Tensor group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  return fused_group_norm(input, std::move(num_groups), weight, bias, eps, {}, Activation{}.negative_slope, {}, false,
                          {});
}

// Written through the kernels, so the tensors' versions have to be told; first, as that may be refused.
void bump_versions(const at::Tensor& running_mean, const at::Tensor& running_var) {
  running_mean.unsafeGetTensorImpl()->bump_version();
  running_var.unsafeGetTensorImpl()->bump_version();
}

void update_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, c10::SymInt count) {
  bump_versions(running_mean, running_var);
  const at::AutoDispatchBelowADInplaceOrView below;
  ops::update_running_stats(running_mean, running_var, mean, var, momentum, std::move(count));
}

Tensors3 channel_norm_tracked(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                              const OptionalTensor& weight, const OptionalTensor& bias, bool over_batch,
                              double momentum, double eps, const OptionalTensor& residual, OptionalName activation,
                              double negative_slope) {
  bump_versions(running_mean, running_var);
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::channel_norm_tracked(input, {running_mean, running_var, momentum}, weight, bias, over_batch, eps,
                                   {as_activation(activation, negative_slope), residual});
}

void update_counted_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, const at::Tensor& count) {
  bump_versions(running_mean, running_var);
  const at::AutoDispatchBelowADInplaceOrView below;
  ops::update_counted_stats(running_mean, running_var, mean, var, momentum, count);
}

// running = (1 - momentum) * running + momentum * statistic, with the unbiased variance, averaged over samples if
// the statistics are per sample.
void compose_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                           const at::Tensor& var, double momentum, c10::SymInt count) {
  const auto move = [&](const at::Tensor& running, const at::Tensor& statistic, const auto& factor) {
    const at::Tensor per_channel = statistic.dim() == 2 ? statistic.mean(0) : statistic;
    running.copy_(running.to(at::kDouble) * (1 - momentum) + per_channel.to(at::kDouble) * factor);
  };
  move(running_mean, mean, momentum);
  const double n = double(count.guard_int(__FILE__, __LINE__));
  move(running_var, var, momentum * (n / (n - 1)));
}

// The same where every statistic has a count of its own: the average is over those of something, and if there are none
// nothing moves. On any device.
void compose_counted_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                           const at::Tensor& var, double momentum, const at::Tensor& count) {
  const at::Tensor n = count.to(at::kDouble).reshape({-1, 1}), there = n > 0;
  const at::Tensor moved = there.any(), share = there.to(at::kDouble) / there.sum().clamp_min(1);
  const auto move = [&](const at::Tensor& running, const at::Tensor& statistic, const at::Tensor& factor) {
    const at::Tensor value = (factor * statistic.to(at::kDouble).reshape({-1, running.size(0)})).sum(0);
    const at::Tensor now = running.to(at::kDouble);
    running.copy_(at::where(moved, now * (1 - momentum) + value * momentum, now));
  };
  move(running_mean, mean, share);
  move(running_var, var, share * n / (n - 1).clamp_min(1));
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm.fused", fused_batch_norm);
  m.impl("instance_norm", instance_norm);
  m.impl("instance_norm.fused", fused_instance_norm);
  m.impl("group_norm", group_norm);
  m.impl("group_norm.fused", fused_group_norm);
}

TORCH_LIBRARY_IMPL(normops, FuncTorchBatched, m) {
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm.fused", fused_batch_norm);
  m.impl("instance_norm", instance_norm);
  m.impl("instance_norm.fused", fused_instance_norm);
  m.impl("group_norm", group_norm);
  m.impl("group_norm.fused", fused_group_norm);
  m.impl("_channel_norm", private_channel_norm);
  m.impl("_channel_norm_tracked", private_channel_norm_tracked);
  m.impl("_channel_norm_backward", channel_norm_backward);
  m.impl("_update_running_stats", compose_running_stats);
  m.impl("_update_running_stats.counted", compose_counted_stats);
}

TORCH_LIBRARY_IMPL(normops, Autograd, m) {
  m.impl("_channel_norm", private_channel_norm);
  m.impl("_channel_norm_tracked", private_channel_norm_tracked);
  m.impl("_channel_norm_backward", channel_norm_backward);
  m.impl("_update_running_stats", torch::CppFunction::makeFallthrough());
  m.impl("_update_running_stats.counted", torch::CppFunction::makeFallthrough());
  // The stages alone have no derivative: asking for one is an error, not a wrong number.
  for (const char* stage : {"_channel_moments", "_merge_moments", "_channel_grad_sums", "_channel_grad_apply"}) {
    m.impl(stage, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(normops, CompositeExplicitAutograd, m) {
  m.impl("_update_running_stats.counted", compose_counted_stats);
}

TORCH_LIBRARY_IMPL(normops, ADInplaceOrView, m) {
  m.impl("_update_running_stats", update_running_stats);
  m.impl("_update_running_stats.counted", update_counted_stats);
  m.impl("_channel_norm_tracked", channel_norm_tracked);
}

}  // namespace normops
