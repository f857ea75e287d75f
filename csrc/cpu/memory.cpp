#include "memory.h"

#include <algorithm>
#include <cstdint>

#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace normops::cpu {

#ifdef __linux__

const at::Tensor& prepare_output(const at::Tensor& output) {
  constexpr int kPopulateWrite = 23;             // MADV_POPULATE_WRITE, which headers before Linux 5.14 do not name
  constexpr int64_t kMapped = 32 * 1024 * 1024;  // the least that glibc maps for itself, whatever it was told
  constexpr int64_t kPiece = 1024 * 1024;
  if (static_cast<int64_t>(output.nbytes()) < kMapped) return output;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + output.nbytes()) / page * page;
  unsigned char resident = 1;
  void* const middle = reinterpret_cast<void*>(begin + (end - begin) / 2 / page * page);
  if (mincore(middle, page, &resident) != 0 || (resident & 1) != 0) return output;
  parallel_for((end - begin + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
    for (uintptr_t piece = begin + first * kPiece; piece < std::min(begin + last * kPiece, end); piece += kPiece) {
      // Where the system does not know this, pages come as they are written.
      madvise(reinterpret_cast<void*>(piece), std::min<uintptr_t>(kPiece, end - piece), kPopulateWrite);
    }
  });
  return output;
}

#else

const at::Tensor& prepare_output(const at::Tensor& output) { return output; }

#endif

}  // namespace normops::cpu
