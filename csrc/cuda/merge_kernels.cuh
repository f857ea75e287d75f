#pragma once

// Stage 2 of the channel engine, in double: what the chunks of a channel and the channels of a group add up to, and the
// coefficients that follow. A block takes one group of channels or, where each channel is a group, 32 of them.

#include "any_array.cuh"
#include "walk.cuh"

namespace normops::cuda {

constexpr int kMergeColumns = kWarp, kMergeRows = 8;

// Where a block of the merge is: threads side by side have adjacent channels, threads below each other share them.
struct MergeBlock {
  int64_t row, first_channel, channels;  // the block's channels
  int64_t chunks, channel_step, chunk_step, first_partial;
  bool grouped;

  __device__ __forceinline__ explicit MergeBlock(const Plan& plan) : grouped(plan.group_size > 1) {
    const int64_t width = grouped ? plan.group_size : kMergeColumns;
    const int64_t across = (plan.channels + width - 1) / width;
    row = blockIdx.x / across;
    first_channel = (blockIdx.x - row * across) * width;
    channels = min(width, plan.channels - first_channel);
    chunks = plan.cut.chunks;
    const bool lines = plan.layout == Layout::kContiguous;
    channel_step = lines ? chunks : 1;
    chunk_step = lines ? 1 : plan.channels;
    first_partial = row * plan.channels * chunks + first_channel * channel_step;
  }

  // f(channel, first) over the block's channels, 32 at a time, the same number of times for every thread; `channel` is
  // not below `channels` where there is none left.
  template <typename F>
  __device__ __forceinline__ void each_channel(F f) const {
    for (int64_t c = threadIdx.x; c - threadIdx.x < channels; c += kMergeColumns) f(c);
  }

  template <typename F>
  __device__ __forceinline__ void each_chunk(int64_t channel, F f) const {
    if (channel >= channels) return;
    for (int64_t k = threadIdx.y; k < chunks; k += kMergeRows) {
      f(k, first_partial + channel * channel_step + k * chunk_step);
    }
  }

  // The sum over the threads of a column.
  __device__ __forceinline__ double down(double value) const {
    NORMOPS_SHARED(double, values, kMergeColumns* kMergeRows);
    values[threadIdx.y * kMergeColumns + threadIdx.x] = value;
    __syncthreads();
    double total = values[threadIdx.x];
    for (int y = 1; y < kMergeRows; ++y) total += values[y * kMergeColumns + threadIdx.x];
    __syncthreads();
    return total;
  }

  // The sum over the channels of a group.
  __device__ __forceinline__ double across(double value) const {
    double terms[1] = {value};
    if (grouped) sum_lanes(terms, kWarp);
    return terms[0];
  }
};

template <typename A>
__global__ void __launch_bounds__(kMergeColumns* kMergeRows) merge_kernel(const Plan plan, const ForwardMerge<A> a) {
  const MergeBlock block(plan);
  const int64_t groups = plan.channels / plan.group_size;
  const int64_t own = block.grouped ? 0 : threadIdx.x;
  const bool there = own < block.channels;
  const int64_t group = (block.first_channel + (there ? own : 0)) / plan.group_size;
  const int64_t at = block.row * groups + group;
  double mean = 0, var = 0;
  if (a.partials) {
    const double count = double(plan.cut.before(plan.cut.total_pieces)) * plan.group_size;
    double sum = 0;
    block.each_channel([&](int64_t c) {
      block.each_chunk(c, [&](int64_t k, int64_t i) { sum += plan.cut.count(k) * a.partials[i].mean; });
    });
    mean = block.across(block.down(sum)) / count;
    double m2 = 0;
    block.each_channel([&](int64_t c) {
      block.each_chunk(c, [&](int64_t k, int64_t i) {
        const double distance = a.partials[i].mean - mean;
        m2 += a.partials[i].m2 + plan.cut.count(k) * distance * distance;
      });
    });
    var = block.across(block.down(m2)) / count;
  } else {
    mean = read_as<double>(a.given_mean, at);
    var = read_as<double>(a.given_var, at);
  }
  const double rstd = 1 / sqrt(var + a.eps);
  const SplitMean<A> split(mean);
  if (there && threadIdx.y == 0 && (threadIdx.x == 0 || !block.grouped)) {
    a.mean[at] = mean;
    a.var[at] = a.reciprocal ? rstd : var;
  }
  if (threadIdx.y > 0 || !a.coefficients.scale) return;
  block.each_channel([&](int64_t c) {
    if (c >= block.channels) return;
    const int64_t channel = block.first_channel + c, i = block.row * plan.channels + channel;
    const double factor = rstd * read_as<double>(a.weight, channel);
    a.coefficients.center[i] = split.center;
    a.coefficients.scale[i] = A(factor);
    a.coefficients.shift[i] = A(read_as<double>(a.bias, channel) - split.low * factor);
  });
}

template <typename A>
__global__ void __launch_bounds__(kMergeColumns* kMergeRows)
    grad_merge_kernel(const Plan plan, const BackwardMerge<A> a) {
  const MergeBlock block(plan);
  const int64_t groups = plan.channels / plan.group_size;
  const int64_t own = block.grouped ? 0 : threadIdx.x;
  const int64_t group = (block.first_channel + (own < block.channels ? own : 0)) / plan.group_size;
  const int64_t at = block.row * groups + group;
  const double rstd = a.reciprocal ? a.var[at] : 1 / sqrt(a.var[at] + a.eps);
  const SplitMean<A> split(a.mean[at]);
  double group_dy = 0, group_dy_xhat = 0;
  if (a.partials) {
    block.each_channel([&](int64_t c) {
      double dy = 0, dy_x = 0;
      block.each_chunk(c, [&](int64_t, int64_t i) {
        dy += a.partials[i].dy;
        dy_x += a.partials[i].dy_x;
      });
      dy = block.down(dy);
      dy_x = block.down(dy_x);
      if (c >= block.channels) return;
      const int64_t channel = block.first_channel + c;
      const double dy_xhat = (dy_x - split.low * dy) * rstd, weight = read_as<double>(a.weight, channel);
      group_dy += dy * weight;
      group_dy_xhat += dy_xhat * weight;
      if (threadIdx.y > 0) return;
      if (a.sums) {
        const int64_t i = block.row * plan.channels + channel;
        a.sums[i] = dy_xhat;
        a.sums[plan.rows * plan.channels + i] = dy;
      } else {
        if (a.dweight) a.dweight[channel] = A(dy_xhat);
        if (a.dbias) a.dbias[channel] = A(dy);
      }
    });
  } else if (a.total_dy) {
    block.each_channel([&](int64_t c) {
      if (c >= block.channels) return;
      const int64_t channel = block.first_channel + c;
      const double weight = read_as<double>(a.weight, channel);
      group_dy += a.total_dy[channel] * weight;
      group_dy_xhat += a.total_dy_xhat[channel] * weight;
    });
  }
  group_dy = block.across(group_dy);
  group_dy_xhat = block.across(group_dy_xhat);
  if (threadIdx.y > 0 || !a.coefficients.scale) return;
  const double n = a.total_dy ? a.total_count : double(plan.cut.before(plan.cut.total_pieces)) * plan.group_size;
  const InputGradient gradient(rstd, split.low, group_dy / n, group_dy_xhat / n, plan.centered);
  block.each_channel([&](int64_t c) {
    if (c >= block.channels) return;
    const int64_t channel = block.first_channel + c, i = block.row * plan.channels + channel;
    a.coefficients.center[i] = split.center;
    a.coefficients.scale[i] = A(rstd * read_as<double>(a.weight, channel));
    a.coefficients.slope[i] = a.input_stats ? A(gradient.slope) : A(0);
    a.coefficients.shift[i] = a.input_stats ? A(gradient.shift) : A(0);
  });
}

constexpr int kSumColumns = 32, kSumRows = 16;

// Column sums of `first` and `second`, each `rows` rows `stride` apart, in double; blocks of kSumColumns by kSumRows
// threads. A result that is null is not wanted.
template <typename S, typename A>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    column_sums_kernel(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, A* first_total,
                       A* second_total) {
  NORMOPS_SHARED(double, totals, kSumColumns* kSumRows);
  const S* const from = blockIdx.y == 0 ? first : second;
  A* const to = blockIdx.y == 0 ? first_total : second_total;
  if (to == nullptr) return;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  double total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) total += from[row * stride + column];
  }
  totals[threadIdx.y * kSumColumns + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int i = 1; i < kSumRows; ++i) total += totals[i * kSumColumns + threadIdx.x];
  to[column] = A(total);
}

// Block y: 0 for the mean, 1 for the variance.
static __global__ void __launch_bounds__(kWalkThreads) running_stats_kernel(const RunningStats a) {
  const int which = blockIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * kWalkThreads + threadIdx.x;
  if (channel >= a.channels) return;
  double sum = 0;
  for (int64_t row = 0; row < a.rows; ++row) sum += a.statistic[which][row * a.channels + channel];
  const double statistic = a.momentum * a.correction[which] * (sum / a.rows);
  const int64_t i = channel * a.stride[which];
  const double old = read_as<double>({a.running[which], a.type[which], 0}, i);
  const double moved = (1 - a.momentum) * old + statistic;
  switch (a.type[which]) {
    case ElementType::kFloat:
      static_cast<float*>(a.running[which])[i] = float(moved);
      break;
    case ElementType::kDouble:
      static_cast<double*>(a.running[which])[i] = moved;
      break;
    case ElementType::kHalf:
      static_cast<c10::Half*>(a.running[which])[i] = c10::Half(float(moved));
      break;
    default:
      static_cast<c10::BFloat16*>(a.running[which])[i] = c10::BFloat16(float(moved));
  }
}

}  // namespace normops::cuda
