// LayerNorm and RMSNorm as torch sees them: public operators, autograd, functorch.

#include <torch/library.h>

#include <limits>

#include "../checks.h"
#include "../ops.h"
#include "composition.h"
#include "function.h"

namespace normops {
namespace {

struct RowNorm : torch::autograd::Function<RowNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, int64_t normalized_ndim,
                            const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, rstd] = ops::row_norm(input, normalized_ndim, weight, bias, eps, centered);
    ctx->save_for_backward({input, weight.value_or(at::Tensor()), mean, rstd});
    ctx->saved_data["normalized_ndim"] = normalized_ndim;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    ctx->saved_data["has_bias"] = defined(bias);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(6);
    auto [dx, dweight, dbias] =
        ops::row_norm_backward(grads[0], saved[0], ctx->saved_data["normalized_ndim"].toInt(), saved[2], saved[3],
                               saved[1], ctx->saved_data["eps"].toDouble(), ctx->saved_data["centered"].toBool(),
                               gradients_wanted(ctx, saved[1].defined(), ctx->saved_data["has_bias"].toBool()));
    return {dx, {}, dweight, dbias, {}, {}};
  }
};

struct RowNormBackward : torch::autograd::Function<RowNormBackward> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               int64_t normalized_ndim, const at::Tensor& mean, const at::Tensor& rstd,
                               const OptionalTensor& weight, double eps, bool centered, Mask3 output_mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensors3 grads =
        ops::row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask);
    ctx->save_for_backward({grad_output, input, weight.value_or(at::Tensor())});
    ctx->saved_data["normalized_ndim"] = normalized_ndim;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    save_mask(ctx, output_mask);
    return only_wanted(grads, output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& input = saved[1];
    const Layer layer{row_frame(input, ctx->saved_data["normalized_ndim"].toInt()), ctx->saved_data["eps"].toDouble(),
                      ctx->saved_data["centered"].toBool()};
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
        RowNormBackward::apply(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask),
        output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return ops::row_norm_backward(grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, output_mask);
}

at::Tensor row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, bool centered) {
  if (composition_needed(input, weight, bias)) {
    return compose({row_frame(input, normalized_ndim), eps, centered}, input, weight, bias);
  }
  if (gradient_needed(input, weight, bias)) {
    return RowNorm::apply(input, normalized_ndim, weight, bias, eps, centered);
  }
  return std::get<0>(ops::row_norm(input, normalized_ndim, weight, bias, eps, centered));
}

at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  check_input("layer_norm", input);
  check_normalized_shape("layer_norm", input, normalized_shape);
  check_parameter("layer_norm", "weight", weight, input, normalized_shape, "normalized_shape");
  check_parameter("layer_norm", "bias", bias, input, normalized_shape, "normalized_shape");
  return row_norm(input, normalized_shape.size(), weight, bias, eps, /*centered=*/true);
}

at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    std::optional<double> eps) {
  check_input("rms_norm", input);
  check_normalized_shape("rms_norm", input, normalized_shape);
  check_parameter("rms_norm", "weight", weight, input, normalized_shape, "normalized_shape");
  // Torch's default: the machine epsilon of the arithmetic.
  const double epsilon = input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon();
  return row_norm(input, normalized_shape.size(), weight, std::nullopt, eps.value_or(epsilon), /*centered=*/false);
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CompositeImplicitAutograd, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("rms_norm", rms_norm);
}

TORCH_LIBRARY_IMPL(normops, FuncTorchBatched, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("rms_norm", rms_norm);
  m.impl("_row_norm_backward", row_norm_backward);
}

TORCH_LIBRARY_IMPL(normops, Autograd, m) {
  m.impl("_row_norm", torch::CppFunction::makeFallthrough());
  m.impl("_row_norm_backward", row_norm_backward);
}

}  // namespace normops
