// Row engine on the CPU: cuts the rows into blocks and shares them among threads.

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "../extras.h"
#include "extremes.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "position.h"
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

// Which rows share a weight and a bias. `varying` has a bit for each dimension of the input along which these differ;
// without any, all rows share them.
class Sharing {
 public:
  Sharing(const at::Tensor& input, int64_t rows, int64_t normalized_ndim, int64_t varying) : run_(rows) {
    const int64_t leading = input.dim() - normalized_ndim;
    int64_t last = leading;
    while (last > 0 && !(varying >> (last - 1) & 1)) --last;
    for (int64_t d = 0; d < last; ++d) {
      const bool differs = (varying >> d & 1) != 0;
      dims_.push_back({input.size(d), differs});
      if (differs) sets_ *= input.size(d);
      run_ = input.size(d) > 0 ? run_ / input.size(d) : 0;
    }
    shared_ = sets_ > 0 ? rows / sets_ : 0;
  }

  int64_t sets() const { return sets_; }      // of parameters
  int64_t shared() const { return shared_; }  // rows that share one

  // f(set, first row, last row) for rows of [begin, end) that follow each other and share a set.
  template <typename F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin; row < end;) {
      const int64_t next = std::min(end, (row / run_ + 1) * run_);
      f(set_of(row / run_), row, next);
      row = next;
    }
  }
  // The same for rows of one set, counted among themselves.
  template <typename F>
  void for_rows_of(int64_t set, int64_t begin, int64_t end, const F& f) const {
    for (int64_t own = begin; own < end;) {
      const int64_t next = std::min(end, (own / run_ + 1) * run_), first = run_of(set, own / run_) * run_ + own % run_;
      f(first, first + next - own);
      own = next;
    }
  }

 private:
  struct Dimension {
    int64_t size;
    bool differs;
  };

  int64_t set_of(int64_t run) const {
    int64_t set = 0, step = 1;
    for (auto d = dims_.rbegin(); d != dims_.rend(); ++d) {
      if (d->differs) {
        set += run % d->size * step;
        step *= d->size;
      }
      run /= d->size;
    }
    return set;
  }
  int64_t run_of(int64_t set, int64_t own) const {
    int64_t run = 0, step = 1;
    for (auto d = dims_.rbegin(); d != dims_.rend(); ++d) {
      int64_t& left = d->differs ? set : own;
      run += left % d->size * step;
      left /= d->size;
      step *= d->size;
    }
    return run;
  }

  c10::SmallVector<Dimension, 4> dims_;  // up to the last that differs
  int64_t sets_ = 1, shared_, run_;
};

// A weight or bias as the kernels read it. Most in float lie that way already; one of the input's own type is widened
// here rather than by torch, whose conversion takes longer than the rows of a small input.
template <typename T>
struct RowParameter {
  at::Tensor tensor;
  int64_t apart;  // from one set to the next

  RowParameter(const OptionalTensor& parameter, const at::Tensor& input, int64_t sets, int64_t length, const char* name,
               double offset = 0)
      : apart(length) {
    if (!defined(parameter)) return;
    tensor = std::is_same_v<T, Acc<T>> ? as_parameter(parameter, input, sets * length, acc_type(input), name)
                                       : as_own_parameter(parameter, input, sets * length, name);
    const Kernels<T>& kernel = kernels().of<T>();
    const bool widen = tensor.scalar_type() != acc_type(input);
    if (!widen && kernel.memory_order && length % kernel.pack_size == 0 && offset == 0) return;
    apart = padded(length);
    const at::Tensor packed = at::detail::empty_cpu({sets * apart}, input.options().dtype(acc_type(input)));
    Acc<T>* const target = packed.mutable_data_ptr<Acc<T>>();
    for (int64_t set = 0; set < sets; ++set) {
      if (widen)
        kernel.widen_parameter(tensor.const_data_ptr<T>() + set * length, length, target + set * apart);
      else
        kernel.pack_parameter(tensor.const_data_ptr<Acc<T>>() + set * length, length, target + set * apart);
    }
    if (offset != 0) {
      for (int64_t i = 0; i < packed.numel(); ++i) target[i] = Acc<T>(double(target[i]) + offset);
    }
    tensor = packed;
  }

  static int64_t padded(int64_t length) {
    const int64_t size = kernels().of<T>().pack_size;
    return (length + size - 1) / size * size;
  }

  const Acc<T>* data(int64_t set = 0) const {
    return tensor.defined() ? tensor.const_data_ptr<Acc<T>>() + set * apart : nullptr;
  }
};

// The gradient of a weight or bias from the sums of all blocks, of which every set has `blocks`.
template <typename T>
at::Tensor sum_blocks(const Acc<T>* sums, int64_t sets, int64_t blocks, int64_t stride, at::IntArrayRef shape,
                      at::TensorOptions options) {
  if (sets * blocks == 0) return at::zeros(shape, options);
  at::Tensor result = at::detail::empty_cpu(shape, options);
  Acc<T>* const total = result.mutable_data_ptr<Acc<T>>();
  const int64_t length = result.numel() / sets, unit = 16 * kernels().of<T>().pack_size;
  const int64_t units = (length + unit - 1) / unit;
  parallel(sets * units, unit * blocks, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t set = begin / units, last = std::min(end, (set + 1) * units);
      const int64_t from = (begin - set * units) * unit, to = std::min(length, (last - set * units) * unit);
      kernels().of<T>().sum_blocks(sums + set * blocks * stride + from, blocks, stride, to - from,
                                   total + set * length + from);
      begin = last;
    }
  });
  return result;
}

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, const OptionalTensor& residual,
                  OptionalName activation, double negative_slope, double weight_offset, int64_t varying) {
  if (normalized_ndim == 0) {
    return position_norm(input, weight, bias, eps, centered,
                         {as_activation(activation, negative_slope), residual, weight_offset});
  }
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const Sharing sharing(input, rows, normalized_ndim, varying);
  const int64_t sets = sharing.sets();
  const at::Tensor x = as_rows(input, rows, length);
  const at::Tensor added = defined(residual) ? as_rows(like(input, *residual), rows, length) : at::Tensor();
  const Activation kind = as_activation(activation, negative_slope);
  // Without the dispatcher: it would take longer than the rows of a small input.
  const auto shape = row_statistics_shape(input, normalized_ndim);
  at::Tensor output = new_output(input);
  at::Tensor mean = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  at::Tensor rstd = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    const Lines<scalar_t> to{output.mutable_data_ptr<scalar_t>(), length};
    double* const means = mean.mutable_data_ptr<double>();
    double* const rstds = rstd.mutable_data_ptr<double>();
    if (kind || added.defined()) {
      using A = Acc<scalar_t>;
      const RowParameter<A> w(weight, input, sets, length, "weight", weight_offset);
      const RowParameter<A> b(bias, input, sets, length, "bias");
      const RowForward<A> layer{length, {}, {}, nullptr, nullptr, eps, centered, means, rstds};
      const Lines<const scalar_t> from = lines<const scalar_t>(x);
      const Lines<const scalar_t> plus = added.defined() ? lines<const scalar_t>(added) : Lines<const scalar_t>{};
      parallel(rows, length, [&](int64_t begin, int64_t end) {
        sharing.for_rows(begin, end, [&](int64_t set, int64_t first, int64_t last) {
          RowForward<A> own = layer;
          own.weight = w.data(set);
          own.bias = b.data(set);
          forward_epilogue<scalar_t>(own, from, to, plus, kind, first, last);
        });
      });
      return;
    }
    const RowParameter<scalar_t> w(weight, input, sets, length, "weight", weight_offset);
    const RowParameter<scalar_t> b(bias, input, sets, length, "bias");
    const RowForward<scalar_t> args{length, lines<const scalar_t>(x), to, nullptr, nullptr, eps, centered, means,
                                    rstds};
    const auto run = kernels().of<scalar_t>().row_forward;
    parallel(rows, length, [&](int64_t begin, int64_t end) {
      sharing.for_rows(begin, end, [&](int64_t set, int64_t first, int64_t last) {
        RowForward<scalar_t> own = args;
        own.weight = w.data(set);
        own.bias = b.data(set);
        run(own, first, last);
        mend_rows(own, first, last);
      });
    });
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
  at::Tensor output = new_output(input);
  at::Tensor sum = new_output(input);
  at::Tensor mean = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  at::Tensor rstd = at::detail::empty_cpu(shape, input.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_add_row_norm", [&] {
    const RowParameter<scalar_t> w(weight, input, 1, length, "weight", weight_offset);
    const RowParameter<scalar_t> b(bias, input, 1, length, "bias");
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
        mend_rows(args, row, row + count);
      });
    });
  });
  return {output, sum, mean, rstd};
}

Tensors4 row_norm_backward(bool in_place, const at::Tensor& grad_output, const at::Tensor& input,
                           int64_t normalized_ndim, const at::Tensor& mean, const at::Tensor& rstd,
                           const OptionalTensor& weight, double eps, bool centered, Mask4 output_mask,
                           const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& output,
                           OptionalName activation, double negative_slope, double weight_offset,
                           const OptionalTensor& grad_sum, int64_t varying) {
  if (normalized_ndim == 0) {
    return position_norm_backward(
        grad_output, input, mean, rstd, weight, eps, centered, output_mask,
        {as_activation(activation, negative_slope), bias, residual, output, weight_offset, grad_sum, {}, 0, in_place});
  }
  int64_t rows, length;  // which lambdas capture, as clang before 16 does not capture structured bindings
  std::tie(rows, length) = row_shape(input, normalized_ndim);
  const Sharing sharing(input, rows, normalized_ndim, varying);
  const int64_t sets = sharing.sets();
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
  if (output_mask[0]) dx = place_of_gradient(in_place, grad_output, input);
  if (output_mask[3]) dresidual = new_output(input);
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
    const int64_t block = rows_per_block(sharing.shared(), length);
    const int64_t blocks = (sharing.shared() + block - 1) / block;  // of each set
    // Sums for dweight and dbias: run(args, set, begin, end) adds those of its rows to the block's.
    const auto each_block = [&](auto args, const auto& run) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(args.dx.data)>>;
      const int64_t stride = RowParameter<E>::padded(length);
      at::Tensor partial;
      if (params) partial = at::detail::empty_cpu({2, sets * blocks, stride}, input.options().dtype(acc_type(input)));
      A* const sums = params ? partial.template mutable_data_ptr<A>() : nullptr;
      parallel(sets * blocks, block * length, [&](int64_t begin, int64_t end) {
        auto own = args;
        for (int64_t i = begin; i < end; ++i) {
          if (params) {
            own.dweight = sums + i * stride;
            own.dbias = sums + (sets * blocks + i) * stride;
            std::fill_n(own.dweight, stride, A(0));
            std::fill_n(own.dbias, stride, A(0));
          }
          const int64_t set = i / blocks, from = i % blocks * block;
          sharing.for_rows_of(set, from, std::min(sharing.shared(), from + block),
                              [&](int64_t first, int64_t last) { run(own, set, first, last); });
        }
      });
      at::DimVector shape(input.sizes().slice(input.dim() - normalized_ndim));
      for (int64_t d = input.dim() - normalized_ndim - 1; varying && d >= 0; --d) {
        shape.insert(shape.begin(), varying >> d & 1 ? input.size(d) : 1);
      }
      if (output_mask[1]) dweight = sum_blocks<E>(sums, sets, blocks, stride, shape, partial.options());
      if (output_mask[2]) {
        dbias = sum_blocks<E>(sums + sets * blocks * stride, sets, blocks, stride, shape, partial.options());
      }
    };
    const double* const mean_data = means.const_data_ptr<double>();
    const double* const rstd_data = rstds.const_data_ptr<double>();
    if (kind) {
      const RowParameter<A> w(weight, input, sets, length, "weight", weight_offset);
      const RowParameter<A> b(bias, input, sets, length, "bias");
      const RowEpilogue<scalar_t> epilogue{
          kind,
          {length, {}, {}, nullptr, nullptr, eps, centered, nullptr, nullptr},
          data_or_null(added),
          data_or_null(y),
          {dresidual.defined() ? dresidual.mutable_data_ptr<scalar_t>() : nullptr, length}};
      each_block(RowBackward<A>{length, {}, {}, {}, nullptr, mean_data, rstd_data, centered, nullptr, nullptr},
                 [&](RowBackward<A> args, int64_t set, int64_t begin, int64_t end) {
                   RowEpilogue<scalar_t> own = epilogue;
                   args.weight = own.layer.weight = w.data(set);
                   own.layer.bias = b.data(set);
                   backward_epilogue<scalar_t>(args, grads, inputs, to, own, begin, end);
                 });
      return;
    }
    const RowParameter<scalar_t> w(weight, input, sets, length, "weight", weight_offset);
    const RowBackward<scalar_t> plain{length,    grads,     inputs,   to,      nullptr,
                                      mean_data, rstd_data, centered, nullptr, nullptr};
    each_block(plain, [&](RowBackward<scalar_t> args, int64_t set, int64_t begin, int64_t end) {
      args.weight = w.data(set);
      if (!summand.data || !to.data) {
        row_backward_and_extremes(args, begin, end);
        return;
      }
      for_row_pieces(begin, end, rows_together_backward(length), [&](int64_t row, int64_t count) {
        row_backward_and_extremes(args, row, row + count);
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
  m.impl("_row_norm_backward", Placing<row_norm_backward, false>::call);
  m.impl("_row_norm_backward_", Placing<row_norm_backward, true>::call);
  m.impl("_add_row_norm", add_row_norm);
}

}  // namespace normops::cpu
