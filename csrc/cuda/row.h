#pragma once

// The row engine on CUDA as its glue sees it: plain pointers, no torch, no CUDA headers.

#include <cstddef>
#include <cstdint>

#include "../activation.h"
#include "arrays.h"

namespace normops::cuda {

// Rows of `length` adjacent elements, `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// Weight and bias, either of which may be null. Both have the type of the elements, or both that of the arithmetic.
struct RowParameters {
  const void* weight;
  const void* bias;
  bool as_elements;
};

// What a row layer takes beside torch's arguments. Kernels have it as a variant of their own.
template <typename T>
struct RowExtras {
  int activation = 0;  // its kind (activation.h)
  Acc<T> negative_slope = 0;
  Acc<T> weight_offset = 0;
  Rows<const T> other{};  // the residual, or null; or, in the backward, the output
  // Forward: the sum of the input and the residual, which is then what is normalized; null: the residual is added to
  // what is normalized. Backward: the gradient before the activation. In either case null where it is not wanted.
  T* made = nullptr;
  // Of the backward:
  bool from_output = false;
  Rows<const T> grad_sum{};  // to be added to dx, or null

  explicit operator bool() const { return activation || weight_offset != 0 || other.data || grad_sum.data; }
};

template <typename T>
struct RowForward {
  int64_t rows, length;
  bool vectors;  // see row_takes_vectors
  Rows<const T> x;
  T* y;
  RowParameters parameters;
  double eps;
  bool centered;  // LayerNorm; RMSNorm does not subtract the mean
  double* mean;   // one per row
  double* rstd;
  RowExtras<T> extras{};
};

template <typename T>
struct RowBackward {
  int64_t rows, length;
  bool vectors;  // see row_takes_vectors
  Rows<const T> dy;
  Rows<const T> x;
  T* dx;  // null: not wanted
  RowParameters parameters;
  const double* mean;
  const double* rstd;
  bool centered;
  AnyOutput dweight, dbias;
  RowExtras<T> extras{};
};

// Whether rows can be read and written 16 bytes at a time. If so, the parameters have to lie on 16-byte boundaries.
template <typename T>
bool row_takes_vectors(const RowForward<T>& args);
template <typename T>
bool row_takes_vectors(const RowBackward<T>& args);

// Whether a row is held on chip. Longer ones are cut into pieces, and want no extras.
template <typename T>
bool row_fits(int device, const RowForward<T>& args);
template <typename T>
bool row_fits(int device, const RowBackward<T>& args);

// Bytes of device memory the launch needs besides its arguments.
template <typename T>
size_t row_forward_scratch(int device, const RowForward<T>& args);
template <typename T>
size_t row_backward_scratch(int device, const RowBackward<T>& args);

template <typename T>
void row_forward(int device, const RowForward<T>& args, void* scratch, void* stream);
template <typename T>
void row_backward(int device, const RowBackward<T>& args, void* scratch, void* stream);

}  // namespace normops::cuda
