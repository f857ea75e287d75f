#include "composition.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "../composed.h"

namespace at::functorch {
// Declared by torch in a header that an extension cannot include.
struct DynamicLayer;
TORCH_API const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch

namespace normops {
namespace {

// The input in a layer's frame: xhat = (x - mean) * rstd, and what the derivatives need of it.
class Normalized {
 public:
  Normalized(const Layer& layer, const at::Tensor& input)
      : layer_(layer), input_(input), type_(acc_type(input)), constant_(defined(layer.mean)) {
    if (defined(layer.mask)) {
      const auto& sizes = layer.frame.view;
      const at::Tensor valid = layer.mask->reshape_symint({sizes[0], 1, 1, sizes[3]});
      masked_ = valid.logical_not();
      count_ = valid.expand_symint({sizes[0], 1, sizes[2], sizes[3]})
                   .sum(layer.frame.dims, /*keepdim=*/true, at::kDouble)
                   .clamp_min(1)
                   .to(type_);
    }
    const at::Tensor x = view(input);
    if (constant_) {
      center = given(layer.mean);
      xhat = x - center;
      var = given(layer.var);
    } else if (layer.centered) {
      center = mean(x);
      xhat = x - center;
      low = mean(xhat);  // what rounding lost of the mean
      xhat = xhat - low;
      var = mean(xhat * xhat);
    } else {
      xhat = x;
      var = mean(x * x);
    }
    rstd = (var + layer.eps).rsqrt();
    xhat = xhat * rstd;
  }

  at::Tensor xhat, center, low, var, rstd;

  // The mean and what else is saved of the statistics, as the engines return them.
  std::pair<at::Tensor, at::Tensor> statistics() const {
    const auto save = [&](const at::Tensor& t) {
      return t.detach().to(at::kDouble).reshape_symint(layer_.frame.statistics_shape);
    };
    const at::Tensor second = save(layer_.frame.save_rstd ? rstd : var);
    if (!center.defined()) return {at::zeros_like(second), second};
    return {low.defined() ? save(center) + save(low) : save(center), second};
  }

  // Into the frame, in the type of the arithmetic, and back. What is masked is zero on both sides.
  at::Tensor view(const at::Tensor& t) const { return valid(t.to(type_).reshape_symint(layer_.frame.view)); }
  at::Tensor parameter(const OptionalTensor& t) const {
    return t->to(type_).reshape_symint(layer_.frame.parameter_view);
  }
  at::Tensor given(const OptionalTensor& t) const { return t->to(type_).reshape_symint(layer_.frame.given_view); }
  at::Tensor like_input(const at::Tensor& t) const {
    return valid(t).reshape_symint(input_.sym_sizes()).to(input_.scalar_type());
  }
  at::Tensor like_parameter(const at::Tensor& t) const {
    const Frame& frame = layer_.frame;
    return (frame.parameter_dims.empty() ? t : t.sum(frame.parameter_dims)).reshape_symint(frame.parameter_shape);
  }

  at::Tensor times_weight(const at::Tensor& t, const OptionalTensor& weight, double offset = 0) const {
    if (!defined(weight)) return t;
    return offset == 0 ? t * parameter(weight) : t * (parameter(weight) + offset);
  }

  at::Tensor mean(const at::Tensor& t) const {
    if (!masked_.defined()) return t.mean(layer_.frame.dims, /*keepdim=*/true);
    return valid(t).sum(layer_.frame.dims, /*keepdim=*/true) / count_;
  }

  // The derivative of xhat by x is rstd * project: u less its components along 1 and along xhat.
  at::Tensor project(const at::Tensor& u) const {
    if (constant_) return u;
    const at::Tensor rest = u - xhat * mean(u * xhat);
    return layer_.centered ? rest - mean(u) : rest;
  }

  // The gradient, through xhat and rstd, of sum(v * rstd * project(g)).
  at::Tensor curvature(const at::Tensor& v, const at::Tensor& g) const {
    const at::Tensor along_v = mean(v * xhat), along_g = mean(g * xhat);
    at::Tensor spread = mean(v * g) - along_v * along_g;
    if (layer_.centered) spread = spread - mean(v) * mean(g);
    return -rstd * rstd * (xhat * spread + along_g * project(v) + along_v * project(g));
  }

  bool constant() const { return constant_; }

 private:
  const Layer& layer_;
  const at::Tensor& input_;
  at::ScalarType type_;
  bool constant_;
  at::Tensor masked_, count_;  // of elements that share a statistic

  at::Tensor valid(const at::Tensor& t) const { return masked_.defined() ? t.masked_fill(masked_, 0) : t; }
};

at::Tensor plus(const at::Tensor& a, const at::Tensor& b) { return a.defined() ? a + b : b; }

}  // namespace

Frame row_frame(const at::Tensor& input, int64_t normalized_ndim, int64_t varying) {
  Frame frame;
  if (normalized_ndim == 0) {  // the channels
    for (int64_t d = 0; d < input.dim(); ++d) {
      frame.view.push_back(input.sym_size(d));
      frame.parameter_view.push_back(d == 1 ? input.sym_size(d) : c10::SymInt(1));
      frame.statistics_shape.push_back(d == 1 ? c10::SymInt(1) : input.sym_size(d));
      if (d != 1) frame.parameter_dims.push_back(d);
    }
    frame.dims = {1};
    frame.parameter_shape = {input.sym_size(1)};
    frame.save_rstd = true;
    return frame;
  }
  const int64_t first = input.dim() - normalized_ndim;
  for (int64_t d = 0; d < input.dim(); ++d) {
    frame.view.push_back(input.sym_size(d));
    if (d < first) {
      const bool differs = (varying >> d & 1) != 0;
      if (!differs) frame.parameter_dims.push_back(d);
      if (varying) frame.parameter_shape.push_back(differs ? input.sym_size(d) : c10::SymInt(1));
      frame.statistics_shape.push_back(input.sym_size(d));
    } else {
      frame.dims.push_back(d);
      frame.statistics_shape.push_back(1);
      frame.parameter_shape.push_back(input.sym_size(d));
    }
  }
  frame.parameter_view = frame.parameter_shape;
  frame.save_rstd = true;
  return frame;
}

Frame channel_frame(const at::Tensor& input, const c10::SymInt& num_groups, bool over_batch, int64_t varying) {
  const c10::SymInt channels = input.sym_size(1);
  const c10::SymInt group_size = num_groups == 0 ? c10::SymInt(0) : channels / num_groups;
  c10::SymInt positions = 1;
  for (int64_t d = 2; d < input.dim(); ++d) positions = positions * input.sym_size(d);
  Frame frame;
  frame.view = {input.sym_size(0), num_groups, group_size, positions};
  if (over_batch) {
    frame.dims = {0, 2, 3};
    frame.statistics_shape = {num_groups};
  } else {
    frame.dims = {2, 3};
    frame.statistics_shape = {input.sym_size(0), num_groups};
  }
  frame.save_rstd = false;
  frame.parameter_shape = {channels};
  frame.parameter_view = frame.given_view = {1, num_groups, group_size, 1};
  frame.parameter_dims = {0, 3};
  if (varying) {
    frame.parameter_shape = {input.sym_size(0), channels};
    frame.parameter_view = {input.sym_size(0), num_groups, group_size, 1};
    frame.parameter_dims = {3};
  }
  return frame;
}

namespace {

// What the activation, if there is one, is applied to.
at::Tensor pre_activation(const Normalized& x, const OptionalTensor& weight, double weight_offset,
                          const OptionalTensor& bias, const OptionalTensor& residual) {
  at::Tensor z = x.times_weight(x.xhat, weight, weight_offset);
  if (defined(bias)) z = z + x.parameter(bias);
  if (defined(residual)) z = z + x.view(*residual);
  return z;
}

}  // namespace

Tensors3 compose(const Layer& layer, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const Extras& extras) {
  const Normalized x(layer, input);
  const at::Tensor z = pre_activation(x, weight, extras.weight_offset, bias, extras.residual);
  const auto [mean, second] = x.statistics();
  return {x.like_input(activated(extras.activation, z)), mean, second};
}

Tensors4 compose_backward(const Layer& layer, const at::Tensor& grad_output, const at::Tensor& input,
                          const OptionalTensor& weight, Mask4 mask, const BackwardExtras& extras) {
  const Normalized x(layer, input);
  at::Tensor dz = x.view(grad_output);
  if (extras.activation) {
    const at::Tensor z = defined(extras.output)
                             ? x.view(*extras.output)
                             : pre_activation(x, weight, extras.weight_offset, extras.bias, extras.residual);
    dz = dz * activation_derivative(extras.activation, z);
  }
  at::Tensor dx, dweight, dbias, dresidual;
  if (mask[0]) {
    dx = x.rstd * x.project(x.times_weight(dz, weight, extras.weight_offset));
    if (defined(extras.grad_sum)) dx = dx + x.view(*extras.grad_sum);
    dx = x.like_input(dx);
  }
  if (mask[1]) dweight = x.like_parameter(dz * x.xhat);
  if (mask[2]) dbias = x.like_parameter(dz);
  if (mask[3]) dresidual = x.like_input(dz);
  return {dx, dweight, dbias, dresidual};
}

Tensors3 compose_double_backward(const Layer& layer, const Tensors3& grads, const at::Tensor& grad_output,
                                 const at::Tensor& input, const OptionalTensor& weight) {
  const auto& [grad_dx, grad_dweight, grad_dbias] = grads;
  const Normalized x(layer, input);
  const at::Tensor dy = x.view(grad_output);
  at::Tensor to_dy, to_x, to_weight;
  if (grad_dx.defined()) {
    const at::Tensor v = x.view(grad_dx);
    const at::Tensor through = x.rstd * x.project(v);
    to_dy = x.times_weight(through, weight);
    if (!x.constant()) to_x = x.curvature(v, x.times_weight(dy, weight));
    if (defined(weight)) to_weight = x.like_parameter(dy * through);
  }
  if (grad_dweight.defined()) {
    const at::Tensor v = x.parameter(grad_dweight);
    to_dy = plus(to_dy, v * x.xhat);
    to_x = plus(to_x, x.rstd * x.project(v * dy));
  }
  if (grad_dbias.defined()) to_dy = plus(to_dy, x.parameter(grad_dbias).expand_as(dy));
  return {to_dy.defined() ? x.like_input(to_dy) : to_dy, to_x.defined() ? x.like_input(to_x) : to_x, to_weight};
}

bool in_functorch() { return at::functorch::functorchTLSAccessor() && !at::functorch::getDynamicLayerStack().empty(); }

}  // namespace normops
