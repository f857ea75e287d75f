#pragma once

// Stage 2 of the channel engine, in double: what the chunks of a column and the columns of a group add up to, and the
// coefficients that follow. A block takes one group of columns or, where each column is a group, as many as there are
// lanes. Threads side by side take adjacent columns, threads below each other chunks in turns. What is done once for a
// statistic is done by one thread.

#include "any_array.cuh"
#include "walk.cuh"

namespace normops::cuda {

constexpr int kMergeThreads = 256;  // at most: see MergeLaunch

// Here all of them have been read: the compiler would put what is done with the first between the reads.
__device__ __forceinline__ void all_there([[maybe_unused]] double& a, [[maybe_unused]] double& b,
                                          [[maybe_unused]] double& c, [[maybe_unused]] double& d) {
#ifndef NORMOPS_EMULATED
  asm volatile("" : "+d"(a), "+d"(b), "+d"(c), "+d"(d));
#endif
}
__device__ __forceinline__ void all_there(ChunkMoments (&batch)[kBatch]) {
  all_there(batch[0].mean, batch[1].mean, batch[2].mean, batch[3].mean);
}
__device__ __forceinline__ void all_there(ChunkGradients (&batch)[kBatch]) {
  all_there(batch[0].dy, batch[1].dy, batch[2].dy, batch[3].dy);
}

struct MergeGrid {
  Divisor blocks;  // of a row
  int lanes_log2;
};

struct MergeBlock {
  int64_t row, statistic;   // of the thread's column
  uint32_t first, columns;  // the block's
  uint32_t x, y, lanes, depth;
  bool grouped;

  __device__ __forceinline__ MergeBlock(const Plan& plan, const MergeGrid& grid)
      : x(threadIdx.x & ((1u << grid.lanes_log2) - 1)),
        y(threadIdx.x >> grid.lanes_log2),
        lanes(1u << grid.lanes_log2),
        depth(blockDim.x >> grid.lanes_log2),
        grouped(plan.group_size > 1) {
    uint32_t block = blockIdx.x;
    row = grid.blocks.split(block);
    const uint32_t width = grouped ? uint32_t(plan.group_size) : lanes;
    first = block * width;
    columns = min(width, uint32_t(plan.columns) - first);
    statistic = row * plan.groups + (grouped ? block : first + x);
  }

  // The thread that does what is done once for a statistic, and where the others find what it says.
  __device__ __forceinline__ bool speaks() const { return threadIdx.x < (grouped ? 1 : columns); }
  __device__ __forceinline__ uint32_t told(uint32_t column) const { return grouped ? 0 : column; }

  // f(partial, chunk) for the thread's chunks of a column of the block.
  template <typename P, typename F>
  __device__ __forceinline__ void each_chunk(const Plan& plan, const P* partials, uint32_t column, F f) const {
    const uint32_t chunks = uint32_t(plan.cut.chunks);
    const P* from = partials + (row * plan.cut.chunks + y) * plan.columns + first + column;
    const int64_t step = int64_t(depth) * plan.columns;
    uint32_t k = y;
#pragma unroll 1
    for (; k + (kBatch - 1) * depth < chunks; k += kBatch * depth) {
      P batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, from += step) batch[i] = *from;
      all_there(batch);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) f(batch[i], k + i * depth);
    }
#pragma unroll 1
    for (; k < chunks; k += depth, from += step) f(*from, k);
  }

  // Sums over the threads of the same lane, or over all: every thread gets them.
  template <int kTerms>
  __device__ __forceinline__ void sum(double (&terms)[kTerms], bool over_lanes) const {
    NORMOPS_SHARED(double, shared, kTerms* kMergeThreads);
    const uint32_t wide = over_lanes ? 1 : lanes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (uint32_t distance = kWarp / 2; distance >= wide; distance /= 2) {
#pragma unroll
      for (int t = 0; t < kTerms; ++t) terms[t] += __shfl_xor_sync(kAllLanes, terms[t], distance);
    }
    if (lane < wide) {
#pragma unroll
      for (int t = 0; t < kTerms; ++t) shared[(warp * kTerms + t) * wide + lane] = terms[t];
    }
    __syncthreads();
    if (threadIdx.x < kTerms * wide) {
      double total = shared[threadIdx.x];
      for (uint32_t w = 1; w < blockDim.x / kWarp; ++w) total += shared[w * kTerms * wide + threadIdx.x];
      shared[threadIdx.x] = total;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTerms; ++t) terms[t] = shared[t * wide + (over_lanes ? 0 : x)];
    __syncthreads();
  }
};

template <typename A>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_kernel(const Plan plan, const MergeGrid grid, const ForwardMerge<A> a) {
  NORMOPS_SHARED(double, told_rstd, kWarp);
  NORMOPS_SHARED(A, told_center, kWarp);
  NORMOPS_SHARED(double, told_low, kWarp);
  const MergeBlock block(plan, grid);
  const double n = double(plan.cut.lines) * plan.cut.positions * plan.group_size;
  // Sums about the mean of the first chunk, of which hardly anything cancels in double.
  double sums[2] = {0, 0}, origin = 0;
  if (a.partials) {
    const bool there = block.told(block.x) < block.columns;
    if (there) {
      origin = a.partials[block.row * plan.cut.chunks * plan.columns + block.first + block.told(block.x)].mean;
      if (origin - origin != 0) origin = 0;  // infinite or NaN
    }
    for (uint32_t c = block.x; c < block.columns; c += block.lanes) {
      block.each_chunk(plan, a.partials, c, [&](const ChunkMoments& chunk, uint32_t k) {
        const double distance = chunk.mean - origin, weighted = plan.cut.count_of(k) * distance;
        sums[0] += weighted;
        sums[1] += chunk.m2 + weighted * distance;
      });
    }
    block.sum(sums, block.grouped);
  }
  if (block.speaks()) {
    double mean, var;
    if (a.partials) {
      const double distance = sums[0] / n;
      mean = origin + distance;
      var = sums[1] / n - distance * distance;
      if (var < 0) var = 0;
    } else {
      mean = read_as<double>(a.given_mean, block.statistic);
      var = read_as<double>(a.given_var, block.statistic);
    }
    const double rstd = 1 / sqrt(var + a.eps);
    if (a.mean) {
      a.mean[block.statistic] = mean;
      a.var[block.statistic] = a.reciprocal ? rstd : var;
    }
    if (a.running.running[0]) move_running(a.running, 0, block.statistic, mean);
    if (a.running.running[1]) move_running(a.running, 1, block.statistic, var);
    const SplitMean<A> split(mean);
    told_center[block.x] = split.center;
    told_low[block.x] = split.low;
    told_rstd[block.x] = rstd;
  }
  if (!a.coefficients.scale) return;
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < block.columns; c += blockDim.x) {
    const uint32_t told = block.told(c);
    const int64_t parameter = plan.width > 1 ? block.statistic : block.first + c;
    const int64_t i = block.row * plan.columns + block.first + c;
    const double factor = told_rstd[told] * read_as<double>(a.weight, parameter);
    a.coefficients.center[i] = told_center[told];
    a.coefficients.scale[i] = A(factor);
    a.coefficients.shift[i] = A(read_as<double>(a.bias, parameter) - told_low[told] * factor);
  }
}

template <typename A>
__global__ void __launch_bounds__(kMergeThreads, 1)
    grad_merge_kernel(const Plan plan, const MergeGrid grid, const BackwardMerge<A> a) {
  NORMOPS_SHARED(double, told_rstd, kWarp);
  NORMOPS_SHARED(A, told_center, kWarp);
  NORMOPS_SHARED(double, told_low, kWarp);
  NORMOPS_SHARED(A, told_slope, kWarp);
  NORMOPS_SHARED(A, told_shift, kWarp);
  const MergeBlock block(plan, grid);
  const bool wide = plan.width > 1;
  if (block.speaks()) {
    told_rstd[block.x] = a.reciprocal ? a.var[block.statistic] : 1 / sqrt(a.var[block.statistic] + a.eps);
    const SplitMean<A> split(a.mean[block.statistic]);
    told_center[block.x] = split.center;
    told_low[block.x] = split.low;
  }
  __syncthreads();
  double group_sums[2] = {0, 0};  // of g = dy * weight and of g * xhat
  // What is known of a channel, by one thread for each.
  const auto finish = [&](int64_t channel, double dy, double dy_xhat) {
    const double weight = read_as<double>(a.weight, channel);
    group_sums[0] += dy * weight;
    group_sums[1] += dy_xhat * weight;
    if (a.total_dy) return;
    if (a.sums) {
      const int64_t i = block.row * plan.channels + channel;
      a.sums[i] = dy_xhat;
      a.sums[plan.rows * plan.channels + i] = dy;
    } else {
      if (a.dweight) write_as(a.dweight, channel, dy_xhat);
      if (a.dbias) write_as(a.dbias, channel, dy);
    }
  };
  const auto finish_sums = [&](int64_t channel, uint32_t column, const double (&sums)[2]) {
    const uint32_t i = block.told(column);
    finish(channel, sums[0], (sums[1] - told_low[i] * sums[0]) * told_rstd[i]);
  };
  if (a.partials) {
    double sums[2] = {0, 0};
    for (uint32_t tile = 0; tile < block.columns; tile += block.lanes) {
      const uint32_t c = tile + block.x;
      if (c < block.columns) {
        block.each_chunk(plan, a.partials, c, [&](const ChunkGradients& chunk, uint32_t) {
          sums[0] += chunk.dy;
          sums[1] += chunk.dy_x;
        });
      }
      if (wide) continue;
      block.sum(sums, /*over_lanes=*/false);
      if (block.y == 0 && c < block.columns) finish_sums(block.first + c, c, sums);
      sums[0] = sums[1] = 0;
    }
    if (wide) {
      block.sum(sums, /*over_lanes=*/true);
      if (threadIdx.x == 0) finish_sums(block.statistic, 0, sums);
    }
  } else if (a.total_dy) {
    const uint32_t channels = wide ? 1 : block.columns;
    for (uint32_t c = threadIdx.x; c < channels; c += blockDim.x) {
      const int64_t channel = wide ? block.statistic : block.first + c;
      finish(channel, a.total_dy[channel], a.total_dy_xhat[channel]);
    }
  }
  if (!a.coefficients.scale) return;
  if (block.grouped && !wide) block.sum(group_sums, /*over_lanes=*/true);
  if (block.speaks()) {
    const double n = a.total_dy ? a.total_count : double(plan.cut.lines) * plan.cut.positions * plan.group_size;
    const InputGradient gradient(told_rstd[block.x], told_low[block.x], group_sums[0] / n, group_sums[1] / n,
                                 plan.centered);
    told_slope[block.x] = a.input_stats ? A(gradient.slope) : A(0);
    told_shift[block.x] = a.input_stats ? A(gradient.shift) : A(0);
  }
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < block.columns; c += blockDim.x) {
    const uint32_t told = block.told(c);
    const int64_t parameter = wide ? block.statistic : block.first + c;
    const int64_t i = block.row * plan.columns + block.first + c;
    a.coefficients.center[i] = told_center[told];
    a.coefficients.scale[i] = A(told_rstd[told] * read_as<double>(a.weight, parameter));
    a.coefficients.slope[i] = told_slope[told];
    a.coefficients.shift[i] = told_shift[told];
  }
}

// Column sums of `first` and `second`, each `rows` rows `stride` apart: four rows in their own type, then in double. A
// result that is null is not wanted. Blocks of 256 threads, lanes of which take adjacent columns.
template <typename S>
__global__ void __launch_bounds__(kMergeThreads, 1)
    column_sums_kernel(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, int lanes_log2,
                       AnyOutput first_total, AnyOutput second_total) {
  NORMOPS_SHARED(double, totals, kMergeThreads);
  const S* const from = blockIdx.y == 0 ? first : second;
  const AnyOutput to = blockIdx.y == 0 ? first_total : second_total;
  if (!to) return;
  const int lanes = 1 << lanes_log2, x = threadIdx.x & (lanes - 1), y = threadIdx.x >> lanes_log2;
  const int depth = kMergeThreads >> lanes_log2;
  const int64_t column = (int64_t(blockIdx.x) << lanes_log2) + x;
  double total = 0;
  if (column < columns) {
    const S* at = from + y * stride + column;
    const int64_t step = depth * stride;
    int64_t row = y;
#pragma unroll 1  // unrolling takes a division
    for (; row + (2 * kBatch - 1) * depth < rows; row += 2 * kBatch * depth) {
      S values[2 * kBatch];
#pragma unroll
      for (int i = 0; i < 2 * kBatch; ++i, at += step) values[i] = *at;
#pragma unroll
      for (int i = 0; i < 2 * kBatch; i += 4) {
        total += double((values[i] + values[i + 1]) + (values[i + 2] + values[i + 3]));
      }
    }
#pragma unroll 1
    for (; row < rows; row += depth, at += step) total += double(*at);
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  if (y > 0 || column >= columns) return;
  for (int i = 1; i < depth; ++i) total += totals[i * lanes + x];
  write_as(to, column, total);
}

// Block y: 0 for the mean, 1 for the variance.
static __global__ void __launch_bounds__(kWalkThreads) running_stats_kernel(const RunningStats a) {
  const int which = blockIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * kWalkThreads + threadIdx.x;
  if (channel >= a.channels) return;
  double sum = 0;
  for (int64_t row = 0; row < a.rows; ++row) sum += a.statistic[which][row * a.channels + channel];
  move_running(a, which, channel, sum / a.rows);
}

}  // namespace normops::cuda
