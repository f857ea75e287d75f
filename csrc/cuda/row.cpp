// The row engine's operators on CUDA tensors.

#include "row.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../composed.h"
#include "glue.h"

namespace normops::cuda {
namespace {

// The matrix of rows as it is seen in a tensor, without making a tensor of it where that can be done.
struct RowMatrix {
  at::Tensor tensor;
  int64_t stride;

  RowMatrix(const at::Tensor& input, int64_t rows, int64_t length) : tensor(input), stride(length) {
    if (input.is_contiguous()) return;
    tensor = as_rows(input, rows, length);
    stride = tensor.stride(0);
  }
  // Of a tensor that goes with the input, as a gradient or a residual does; none where it is not wanted.
  RowMatrix(const OptionalTensor& given, const at::Tensor& input, int64_t rows, int64_t length, const char* name)
      : stride(0) {
    if (!defined(given)) return;
    TORCH_CHECK(given->sizes() == input.sizes() && given->scalar_type() == input.scalar_type() &&
                    given->device() == input.device(),
                "normops: expected ", name, " like the input (", input.scalar_type(), ", ", input.sizes(), ", ",
                input.device(), "), got ", given->scalar_type(), ", ", given->sizes(), ", ", given->device());
    *this = RowMatrix(*given, rows, length);
  }
  template <typename T>
  Rows<const T> rows() const {
    if (!tensor.defined()) return {nullptr, 0};
    return {tensor.const_data_ptr<T>(), stride};
  }
};

// Weight and bias as the kernels take them, kept alive: in the type of the elements if both have it, in that of the
// arithmetic otherwise.
struct Parameters {
  at::Tensor weight, bias;
  bool as_elements;

  template <typename Args>
  Parameters(const OptionalTensor& w, const OptionalTensor& b, const at::Tensor& input, const Args& args)
      : as_elements(true) {
    for (const OptionalTensor* parameter : {&w, &b}) {
      as_elements = as_elements && (!defined(*parameter) || (*parameter)->scalar_type() == input.scalar_type());
    }
    const at::ScalarType type = as_elements ? input.scalar_type() : acc_type(input);
    weight = on_boundary(as_parameter(w, input, args.length, type, "weight"), args.vectors);
    bias = on_boundary(as_parameter(b, input, args.length, type, "bias"), args.vectors);
  }

  static at::Tensor on_boundary(const at::Tensor& parameter, bool vectors) {
    const bool off =
        vectors && parameter.defined() && reinterpret_cast<uintptr_t>(parameter.const_data_ptr()) % 16 != 0;
    return off ? parameter.clone() : parameter;
  }

  RowParameters pointers() const {
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
    return {data(weight), data(bias), as_elements};
  }
};

// What a layer with extras needs of a device to fuse them; longer rows have them in ATen operators (composed.h).
template <typename T>
RowExtras<T> row_extras(const Activation& activation, double weight_offset, const OptionalTensor& weight,
                        const RowMatrix& other) {
  RowExtras<T> extras;
  extras.activation = activation.kind;
  extras.negative_slope = Acc<T>(activation.negative_slope);
  extras.weight_offset = defined(weight) ? Acc<T>(weight_offset) : Acc<T>(0);
  extras.other = other.rows<T>();
  return extras;
}

struct ForwardResults {
  at::Tensor output, mean, rstd;
  bool done = true;  // false: the device has no kernel for these extras and this length
};

// `sum`: where the sum of the input and the residual goes, if that is what is normalized.
ForwardResults forward(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool centered, const Extras& extras,
                       const at::Tensor& sum) {
  const Here here(input);
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const RowMatrix x(input, rows, length), added(extras.residual, input, rows, length, "a residual");
  const auto shape = row_statistics_shape(input, normalized_ndim);
  const auto statistics = input.options().dtype(at::kDouble);
  ForwardResults results{at::empty(input.sizes(), input.options()), at::empty(shape, statistics),
                         at::empty(shape, statistics)};
  if (rows == 0) return results;
  if (length == 0) {
    results.mean.zero_();
    results.rstd.fill_(1 / std::sqrt(eps));
    return results;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    RowForward<scalar_t> args{rows,
                              length,
                              false,
                              x.rows<scalar_t>(),
                              results.output.mutable_data_ptr<scalar_t>(),
                              {},
                              eps,
                              centered,
                              results.mean.mutable_data_ptr<double>(),
                              results.rstd.mutable_data_ptr<double>()};
    args.extras = row_extras<scalar_t>(extras.activation, extras.weight_offset, weight, added);
    args.extras.made = data_or_null<scalar_t>(sum);
    args.vectors = row_takes_vectors(args);
    if (args.extras && !row_fits(here.device(), args)) {
      results.done = false;
      return;
    }
    const Parameters parameters(weight, bias, input, args);
    args.parameters = parameters.pointers();
    const size_t bytes = row_forward_scratch(here.device(), args);
    const at::Tensor scratch = bytes ? allocate(input, bytes) : at::Tensor();
    row_forward(here.device(), args, bytes ? scratch.mutable_data_ptr() : nullptr, here.stream());
  });
  return results;
}

// LayerNorm is always contiguous, as torch's.
Tensors3 plain_row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                        const OptionalTensor& bias, double eps, bool centered) {
  const ForwardResults r = forward(input, normalized_ndim, weight, bias, eps, centered, {}, at::Tensor());
  return {centered ? r.output : in_format_of(input, r.output), r.mean, r.rstd};
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                  OptionalName activation, double negative_slope, double weight_offset, int64_t varying) {
  if (normalized_ndim != 0 && !varying) {
    const Extras extras{as_activation(activation, negative_slope), residual, weight_offset};
    const ForwardResults r = forward(input, normalized_ndim, weight, bias, eps, centered, extras, at::Tensor());
    if (r.done) return {centered ? r.output : in_format_of(input, r.output), r.mean, r.rstd};
  }
  return composed_row_norm<plain_row_norm>(input, normalized_ndim, weight, bias, eps, centered, residual, activation,
                                           negative_slope, weight_offset, varying);
}

Tensors4 add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                      double weight_offset) {
  const at::Tensor sum = at::empty(input.sizes(), input.options());
  const ForwardResults r =
      forward(input, normalized_ndim, weight, bias, eps, centered, {{}, residual, weight_offset}, sum);
  if (r.done) return {r.output, sum, r.mean, r.rstd};
  return composed_add_row_norm<plain_row_norm>(input, residual, normalized_ndim, weight, bias, eps, centered,
                                               weight_offset);
}

// Nothing where the device has no kernel for these extras and this length.
std::optional<Tensors4> backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                                 const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight,
                                 bool centered, Mask4 output_mask, const BackwardExtras& extras) {
  const Here here(input);
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const bool kind = bool(extras.activation), from_output = kind && defined(extras.output);
  const RowMatrix dy(grad_output, input, rows, length, "a gradient"), x(input, rows, length);
  const RowMatrix other(!kind         ? std::nullopt
                        : from_output ? extras.output
                                      : extras.residual,
                        input, rows, length, from_output ? "the output" : "a residual");
  const RowMatrix grad_sum(output_mask[0] ? extras.grad_sum : std::nullopt, input, rows, length,
                           "a gradient of the sum");
  const at::Tensor means = as_parameter(mean, input, rows, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, rows, at::kDouble, "rstd");
  const at::IntArrayRef shape = input.sizes().slice(input.dim() - normalized_ndim);
  const auto options = input.options().dtype(composed::gradient_type(weight, input));
  const bool empty = rows == 0 || length == 0;
  const auto parameter = [&](bool wanted) {
    return !wanted ? at::Tensor() : empty ? at::zeros(shape, options) : at::empty(shape, options);
  };
  const auto like_input = [&](bool wanted) {
    return wanted ? at::empty(input.sizes(), input.options()) : at::Tensor();
  };
  const at::Tensor dx = like_input(output_mask[0]), dresidual = like_input(output_mask[3]);
  const at::Tensor dweight = parameter(output_mask[1]), dbias = parameter(output_mask[2]);
  if (dresidual.defined() && !kind) dresidual.copy_(grad_output);
  const auto results = [&] {
    const auto formed = [&](const at::Tensor& grad) { return centered ? grad : in_format_of(grad_output, grad); };
    return Tensors4{formed(dx), dweight, dbias, formed(dresidual)};
  };
  if (empty || !(output_mask[0] || output_mask[1] || output_mask[2] || (kind && output_mask[3]))) return results();
  bool done = true;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm_backward", [&] {
    RowBackward<scalar_t> args{rows,
                               length,
                               false,
                               dy.rows<scalar_t>(),
                               x.rows<scalar_t>(),
                               data_or_null<scalar_t>(dx),
                               {},
                               means.const_data_ptr<double>(),
                               rstds.const_data_ptr<double>(),
                               centered,
                               any_output(dweight),
                               any_output(dbias)};
    args.extras = row_extras<scalar_t>(extras.activation, extras.weight_offset, weight, other);
    args.extras.from_output = from_output;
    args.extras.grad_sum = grad_sum.rows<scalar_t>();
    if (kind) args.extras.made = data_or_null<scalar_t>(dresidual);
    args.vectors = row_takes_vectors(args);
    if (args.extras && !row_fits(here.device(), args)) {
      done = false;
      return;
    }
    const Parameters parameters(weight, kind ? extras.bias : std::nullopt, input, args);
    args.parameters = parameters.pointers();
    const size_t bytes = row_backward_scratch(here.device(), args);
    const at::Tensor scratch = bytes ? allocate(input, bytes) : at::Tensor();
    row_backward(here.device(), args, bytes ? scratch.mutable_data_ptr() : nullptr, here.stream());
  });
  return done ? std::optional(results()) : std::nullopt;
}

Tensors3 plain_row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                                 const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double,
                                 bool centered, Mask3 mask) {
  const auto [dx, dweight, dbias, none] = *backward(grad_output, input, normalized_ndim, mean, rstd, weight, centered,
                                                    {mask[0], mask[1], mask[2], false}, {});
  return {dx, dweight, dbias};
}

Tensors4 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask4 mask, const OptionalTensor& bias, const OptionalTensor& residual,
                           const OptionalTensor& output, OptionalName activation, double negative_slope,
                           double weight_offset, const OptionalTensor& grad_sum, int64_t varying) {
  if (normalized_ndim != 0 && !varying) {
    const BackwardExtras extras{
        as_activation(activation, negative_slope), bias, residual, output, weight_offset, grad_sum};
    const auto grads = backward(grad_output, input, normalized_ndim, mean, rstd, weight, centered, mask, extras);
    if (grads) return *grads;
  }
  return composed_row_norm_backward<plain_row_norm, plain_row_norm_backward>(
      grad_output, input, normalized_ndim, mean, rstd, weight, eps, centered, mask, bias, residual, output, activation,
      negative_slope, weight_offset, grad_sum, varying);
}

}  // namespace

void add_row_kernels(torch::Library& library) {
  library.impl("_row_norm", row_norm);
  library.impl("_row_norm_backward", row_norm_backward);
  library.impl("_add_row_norm", add_row_norm);
}

}  // namespace normops::cuda
