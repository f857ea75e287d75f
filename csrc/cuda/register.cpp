// Puts the kernels behind the private operators.

#include "glue.h"

namespace normops::cuda {

void add_cuda_kernels(torch::Library& library) {
  add_row_kernels(library);
  add_channel_kernels(library);
}

}  // namespace normops::cuda

// The emulator chooses the key, and the moment, itself.
#ifndef NORMOPS_EMULATED
TORCH_LIBRARY_IMPL(normops, CUDA, m) { normops::cuda::add_cuda_kernels(m); }
#endif
