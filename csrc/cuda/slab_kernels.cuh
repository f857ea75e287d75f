#pragma once

// The channel engine where all elements that share a statistic (a slab) fit in the registers of one block, in
// contiguous layout: the three stages in one kernel, and memory is read once.
//
// A slab is made of lines, each one channel of one sample, and those of pieces: one vector for each of `lanes` threads.
// Pieces are dealt to groups of `lanes` threads in turn.

#include "any_array.cuh"
#include "walk.cuh"

namespace normops::cuda {

template <int kSize, int kItems>
struct SlabWalk {
  const Plan& plan;
  int64_t row, group;
  int lines, pieces, total;  // pieces of a line, of the slab

  __device__ __forceinline__ explicit SlabWalk(const Plan& plan) : plan(plan) {
    const int64_t groups = plan.channels / plan.group_size;
    row = blockIdx.x / groups;
    group = blockIdx.x - row * groups;
    pieces = int(plan.cut.pieces);
    lines = int(plan.over_batch ? plan.cut.total_pieces / plan.cut.pieces : plan.group_size);
    total = lines * pieces;
  }

  __device__ __forceinline__ int64_t channel(int line) const {
    return group * plan.group_size + (plan.over_batch ? 0 : line);
  }

  // f(item, piece, line, offset of the vector in a tensor), for the vectors that lie in the slab.
  template <typename F>
  __device__ __forceinline__ void each(const Strides& strides, F f) const {
    const int step = blockDim.x / plan.lanes, lane = threadIdx.x % plan.lanes;
    int piece = threadIdx.x / plan.lanes;
#pragma unroll
    for (int i = 0; i < kItems; ++i, piece += step) {
      const int line = piece / pieces;
      const int64_t position = (int64_t(piece - line * pieces) * plan.lanes + lane) * kSize;
      if (piece < total && position < plan.cut.positions) {
        const int64_t sample = plan.over_batch ? line : row;
        f(i, piece, line, sample * strides.sample + channel(line) * strides.channel + position);
      }
    }
  }

  __device__ __forceinline__ double count() const { return double(plan.cut.positions) * lines; }
};

constexpr int kSlabThreads = 512;

template <typename T, int kSize, int kItems>
__global__ void __launch_bounds__(kSlabThreads, 1)
    slab_forward_kernel(const Plan plan, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                        const ForwardMerge<Acc<T>> a) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared_sums, kWarp);
  NORMOPS_SHARED(A, shared_squares, 2 * kWarp);
  const SlabWalk<kSize, kItems> walk(plan);
  const int threads = blockDim.x;
  const A inverse = A(1 / walk.count());

  Vector<T, kSize> values[kItems];
  A sum[1] = {0};
  walk.each(x.strides, [&](int i, int, int, int64_t offset) { values[i] = Vector<T, kSize>::load(x.data + offset); });
  walk.each(x.strides, [&](int i, int, int, int64_t) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[0] += values[i][k];
  });
  block_sum(sum, threads, shared_sums);
  const A center = sum[0] * inverse;
  A sums[2] = {0, 0};
  walk.each(x.strides, [&](int i, int, int, int64_t) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values[i][k] - center;
      sums[0] += d;
      sums[1] += d * d;
    }
  });
  block_sum(sums, threads, shared_squares);
  const A low = sums[0] * inverse, var = sums[1] * inverse - low * low;
  const A rstd = reciprocal_std(var, A(a.eps));
  if (threadIdx.x == 0) {
    a.mean[blockIdx.x] = double(center) + low;
    a.var[blockIdx.x] = var < A(0) ? A(0) : var;
  }
  walk.each(y.strides, [&](int i, int, int line, int64_t offset) {
    const int64_t channel = walk.channel(line);
    const A scale = rstd * read_as<A>(a.weight, channel), shift = read_as<A>(a.bias, channel) - low * scale;
    Vector<T, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.values[k] = T((values[i][k] - center) * scale + shift);
    out.store(y.data + offset);
  });
}

// Dynamic shared memory: the sums of every piece, two values each, where the slab has more than one channel.
template <typename T, int kSize, int kItems>
__global__ void __launch_bounds__(kSlabThreads, 1)
    slab_backward_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                         const ChannelTensor<T> dx, const BackwardMerge<Acc<T>> a) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared, 2 * kWarp);
  NORMOPS_SHARED(double, group_shared, 2 * kWarp);
  NORMOPS_DYNAMIC_SHARED(A, piece_sums);
  const SlabWalk<kSize, kItems> walk(plan);
  const int threads = blockDim.x;
  const double mean = a.mean[blockIdx.x], rstd = 1 / sqrt(a.var[blockIdx.x] + a.eps);
  const SplitMean<A> split(mean);
  const bool one_channel = plan.group_size == 1;

  Vector<T, kSize> grads[kItems], values[kItems];
  A item_sums[kItems][2] = {};
  walk.each(dy.strides, [&](int i, int, int, int64_t offset) { grads[i] = Vector<T, kSize>::load(dy.data + offset); });
  walk.each(x.strides, [&](int i, int, int, int64_t offset) { values[i] = Vector<T, kSize>::load(x.data + offset); });
  walk.each(x.strides, [&](int i, int, int, int64_t) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      item_sums[i][0] += grads[i][k];
      item_sums[i][1] += grads[i][k] * (values[i][k] - split.center);
    }
  });

  const int64_t first_channel = walk.group * plan.group_size, row_start = walk.row * plan.channels;
  double group_sums[2] = {0, 0};
  // What a channel's sums of dy and dy * (x - center) mean to the parameters and to the group.
  const auto finish = [&](int64_t channel, double channel_dy, double channel_dy_x) {
    const double dy_xhat = (channel_dy_x - split.low * channel_dy) * rstd;
    const double weight = read_as<double>(a.weight, channel);
    group_sums[0] += channel_dy * weight;
    group_sums[1] += dy_xhat * weight;
    if (one_channel && threadIdx.x > 0) return;
    if (a.sums) {
      a.sums[row_start + channel] = dy_xhat;
      a.sums[plan.rows * plan.channels + row_start + channel] = channel_dy;
    } else {
      if (a.dweight) a.dweight[channel] = A(dy_xhat);
      if (a.dbias) a.dbias[channel] = A(channel_dy);
    }
  };
  if (one_channel) {
    A totals[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      totals[0] += item_sums[i][0];
      totals[1] += item_sums[i][1];
    }
    block_sum(totals, threads, shared);
    finish(first_channel, totals[0], totals[1]);
  } else {
    const int step = threads / plan.lanes, lane = threadIdx.x % plan.lanes;
    int piece = threadIdx.x / plan.lanes;
#pragma unroll
    for (int i = 0; i < kItems; ++i, piece += step) {
      sum_lanes(item_sums[i], plan.lanes);
      if (lane == 0 && piece < walk.total) {
        piece_sums[2 * piece] = item_sums[i][0];
        piece_sums[2 * piece + 1] = item_sums[i][1];
      }
    }
    __syncthreads();
    for (int line = threadIdx.x; line < walk.lines; line += threads) {
      double channel_dy = 0, channel_dy_x = 0;
      for (int p = line * walk.pieces; p < (line + 1) * walk.pieces; ++p) {
        channel_dy += piece_sums[2 * p];
        channel_dy_x += piece_sums[2 * p + 1];
      }
      finish(first_channel + line, channel_dy, channel_dy_x);
    }
    block_sum(group_sums, threads, group_shared);
  }
  if (dx.data == nullptr) return;
  const double n = walk.count();
  const InputGradient gradient(rstd, split.low, group_sums[0] / n, group_sums[1] / n, /*centered=*/true);
  const A slope = A(gradient.slope), shift = A(gradient.shift);
  walk.each(dx.strides, [&](int i, int, int line, int64_t offset) {
    const A scale = A(rstd) * read_as<A>(a.weight, walk.channel(line));
    Vector<T, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      out.values[k] = T(grads[i][k] * scale + ((values[i][k] - split.center) * slope + shift));
    }
    out.store(dx.data + offset);
  });
}

}  // namespace normops::cuda
