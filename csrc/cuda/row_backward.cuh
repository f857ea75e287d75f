#pragma once

// The backward of the row engine.

#include "row.h"
#include "row_teams.cuh"

namespace normops::cuda {

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
  static_assert(kRows == 1 || !kExtras);
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
  // Nor, with many vectors, what the extras read, before it is needed; or, in double, the second of them.
  constexpr bool kAhead = kExtras && kItems <= 2, kBothAhead = kAhead && sizeof(T) < 8;
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
    // The output or residual that the activation needs, and the gradient of the sum, which is added to dx.
    [[maybe_unused]] RowVectors<T, kSize, kAhead ? kItems : 1> other;
    [[maybe_unused]] RowVectors<T, kSize, kExtras ? kItems : 1> more;
    const auto there = [&](const Rows<const T>& from) { return from.data && rows > 0 ? length : 0; };
    const auto start = [&](const Rows<const T>& from) { return from.data + first * from.stride + part.begin; };
    if constexpr (kAhead) {
      other.load(start(a.extras.other), team, a.extras.activation ? there(a.extras.other) : 0);
      if (kBothAhead) more.load(start(a.extras.grad_sum), team, a.dx ? there(a.extras.grad_sum) : 0);
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
        [[maybe_unused]] const T* const others = a.extras.other.data ? start(a.extras.other) : nullptr;
        const auto element = [&](int i) { return (team.thread + i * team.threads) * kSize; };
        each_in_turn(
            [&](int i) {
              if constexpr (kAhead) {
                return other.items[i];
              } else {
                return Vector<T, kSize>::load_if(others && rows > 0 && element(i) < length, others + element(i));
              }
            },
            [&](int i, Vector<T, kSize>& grads, const Vector<T, kSize>& values, const Vector<T, kSize>& added) {
              const int j = element(i);
              if (rows < 1 || j >= length) return;
              A w[kSize], b[kSize], z[kSize], gradient[kSize];
              parameter_or(weight, A(1), a.extras.weight_offset, j, w);
              parameter_or(bias, A(0), A(0), j, b);
#pragma unroll
              for (int k = 0; k < kSize; ++k) {
                const A made = ((values[k] - c[0].center) * c[0].rstd + c[0].low) * w[k] + b[k];
                z[k] = a.extras.from_output ? added[k] : made + added[k];
              }
              before_activation<T, kSize>(a.extras.activation, a.extras.negative_slope, grads, z, gradient);
              grads = Vector<T, kSize>::of(gradient);
              if (a.extras.made) grads.store(a.extras.made + first * a.length + part.begin + j);
            },
            dy[0].items, x[0].items);
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
    // Where registers are too few to hold it from the beginning, this comes in while the threads add up.
    if constexpr (kExtras && !kBothAhead) more.load(start(a.extras.grad_sum), team, there(a.extras.grad_sum));
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
          if constexpr (kExtras) result[k] += more.items[i][k];
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
