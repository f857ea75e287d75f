#pragma once

// Rows with what follows the layer: a residual that is added, an activation. Some rows at a time go through the row
// engine's own kernels and those of epilogue.cpp while they are in the nearest cache; in 16-bit types all of that is
// done in float, between a first loop that widens and a last one that narrows.

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../activation.h"
#include "channel_epilogue.h"
#include "extremes.h"
#include "kernels.h"

namespace normops::cpu {

// How many rows are taken at a time where one loop follows another: what is between them stays in the nearest cache.
// Going back, no fewer than the kernel keeps sums for dweight and dbias in registers over.
inline int64_t rows_together(int64_t length) {
  return std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, length));
}
inline int64_t rows_together_backward(int64_t length) { return std::max<int64_t>(8, rows_together(length)); }

// f(first row, number of rows) for `step` rows at a time.
template <typename F>
void for_row_pieces(int64_t begin, int64_t end, int64_t step, const F& f) {
  for (int64_t row = begin; row < end; row += step) f(row, std::min(step, end - row));
}

template <typename T>
Lines<T> from_row(const Lines<T>& rows, int64_t row) {
  return {rows[row], rows.stride};
}

// Rows of T in the type of the arithmetic: as they lie, or widened into `memory`.
template <typename T>
Lines<const Acc<T>> wide_rows(Lines<const T> rows, Acc<T>* memory, int64_t count, int64_t length) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return rows;
  } else {
    kernels().of<T>().widen_lines(rows, {memory, length}, count, length);
    return {memory, length};
  }
}

template <typename A>
std::unique_ptr<A[]> row_memory(int64_t rows, int64_t length) {
  return std::unique_ptr<A[]>(new A[rows * length]);
}

// z = norm(x) + residual for some rows, in the type of the arithmetic. The layer's x, y, mean and rstd are not read.
template <typename T>
void rows_before_activation(RowForward<Acc<T>> layer, Lines<const Acc<T>> x, Lines<const T> residual, Lines<Acc<T>> z,
                            double* mean, double* rstd, int64_t count) {
  layer.x = x;
  layer.y = z;
  layer.mean = mean;
  layer.rstd = rstd;
  kernels().of<Acc<T>>().row_forward(layer, 0, count);
  mend_rows(layer, 0, count);
  if (residual.data) kernels().of<T>().add_lines(residual, z, count, layer.length);
}

// y = activation(norm(x) + residual), by the plain kernels of the arithmetic's type and those of the epilogue.
template <typename T>
void forward_epilogue(const RowForward<Acc<T>>& layer, Lines<const T> x, Lines<T> y, Lines<const T> residual,
                      const Activation& activation, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const int64_t length = layer.length, most = rows_together(length);
  const auto memory = kWide ? nullptr : row_memory<A>(most, length);
  const auto wide_x = kWide ? nullptr : row_memory<A>(most, length);
  for_row_pieces(begin, end, most, [&](int64_t row, int64_t count) {
    Lines<A> z{memory.get(), length};
    if constexpr (kWide) z = from_row(y, row);
    rows_before_activation(layer, wide_rows(from_row(x, row), wide_x.get(), count, length),
                           residual.data ? from_row(residual, row) : residual, z, layer.mean + row, layer.rstd + row,
                           count);
    if (activation) kernels().of<A>().activate(activation, z, count, length);
    if constexpr (!kWide) kernels().of<T>().narrow_lines(read_only(z), from_row(y, row), count, length);
  });
}

// What the backward of rows needs beside the layer where an activation follows it.
template <typename T>
struct RowEpilogue {
  Activation activation;
  RowForward<Acc<T>> layer;  // makes anew what the activation was applied to
  Lines<const T> residual, output;
  Lines<T> grad_residual;
};

// The plain backward of the arithmetic's type, with the gradient before the activation in the place of dy.
template <typename T>
void backward_epilogue(const RowBackward<Acc<T>>& layer, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                       const RowEpilogue<T>& e, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  [[maybe_unused]] const Kernels<T>& kernel = kernels().of<T>();
  const Kernels<A>& wide = kernels().of<A>();
  const int64_t length = layer.length, most = rows_together_backward(length);
  const auto memory = row_memory<A>(most, length), wide_x = kWide ? nullptr : row_memory<A>(most, length);
  const auto more = kWide ? nullptr : row_memory<A>(most, length);  // dy; and then dx, as the kernel reads dz after it
  const std::unique_ptr<double[]> statistics(new double[2 * most]);
  for_row_pieces(begin, end, most, [&](int64_t row, int64_t count) {
    const Lines<A> z{memory.get(), length};
    RowBackward<A> part = layer;
    part.x = wide_rows(from_row(x, row), wide_x.get(), count, length);
    Lines<const A> before = read_only(z);
    if (e.output.data) {
      before = wide_rows(from_row(e.output, row), memory.get(), count, length);
    } else {
      rows_before_activation(e.layer, part.x, e.residual.data ? from_row(e.residual, row) : e.residual, z,
                             statistics.get(), statistics.get() + most, count);
    }
    Lines<A> dz = z;
    if constexpr (kWide) {
      if (e.grad_residual.data) dz = from_row(e.grad_residual, row);
    }
    wide.differentiate(e.activation, before, wide_rows(from_row(dy, row), more.get(), count, length), dz, count,
                       length);
    part.dy = read_only(dz);
    if constexpr (kWide) {
      if (dx.data) part.dx = from_row(dx, row);
    } else {
      if (e.grad_residual.data) kernel.narrow_lines(part.dy, from_row(e.grad_residual, row), count, length);
      if (dx.data) part.dx = {more.get(), length};
    }
    part.mean += row;
    part.rstd += row;
    row_backward_and_extremes(part, 0, count);
    if constexpr (!kWide) {
      if (dx.data) kernel.narrow_lines(read_only(part.dx), from_row(dx, row), count, length);
    }
  });
}

}  // namespace normops::cpu
