#pragma once

// Rows that neither a block nor a cluster holds, as the launcher of rows sees them.

#include "row.h"

namespace normops::cuda {

// Bytes of device memory that they need besides their arguments.
template <typename T>
size_t long_row_forward_scratch(const RowForward<T>& args);
template <typename T>
size_t long_row_backward_scratch(const RowBackward<T>& args);

template <typename T>
void long_row_forward(const RowForward<T>& args, void* scratch, void* stream);
template <typename T>
void long_row_backward(const RowBackward<T>& args, void* scratch, void* stream);

}  // namespace normops::cuda
