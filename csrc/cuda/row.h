#pragma once

// The row engine on CUDA as its glue sees it: plain pointers, no torch, no CUDA headers.

#include <cstddef>
#include <cstdint>

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
};

// Whether rows can be read and written 16 bytes at a time. If so, the parameters have to lie on 16-byte boundaries.
template <typename T>
bool row_takes_vectors(const RowForward<T>& args);
template <typename T>
bool row_takes_vectors(const RowBackward<T>& args);

// Whether a row is held on chip. Longer ones are cut into pieces, and want parameters in the type of the arithmetic.
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
