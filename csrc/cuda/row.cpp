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
  template <typename T>
  Rows<const T> rows() const {
    return {tensor.const_data_ptr<T>(), stride};
  }
};

// Weight and bias as the kernels take them, kept alive: in the type of the elements if both have it and rows are short,
// in that of the arithmetic otherwise.
struct Parameters {
  at::Tensor weight, bias;
  bool as_elements;

  template <typename Args>
  Parameters(const OptionalTensor& w, const OptionalTensor& b, const at::Tensor& input, int device, const Args& args)
      : as_elements(row_fits(device, args)) {
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

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered) {
  const Here here(input);
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const RowMatrix x(input, rows, length);
  const auto shape = row_statistics_shape(input, normalized_ndim);
  const auto statistics = input.options().dtype(at::kDouble);
  const at::Tensor output = at::empty(input.sizes(), input.options());
  const at::Tensor mean = at::empty(shape, statistics), rstd = at::empty(shape, statistics);
  // LayerNorm is always contiguous, as torch's.
  const auto results = [&] { return Tensors3{centered ? output : in_format_of(input, output), mean, rstd}; };
  if (rows == 0) return results();
  if (length == 0) {
    mean.zero_();
    rstd.fill_(1 / std::sqrt(eps));
    return results();
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    RowForward<scalar_t> args{rows,
                              length,
                              false,
                              x.rows<scalar_t>(),
                              output.mutable_data_ptr<scalar_t>(),
                              {},
                              eps,
                              centered,
                              mean.mutable_data_ptr<double>(),
                              rstd.mutable_data_ptr<double>()};
    args.vectors = row_takes_vectors(args);
    const Parameters parameters(weight, bias, input, here.device(), args);
    args.parameters = parameters.pointers();
    const size_t bytes = row_forward_scratch(here.device(), args);
    const at::Tensor scratch = bytes ? allocate(input, bytes) : at::Tensor();
    row_forward(here.device(), args, bytes ? scratch.mutable_data_ptr() : nullptr, here.stream());
  });
  return results();
}

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask) {
  const Here here(input);
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  TORCH_CHECK(grad_output.sizes() == input.sizes() && grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.device() == input.device(),
              "normops: expected a gradient like the input (", input.scalar_type(), ", ", input.sizes(), ", ",
              input.device(), "), got ", grad_output.scalar_type(), ", ", grad_output.sizes(), ", ",
              grad_output.device());
  const RowMatrix dy(grad_output, rows, length);
  const RowMatrix x(input, rows, length);
  const at::Tensor means = as_parameter(mean, input, rows, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, rows, at::kDouble, "rstd");
  const at::IntArrayRef shape = input.sizes().slice(input.dim() - normalized_ndim);
  const auto options = input.options().dtype(composed::gradient_type(weight, input));
  const bool empty = rows == 0 || length == 0;
  const auto parameter = [&](bool wanted) {
    return !wanted ? at::Tensor() : empty ? at::zeros(shape, options) : at::empty(shape, options);
  };
  at::Tensor dx, dweight = parameter(output_mask[1]), dbias = parameter(output_mask[2]);
  if (output_mask[0]) dx = at::empty(input.sizes(), input.options());
  const auto results = [&] { return Tensors3{centered ? dx : in_format_of(grad_output, dx), dweight, dbias}; };
  if (empty || !(output_mask[0] || output_mask[1] || output_mask[2])) return results();
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
    args.vectors = row_takes_vectors(args);
    const Parameters parameters(weight, std::nullopt, input, here.device(), args);
    args.parameters = parameters.pointers();
    const size_t bytes = row_backward_scratch(here.device(), args);
    const at::Tensor scratch = bytes ? allocate(input, bytes) : at::Tensor();
    row_backward(here.device(), args, bytes ? scratch.mutable_data_ptr() : nullptr, here.stream());
  });
  return results();
}

}  // namespace

void add_row_kernels(torch::Library& library) {
  library.impl("_row_norm", composed_row_norm<row_norm>);
  library.impl("_row_norm_backward", composed_row_norm_backward<row_norm, row_norm_backward>);
  library.impl("_add_row_norm", composed_add_row_norm<row_norm>);
}

}  // namespace normops::cuda
