#include "restore.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include "../ops.h"

namespace normops {
namespace {

// z = weight * xhat + bias is rounded to its type, and what is lost of xhat is larger by |bias / weight|: up to this.
constexpr double kLargestBias = 4;
// elu(z) is rounded next to -1, and what is lost of z is larger by exp(-z): up to this. In 16 bits that would be most
// of a z below zero.
constexpr double kLargestLoss = 256;

bool is_elu(const Activation& activation) { return activation_name(activation.kind) == "elu"; }

double machine_epsilon(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return 0x1p-10;
    case at::kBFloat16:
      return 0x1p-7;
    case at::kFloat:
      return 0x1p-23;
    default:
      return 0x1p-52;
  }
}

double smallest_normal(at::ScalarType type) {
  return type == at::kHalf ? 0x1p-14 : type == at::kDouble ? 0x1p-1022 : 0x1p-126;
}

// In float64, with one dimension.
at::Tensor flat(const at::Tensor& parameter) { return parameter.detach().to(at::kDouble).flatten(); }

// Channels or positions of which too little can be had from the output: a bool for each; undefined: there are none.
at::Tensor lost(const at::Tensor& output, const OptionalTensor& weight, const OptionalTensor& bias,
                const Extras& extras) {
  const at::ScalarType type = output.scalar_type();
  at::Tensor mask;
  const auto add = [&](const at::Tensor& more) { mask = mask.defined() ? mask.logical_or_(more) : more; };
  at::Tensor size;
  if (defined(weight)) {
    size = (flat(*weight) + extras.weight_offset).abs();
    add(size < smallest_normal(type) / machine_epsilon(type));
  }
  if (defined(bias)) {
    const at::Tensor shift = flat(*bias).abs();
    add(size.defined() ? shift > kLargestBias * size : shift > kLargestBias);
  }
  if (is_elu(extras.activation)) {
    at::DimVector others;
    for (int64_t d = 0; d < output.dim(); ++d) {
      if (d != 1) others.push_back(d);
    }
    add(output.detach().amin(others) < -1 + 1 / kLargestLoss);
  }
  return mask;
}

// The inverse of an activation, in the type of its argument.
at::Tensor before_activation(const Activation& activation, const at::Tensor& y) {
  if (!activation) return y;
  if (!is_elu(activation)) return at::leaky_relu(y, 1 / activation.negative_slope);
  const at::Tensor below = at::clamp_max(y, 0).log1p_();
  return below.add_(y.clamp_min(0));
}

at::Tensor as_matrix(const at::Tensor& input, int64_t normalized_ndim) {
  return input.reshape({-1, c10::multiply_integers(input.sizes().slice(input.dim() - normalized_ndim))});
}

}  // namespace

std::optional<KeptInputs> inputs_to_keep(const at::Tensor& input, const at::Tensor& output,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t normalized_ndim, const Extras& extras) {
  // What a compiler traces has no values to look at; what is saved is then the compiler's affair.
  if (!extras.memory_efficient || defined(extras.mask) || extras.varying || at::isTensorSubclassLike(input) ||
      input.is_meta() || input.numel() == 0)
    return {};
  const bool narrow = acc_type(input) != input.scalar_type();
  if (narrow && is_elu(extras.activation)) return {};
  const auto view = [&](const at::Tensor& t) { return normalized_ndim ? as_matrix(t, normalized_ndim) : t; };
  const at::Tensor mask = lost(view(output), weight, bias, extras);
  if (!mask.defined()) return KeptInputs{};
  const at::Tensor index = mask.nonzero().flatten();
  if (index.numel() == 0) return KeptInputs{};
  if (index.numel() == mask.numel()) return {};
  return KeptInputs{index, view(input.detach()).index_select(1, index)};
}

Tensors2 restored_channels(const at::Tensor& output, const at::Tensor& mean, const at::Tensor& var,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           const Activation& activation, const KeptInputs& kept) {
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t channels = output.size(1), groups = mean.size(-1);
  const auto per_channel = [&](const at::Tensor& t) {
    return groups == channels ? t : t.repeat_interleave(channels / groups, -1);
  };
  // A layer again, with statistics that are given: mean is bias, the variance is that of the inverse.
  const at::Tensor inverse = (per_channel(var) + eps).reciprocal_();
  const at::Tensor shift = defined(bias) ? flat(*bias).expand_as(inverse) : at::zeros_like(inverse);
  OptionalTensor factor;
  if (defined(weight)) factor = flat(*weight).reciprocal();
  const at::Tensor x = std::get<0>(ops::channel_norm(before_activation(activation, output.detach()), shift, inverse,
                                                     factor, std::nullopt, channels, mean.dim() == 1, /*eps=*/0));
  at::Tensor center = at::zeros_like(mean);
  if (kept.index.defined()) {
    if (groups == channels) {
      center.index_copy_(-1, kept.index, mean.index_select(-1, kept.index));
      x.index_copy_(1, kept.index, kept.values);
    } else {
      at::Tensor means = per_channel(mean).index_select(-1, kept.index);
      while (means.dim() < output.dim()) means = means.unsqueeze(-1);
      x.index_copy_(1, kept.index, (kept.values - means).to(x.scalar_type()));
    }
  }
  return {x, center};
}

Tensors2 restored_rows(const at::Tensor& output, int64_t normalized_ndim, const at::Tensor& mean,
                       const at::Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Activation& activation, double weight_offset, const KeptInputs& kept) {
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::ScalarType type = acc_type(output);
  at::Tensor x = before_activation(activation, output.detach().to(type));
  x = defined(bias) ? x - bias->detach().to(type) : x * 1;
  if (defined(weight)) x.mul_((weight->detach().to(at::kDouble) + weight_offset).reciprocal_().to(type));
  x.mul_(rstd.reciprocal().to(type));
  if (kept.index.defined()) {
    at::Tensor rows = as_matrix(x, normalized_ndim);
    rows.index_copy_(1, kept.index, (kept.values - mean.reshape({-1, 1})).to(type));
    x = rows.reshape(x.sizes());
  }
  return {x.to(output.scalar_type()), at::zeros_like(mean)};
}

void connect_to_input(const at::Tensor& restored) {
  if (!at::GradMode::is_enabled()) return;
  const auto node = torch::autograd::get_current_node();
  const auto edge = node ? node->next_edge(0) : torch::autograd::Edge();
  if (edge.is_valid()) torch::autograd::impl::set_gradient_edge(restored, edge);
}

}  // namespace normops
