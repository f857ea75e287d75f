#pragma once

// Rows that neither a block nor a cluster holds. Their matrix is walked across, with the elements of a row as columns
// and 32 lanes side by side: a warp has one row at a time. A thread reads the parameters of its columns once, for all
// rows of its block.

#include "any_array.cuh"
#include "channel_kernels.cuh"
#include "row.h"

namespace normops::cuda {

// The parameters of a thread's columns, in the type of the elements or in that of the arithmetic; or a constant.
template <typename T, typename W, typename A>
__device__ __forceinline__ void load_parameter(const W& walk, const void* array, bool as_elements, A absent,
                                               A (&values)[W::kColumns]) {
#pragma unroll
  for (int k = 0; k < W::kColumns; ++k) values[k] = absent;
  if (array == nullptr || !walk.active()) return;
  if (as_elements) {
    const auto v = Vector<T, W::kColumns>::load(static_cast<const T*>(array) + walk.column);
#pragma unroll
    for (int k = 0; k < W::kColumns; ++k) values[k] = v[k];
  } else {
    load_values(static_cast<const A*>(array) + walk.column, values);
  }
}

// The rows of a block: as many as its 8 warps take in turns.
template <typename W>
__device__ __forceinline__ int64_t first_row(const W& walk) {
  return walk.position({}) - threadIdx.x / kWarp;
}
template <typename W>
constexpr int kRowsOfBlock = kWalkWarps * W::kItems;

template <typename T, typename A>
struct LongRowForward {
  ChannelTensor<const T> x;
  ChannelTensor<T> y;
  RowParameters parameters;
  Coefficients<A> coefficients;  // one per row
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kWalkThreads, last_stage_blocks(kSize, /*more=*/true))
    long_row_forward_kernel(const Plan plan, const LongRowForward<T, Acc<T>> a) {
  using A = Acc<T>;
  using W = Walk<Layout::kChannelsLast, kSize>;
  enum { kCenter, kScale, kShift, kFields };
  NORMOPS_SHARED(A, rows, kFields * kRowsOfBlock<W>);
  const W walk(plan, /*reverse=*/true);
  const int64_t first = first_row(walk);
  for (uint32_t r = threadIdx.x; r < walk.count(); r += kWalkThreads) {
    A* const row = rows + r * kFields;
    row[kCenter] = a.coefficients.center[first + r];
    row[kScale] = a.coefficients.scale[first + r];
    row[kShift] = a.coefficients.shift[first + r];
  }
  A weight[kSize], bias[kSize];
  load_parameter<T>(walk, a.parameters.weight, a.parameters.as_elements, A(1), weight);
  load_parameter<T>(walk, a.parameters.bias, a.parameters.as_elements, A(0), bias);
  __syncthreads();

  auto at_x = walk.cursor(a.x);
  auto at_y = walk.cursor(a.y);
  const auto finish = [&](const Place& place, const Vector<T, kSize>* of) {
    T* const to = at_y.next(place);
    if (!place.there) return;
    const A* const row = rows + (threadIdx.x / kWarp + place.position) * kFields;
    const A center = row[kCenter], scale = row[kScale], shift = row[kShift];
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) result[k] = ((of[0][k] - center) * scale + shift) * weight[k] + bias[k];
    store_rounded<kSize>(to, result);
  };
  each_vector<T, kSize, false>(walk, [] {}, finish, at_x);
}

// The sums of kTerms values over the lanes of a warp; each lane is given one of them, number lane / (32 / kTerms).
template <int kTerms, typename A>
__device__ __forceinline__ A sum_and_deal(A (&terms)[kTerms]) {
  int distance = kWarp / 2;
#pragma unroll
  for (int half = kTerms / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const A kept = upper ? terms[half + k] : terms[k], given = upper ? terms[k] : terms[half + k];
      terms[k] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) terms[0] += __shfl_xor_sync(kAllLanes, terms[0], distance);
  return terms[0];
}

template <typename T>
struct LongRowSums {
  ChannelTensor<const T> dy, x;
  RowParameters parameters;
  const double* mean;
  ChunkGradients* partials;  // (rows, tiles)
};

// Of g = dy * weight and of g * (x - center), for each row and the columns of a warp.
template <typename T, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    long_row_sums_kernel(const Plan plan, const LongRowSums<T> a) {
  using A = Acc<T>;
  using W = Walk<Layout::kChannelsLast, kSize>;
  NORMOPS_SHARED(A, centers, kRowsOfBlock<W>);
  const W walk(plan);
  const int64_t first = first_row(walk);
  for (uint32_t r = threadIdx.x; r < walk.count(); r += kWalkThreads) centers[r] = A(a.mean[first + r]);
  A weight[kSize];
  load_parameter<T>(walk, a.parameters.weight, a.parameters.as_elements, A(1), weight);
  __syncthreads();

  auto at_dy = walk.cursor(a.dy);
  auto at_x = walk.cursor(a.x);
  constexpr int kTerms = 2 * kBatch, kLanes = kWarp / kTerms;  // lanes that are given the same sum
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tile = walk.column / (kWarp * kSize);
#pragma unroll
  for (int i = 0; i < W::kItems; i += kBatch) {
    Place places[kBatch];
    find_places(walk, i, places);
    Vector<T, kSize> dy[kBatch], x[kBatch];
    load_batch<T, kSize>(places, at_dy, dy);
    load_batch<T, kSize>(places, at_x, x);
    A terms[kTerms];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      terms[2 * n] = terms[2 * n + 1] = 0;
      if (!places[n].there) continue;
      const A center = centers[warp + places[n].position];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A g = dy[n][k] * weight[k];
        terms[2 * n] += g;
        terms[2 * n + 1] += g * (x[n][k] - center);
      }
    }
    const A sum = sum_and_deal(terms);
    const uint32_t term = lane / kLanes, row = warp + (i + term / 2) * kWalkWarps;
    if (lane % kLanes == 0 && row < walk.count()) {
      ChunkGradients& partial = a.partials[(first + row) * plan.by_tiles.divisor() + tile];
      (term % 2 == 0 ? partial.dy : partial.dy_x) = double(sum);
    }
  }
}

// The input gradient together with the sums for dweight and dbias.
template <typename T, typename A>
struct LongRowBackward {
  ChannelTensor<const T> dy, x;
  ChannelTensor<T> dx;  // data null: not wanted
  RowParameters parameters;
  const double* mean;
  const double* rstd;
  Coefficients<A> coefficients;  // one per row
  A* partials;                   // (chunks, 2, columns) of dweight and dbias
  AnyOutput dweight, dbias;      // where there are no partials: of the only chunk
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    long_row_backward_kernel(const Plan plan, const LongRowBackward<T, Acc<T>> a) {
  using A = Acc<T>;
  using W = Walk<Layout::kChannelsLast, kSize>;
  enum { kCenter, kScale, kLow, kSlope, kShift, kFields };
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kSize);
  NORMOPS_SHARED(A, rows, kFields * kRowsOfBlock<W>);
  const W walk(plan, /*reverse=*/true);

  // What is known of each row: by one thread for each, as it takes double arithmetic.
  const int64_t first = first_row(walk);
  for (uint32_t r = threadIdx.x; r < walk.count(); r += kWalkThreads) {
    const double rstd = a.rstd[first + r];
    const SplitMean<A> split(a.mean[first + r]);
    A* const row = rows + r * kFields;
    row[kCenter] = split.center;
    row[kScale] = A(rstd);
    row[kLow] = A(-split.low * rstd);
    row[kSlope] = a.dx.data ? a.coefficients.slope[first + r] : A(0);
    row[kShift] = a.dx.data ? a.coefficients.shift[first + r] : A(0);
  }
  A weight[kSize], own[kSize] = {}, sums[2 * kSize] = {};
  load_parameter<T>(walk, a.parameters.weight, a.parameters.as_elements, A(1), weight);
  __syncthreads();

  auto at_dy = walk.cursor(a.dy);
  auto at_x = walk.cursor(a.x);
  auto at_dx = walk.cursor(a.dx);
  const auto finish = [&](const Place& place, const Vector<T, kSize>* of) {
    T* const to = at_dx.next(place);
    if (!place.there) return;
    const A* const row = rows + (threadIdx.x / kWarp + place.position) * kFields;
    const A center = row[kCenter], scale = row[kScale], low = row[kLow], slope = row[kSlope], shift = row[kShift];
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A g = of[0][k], d = of[1][k] - center;
      sums[k] += g * (d * scale + low);
      sums[kSize + k] += g;
      result[k] = g * weight[k] * scale + (d * slope + shift);
    }
    if (a.dx.data) store_rounded<kSize>(to, result);
  };
  each_vector<T, kSize, false>(walk, [] {}, finish, at_dy, at_x);
  if (!a.partials && !a.dweight && !a.dbias) return;
  walk.totals(sums, shared, own, static_cast<const A*>(nullptr), [&](uint32_t column, A dweight, A dbias, A) {
    const int64_t at = walk.partial(column);  // of one row of statistics: (chunk, column)
    if (a.partials) {
      A* const partial = a.partials + at + walk.chunk * plan.columns;  // pairs of rows
      partial[0] = dweight;
      partial[plan.columns] = dbias;
      return;
    }
    if (a.dweight) write_as(a.dweight, at, dweight);
    if (a.dbias) write_as(a.dbias, at, dbias);
  });
}

}  // namespace normops::cuda
