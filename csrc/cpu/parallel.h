#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

// at::parallel_for is a header, and runs on the threads of the OpenMP that our compiler knows. In g++ that is torch's
// own, libgomp. clang knows libomp alone: a second pool, which torch.set_num_threads does not reach, and whose threads
// spin while torch's work. Under clang on Linux we therefore call libgomp as g++ does.
#if defined(__clang__) && defined(__linux__)
#define NORMOPS_CALL_LIBGOMP
#ifdef _OPENMP
#error "compile with -fopenmp=libgomp: with -fopenmp clang brings a second OpenMP runtime beside torch's"
#endif
#elif !defined(_OPENMP)
#error "at::parallel_for runs serially without -fopenmp"
#endif

#ifdef NORMOPS_CALL_LIBGOMP
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace normops::cpu {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

#ifdef NORMOPS_CALL_LIBGOMP

constexpr int kOpenMP = 201307;  // which brought GOMP_parallel

// at::parallel_for over [0, items).
template <typename F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  at::internal::lazy_init_num_threads();
  if (items <= grain || at::in_parallel_region() || at::get_num_threads() == 1) {
    at::parallel_for(0, items, grain, f);  // serial, as _OPENMP is not defined
    return;
  }
  struct Team {
    const F& f;
    const int64_t items, grain;
    std::atomic_flag failed;
    std::exception_ptr error;
  } team{f, items, grain, {}, {}};
  const auto work = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(team.items, team.grain));
    const int64_t share = at::divup(team.items, threads), begin = omp_get_thread_num() * share;
    if (begin >= team.items) return;
    try {
      const at::internal::ThreadIdGuard id(omp_get_thread_num());
      const c10::ParallelGuard guard(true);
      team.f(begin, std::min(team.items, begin + share));
    } catch (...) {
      if (!team.failed.test_and_set()) team.error = std::current_exception();
    }
  };
  GOMP_parallel(work, &team, /*num_threads=*/0, /*flags=*/0);
  if (team.error) std::rethrow_exception(team.error);
}

#else

constexpr int kOpenMP = _OPENMP;

template <typename F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  at::parallel_for(0, items, grain, f);
}

#endif

// Runs f(begin, end) over [0, items), sharing them among threads where there is enough work.
template <typename F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  parallel_for(items, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_item)), f);
}

}  // namespace normops::cpu
