#pragma once

// The stages of the channel engine over memory. `center` and the other coefficients hold one entry per row of
// statistics and column; a thread needs those of the columns in one vector, which all its vectors share. Vectors are
// read in batches, computed, and written: the reads of a batch are under way together.

#include "walk.cuh"

namespace normops::cuda {

// The coefficients of the thread's columns, or a constant.
template <typename W, typename A>
__device__ __forceinline__ void load_coefficients(const W& walk, const A* array, A absent, A (&values)[W::kColumns]) {
  if (walk.active() && array) {
    load_values(array + walk.row * walk.plan.columns + walk.column, values);
  } else {
#pragma unroll
    for (int k = 0; k < W::kColumns; ++k) values[k] = absent;
  }
}

// The places of a batch, and its vectors in a tensor.
template <typename T, int kSize, int kItems>
struct Batch {
  Vector<T, kSize> vectors[kItems];

  template <typename Cursor>
  __device__ __forceinline__ void load(const Place (&places)[kItems], Cursor& cursor) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      vectors[i] = Vector<T, kSize>::load_if(places[i].there, cursor.next(places[i]));
    }
  }
};

template <int kItems, typename W>
__device__ __forceinline__ void find_places(const W& walk, int first, Place (&places)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) places[i] = walk.place(first + i);
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    moments_kernel(const Plan plan, const ChannelTensor<const T> x, ChunkMoments* partials) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  NORMOPS_SHARED(A, shared_sums, W::kShared * kColumns);
  NORMOPS_SHARED(A, shared_squares, W::kShared * 2 * kColumns);
  const W walk(plan);

  Place places[W::kItems];
  find_places(walk, 0, places);
  Batch<T, kSize, W::kItems> values;
  auto cursor = walk.cursor(x);
  values.load(places, cursor);
  const A inverse = reciprocal(A(walk.count()));
  A center[kColumns] = {};
  if (plan.centered) {
#pragma unroll
    for (int i = 0; i < W::kItems; ++i) {  // zeros where there is nothing
      A item[kColumns];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        item[k % kColumns] = k < kColumns ? values.vectors[i][k] : item[k % kColumns] + values.vectors[i][k];
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) center[k] += item[k];
    }
    walk.sum(center, shared_sums);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) center[k] *= inverse;
  }
  // Deviations from the rounded mean, whose own mean is what rounding lost.
  A sums[2 * kColumns] = {};
#pragma unroll
  for (int i = 0; i < W::kItems; ++i) {
    if (!places[i].there) continue;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values.vectors[i][k] - center[k % kColumns];
      sums[k % kColumns] += d;
      sums[kColumns + k % kColumns] += d * d;
    }
  }
  walk.totals(sums, shared_squares, center, plan.centered ? shared_sums : nullptr,
              [&](uint32_t column, A deviations, A squares, A sum) {
                const A low = plan.centered ? deviations * inverse : A(0);
                const A mean = kLayout == Layout::kContiguous ? sum : sum * inverse;
                partials[walk.partial(column)] = {double(mean) + low, double(squares - deviations * low)};
              });
}

// kWeighted: with a factor of dy at each position.
template <typename T, Layout kLayout, int kSize, bool kWeighted>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    grad_sums_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                     const double* mean, const Acc<T>* position_weight, ChunkGradients* partials) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kColumns);
  const W walk(plan);
  auto at_dy = walk.cursor(dy);
  auto at_x = walk.cursor(x);

  A center[kColumns] = {}, sums[2 * kColumns] = {};
#pragma unroll
  for (int first = 0; first < W::kItems; first += kBatch) {
    Place places[kBatch];
    find_places(walk, first, places);
    Batch<T, kSize, kBatch> grads, values;
    grads.load(places, at_dy);
    values.load(places, at_x);
    if (first == 0 && walk.active()) {  // behind the first reads, which need not wait for it
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        center[k] = A(mean[walk.row * plan.groups + plan.by_group.quotient(walk.column + k)]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // zeros where there is nothing
      Vector<A, kSize> weight;
      if constexpr (kWeighted) {
        weight = Vector<A, kSize>::load_if(places[i].there, position_weight + walk.position(places[i]));
      }
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A grad = kWeighted ? grads.vectors[i][k] * weight[k] : grads.vectors[i][k];
        sums[k % kColumns] += grad;
        sums[kColumns + k % kColumns] += grad * (values.vectors[i][k] - center[k % kColumns]);
      }
    }
  }
  walk.totals(sums, shared, center, static_cast<const A*>(nullptr), [&](uint32_t column, A sum_dy, A sum_dy_x, A) {
    partials[walk.partial(column)] = {double(sum_dy), double(sum_dy_x)};
  });
}

// kPositions: with a weight or a bias for each position.
template <typename T, Layout kLayout, int kSize, bool kPositions>
__global__ void __launch_bounds__(kWalkThreads, kSize == 1 || kPositions ? 1 : 3)
    apply_kernel(const Plan plan, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                 const Coefficients<Acc<T>> coefficients, const Acc<T>* position_weight, const Acc<T>* position_bias) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  const W walk(plan, /*reverse=*/true);
  auto at_x = walk.cursor(x);
  auto at_y = walk.cursor(y);

  A center[kColumns], scale[kColumns], shift[kColumns];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.shift, A(0), shift);
#pragma unroll
  for (int first = 0; first < W::kItems; first += kBatch) {
    Place places[kBatch];
    find_places(walk, first, places);
    Batch<T, kSize, kBatch> values;
    values.load(places, at_x);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      A result[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        result[k] = (values.vectors[i][k] - center[k % kColumns]) * scale[k % kColumns] + shift[k % kColumns];
      }
      if (kPositions && position_weight && places[i].there) {
        A weight[kSize];
        load_values(position_weight + walk.position(places[i]), weight);
#pragma unroll
        for (int k = 0; k < kSize; ++k) result[k] *= weight[k];
      }
      if (kPositions && position_bias && places[i].there) {
        A bias[kSize];
        load_values(position_bias + walk.position(places[i]), bias);
#pragma unroll
        for (int k = 0; k < kSize; ++k) result[k] += bias[k];
      }
      T* const to = at_y.next(places[i]);
      if (places[i].there) store_rounded<kSize>(to, result);
    }
  }
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 3 : 1)
    grad_apply_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                      const ChannelTensor<T> dx, const Coefficients<Acc<T>> coefficients) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kColumns = W::kColumns;
  const W walk(plan, /*reverse=*/true);
  auto at_dy = walk.cursor(dy);
  auto at_x = walk.cursor(x);
  auto at_dx = walk.cursor(dx);

  A center[kColumns], scale[kColumns], slope[kColumns], shift[kColumns];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.slope, A(0), slope);
  load_coefficients(walk, coefficients.shift, A(0), shift);
#pragma unroll
  for (int first = 0; first < W::kItems; first += kBatch) {
    Place places[kBatch];
    find_places(walk, first, places);
    Batch<T, kSize, kBatch> grads, values;
    grads.load(places, at_dy);
    values.load(places, at_x);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      A result[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int c = k % kColumns;
        result[k] = grads.vectors[i][k] * scale[c] + ((values.vectors[i][k] - center[c]) * slope[c] + shift[c]);
      }
      T* const to = at_dx.next(places[i]);
      if (places[i].there) store_rounded<kSize>(to, result);
    }
  }
}

// Long rows: walked across, so that the sums for dweight and dbias come with the input gradient.
template <typename T, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kSize > 1 ? 2 : 1)
    long_row_backward_kernel(const Plan plan, const LongRowBackward<T, Acc<T>> a) {
  using A = Acc<T>;
  using W = Walk<Layout::kChannelsLast, kSize>;
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kSize);
  NORMOPS_SHARED(A, rows, 5 * kWalkWarps * W::kItems);  // as many lanes as a warp has
  const W walk(plan);

  // What is known of each row: by one thread for each, as it takes double arithmetic.
  enum { kCenter, kScale, kLow, kSlope, kShift, kFields };
  const int64_t first_row = walk.position({}) - (threadIdx.x >> plan.lanes_log2);
  for (uint32_t r = threadIdx.x; r < walk.count(); r += kWalkThreads) {
    const double rstd = a.rstd[first_row + r];
    const SplitMean<A> split(a.mean[first_row + r]);
    A* const row = rows + r * kFields;
    row[kCenter] = split.center;
    row[kScale] = A(rstd);
    row[kLow] = A(-split.low * rstd);
    row[kSlope] = a.dx.data ? a.coefficients.slope[first_row + r] : A(0);
    row[kShift] = a.dx.data ? a.coefficients.shift[first_row + r] : A(0);
  }
  A weight[kSize], own[kSize] = {}, sums[2 * kSize] = {};
#pragma unroll
  for (int k = 0; k < kSize; ++k) weight[k] = A(1);
  if (walk.active() && a.weight) load_values(a.weight + walk.column, weight);
  __syncthreads();

  auto at_dy = walk.cursor(a.dy);
  auto at_x = walk.cursor(a.x);
  auto at_dx = walk.cursor(a.dx);
#pragma unroll
  for (int first = 0; first < W::kItems; first += kBatch) {
    Place places[kBatch];
    find_places(walk, first, places);
    Batch<T, kSize, kBatch> grads, values;
    grads.load(places, at_dy);
    values.load(places, at_x);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      T* const to = at_dx.next(places[i]);
      if (!places[i].there) continue;
      const A* const row = rows + ((threadIdx.x >> plan.lanes_log2) + places[i].position) * kFields;
      const A center = row[kCenter], scale = row[kScale], low = row[kLow], slope = row[kSlope], shift = row[kShift];
      A result[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A g = grads.vectors[i][k], d = values.vectors[i][k] - center;
        sums[k] += g * (d * scale + low);
        sums[kSize + k] += g;
        result[k] = g * weight[k] * scale + (d * slope + shift);
      }
      if (a.dx.data) store_rounded<kSize>(to, result);
    }
  }
  if (a.partials == nullptr) return;
  walk.totals(sums, shared, own, static_cast<const A*>(nullptr), [&](uint32_t column, A dweight, A dbias, A) {
    A* const partial = a.partials + walk.partial(column) + walk.chunk * plan.columns;  // pairs of rows
    partial[0] = dweight;
    partial[plan.columns] = dbias;
  });
}

}  // namespace normops::cuda
