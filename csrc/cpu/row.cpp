// Row engine on the CPU: cuts the rows into blocks and shares them among threads.

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "../extras.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "row_epilogue.h"

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

// A tensor that goes with the input, as a gradient or a residual does.
const at::Tensor& like(const at::Tensor& input, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.sizes() == input.sizes() && tensor.scalar_type() == input.scalar_type(),
              "normops: expected a tensor like the input (", input.scalar_type(), ", ", input.sizes(), "), got ",
              tensor.scalar_type(), ", ", tensor.sizes());
  return tensor;
}

// A weight or bias as the kernels read it. Most in float lie that way already; one of the input's own type is widened
// here rather than by torch, whose conversion takes longer than the rows of a small input.
template <typename T>
struct RowParameter {
  at::Tensor tensor;

  RowParameter(const OptionalTensor& parameter, const at::Tensor& input, int64_t length, const char* name,
               double offset = 0) {
    if (!defined(parameter)) return;
    tensor = std::is_same_v<T, Acc<T>> ? as_parameter(parameter, input, length, acc_type(input), name)
                                       : as_own_parameter(parameter, input, length, name);
    const Kernels<T>& kernel = kernels().of<T>();
    const bool widen = tensor.scalar_type() != acc_type(input);
    if (!widen && kernel.memory_order && length % kernel.pack_size == 0 && offset == 0) return;
    const at::Tensor packed = at::detail::empty_cpu({padded(length)}, input.options().dtype(acc_type(input)));
    Acc<T>* const target = packed.mutable_data_ptr<Acc<T>>();
    if (widen)
      kernel.widen_parameter(tensor.const_data_ptr<T>(), length, target);
    else
      kernel.pack_parameter(tensor.const_data_ptr<Acc<T>>(), length, target);
    if (offset != 0) {
      for (int64_t i = 0; i < packed.numel(); ++i) target[i] = Acc<T>(double(target[i]) + offset);
    }
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
                  const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                  OptionalName activation, double negative_slope, double weight_offset) {
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const at::Tensor x = as_rows(input, rows, length);
  const at::Tensor added = defined(residual) ? as_rows(like(input, *residual), rows, length) : at::Tensor();
  const Activation kind = as_activation(activation, negative_slope);
  // Without the dispatcher: it would take longer than the rows of a small input.
  const auto shape = row_statistics_shape(input, normalized_ndim);
  at::Tensor output = at::detail::empty_cpu(input.sizes(), input.options());
  prepare_output(output);
  at::Tensor mean = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  at::Tensor rstd = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    const Lines<scalar_t> to{output.mutable_data_ptr<scalar_t>(), length};
    double* const means = mean.mutable_data_ptr<double>();
    double* const rstds = rstd.mutable_data_ptr<double>();
    if (kind || added.defined()) {
      using A = Acc<scalar_t>;
      const RowParameter<A> w(weight, input, length, "weight", weight_offset), b(bias, input, length, "bias");
      const RowForward<A> layer{length, {}, {}, w.data(), b.data(), eps, centered, means, rstds};
      const Lines<const scalar_t> from = lines<const scalar_t>(x);
      const Lines<const scalar_t> plus = added.defined() ? lines<const scalar_t>(added) : Lines<const scalar_t>{};
      parallel(rows, length, [&](int64_t begin, int64_t end) {
        forward_epilogue<scalar_t>(layer, from, to, plus, kind, begin, end);
      });
      return;
    }
    const RowParameter<scalar_t> w(weight, input, length, "weight", weight_offset), b(bias, input, length, "bias");
    const RowForward<scalar_t> args{length, lines<const scalar_t>(x), to, w.data(), b.data(), eps, centered, means,
                                    rstds};
    const auto run = kernels().of<scalar_t>().row_forward;
    parallel(rows, length, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  // LayerNorm is always contiguous, as torch's.
  return {centered ? output : in_format_of(input, output), mean, rstd};
}

// (output, sum, mean, rstd): rows are added and, while their sum is in cache, normalized.
Tensors4 add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                      double weight_offset) {
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const at::Tensor x = as_rows(input, rows, length), added = as_rows(like(input, residual), rows, length);
  const auto shape = row_statistics_shape(input, normalized_ndim);
  at::Tensor output = at::detail::empty_cpu(input.sizes(), input.options());
  at::Tensor sum = at::detail::empty_cpu(input.sizes(), input.options());
  prepare_output(output);
  prepare_output(sum);
  at::Tensor mean = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  at::Tensor rstd = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_add_row_norm", [&] {
    const RowParameter<scalar_t> w(weight, input, length, "weight", weight_offset), b(bias, input, length, "bias");
    const Lines<const scalar_t> first = lines<const scalar_t>(x), second = lines<const scalar_t>(added);
    const Lines<scalar_t> to{sum.mutable_data_ptr<scalar_t>(), length};
    const RowForward<scalar_t> args{length,
                                    read_only(to),
                                    {output.mutable_data_ptr<scalar_t>(), length},
                                    w.data(),
                                    b.data(),
                                    eps,
                                    centered,
                                    mean.mutable_data_ptr<double>(),
                                    rstd.mutable_data_ptr<double>()};
    const Kernels<scalar_t>& kernel = kernels().of<scalar_t>();
    parallel(rows, length, [&](int64_t begin, int64_t end) {
      for_row_pieces(begin, end, rows_together(length), [&](int64_t row, int64_t count) {
        kernel.sum_lines(from_row(first, row), from_row(second, row), from_row(to, row), count, length);
        kernel.row_forward(args, row, row + count);
      });
    });
  });
  return {output, sum, mean, rstd};
}

Tensors4 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask4 output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
                           const OptionalTensor& output, OptionalName activation, double negative_slope,
                           double weight_offset, const OptionalTensor& grad_sum) {
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const auto matrix = [&](const OptionalTensor& tensor) {
    return defined(tensor) ? as_rows(like(input, *tensor), rows, length) : at::Tensor();
  };
  const Activation kind = as_activation(activation, negative_slope);
  const at::Tensor dy = matrix(grad_output), x = as_rows(input, rows, length), more = matrix(grad_sum);
  const at::Tensor means = as_parameter(mean, input, rows, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, rows, at::kDouble, "rstd");
  at::Tensor dx, dweight, dbias, dresidual, added, y;
  if (kind) {
    added = matrix(residual);
    y = matrix(output);
  }
  if (output_mask[0]) dx = prepare_output(at::detail::empty_cpu(input.sizes(), input.options()));
  if (output_mask[3]) dresidual = at::detail::empty_cpu(input.sizes(), input.options());
  if (output_mask[3] && !kind) dresidual.copy_(grad_output);
  const bool params = output_mask[1] || output_mask[2];
  if (!params && !output_mask[0] && !(kind && output_mask[3])) return {dx, dweight, dbias, dresidual};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm_backward", [&] {
    using A = Acc<scalar_t>;
    const auto data_or_null = [&](const at::Tensor& t) {
      return t.defined() ? lines<const scalar_t>(t) : Lines<const scalar_t>{};
    };
    const Kernels<scalar_t>& kernel = kernels().of<scalar_t>();
    const Lines<const scalar_t> grads = lines<const scalar_t>(dy), inputs = lines<const scalar_t>(x);
    const Lines<const scalar_t> summand = data_or_null(more);
    const Lines<scalar_t> to{dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr, length};
    const int64_t block = rows_per_block(rows, length);
    const int64_t blocks = (rows + block - 1) / block;
    // Sums for dweight and dbias: run(args, begin, end) adds those of its rows to the block's.
    const auto each_block = [&](auto args, const auto& run) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(args.dx.data)>>;
      const int64_t stride = RowParameter<E>::padded(length);
      at::Tensor partial;
      if (params) partial = at::detail::empty_cpu({2, blocks, stride}, input.options().dtype(acc_type(input)));
      A* const sums = params ? partial.template mutable_data_ptr<A>() : nullptr;
      parallel(blocks, block * length, [&](int64_t begin, int64_t end) {
        auto own = args;
        for (int64_t i = begin; i < end; ++i) {
          if (params) {
            own.dweight = sums + i * stride;
            own.dbias = sums + (blocks + i) * stride;
            std::fill_n(own.dweight, stride, A(0));
            std::fill_n(own.dbias, stride, A(0));
          }
          run(own, i * block, std::min(rows, (i + 1) * block));
        }
      });
      const at::IntArrayRef shape = input.sizes().slice(input.dim() - normalized_ndim);
      if (output_mask[1]) dweight = sum_blocks<E>(sums, blocks, stride, shape, partial.options());
      if (output_mask[2]) dbias = sum_blocks<E>(sums + blocks * stride, blocks, stride, shape, partial.options());
    };
    const double* const mean_data = means.const_data_ptr<double>();
    const double* const rstd_data = rstds.const_data_ptr<double>();
    if (kind) {
      const RowParameter<A> w(weight, input, length, "weight", weight_offset), b(bias, input, length, "bias");
      const RowEpilogue<scalar_t> epilogue{
          kind,
          {length, {}, {}, w.data(), b.data(), eps, centered, nullptr, nullptr},
          data_or_null(added),
          data_or_null(y),
          {dresidual.defined() ? dresidual.mutable_data_ptr<scalar_t>() : nullptr, length}};
      each_block(RowBackward<A>{length, {}, {}, {}, w.data(), mean_data, rstd_data, centered, nullptr, nullptr},
                 [&](const RowBackward<A>& args, int64_t begin, int64_t end) {
                   backward_epilogue<scalar_t>(args, grads, inputs, to, epilogue, begin, end);
                 });
      return;
    }
    const RowParameter<scalar_t> w(weight, input, length, "weight", weight_offset);
    const RowBackward<scalar_t> plain{length,    grads,     inputs,   to,      w.data(),
                                      mean_data, rstd_data, centered, nullptr, nullptr};
    each_block(plain, [&](const RowBackward<scalar_t>& args, int64_t begin, int64_t end) {
      if (!summand.data || !to.data) {
        kernel.row_backward(args, begin, end);
        return;
      }
      for_row_pieces(begin, end, rows_together_backward(length), [&](int64_t row, int64_t count) {
        kernel.row_backward(args, row, row + count);
        kernel.sum_lines(read_only(from_row(to, row)), from_row(summand, row), from_row(to, row), count, length);
      });
    });
  });
  return {centered ? dx : in_format_of(grad_output, dx), dweight, dbias,
          centered ? dresidual : in_format_of(grad_output, dresidual)};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_row_norm", row_norm);
  m.impl("_row_norm_backward", row_norm_backward);
  m.impl("_add_row_norm", add_row_norm);
}

}  // namespace normops::cpu
