// LayerNorm and RMSNorm as torch sees them: public operators, autograd, functorch.

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
  bool has_bias;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["layer"] = normalized_ndim << 2 | int64_t(centered) << 1 | int64_t(has_bias);
  }

  explicit Settings(AutogradContext* ctx) : eps(ctx->saved_data["eps"].toDouble()) {
    const int64_t layer = ctx->saved_data["layer"].toInt();
    normalized_ndim = layer >> 2;
    centered = (layer & 2) != 0;
    has_bias = (layer & 1) != 0;
  }
  Settings(int64_t normalized_ndim, double eps, bool centered, bool has_bias)
      : normalized_ndim(normalized_ndim), eps(eps), centered(centered), has_bias(has_bias) {}
};

struct RowNorm : torch::autograd::Function<RowNorm> {
  static constexpr size_t kDifferentiable = 1;  // not the statistics

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, int64_t normalized_ndim,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                               bool with_statistics) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, rstd] = ops::row_norm(input, normalized_ndim, weight, bias, eps, centered);
    ctx->save_for_backward({input, weight.value_or(at::Tensor()), mean, rstd});
    Settings(normalized_ndim, eps, centered, defined(bias)).save(ctx);
    if (!with_statistics) return {output};
    return {output, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(7);
    const Settings layer(ctx);
    auto [dx, dweight, dbias] =
        ops::row_norm_backward(grads[0], saved[0], layer.normalized_ndim, saved[2], saved[3], saved[1], layer.eps,
                               layer.centered, gradients_wanted(ctx, saved[1].defined(), layer.has_bias));
    return {dx, {}, dweight, dbias, {}, {}, {}};
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
    Settings(normalized_ndim, eps, centered, /*has_bias=*/false).save(ctx);
    save_mask(ctx, output_mask);
    return only_wanted(grads, output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& input = saved[1];
    const Settings settings(ctx);
    const Layer layer{row_frame(input, settings.normalized_ndim), settings.eps, settings.centered};
    auto [to_dy, to_x, to_weight] =
        compose_double_backward(layer, all_three(grads, saved_mask(ctx)), saved[0], input, saved[2]);
    return {to_dy, to_x, {}, {}, {}, to_weight, {}, {}, {}};
  }
};

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask) {
  if (composition_needed(grad_output, input, weight)) {
    return compose_backward({row_frame(input, normalized_ndim), eps, centered}, grad_output, input, weight,
                            output_mask);
  }
  if (gradient_needed(grad_output, input, weight)) {
    return all_three(
        record<RowNormBackward>(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask),
        output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask);
}

// The statistics are left out of the graph, and out of the result, where they are not asked for.
Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, bool with_statistics) {
  if (composition_needed(input, weight, bias)) {
    return compose({row_frame(input, normalized_ndim), eps, centered}, input, weight, bias);
  }
  if (gradient_needed(input, weight, bias)) {
    const variable_list results = record<RowNorm>(input, normalized_ndim, weight, bias, eps, centered, with_statistics);
    if (!with_statistics) return {results[0], {}, {}};
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::row_norm(input, normalized_ndim, weight, bias, eps, centered);
}

Tensors3 row_norm_and_statistics(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                                 const OptionalTensor& bias, double eps, bool centered) {
  return row_norm(input, normalized_ndim, weight, bias, eps, centered, /*with_statistics=*/true);
}

at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  check_input("layer_norm", input);
  check_normalized_shape("layer_norm", input, normalized_shape);
  check_parameter("layer_norm", "weight", weight, input, normalized_shape, "normalized_shape");
  check_parameter("layer_norm", "bias", bias, input, normalized_shape, "normalized_shape");
  return std::get<0>(row_norm(input, normalized_shape.size(), weight, bias, eps, /*centered=*/true,
                              /*with_statistics=*/false));
}

at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps) {
  check_input("rms_norm", input);
  check_normalized_shape("rms_norm", input, normalized_shape);
  check_parameter("rms_norm", "weight", weight, input, normalized_shape, "normalized_shape");
  return std::get<0>(row_norm(input, normalized_shape.size(), weight, std::nullopt,
                              eps.value_or(default_rms_eps(input)),
                              /*centered=*/false, /*with_statistics=*/false));
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CompositeImplicitAutograd, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("rms_norm", rms_norm);
}

TORCH_LIBRARY_IMPL(normops, FuncTorchBatched, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("rms_norm", rms_norm);
  m.impl("_row_norm", row_norm_and_statistics);
  m.impl("_row_norm_backward", row_norm_backward);
}

TORCH_LIBRARY_IMPL(normops, Autograd, m) {
  m.impl("_row_norm", row_norm_and_statistics);
  m.impl("_row_norm_backward", row_norm_backward);
}

}  // namespace normops
