#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#ifndef _OPENMP
#error "at::parallel_for runs serially without -fopenmp"
#endif

namespace normops::cpu {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

// Runs f(begin, end) over [0, items), sharing them among threads where there is enough work.
template <typename F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_item));
  at::parallel_for(0, items, grain, f);
}

}  // namespace normops::cpu
