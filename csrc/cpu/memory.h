#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace normops::cpu {

// malloc maps a large block anew, and the system then clears it page by page as it is first written: for an output of
// this size that takes longer than the layer. Asked for large pages, where the system gives them on request, it takes
// half as long. Memory that is already there, or that others may lie in, is left as it is.
inline const at::Tensor& prepare_output(const at::Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kMapped = 32 * 1024 * 1024;  // the least that glibc maps for itself, whatever it was told
  if (static_cast<int64_t>(output.nbytes()) < kMapped) return output;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + output.nbytes()) / page * page;
  unsigned char resident = 1;
  void* const middle = reinterpret_cast<void*>(first + (last - first) / 2 / page * page);
  if (mincore(middle, page, &resident) == 0 && (resident & 1) == 0) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return output;
}

}  // namespace normops::cpu
