// Puts the kernels behind the private operators for CUDA tensors.

#include "glue.h"

TORCH_LIBRARY_IMPL(normops, CUDA, m) {
  normops::cuda::add_row_kernels(m);
  normops::cuda::add_channel_kernels(m);
}
