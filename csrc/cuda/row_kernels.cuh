#pragma once

// Row engine (LayerNorm, RMSNorm): a row lives in the registers of its threads from the only time it is read.
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

template <typename W>
__device__ __forceinline__ const W* at(const W* array, int begin) {
  return array ? array + begin : nullptr;
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

// In the forward, teams of more than a warp have at least so many vectors for each thread, and take one row.
constexpr int kManyItems = 8;
NORMOPS_HOST_DEVICE constexpr int forward_rows(int size, int items) {
  return size > 1 && items < kManyItems ? kManyItems / items : 1;
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

// `most`: elements of a part, in clusters.
template <typename T, typename W, int kSize, int kItems, bool kCluster, bool kExtras>
__global__ void __launch_bounds__(forward_threads(kSize, kItems, kExtras), 1)
    row_forward_kernel(const RowForward<T> a, int threads_log2, int most) {
  using A = Acc<T>;
  constexpr int kRows = forward_rows(kSize, kItems);
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

// xhat = (x - center) * rstd + low, and with g = dy * weight: dx = rstd * g + slope * (x - center) + shift
// (statistics.h).
template <typename A>
struct RowCoefficients {
  A center, rstd, low, mean_low;

  RowCoefficients() = default;
  __device__ __forceinline__ RowCoefficients(double mean, double exact_rstd) : rstd(A(exact_rstd)) {
    const SplitMean<A> split(mean);
    center = split.center;
    mean_low = A(split.low);
    low = -mean_low * rstd;
  }

  // Those of another lane.
  __device__ __forceinline__ RowCoefficients of_lane(int lane) const {
    RowCoefficients other;
    other.center = __shfl_sync(kAllLanes, center, lane);
    other.rstd = __shfl_sync(kAllLanes, rstd, lane);
    other.mean_low = __shfl_sync(kAllLanes, mean_low, lane);
    other.low = -other.mean_low * other.rstd;
    return other;
  }

  // From the sums over the row of g and g * (x - center).
  __device__ __forceinline__ InputGradientIn<A> gradient(A sum_g, A sum_g_x, A inverse, bool centered) const {
    const A sum_g_xhat = (sum_g_x - mean_low * sum_g) * rstd;
    return {rstd, mean_low, sum_g * inverse, sum_g_xhat * inverse, centered};
  }
};

// Where a thread keeps its sums for dweight and dbias: in registers, or, where those would not do, in places of the
// block's shared memory that no other thread touches.
template <typename A, int kSize, int kItems, bool kShared>
struct ParameterSums {
  A weight[kItems][kSize], bias[kItems][kSize];

  __device__ __forceinline__ ParameterSums(A*, const Team&, int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) weight[i][k] = bias[i][k] = 0;
    }
  }
  __device__ __forceinline__ void add_weight(int i, int, const A (&values)[kSize]) { add(weight[i], values); }
  __device__ __forceinline__ void add_bias(int i, int, const A (&values)[kSize]) { add(bias[i], values); }
  __device__ __forceinline__ void get_weight(int i, int, A (&values)[kSize]) const { copy(weight[i], values); }
  __device__ __forceinline__ void get_bias(int i, int, A (&values)[kSize]) const { copy(bias[i], values); }

 private:
  static __device__ __forceinline__ void add(A (&to)[kSize], const A (&values)[kSize]) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) to[k] += values[k];
  }
  static __device__ __forceinline__ void copy(const A (&from)[kSize], A (&to)[kSize]) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) to[k] = from[k];
  }
};

template <typename A, int kSize, int kItems>
struct ParameterSums<A, kSize, kItems, true> {
  // A vector's sums lie in parts of 16 bytes, the first parts of all vectors before the second, so that threads side by
  // side reach for places side by side.
  static constexpr int kPart = kVectorBytes / int(sizeof(A)), kParts = kSize / kPart;
  struct alignas(kVectorBytes) Part {
    A values[kPart];
  };
  Part *weight, *bias;
  int vectors;

  __device__ __forceinline__ ParameterSums(A* shared, const Team& team, int length)
      : weight(reinterpret_cast<Part*>(shared)), bias(weight + length / kPart), vectors(length / kSize) {
    team.each_vector<kSize, kItems>(length, [&](int, int j) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) weight[place(j, p)] = bias[place(j, p)] = {};
    });
  }
  __device__ __forceinline__ void add_weight(int, int j, const A (&values)[kSize]) { add(weight, j, values); }
  __device__ __forceinline__ void add_bias(int, int j, const A (&values)[kSize]) { add(bias, j, values); }
  __device__ __forceinline__ void get_weight(int, int j, A (&values)[kSize]) const { get(weight, j, values); }
  __device__ __forceinline__ void get_bias(int, int j, A (&values)[kSize]) const { get(bias, j, values); }

 private:
  __device__ __forceinline__ int place(int j, int part) const { return part * vectors + j / kSize; }
  __device__ __forceinline__ void add(Part* to, int j, const A (&values)[kSize]) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      Part part = to[place(j, p)];
#pragma unroll
      for (int k = 0; k < kPart; ++k) part.values[k] += values[p * kPart + k];
      to[place(j, p)] = part;
    }
  }
  __device__ __forceinline__ void get(const Part* from, int j, A (&values)[kSize]) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part = from[place(j, p)];
#pragma unroll
      for (int k = 0; k < kPart; ++k) values[p * kPart + k] = part.values[k];
    }
  }
};

// A row on the chip: the threads of a block, with sums for dweight and dbias in registers or in shared memory; or those
// of a cluster, with sums in registers.
enum class RowPlace { kBlock, kBlockAndShared, kCluster };

constexpr int kBackwardThreads = 512;
// Teams of more than a warp have at least so many vectors for each thread.
NORMOPS_HOST_DEVICE constexpr int backward_many(int bytes, int size) {
  return size == 1 ? (bytes == 8 ? 4 : 8) : bytes == 2 ? 2 : 4;
}
NORMOPS_HOST_DEVICE constexpr int backward_rows(int size, int items, RowPlace place, bool extras) {
  return size > 1 && items < 4 && place != RowPlace::kBlockAndShared && !extras ? 4 / items : 1;
}

// dx and, in `partial`, what the block's rows add to dweight and, behind it, dbias, as far as they are wanted. A block
// has `rows_per_block` rows, whatever the device, so the sums are the same on all.
template <typename T, typename W, int kSize, int kItems, RowPlace kPlace, bool kExtras>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    row_backward_kernel(const RowBackward<T> a, int threads_log2, int most, int64_t rows_per_block, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr bool kShared = kPlace == RowPlace::kBlockAndShared, kCluster = kPlace == RowPlace::kCluster;
  constexpr int kRows = backward_rows(kSize, kItems, kPlace, kExtras);
  constexpr bool kWarps = kPlace != RowPlace::kBlock || kExtras || kItems >= backward_many(sizeof(T), kSize);
  NORMOPS_SHARED(A, partial_sums, 2 * 2 * kRows * kWarp);
  NORMOPS_SHARED(A, told_sums, 2 * 2 * kRows);
  NORMOPS_DYNAMIC_SHARED(A, scratch);
  const Team team(threads_log2);
  const Part<kCluster> part(a.length, most);
  const int length = part.length;
  const A inverse = reciprocal(A(int(a.length)));
  const W* const weight = at(static_cast<const W*>(a.parameters.weight), part.begin);
  const bool want_dweight = bool(a.dweight), want_dbias = bool(a.dbias);

  // Where the sums are in shared memory, and with extras, registers are too few to hold the weight too.
  constexpr bool kHeld = !kShared && !kExtras;
  RowVectors<W, kSize, kHeld ? kItems : 1> w;
  if (weight && kHeld) w.load(weight, team, length);
  const auto scaled = [&](int i, int j, const Vector<T, kSize>& dy, A(&g)[kSize]) {
    if (weight) {
      if (!kHeld) w.items[0] = Vector<W, kSize>::load(weight + j);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A factor = w.items[kHeld ? i : 0][k];
        g[k] = dy[k] * (kExtras ? factor + a.extras.weight_offset : factor);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) g[k] = dy[k];
    }
  };
  ParameterSums<A, kSize, kItems, kShared> sums(scratch, team, length);

  int parity = 0;
  const int64_t begin = part.block * rows_per_block, end = min(begin + rows_per_block, a.rows);
  for (int64_t of_block = begin; of_block < end; of_block += team.count * kRows) {
    const int64_t first = of_block + team.number * kRows;
    const int rows = int(min(int64_t(kRows), end - first));  // may be none
    RowVectors<T, kSize, kItems> dy[kRows], x[kRows];
    const T* from_dy = a.dy.data + first * a.dy.stride + part.begin;
    const T* from_x = a.x.data + first * a.x.stride + part.begin;
#pragma unroll
    for (int r = 0; r < kRows; ++r, from_dy += a.dy.stride, from_x += a.x.stride) {
      dy[r].load(from_dy, team, r < rows ? length : 0);
      x[r].load(from_x, team, r < rows ? length : 0);
    }
    // Double arithmetic, which is slow on some devices: of each row by one lane, of which a team has as many.
    const int lane = team.thread % kWarp, own_row = lane % kRows;
    const int64_t row = own_row < rows ? first + own_row : begin;
    const RowCoefficients<A> own(a.mean[row], a.rstd[row]);
    RowCoefficients<A> c[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) c[r] = kRows > 1 ? own.of_lane(int(threadIdx.x % kWarp) - lane + r) : own;
    if constexpr (kExtras) {
      if (a.extras.activation) {
        const W* const bias = at(static_cast<const W*>(a.parameters.bias), part.begin);
        each_row_in_turn<kSize>(
            team, a.extras.other, first, rows, part.begin, length,
            [&](int r, int, int j, Vector<T, kSize>& grads, const Vector<T, kSize>& values,
                const Vector<T, kSize>& other) {
              A w[kSize], b[kSize], z[kSize], gradient[kSize];
              parameter_or(weight, A(1), a.extras.weight_offset, j, w);
              parameter_or(bias, A(0), A(0), j, b);
#pragma unroll
              for (int k = 0; k < kSize; ++k) {
                const A made = ((values[k] - c[0].center) * c[0].rstd + c[0].low) * w[k] + b[k];
                z[k] = a.extras.from_output ? other[k] : made + other[k];
              }
              before_activation<T, kSize>(a.extras.activation, a.extras.negative_slope, grads, z, gradient);
              grads = Vector<T, kSize>::of(gradient);
              if (a.extras.made) grads.store(a.extras.made + (first + r) * a.length + part.begin + j);
            },
            [&] { turn<kRows>(c); }, dy, x);
      }
    }

    A g_sums[2 * kRows] = {};
    team.each_vector<kSize, kItems>(length, [&](int i, int j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        A g[kSize], grad[kSize], grad_xhat[kSize];
        scaled(i, j, dy[r].items[i], g);
        A first_sum = 0, second_sum = 0;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const A d = x[r].items[i][k] - c[r].center;
          first_sum += g[k];
          second_sum += g[k] * d;
          grad[k] = dy[r].items[i][k];
          grad_xhat[k] = grad[k] * (d * c[r].rstd + c[r].low);
        }
        g_sums[2 * r] += first_sum;
        g_sums[2 * r + 1] += second_sum;
        if (want_dweight) sums.add_weight(i, j, grad_xhat);
        if (want_dbias) sums.add_bias(i, j, grad);
      }
    });
    if (a.dx == nullptr) continue;
    // The gradient of the sum comes in while the threads add up.
    [[maybe_unused]] RowVectors<T, kSize, kExtras ? kItems : 1> more[kExtras ? kRows : 1];
    if constexpr (kExtras) {
      const Rows<const T>& from = a.extras.grad_sum;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        more[r].load(from.data + (first + r) * from.stride + part.begin, team, from.data && r < rows ? length : 0);
      }
    }
    // The sums of one turn are read while those of the next are written.
    parity ^= 1;
    sum_row<kWarps, kCluster>(g_sums, team, partial_sums + parity * 2 * kRows * kWarp, told_sums + parity * 2 * kRows);
    T* const dx = a.dx + first * a.length + part.begin;
    A slope[kRows], shift[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto gradient = c[r].gradient(g_sums[2 * r], g_sums[2 * r + 1], inverse, a.centered);
      slope[r] = gradient.slope;
      shift[r] = gradient.shift;
    }
    team.each_vector<kSize, kItems>(length, [&](int i, int j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        A g[kSize], result[kSize];
        scaled(i, j, dy[r].items[i], g);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          result[k] = g[k] * c[r].rstd + ((x[r].items[i][k] - c[r].center) * slope[r] + shift[r]);
          if constexpr (kExtras) result[k] += more[r].items[i][k];
        }
        store_rounded<kSize>(dx + (r * a.length + j), result);
      }
    });
  }
  if constexpr (kCluster) cluster_sync();  // the last of the others may still read what this block has told
  if (!want_dweight && !want_dbias) return;

  A* const block = partial + part.block * (want_dweight + want_dbias) * a.length + part.begin;
  A* const block_bias = block + (want_dweight ? a.length : 0);
  const auto get = [&](bool of_bias, int i, int j, A(&values)[kSize]) {
    of_bias ? sums.get_bias(i, j, values) : sums.get_weight(i, j, values);
  };
#pragma unroll
  for (const bool of_bias : {false, true}) {
    if (!(of_bias ? want_dbias : want_dweight)) continue;
    A* const to = of_bias ? block_bias : block;
    if (team.count == 1) {
      team.each_vector<kSize, kItems>(length, [&](int i, int j) {
        A values[kSize];
        get(of_bias, i, j, values);
        Vector<A, kSize>::of(values).store(to + j);
      });
      continue;
    }
    // The teams of a block are added up through shared memory, in order.
    team.each_vector<kSize, kItems>(length, [&](int i, int j) {
      A values[kSize];
      get(of_bias, i, j, values);
#pragma unroll
      for (int k = 0; k < kSize; ++k) scratch[team.number * length + j + k] = values[k];
    });
    __syncthreads();
    for (int j = threadIdx.x; j < length; j += blockDim.x) {
      A total = 0;
      for (int s = 0; s < team.count; ++s) total += scratch[s * length + j];
      to[j] = total;
    }
    __syncthreads();
  }
}

}  // namespace normops::cuda
