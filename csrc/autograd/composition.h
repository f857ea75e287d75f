#pragma once

// Normalisation written in ATen's own differentiable operators. It stands in for the kernels wherever something other
// than plain values has to flow through a layer (functorch transforms, forward-mode AD), and it is the derivative of
// the backward. Slower than a kernel, but differentiable to any order and right for any kind of tensor.

#include <ATen/core/grad_mode.h>

#include "../extras.h"

namespace normops {

// How a layer sees its input: a view whose `dims` run over the elements that share a statistic, and in which a
// parameter of shape `parameter_shape` lies as `parameter_view` and is shared over `parameter_dims`.
struct Frame {
  c10::SymDimVector view;
  at::DimVector dims;
  c10::SymDimVector parameter_shape;
  c10::SymDimVector parameter_view;
  c10::SymDimVector given_view;  // of statistics that are constants
  at::DimVector parameter_dims;
  c10::SymDimVector statistics_shape;
  bool save_rstd;  // the statistic saved beside the mean: rstd of rows, var of channels
};
// `normalized_ndim` as in private operators: how many dimensions are a row, or 0 for the channels, dimension 1.
Frame row_frame(const at::Tensor& input, int64_t normalized_ndim, int64_t varying = 0);
Frame channel_frame(const at::Tensor& input, const c10::SymInt& num_groups, bool over_batch, int64_t varying = 0);

struct Layer {
  Frame frame;
  double eps;
  bool centered = true;   // false: RMSNorm
  OptionalTensor mean{};  // statistics that are constants (evaluation)
  OptionalTensor var{};
  OptionalTensor mask{};  // (N, *positions), of channels: elements that count, and whose results are not zero
};

// What the engine's forward returns: the output, and the statistics in float64, which have no derivative.
Tensors3 compose(const Layer& layer, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const Extras& extras = {});

// (dx, dweight, dbias, gradient of the residual)
Tensors4 compose_backward(const Layer& layer, const at::Tensor& grad_output, const at::Tensor& input,
                          const OptionalTensor& weight, Mask4 mask, const BackwardExtras& extras = {});

// The backward of compose_backward without extras: gradients of (grad_output, input, weight) from those of (dx,
// dweight, dbias), of which any may be undefined.
Tensors3 compose_double_backward(const Layer& layer, const Tensors3& grads, const at::Tensor& grad_output,
                                 const at::Tensor& input, const OptionalTensor& weight);

// Whether a functorch transform is running.
bool in_functorch();

inline bool has_tangent(const at::Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t.has_value() && has_tangent(*t); }
inline bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const OptionalTensor& t) { return t.has_value() && requires_grad(*t); }

// Whether something other than plain values has to flow through a call with these tensors.
template <typename... Tensors>
bool composition_needed(const Tensors&... tensors) {
  return in_functorch() || (has_tangent(tensors) || ...);
}

// Whether the call has to be recorded.
template <typename... Tensors>
bool gradient_needed(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

}  // namespace normops
