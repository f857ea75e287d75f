#pragma once

#include <cstdint>

#ifdef __linux__
#include <unistd.h>
#endif

namespace normops::cpu {

// Bytes of the second-level cache that a core has to itself, as the system tells; a modest one where it does not. For
// deciding what is done next to what, never for where sums are cut: the same input has the same bits on any processor.
inline int64_t second_level_cache() {
  static const int64_t bytes = [] {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long told = sysconf(_SC_LEVEL2_CACHE_SIZE); told > 0) return static_cast<int64_t>(told);
#endif
    return int64_t{512 * 1024};
  }();
  return bytes;
}

}  // namespace normops::cpu
