#pragma once

// The extras in ATen operators: what the composition of autograd is made of, and how a device whose kernels know
// nothing of them gets them.

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>

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

// A device's plain operators, which know torch's arguments alone, as operators with extras: for as long as its kernels
// do not fuse them. 16-bit inputs go through the plain kernels in float, so that nothing is rounded in between.
namespace composed {

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

}  // namespace composed

template <auto row_norm>
Tensors3 composed_row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                           OptionalName activation, double negative_slope, double weight_offset) {
  const Extras extras{as_activation(activation, negative_slope), residual, weight_offset};
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
                                    const OptionalTensor& grad_sum) {
  const BackwardExtras extras{
      as_activation(activation, negative_slope), bias, residual, output, weight_offset, grad_sum};
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

}  // namespace normops
