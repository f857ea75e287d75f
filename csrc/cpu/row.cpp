// Row engine on the CPU: cuts the rows into blocks and shares them among threads.

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../tensors.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace normops::cpu {
namespace {

// Each block of rows has its own float sums for dweight and dbias, which are then added up in double. The blocks
// depend on the shape alone, so the sums come out the same for any number of threads. A block is work enough for a
// thread; rows that no cache holds share their sums more widely, as there the sums are memory traffic.
int64_t rows_per_block(int64_t rows, int64_t length) {
  constexpr int64_t kBlocks = 64, kMostRows = 256, kElements = 16 * 1024, kLongRow = 64 * 1024;
  const int64_t even = (rows + kBlocks - 1) / kBlocks;
  const int64_t fewest = length > kLongRow ? 16 : std::max<int64_t>(4, kElements / std::max<int64_t>(1, length));
  return std::min((std::max(even, fewest) + 3) / 4 * 4, kMostRows);
}

template <typename T>
Lines<T> lines(const at::Tensor& rows) {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_const_v<T>)
    return {rows.const_data_ptr<Element>(), rows.stride(0)};
  else
    return {rows.mutable_data_ptr<Element>(), rows.stride(0)};
}

// A weight or bias as the kernels read it. Most in float lie that way already; one of the input's own type is widened
// here rather than by torch, whose conversion takes longer than the rows of a small input.
template <typename T>
struct RowParameter {
  at::Tensor tensor;

  RowParameter(const OptionalTensor& parameter, const at::Tensor& input, int64_t length, const char* name) {
    if (!defined(parameter)) return;
    tensor = as_own_parameter(parameter, input, length, name);
    const Kernels<T>& kernel = kernels().of<T>();
    const bool widen = tensor.scalar_type() != acc_type(input);
    if (!widen && kernel.memory_order && length % kernel.pack_size == 0) return;
    const at::Tensor packed = at::detail::empty_cpu({padded(length)}, input.options().dtype(acc_type(input)));
    Acc<T>* const target = packed.mutable_data_ptr<Acc<T>>();
    if (widen)
      kernel.widen_parameter(tensor.const_data_ptr<T>(), length, target);
    else
      kernel.pack_parameter(tensor.const_data_ptr<Acc<T>>(), length, target);
    tensor = packed;
  }

  static int64_t padded(int64_t length) {
    const int64_t size = kernels().of<T>().pack_size;
    return (length + size - 1) / size * size;
  }

  const Acc<T>* data() const { return tensor.defined() ? tensor.const_data_ptr<Acc<T>>() : nullptr; }
};

// The gradient of a weight or bias from the sums of all blocks.
template <typename T>
at::Tensor sum_blocks(const Acc<T>* sums, int64_t blocks, int64_t stride, at::IntArrayRef shape,
                      at::TensorOptions options) {
  if (blocks == 0) return at::zeros(shape, options);
  at::Tensor result = at::detail::empty_cpu(shape, options);
  Acc<T>* const total = result.mutable_data_ptr<Acc<T>>();
  const int64_t length = result.numel(), unit = 16 * kernels().of<T>().pack_size;
  parallel((length + unit - 1) / unit, unit * blocks, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * unit;
    kernels().of<T>().sum_blocks(sums + from, blocks, stride, std::min(length, end * unit) - from, total + from);
  });
  return result;
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered) {
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const at::Tensor x = as_rows(input, rows, length);
  // Without the dispatcher: it would take longer than the rows of a small input.
  const auto shape = row_statistics_shape(input, normalized_ndim);
  at::Tensor output = at::detail::empty_cpu(input.sizes(), input.options());
  prepare_output(output);
  at::Tensor mean = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  at::Tensor rstd = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    const RowParameter<scalar_t> w(weight, input, length, "weight"), b(bias, input, length, "bias");
    const RowForward<scalar_t> args{length,
                                    lines<const scalar_t>(x),
                                    {output.mutable_data_ptr<scalar_t>(), length},
                                    w.data(),
                                    b.data(),
                                    eps,
                                    centered,
                                    mean.mutable_data_ptr<double>(),
                                    rstd.mutable_data_ptr<double>()};
    const auto run = kernels().of<scalar_t>().row_forward;
    parallel(rows, length, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  // LayerNorm is always contiguous, as torch's.
  return {centered ? output : in_format_of(input, output), mean, rstd};
}

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask) {
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  TORCH_CHECK(grad_output.sizes() == input.sizes() && grad_output.scalar_type() == input.scalar_type(),
              "normops: expected a gradient like the input (", input.scalar_type(), ", ", input.sizes(), "), got ",
              grad_output.scalar_type(), ", ", grad_output.sizes());
  const at::Tensor dy = as_rows(grad_output, rows, length);
  const at::Tensor x = as_rows(input, rows, length);
  const at::Tensor means = as_parameter(mean, input, rows, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, rows, at::kDouble, "rstd");
  at::Tensor dx, dweight, dbias;
  if (output_mask[0]) dx = prepare_output(at::detail::empty_cpu(input.sizes(), input.options()));
  const bool params = output_mask[1] || output_mask[2];
  if (!params && !output_mask[0]) return {};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm_backward", [&] {
    using A = Acc<scalar_t>;
    const RowParameter<scalar_t> w(weight, input, length, "weight");
    const int64_t stride = w.padded(length);
    const int64_t block = rows_per_block(rows, length);
    const int64_t blocks = (rows + block - 1) / block;
    at::Tensor partial;
    if (params) partial = at::detail::empty_cpu({2, blocks, stride}, input.options().dtype(acc_type(input)));
    A* const sums = params ? partial.mutable_data_ptr<A>() : nullptr;
    const auto run = kernels().of<scalar_t>().row_backward;
    parallel(blocks, block * length, [&](int64_t begin, int64_t end) {
      RowBackward<scalar_t> args{length,
                                 lines<const scalar_t>(dy),
                                 lines<const scalar_t>(x),
                                 {dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr, length},
                                 w.data(),
                                 means.const_data_ptr<double>(),
                                 rstds.const_data_ptr<double>(),
                                 centered,
                                 nullptr,
                                 nullptr};
      for (int64_t i = begin; i < end; ++i) {
        if (params) {
          args.dweight = sums + i * stride;
          args.dbias = sums + (blocks + i) * stride;
          std::fill_n(args.dweight, stride, A(0));
          std::fill_n(args.dbias, stride, A(0));
        }
        run(args, i * block, std::min(rows, (i + 1) * block));
      }
    });
    const at::IntArrayRef shape = input.sizes().slice(input.dim() - normalized_ndim);
    if (output_mask[1]) dweight = sum_blocks<scalar_t>(sums, blocks, stride, shape, partial.options());
    if (output_mask[2]) dbias = sum_blocks<scalar_t>(sums + blocks * stride, blocks, stride, shape, partial.options());
  });
  return {centered ? dx : in_format_of(grad_output, dx), dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_row_norm", row_norm);
  m.impl("_row_norm_backward", row_norm_backward);
}

}  // namespace normops::cpu
