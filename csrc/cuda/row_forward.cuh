#pragma once

// The forward of the row engine.

#include "row.h"
#include "row_teams.cuh"

namespace normops::cuda {

// Sum of the elements of a vector.
template <typename T, int kSize>
__device__ __forceinline__ Acc<T> sum_of(const Vector<T, kSize>& v) {
  Acc<T> sum = v[0];
#pragma unroll
  for (int k = 1; k < kSize; ++k) sum += v[k];
  return sum;
}

// Mean as the nearest A and the rest, and the variance, of the elements of kRows rows that a team's threads hold.
template <bool kWarps, bool kCluster, typename T, int kSize, int kItems, int kRows>
__device__ __forceinline__ void row_moments(std::bool_constant<kWarps>, std::bool_constant<kCluster>,
                                            const RowVectors<T, kSize, kItems> (&x)[kRows], const Team& team,
                                            int64_t row_length, int length, bool centered, Acc<T> (&center)[kRows],
                                            Acc<T> (&low)[kRows], Acc<T> (&var)[kRows]) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, told_sums, kRows);
  NORMOPS_SHARED(A, told_squares, 2 * kRows);
  NORMOPS_SHARED(A, partial_sums, kRows * kWarp);
  NORMOPS_SHARED(A, partial_squares, 2 * kRows * kWarp);
  const A inverse = reciprocal(A(int(row_length)));
#pragma unroll
  for (int r = 0; r < kRows; ++r) center[r] = 0;
  if (centered) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) center[r] += sum_of(x[r].items[i]);
    }
    sum_row<kWarps, kCluster>(center, team, partial_sums, told_sums);
#pragma unroll
    for (int r = 0; r < kRows; ++r) center[r] *= inverse;
  }
  // Deviations from the rounded mean. Their own mean is what rounding lost, so it sharpens both results.
  A sums[2 * kRows] = {};
  team.each_vector<kSize, kItems>(length, [&](int i, int) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      A first = 0, second = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A d = x[r].items[i][k] - center[r];
        first = k == 0 ? d : first + d;
        second += d * d;
      }
      sums[2 * r] += first;
      sums[2 * r + 1] += second;
    }
  });
  sum_row<kWarps, kCluster>(sums, team, partial_squares, told_squares);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    low[r] = centered ? sums[2 * r] * inverse : A(0);
    var[r] = sums[2 * r + 1] * inverse - low[r] * low[r];
  }
}

// Vectors of a parameter from `first` on, `step` apart, as far as they lie below `length`; or, without it, constants.
template <typename W, int kSize, int kItems>
__device__ __forceinline__ void load_or(const W* array, Acc<W> absent, int first, int step, int length,
                                        Vector<W, kSize> (&vectors)[kItems]) {
  Acc<W> constants[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) constants[k] = absent;
#pragma unroll
  for (int i = 0; i < kItems; ++i) vectors[i] = Vector<W, kSize>::of(constants);
  if (array == nullptr) return;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i * step < length) vectors[i] = Vector<W, kSize>::load(array + first + i * step);
  }
}

// In the forward, teams of more than a warp have at least so many vectors for each thread, and take one row; clusters,
// if that is all that a thread has of each, two.
constexpr int kManyItems = 8;
NORMOPS_HOST_DEVICE constexpr int forward_rows(int size, int items, bool cluster) {
  return size > 1 && items < kManyItems ? kManyItems / items : cluster && items == kManyItems ? 2 : 1;
}
NORMOPS_HOST_DEVICE constexpr int forward_threads(int size, int items, bool extras) {
  return size == 1 && !extras ? kMostThreads : size > 1 && items < kManyItems ? 256 : 512;
}

// x becomes the sum of x and the residual, which is stored.
template <typename T, int kSize, int kItems, int kRows>
__device__ __forceinline__ void add_rows(const RowForward<T>& a, const Team& team, int64_t first, int rows, int begin,
                                         int length, RowVectors<T, kSize, kItems> (&x)[kRows]) {
  RowVectors<T, kSize, kItems> added[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    added[r].load(a.extras.other.data + (first + r) * a.extras.other.stride + begin, team, r < rows ? length : 0);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    T* const sums = a.extras.made + (first + r) * a.length + begin;
    team.each_vector<kSize, kItems>(r < rows ? length : 0, [&](int i, int j) {
      Acc<T> sum[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) sum[k] = x[r].items[i][k] + added[r].items[i][k];
      x[r].items[i] = Vector<T, kSize>::of(sum);
      x[r].items[i].store(sums + j);
    });
  }
}

// `most`: elements of a part, in clusters.
template <typename T, typename W, int kSize, int kItems, bool kCluster, bool kExtras>
__global__ void __launch_bounds__(forward_threads(kSize, kItems, kExtras), 1)
    row_forward_kernel(const RowForward<T> a, int threads_log2, int most) {
  using A = Acc<T>;
  constexpr int kRows = forward_rows(kSize, kItems, kCluster && !kExtras);
  const Team team(threads_log2);
  const Part<kCluster> part(a.length, most);
  const int length = part.length;
  const int64_t first = (part.block * team.count + team.number) * kRows;
  const int rows = int(min(int64_t(kRows), a.rows - first));  // may be none

  RowVectors<T, kSize, kItems> x[kRows];
  const T* from = a.x.data + first * a.x.stride + part.begin;
#pragma unroll
  for (int r = 0; r < kRows; ++r, from += a.x.stride) x[r].load(from, team, r < rows ? length : 0);
  if constexpr (kExtras) {
    if (a.extras.made) add_rows(a, team, first, rows, part.begin, length, x);
  }
  A center[kRows], low[kRows], scale[kRows], shift[kRows];
  row_moments(std::bool_constant<(kItems >= kManyItems)>(), std::bool_constant<kCluster>(), x, team, a.length, length,
              a.centered, center, low, scale);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = reciprocal_std(scale[r], A(a.eps));
    shift[r] = -low[r] * scale[r];
    if (team.thread == 0 && part.begin == 0 && r < rows) {
      a.mean[first + r] = double(center[r]) + low[r];
      a.rstd[first + r] = scale[r];
    }
  }

  const W* const weight = at(static_cast<const W*>(a.parameters.weight), part.begin);
  const W* const bias = at(static_cast<const W*>(a.parameters.bias), part.begin);
  T* const y = a.y + first * a.length + part.begin;
  if constexpr (kExtras) {
    const Rows<const T> residual = a.extras.made ? Rows<const T>{} : a.extras.other;
    each_row_in_turn<kSize>(
        team, residual, first, rows, part.begin, length,
        [&](int r, int, int j, const Vector<T, kSize>& values, const Vector<T, kSize>& added) {
          A w[kSize], b[kSize], v[kSize];
          parameter_or(weight, A(1), a.extras.weight_offset, j, w);
          parameter_or(bias, A(0), A(0), j, b);
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            v[k] = ((values[k] - center[0]) * scale[0] + shift[0]) * w[k] + b[k] + added[k];
          }
          activate(a.extras.activation, a.extras.negative_slope, v);
          store_rounded<kSize>(y + (r * a.length + j), v);
        },
        [&] { turn<kRows>(center), turn<kRows>(scale), turn<kRows>(shift); }, x);
  } else {
    constexpr int kTogether = kItems < 4 ? kItems : kItems < 8 ? 4 : kItems == 8 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kItems; i += kTogether) {
      Vector<W, kSize> w[kTogether], b[kTogether];
      int j = (team.thread + i * team.threads) * kSize;
      load_or(weight, Acc<W>(1), j, team.threads * kSize, length, w);
      load_or(bias, Acc<W>(0), j, team.threads * kSize, length, b);
#pragma unroll
      for (int n = 0; n < kTogether; ++n, j += team.threads * kSize) {
        if (j >= length) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) continue;
          A v[kSize];
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            v[k] = ((x[r].items[i + n][k] - center[r]) * scale[r] + shift[r]) * w[n][k] + b[n][k];
          }
          store_rounded<kSize>(y + (r * a.length + j), v);
        }
      }
    }
  }
  if constexpr (kCluster) cluster_sync();  // the last of the others may still read what this block has told
}

}  // namespace normops::cuda
