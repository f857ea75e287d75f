#pragma once

// Sums over the threads that share a row. Every thread gets the same bits, and the order of additions depends on the
// number of threads alone.

#include "../statistics.h"
#include "vectors.cuh"

namespace normops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMostThreads = 1024;

// Over groups of `width` adjacent lanes, a power of two. All lanes of the warp take part.
template <int kTerms, typename A>
__device__ __forceinline__ void sum_lanes(A (&terms)[kTerms], int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) terms[k] += __shfl_xor_sync(kAllLanes, terms[k], distance);
  }
}

// Over all threads of a block, a multiple of 32. `shared` holds kTerms * kWarp values and may be used again only after
// another barrier.
template <int kTerms, typename A>
__device__ __forceinline__ void block_sum(A (&terms)[kTerms], int threads, A* shared) {
  sum_lanes(terms, kWarp);
  if (threads == kWarp) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = threads / kWarp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) shared[k * kWarp + warp] = terms[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kTerms; ++k) terms[k] = lane < warps ? shared[k * kWarp + lane] : A(0);
  sum_lanes(terms, kWarp);
}

// Over a row's threads: a group of lanes, or the whole block.
template <int kTerms, typename A>
__device__ __forceinline__ void sum_threads(A (&terms)[kTerms], int threads, A* shared) {
  if (threads <= kWarp) {
    sum_lanes(terms, threads);
  } else {
    block_sum(terms, threads, shared);
  }
}

// Over the blocks of a cluster, in the order of their ranks, what all threads of a block have. `told` may be written
// again only after another of these with other memory.
template <int kTerms, typename A>
__device__ __forceinline__ void cluster_sum(A (&terms)[kTerms], A* told) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) told[k] = terms[k];
  }
  cluster_sync();
#pragma unroll
  for (int k = 0; k < kTerms; ++k) terms[k] = 0;
#pragma unroll 1  // unrolling takes registers that kernels do not have
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    const A* const theirs = map_shared(told, rank);
#pragma unroll
    for (int k = 0; k < kTerms; ++k) terms[k] += theirs[k];
  }
}

// 1 / count, or its neighbour: only guesses at a mean and small corrections are multiplied by it.
__device__ __forceinline__ float reciprocal(float count) { return __fdividef(1.0f, count); }
__device__ __forceinline__ double reciprocal(double count) { return 1 / count; }

// 1 / sqrt(var + eps). A variance may come out of rounding a little below zero; NaN stays NaN.
template <typename A>
__device__ __forceinline__ A reciprocal_std(A var, A eps) {
  return A(1) / sqrt((var < A(0) ? A(0) : var) + eps);
}

}  // namespace normops::cuda
