#pragma once

// What the kernels of the row engine (LayerNorm, RMSNorm) are made of: a row lives in the registers of its threads from
// the only time it is read.
//
// A row is shared by a team of threads: a power of two up to a warp, with several teams to a block; or whole warps, the
// block; or the blocks of a cluster, each of which has a part of the row. Thread t of a block holds the vectors t,
// t + threads, t + 2 * threads, ... Where a row gives its threads few vectors to read, a team takes several rows at a
// time.

#include "any_array.cuh"
#include "epilogue.cuh"
#include "reduce.cuh"
#include "row.h"

namespace normops::cuda {

// The threads of a block that share a row: 2 to the power of threads_log2, or all if that is negative.
struct Team {
  int threads, thread, number, count;  // the team's threads, this one; the block's teams, this one

  __device__ __forceinline__ explicit Team(int threads_log2)
      : threads(threads_log2 < 0 ? blockDim.x : 1 << threads_log2),
        thread(threads_log2 < 0 ? threadIdx.x : threadIdx.x & (threads - 1)),
        number(threads_log2 < 0 ? 0 : threadIdx.x >> threads_log2),
        count(threads_log2 < 0 ? 1 : blockDim.x >> threads_log2) {}

  // f(item, element) for the vectors of the thread in (its block's part of) a row of `length`.
  template <int kSize, int kItems, typename F>
  __device__ __forceinline__ void each_vector(int length, F f) const {
    int j = thread * kSize;
#pragma unroll
    for (int i = 0; i < kItems; ++i, j += threads * kSize) {
      if (j < length) f(i, j);
    }
  }
};

// A block's part of its rows: all of it, or in a cluster every block's share.
template <bool kCluster>
struct Part {
  int64_t block;  // number of the block, or of the cluster
  int begin, length;

  __device__ __forceinline__ Part(int64_t row_length, int most) : block(blockIdx.x), begin(0), length(int(row_length)) {
    if constexpr (kCluster) {
      block = blockIdx.x / cluster_size();
      begin = int(cluster_rank()) * most;
      length = min(most, max(0, int(row_length) - begin));
    }
  }
};

// The sums over all that share a row; kWarps: which may be whole warps.
template <bool kWarps, bool kCluster, int kTerms, typename A>
__device__ __forceinline__ void sum_row(A (&terms)[kTerms], const Team& team, A* shared, A* told) {
  if constexpr (kWarps) {
    sum_threads(terms, team.threads, shared);
  } else {
    sum_lanes(terms, team.threads);
  }
  if constexpr (kCluster) cluster_sum(terms, told);
}

template <typename T, int kSize, int kItems>
struct RowVectors {
  Vector<T, kSize> items[kItems];

  __device__ __forceinline__ void load(const T* row, const Team& team, int length) {
    int j = team.thread * kSize;
#pragma unroll
    for (int i = 0; i < kItems; ++i, j += team.threads * kSize) {
      items[i] = Vector<T, kSize>::load_if(j < length, row + j);
    }
  }
};

template <typename W>
__device__ __forceinline__ const W* at(const W* array, int begin) {
  return array ? array + begin : nullptr;
}

// A weight or a bias of the elements from j on, or a constant without it.
template <int kSize, typename W>
__device__ __forceinline__ void parameter_or(const W* array, Acc<W> absent, Acc<W> offset, int j,
                                             Acc<W> (&values)[kSize]) {
  if (array) {
    const auto vector = Vector<W, kSize>::load(array + j);
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] = vector[k] + offset;
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] = absent;
  }
}

// f(row, item, element, vectors..., other) for all of some rows, from one place in the code (epilogue.cuh). The rows
// take turns too, at being number 0; `after()` a row, for what else is kept of each.
template <int kSize, int kRows, typename T, typename F, typename After, typename... V>
__device__ __forceinline__ void each_row_in_turn(const Team& team, const Rows<const T>& other, int64_t first_row,
                                                 int rows, int begin, int length, const F& f, const After& after,
                                                 V (&... of_rows)[kRows]) {
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const T* const row = other.data ? other.data + (first_row + r) * other.stride + begin : nullptr;
    const auto element = [&](int i) { return (team.thread + i * team.threads) * kSize; };
    each_in_turn(
        [&](int i) { return Vector<T, kSize>::load_if(row && r < rows && element(i) < length, row + element(i)); },
        [&](int i, auto&... vectors) {
          if (r < rows && element(i) < length) f(r, i, element(i), vectors...);
        },
        of_rows[0].items...);
    (turn<kRows>(of_rows), ...);
    after();
  }
}

}  // namespace normops::cuda
