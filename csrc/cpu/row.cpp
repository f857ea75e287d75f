// Row engine on the CPU: cuts the rows into blocks and shares them among threads.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace normops::cpu {
namespace {

// Each block of rows has its own float sums for dweight and dbias, which are then added up in double. The blocks
// depend on the number of rows alone, so the sums come out the same for any number of threads.
int64_t rows_per_block(int64_t rows) {
  constexpr int64_t kBlocks = 64, kMostRows = 256, kFewestRows = 4;
  const int64_t even = (rows + kBlocks - 1) / kBlocks;
  return std::min(std::max((even + 3) / 4 * 4, kFewestRows), kMostRows);
}

template <typename T>
Lines<T> lines(const at::Tensor& rows) {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_const_v<T>)
    return {rows.const_data_ptr<Element>(), rows.stride(0)};
  else
    return {rows.mutable_data_ptr<Element>(), rows.stride(0)};
}

template <typename A>
const A* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<A>() : nullptr;
}

template <typename A>
void add_blocks(const A* partial, int64_t blocks, int64_t length, A* total) {
  parallel(length, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * length + j];
      total[j] = A(sum);
    }
  });
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered) {
  const auto [rows, length] = row_shape(input, normalized_ndim);
  const at::Tensor x = as_rows(input, rows, length);
  at::Tensor output = at::empty(input.sizes(), input.options());
  at::Tensor mean = at::empty(row_statistics_shape(input, normalized_ndim), input.options().dtype(at::kDouble));
  at::Tensor rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    using A = Acc<scalar_t>;
    const at::Tensor w = as_parameter(weight, input, length, acc_type(input), "weight");
    const at::Tensor b = as_parameter(bias, input, length, acc_type(input), "bias");
    const RowForward<scalar_t> args{length,
                                    lines<const scalar_t>(x),
                                    {output.mutable_data_ptr<scalar_t>(), length},
                                    data_or_null<A>(w),
                                    data_or_null<A>(b),
                                    eps,
                                    centered,
                                    mean.mutable_data_ptr<double>(),
                                    rstd.mutable_data_ptr<double>()};
    const auto run = kernels().of<scalar_t>().row_forward;
    parallel(rows, length, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {output, mean, rstd};
}

Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask) {
  const auto [rows, length] = row_shape(input, normalized_ndim);
  TORCH_CHECK(grad_output.sizes() == input.sizes() && grad_output.scalar_type() == input.scalar_type(),
              "normops: expected a gradient like the input (", input.scalar_type(), ", ", input.sizes(), "), got ",
              grad_output.scalar_type(), ", ", grad_output.sizes());
  const at::Tensor dy = as_rows(grad_output, rows, length);
  const at::Tensor x = as_rows(input, rows, length);
  const at::Tensor means = as_parameter(mean, input, rows, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, rows, at::kDouble, "rstd");
  at::Tensor dx, dweight, dbias;
  if (output_mask[0]) dx = at::empty(input.sizes(), input.options());
  const bool params = output_mask[1] || output_mask[2];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm_backward", [&] {
    using A = Acc<scalar_t>;
    const at::Tensor w = as_parameter(weight, input, length, acc_type(input), "weight");
    const int64_t block = rows_per_block(rows);
    const int64_t blocks = (rows + block - 1) / block;
    at::Tensor partial;
    if (params) partial = at::empty({2, blocks, length}, input.options().dtype(acc_type(input)));
    A* const sums = params ? partial.mutable_data_ptr<A>() : nullptr;
    const auto run = kernels().of<scalar_t>().row_backward;
    parallel(blocks, block * length, [&](int64_t begin, int64_t end) {
      RowBackward<scalar_t> args{length,
                                 lines<const scalar_t>(dy),
                                 lines<const scalar_t>(x),
                                 {dx.defined() ? dx.mutable_data_ptr<scalar_t>() : nullptr, length},
                                 data_or_null<A>(w),
                                 means.const_data_ptr<double>(),
                                 rstds.const_data_ptr<double>(),
                                 centered,
                                 nullptr,
                                 nullptr};
      for (int64_t i = begin; i < end; ++i) {
        if (params) {
          args.dweight = sums + i * length;
          args.dbias = sums + (blocks + i) * length;
          std::fill_n(args.dweight, length, A(0));
          std::fill_n(args.dbias, length, A(0));
        }
        run(args, i * block, std::min(rows, (i + 1) * block));
      }
    });
    const auto finish = [&](const A* from) {
      at::Tensor total = at::empty(input.sizes().slice(input.dim() - normalized_ndim), partial.options());
      add_blocks(from, blocks, length, total.mutable_data_ptr<A>());
      return total;
    };
    if (output_mask[1]) dweight = finish(sums);
    if (output_mask[2]) dbias = finish(sums + blocks * length);
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_row_norm", row_norm);
  m.impl("_row_norm_backward", row_norm_backward);
}

}  // namespace normops::cpu
