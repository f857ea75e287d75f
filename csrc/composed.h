#pragma once

// The extras in ATen operators: what the composition of autograd is made of, and how a device whose kernels know
// nothing of them gets them.

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/sigmoid.h>

#include "autograd/composition.h"
#include "extras.h"

namespace normops {

// A tensor as activation.h wants its numbers.
struct TensorNumber {
  at::Tensor t;

  friend TensorNumber operator+(const TensorNumber& a, const TensorNumber& b) { return {a.t + b.t}; }
  friend TensorNumber operator+(const TensorNumber& a, double b) { return {a.t + b}; }
  friend TensorNumber operator-(const TensorNumber& a, double b) { return {a.t - b}; }
  friend TensorNumber operator-(double a, const TensorNumber& b) { return {a - b.t}; }
  friend TensorNumber operator-(const TensorNumber& a) { return {-a.t}; }
  friend TensorNumber operator*(const TensorNumber& a, const TensorNumber& b) { return {a.t * b.t}; }
  friend TensorNumber operator*(const TensorNumber& a, double b) { return {a.t * b}; }
  friend TensorNumber operator/(const TensorNumber& a, const TensorNumber& b) { return {a.t / b.t}; }
  friend TensorNumber exp(const TensorNumber& z) { return {at::exp(z.t)}; }
  friend TensorNumber erf(const TensorNumber& z) { return {at::erf(z.t)}; }
  friend TensorNumber sigmoid(const TensorNumber& z) { return {at::sigmoid(z.t)}; }
  friend TensorNumber clamp(const TensorNumber& z, double least, double most) {
    return {at::clamp(z.t, at::Scalar(least), at::Scalar(most))};
  }
  friend TensorNumber choose(const TensorNumber& z, double limit, double above, double otherwise) {
    return {(z.t > limit).to(z.t.scalar_type()) * (above - otherwise) + otherwise};
  }
};

inline at::Tensor activated(const Activation& activation, const at::Tensor& z) {
  at::Tensor result = z;
  with_activation(activation.kind, [&](auto f) { result = f.value(TensorNumber{z}, activation.negative_slope).t; });
  return result;
}

inline at::Tensor activation_derivative(const Activation& activation, const at::Tensor& z) {
  at::Tensor result;
  with_activation(activation.kind,
                  [&](auto f) { result = f.derivative(TensorNumber{z}, activation.negative_slope).t; });
  return result;
}

// A device's plain operators, which know torch's arguments alone, as operators with extras: for what its kernels do not
// fuse. 16-bit inputs go through the plain kernels in float, so that nothing is rounded in between.
namespace composed {

// The dtype in which gradients of parameters are written: the weight's, if the input has it too, as the bias then has
// it in all but odd models; otherwise that of the arithmetic, as nothing is known of the bias, and autograd converts.
inline at::ScalarType gradient_type(const OptionalTensor& weight, const at::Tensor& input) {
  return defined(weight) && weight->scalar_type() == input.scalar_type() ? input.scalar_type() : acc_type(input);
}

inline at::Tensor wide(const at::Tensor& t) { return t.to(acc_type(t)); }

inline OptionalTensor moved(const OptionalTensor& weight, const at::Tensor& input, double offset) {
  if (!defined(weight) || offset == 0) return weight;
  return weight->to(acc_type(input)) + offset;
}

inline at::Tensor finish(const at::Tensor& y, const at::Tensor& input, const Extras& extras) {
  const at::Tensor z = defined(extras.residual) ? y + wide(*extras.residual) : y;
  return activated(extras.activation, z).to(input.scalar_type());
}

// The gradient before the activation, given what `pre_activation` makes of the input.
template <typename F>
at::Tensor before(const at::Tensor& grad_output, const BackwardExtras& extras, const F& pre_activation) {
  if (!extras.activation) return grad_output;
  const auto z = [&] {
    if (defined(extras.output)) return wide(*extras.output);
    return defined(extras.residual) ? pre_activation() + wide(*extras.residual) : pre_activation();
  };
  return wide(grad_output) * activation_derivative(extras.activation, z());
}

inline Tensors4 after(const Tensors3& grads, const at::Tensor& dz, const at::Tensor& input, at::MemoryFormat format,
                      Mask4 mask, const BackwardExtras& extras) {
  auto [dx, dweight, dbias] = grads;
  if (dx.defined() && defined(extras.grad_sum)) dx = dx + *extras.grad_sum;
  at::Tensor dresidual;
  if (mask[3]) dresidual = at::empty_like(input, format).copy_(dz);
  return {dx.defined() ? dx.to(input.scalar_type()) : dx, dweight, dbias, dresidual};
}

// A result in the memory format that engines return.
inline at::Tensor like(const at::Tensor& input, const at::Tensor& t) {
  return t.defined() ? t.contiguous(input.suggest_memory_format()) : t;
}

}  // namespace composed

namespace composed {

// The channels as rows, and back.
inline at::Tensor as_rows(const at::Tensor& t) { return t.movedim(1, -1).contiguous(); }
inline OptionalTensor as_rows(const OptionalTensor& t) {
  return defined(t) ? OptionalTensor(as_rows(*t)) : std::nullopt;
}
inline at::Tensor from_rows(const at::Tensor& t) { return t.defined() ? t.movedim(-1, 1).contiguous() : t; }

}  // namespace composed

template <auto row_norm>
Tensors3 composed_row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                           OptionalName activation, double negative_slope, double weight_offset, int64_t varying) {
  const Extras extras{as_activation(activation, negative_slope), residual, weight_offset};
  if (normalized_ndim == 0) {
    auto [y, mean, rstd] =
        composed_row_norm<row_norm>(composed::as_rows(input), 1, weight, bias, eps, centered,
                                    composed::as_rows(residual), activation, negative_slope, weight_offset, varying);
    return {composed::from_rows(y), composed::from_rows(mean), composed::from_rows(rstd)};
  }
  if (varying) {
    auto [y, mean, rstd] =
        compose({row_frame(input, normalized_ndim, varying), eps, centered}, input, weight, bias, extras);
    return {centered ? y.contiguous() : composed::like(input, y), mean, rstd};
  }
  const OptionalTensor weights = composed::moved(weight, input, weight_offset);
  if (!extras.epilogue()) return row_norm(input, normalized_ndim, weights, bias, eps, centered);
  auto [y, mean, rstd] = row_norm(composed::wide(input), normalized_ndim, weights, bias, eps, centered);
  return {composed::finish(y, input, extras), mean, rstd};
}

template <auto row_norm, auto row_norm_backward>
Tensors4 composed_row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                                    const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight,
                                    double eps, bool centered, Mask4 mask, const OptionalTensor& bias,
                                    const OptionalTensor& residual, const OptionalTensor& output,
                                    OptionalName activation, double negative_slope, double weight_offset,
                                    const OptionalTensor& grad_sum, int64_t varying) {
  const BackwardExtras extras{
      as_activation(activation, negative_slope), bias, residual, output, weight_offset, grad_sum};
  if (normalized_ndim == 0) {
    auto [dx, dweight, dbias, dresidual] = composed_row_norm_backward<row_norm, row_norm_backward>(
        composed::as_rows(grad_output), composed::as_rows(input), 1, composed::as_rows(mean), composed::as_rows(rstd),
        weight, eps, centered, mask, bias, composed::as_rows(residual), composed::as_rows(output), activation,
        negative_slope, weight_offset, composed::as_rows(grad_sum), varying);
    return {composed::from_rows(dx), dweight, dbias, composed::from_rows(dresidual)};
  }
  if (varying) {
    auto [dx, dweight, dbias, dresidual] = compose_backward({row_frame(input, normalized_ndim, varying), eps, centered},
                                                            grad_output, input, weight, mask, extras);
    const auto parameter = [&](const at::Tensor& t) {
      return t.defined() ? t.to(composed::gradient_type(weight, input)) : t;
    };
    const auto lying = [&](const at::Tensor& t) {
      return t.defined() && centered ? t.contiguous() : composed::like(grad_output, t);
    };
    return {lying(dx), parameter(dweight), parameter(dbias), lying(dresidual)};
  }
  const OptionalTensor weights = composed::moved(weight, input, weight_offset);
  const at::Tensor dz = composed::before(grad_output, extras, [&] {
    return std::get<0>(row_norm(composed::wide(input), normalized_ndim, weights, bias, eps, centered));
  });
  const at::Tensor x = extras.activation ? composed::wide(input) : input;
  return composed::after(
      row_norm_backward(dz, x, normalized_ndim, mean, rstd, weights, eps, centered, {mask[0], mask[1], mask[2]}), dz,
      input, centered ? at::MemoryFormat::Contiguous : grad_output.suggest_memory_format(), mask, extras);
}

template <auto row_norm>
Tensors4 composed_add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                               double weight_offset) {
  const at::Tensor sum = (input + residual).contiguous();
  auto [output, mean, rstd] =
      row_norm(sum, normalized_ndim, composed::moved(weight, input, weight_offset), bias, eps, centered);
  return {output, sum, mean, rstd};
}

// Channels with a mask or parameters of samples, which the kernels do not know, and others.
template <auto channel_norm>
Tensors3 composed_channel_norm(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                               const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups,
                               bool over_batch, double eps, const OptionalTensor& residual, OptionalName activation,
                               double negative_slope, const OptionalTensor& mask, int64_t varying) {
  if (!defined(mask) && !varying) {
    return channel_norm(input, mean, var, weight, bias, num_groups, over_batch, eps, residual, activation,
                        negative_slope);
  }
  const Extras extras{as_activation(activation, negative_slope), residual};
  auto [y, used_mean, used_var] =
      compose({channel_frame(input, num_groups, over_batch, varying), eps, /*centered=*/true, mean, var, mask}, input,
              weight, bias, extras);
  return {composed::like(input, y), used_mean, used_var};
}

template <auto channel_norm_backward>
Tensors4 composed_channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                                        const at::Tensor& var, const OptionalTensor& weight, int64_t num_groups,
                                        bool over_batch, double eps, bool input_stats, Mask4 wanted,
                                        const OptionalTensor& bias, const OptionalTensor& residual,
                                        const OptionalTensor& output, OptionalName activation, double negative_slope,
                                        const OptionalTensor& mask, int64_t varying) {
  if (!defined(mask) && !varying) {
    return channel_norm_backward(grad_output, input, mean, var, weight, num_groups, over_batch, eps, input_stats,
                                 wanted, bias, residual, output, activation, negative_slope);
  }
  const BackwardExtras extras{as_activation(activation, negative_slope), bias, residual, output};
  const OptionalTensor none, given_mean = input_stats ? none : mean, given_var = input_stats ? none : var;
  auto [dx, dweight, dbias, dresidual] = compose_backward(
      {channel_frame(input, num_groups, over_batch, varying), eps, /*centered=*/true, given_mean, given_var, mask},
      grad_output, input, weight, wanted, extras);
  const auto parameter = [&](const at::Tensor& t) {
    return t.defined() ? t.to(composed::gradient_type(weight, input)) : t;
  };
  return {composed::like(input, dx), parameter(dweight), parameter(dbias), composed::like(input, dresidual)};
}

// The stages of BatchNorm, which know no mask either.

inline Layer masked_batch_layer(const at::Tensor& input, double eps, const OptionalTensor& mean,
                                const OptionalTensor& var, const OptionalTensor& mask) {
  return {channel_frame(input, input.sym_size(1), /*over_batch=*/true), eps, /*centered=*/true, mean, var, mask};
}

template <auto moments>
Tensors2 composed_moments(const at::Tensor& input, const OptionalTensor& mask) {
  if (!defined(mask)) return moments(input);
  auto [y, mean, var] = compose(masked_batch_layer(input, /*eps=*/1, {}, {}, mask), input, {}, {});
  return {mean, var};
}

template <auto grad_sums>
Tensors2 composed_grad_sums(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                            const at::Tensor& var, double eps, const OptionalTensor& mask) {
  if (!defined(mask)) return grad_sums(grad_output, input, mean, var, eps);
  auto [dx, dweight, dbias, dresidual] = compose_backward(masked_batch_layer(input, eps, mean, var, mask), grad_output,
                                                          input, {}, {false, true, true, false});
  return {dbias.to(at::kDouble), dweight.to(at::kDouble)};
}

template <auto grad_apply>
at::Tensor composed_grad_apply(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, const at::Tensor& sum_dy,
                               const at::Tensor& sum_dy_xhat, int64_t count, double eps, const OptionalTensor& mask) {
  if (!defined(mask)) return grad_apply(grad_output, input, mean, var, weight, sum_dy, sum_dy_xhat, count, eps);
  at::DimVector shape(input.dim(), 1);
  shape[1] = input.size(1);
  const auto channels = [&](const at::Tensor& t) { return t.to(at::kDouble).reshape(shape); };
  const at::Tensor rstd = (var.to(at::kDouble) + eps).rsqrt();
  const at::Tensor scale = defined(weight) ? rstd * weight->to(at::kDouble) : rstd;
  const at::Tensor xhat = (composed::wide(input) - channels(mean)) * channels(rstd);
  const at::Tensor rest = channels(sum_dy / count) + xhat * channels(sum_dy_xhat / count);
  const at::Tensor dx = (composed::wide(grad_output) - rest) * channels(scale);
  return composed::like(input, dx.masked_fill(mask->unsqueeze(1).logical_not(), 0).to(input.scalar_type()));
}

}  // namespace normops
