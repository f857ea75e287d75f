#pragma once

// Row engine (LayerNorm, RMSNorm): a row lives in the registers of its threads from the only time it is read.
//
// A row is shared by `threads` threads: a power of two up to a warp, with several rows to a block, or whole warps, with
// one row to a block. Thread t holds the vectors t, t + threads, t + 2 * threads, ...

#include "reduce.cuh"
#include "row.h"

namespace normops::cuda {

// f(item, element) for the vectors of a thread in a row of `length`.
template <int kSize, int kItems, typename F>
__device__ __forceinline__ void each_vector(int thread, int threads, int length, F f) {
  int j = thread * kSize;
#pragma unroll
  for (int i = 0; i < kItems; ++i, j += threads * kSize) {
    if (j < length) f(i, j);
  }
}

template <typename T, int kSize, int kItems>
struct RowVectors {
  Vector<T, kSize> items[kItems];

  __device__ __forceinline__ void load(const T* row, int thread, int threads, int length) {
    int j = thread * kSize;
#pragma unroll
    for (int i = 0; i < kItems; ++i, j += threads * kSize) items[i] = Vector<T, kSize>::load_if(j < length, row + j);
  }
};

// Mean as the nearest A and the rest, and the variance, of the elements that a row's threads hold.
template <typename T, int kSize, int kItems>
__device__ __forceinline__ void row_moments(const RowVectors<T, kSize, kItems>& x, int thread, int threads, int length,
                                            bool centered, Acc<T>& center, Acc<T>& low, Acc<T>& var) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, partial_sums, kWarp);
  NORMOPS_SHARED(A, partial_squares, 2 * kWarp);
  const A inverse = A(1) / A(length);
  center = 0;
  if (centered) {
    A sum[1] = {0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      A item = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) item += x.items[i][k];
      sum[0] += item;
    }
    sum_threads(sum, threads, partial_sums);
    center = sum[0] * inverse;
  }
  // Deviations from the rounded mean. Their own mean is what rounding lost, so it sharpens both results.
  A sums[2] = {0, 0};
  each_vector<kSize, kItems>(thread, threads, length, [&](int i, int) {
    A first = 0, second = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = x.items[i][k] - center;
      first += d;
      second += d * d;
    }
    sums[0] += first;
    sums[1] += second;
  });
  sum_threads(sums, threads, partial_squares);
  low = centered ? sums[0] * inverse : A(0);
  var = sums[1] * inverse - low * low;
}

template <typename T, typename W, int kSize, int kItems>
__global__ void __launch_bounds__(kMostThreads, 1) row_forward_kernel(const RowForward<T> a, int threads) {
  using A = Acc<T>;
  const int thread = threadIdx.x % threads, length = int(a.length);
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
  const bool active = row < a.rows;
  const int held = active ? length : 0;

  RowVectors<T, kSize, kItems> x;
  x.load(a.x.data + (active ? row : 0) * a.x.stride, thread, threads, held);
  A center, low, var;
  row_moments(x, thread, threads, length, a.centered, center, low, var);
  const A rstd = reciprocal_std(var, A(a.eps));
  if (!active) return;
  if (thread == 0) {
    a.mean[row] = double(center) + low;
    a.rstd[row] = rstd;
  }

  const A shift = -low * rstd;
  const W* const weight = static_cast<const W*>(a.parameters.weight);
  const W* const bias = static_cast<const W*>(a.parameters.bias);
  T* const y = a.y + row * a.length;
  each_vector<kSize, kItems>(thread, threads, length, [&](int i, int j) {
    A v[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k] = (x.items[i][k] - center) * rstd + shift;
    if (weight) {
      const auto w = Vector<W, kSize>::load(weight + j);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] *= w[k];
    }
    if (bias) {
      const auto b = Vector<W, kSize>::load(bias + j);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] += b[k];
    }
    Vector<T, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.values[k] = T(v[k]);
    out.store(y + j);
  });
}

// xhat = (x - center) * rstd + low, and with g = dy * weight: dx = rstd * g + slope * (x - center) + shift
// (statistics.h).
template <typename A>
struct RowCoefficients {
  A center, rstd, low;
  double mean_low, exact_rstd;

  __device__ __forceinline__ RowCoefficients(double mean, double rstd) : rstd(A(rstd)), exact_rstd(rstd) {
    const SplitMean<A> split(mean);
    center = split.center;
    mean_low = split.low;
    low = A(-mean_low * rstd);
  }

  // From the sums over the row of g and g * (x - center).
  __device__ __forceinline__ InputGradient gradient(double sum_g, double sum_g_x, double inverse, bool centered) const {
    const double sum_g_xhat = (sum_g_x - mean_low * sum_g) * exact_rstd;
    return InputGradient(exact_rstd, mean_low, sum_g * inverse, sum_g_xhat * inverse, centered);
  }
};

// Where a thread keeps its sums for dweight and dbias: in registers, or, where those would not do, in places of the
// block's shared memory that no other thread touches.
template <typename A, int kSize, int kItems, bool kShared>
struct ParameterSums {
  Vector<A, kSize> weight[kItems], bias[kItems];

  __device__ __forceinline__ ParameterSums(A*, int, int, int) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) weight[i] = bias[i] = Vector<A, kSize>::zero();
  }
  __device__ __forceinline__ void add(int i, int, const Vector<A, kSize>& dweight, const Vector<A, kSize>& dbias) {
    weight[i] += dweight;
    bias[i] += dbias;
  }
  __device__ __forceinline__ Vector<A, kSize> dweight(int i, int) const { return weight[i]; }
  __device__ __forceinline__ Vector<A, kSize> dbias(int i, int) const { return bias[i]; }
};

template <typename A, int kSize, int kItems>
struct ParameterSums<A, kSize, kItems, true> {
  A *weight, *bias;

  __device__ __forceinline__ ParameterSums(A* shared, int thread, int threads, int length)
      : weight(shared), bias(shared + length) {
    each_vector<kSize, kItems>(thread, threads, length, [&](int, int j) {
      Vector<A, kSize>::zero().store(weight + j);
      Vector<A, kSize>::zero().store(bias + j);
    });
  }
  __device__ __forceinline__ void add(int i, int j, const Vector<A, kSize>& add_weight,
                                      const Vector<A, kSize>& add_bias) {
    (dweight(i, j) += add_weight).store(weight + j);
    (dbias(i, j) += add_bias).store(bias + j);
  }
  __device__ __forceinline__ Vector<A, kSize> dweight(int, int j) const { return Vector<A, kSize>::load(weight + j); }
  __device__ __forceinline__ Vector<A, kSize> dbias(int, int j) const { return Vector<A, kSize>::load(bias + j); }
};

constexpr int kBackwardThreads = 512;

// dx and, in `partial` (one pair of rows of sums per block: dweight, dbias), what the block's rows add to the gradients
// of the parameters. Blocks take rows in turns.
template <typename T, typename W, int kSize, int kItems, bool kShared>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    row_backward_kernel(const RowBackward<T> a, int threads, Acc<T>* partial) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, partial_sums, 2 * 2 * kWarp);
  NORMOPS_DYNAMIC_SHARED(A, scratch);
  const int thread = threadIdx.x % threads, slot = threadIdx.x / threads, slots = blockDim.x / threads;
  const int length = int(a.length);
  const double inverse = 1.0 / length;
  const W* const weight = static_cast<const W*>(a.parameters.weight);

  // Where the sums are in shared memory, registers are too few to hold the weight too.
  RowVectors<W, kSize, kShared ? 1 : kItems> w;
  if (weight && !kShared) w.load(weight, thread, threads, length);
  const auto scaled = [&](int i, int j, const Vector<T, kSize>& dy) {
    Vector<A, kSize> g;
    if (weight) {
      if (kShared) w.items[0] = Vector<W, kSize>::load(weight + j);
#pragma unroll
      for (int k = 0; k < kSize; ++k) g.values[k] = dy[k] * w.items[kShared ? 0 : i][k];
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) g.values[k] = dy[k];
    }
    return g;
  };
  ParameterSums<A, kSize, kItems, kShared> sums(scratch, thread, threads, length);

  int parity = 0;
  for (int64_t first = int64_t(blockIdx.x) * slots; first < a.rows; first += int64_t(gridDim.x) * slots) {
    const bool active = first + slot < a.rows;
    const int64_t row = active ? first + slot : 0;
    const int held = active ? length : 0;
    RowVectors<T, kSize, kItems> dy, x;
    dy.load(a.dy.data + row * a.dy.stride, thread, threads, held);
    x.load(a.x.data + row * a.x.stride, thread, threads, held);
    const RowCoefficients<A> c(a.mean[row], a.rstd[row]);

    A g_sums[2] = {0, 0};
    each_vector<kSize, kItems>(thread, threads, held, [&](int i, int j) {
      const Vector<A, kSize> g = scaled(i, j, dy.items[i]);
      Vector<A, kSize> dweight, dbias;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A d = x.items[i][k] - c.center;
        g_sums[0] += g[k];
        g_sums[1] += g[k] * d;
        dbias.values[k] = dy.items[i][k];
        dweight.values[k] = dbias[k] * (d * c.rstd + c.low);
      }
      if (partial) sums.add(i, j, dweight, dbias);
    });
    if (a.dx == nullptr) continue;
    // The sums of one row are read while those of the next are written.
    sum_threads(g_sums, threads, partial_sums + (parity ^= 1) * 2 * kWarp);
    const InputGradient gradient = c.gradient(g_sums[0], g_sums[1], inverse, a.centered);
    const A slope = A(gradient.slope), shift = A(gradient.shift);
    T* const dx = a.dx + row * a.length;
    each_vector<kSize, kItems>(thread, threads, held, [&](int i, int j) {
      const Vector<A, kSize> g = scaled(i, j, dy.items[i]);
      Vector<T, kSize> out;
#pragma unroll
      for (int k = 0; k < kSize; ++k) out.values[k] = T(g[k] * c.rstd + ((x.items[i][k] - c.center) * slope + shift));
      out.store(dx + j);
    });
  }
  if (partial == nullptr) return;

  A* const block = partial + int64_t(blockIdx.x) * 2 * length;
  if (slots == 1) {
    each_vector<kSize, kItems>(thread, threads, length, [&](int i, int j) {
      sums.dweight(i, j).store(block + j);
      sums.dbias(i, j).store(block + length + j);
    });
    return;
  }
  // The rows of a block are added up through shared memory, in order.
  for (const bool bias : {false, true}) {
    each_vector<kSize, kItems>(thread, threads, length, [&](int i, int j) {
      (bias ? sums.dbias(i, j) : sums.dweight(i, j)).store(scratch + slot * length + j);
    });
    __syncthreads();
    for (int j = threadIdx.x; j < length; j += blockDim.x) {
      A total = 0;
      for (int s = 0; s < slots; ++s) total += scratch[s * length + j];
      block[bias * length + j] = total;
    }
    __syncthreads();
  }
}

}  // namespace normops::cuda
