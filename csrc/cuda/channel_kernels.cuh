#pragma once

// The stages of the channel engine. `center` and the other coefficients hold one entry per row of statistics and
// channel; a thread needs those of the channels in one vector, which it shares with all the vectors it holds.

#include "walk.cuh"

namespace normops::cuda {

// The coefficients of the thread's channels, or a constant.
template <typename W, typename A>
__device__ __forceinline__ void load_coefficients(const W& walk, const A* array, A absent, A (&values)[W::kChannels]) {
#pragma unroll
  for (int k = 0; k < W::kChannels; ++k) {
    values[k] = walk.active && array ? array[walk.row * walk.plan.channels + walk.channel + k] : absent;
  }
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    moments_kernel(const Plan plan, const ChannelTensor<const T> x, ChunkMoments* partials) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kChannels = W::kChannels;
  NORMOPS_SHARED(A, shared_sums, W::kShared * kChannels);
  NORMOPS_SHARED(A, shared_squares, W::kShared * 2 * kChannels);
  const W walk(plan);

  Vector<T, kSize> values[W::kItems];
  A center[kChannels] = {};
  walk.each([&](int i, int64_t sample, int64_t position) {
    values[i] = Vector<T, kSize>::load(x.data + offset_of(x, sample, walk.channel, position));
  });
  const double count = double(plan.cut.count(walk.chunk));
  const A inverse = A(1) / A(count);
  if (plan.centered) {
    walk.each([&](int i, int64_t, int64_t) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) center[k % kChannels] += values[i][k];
    });
    walk.sum(center, shared_sums);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) center[k] *= inverse;
  }
  // Deviations from the rounded mean, whose own mean is what rounding lost.
  A sums[2 * kChannels] = {};
  walk.each([&](int i, int64_t, int64_t) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values[i][k] - center[k % kChannels];
      sums[k % kChannels] += d;
      sums[kChannels + k % kChannels] += d * d;
    }
  });
  walk.sum(sums, shared_squares);
  if (!walk.speaks()) return;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const double low = plan.centered ? sums[k] / count : 0;
    partials[walk.partial(k)] = {center[k] + low, sums[kChannels + k] - sums[k] * low};
  }
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    grad_sums_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                     const double* mean, const Acc<T>* position_weight, ChunkGradients* partials) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kChannels = W::kChannels;
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kChannels);
  const W walk(plan);
  const int64_t groups = plan.channels / plan.group_size;

  A center[kChannels] = {};
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (walk.active) center[k] = A(mean[walk.row * groups + (walk.channel + k) / plan.group_size]);
  }
  A sums[2 * kChannels] = {};
  walk.each([&](int, int64_t sample, int64_t position) {
    const auto g = Vector<T, kSize>::load(dy.data + offset_of(dy, sample, walk.channel, position));
    const auto v = Vector<T, kSize>::load(x.data + offset_of(x, sample, walk.channel, position));
    Vector<A, kSize> w;
    if (position_weight) w = Vector<A, kSize>::load(position_weight + position);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A grad = position_weight ? g[k] * w[k] : g[k];
      sums[k % kChannels] += grad;
      sums[kChannels + k % kChannels] += grad * (v[k] - center[k % kChannels]);
    }
  });
  walk.sum(sums, shared);
  if (!walk.speaks()) return;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) partials[walk.partial(k)] = {sums[k], sums[kChannels + k]};
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    apply_kernel(const Plan plan, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                 const Coefficients<Acc<T>> coefficients, const Acc<T>* position_weight, const Acc<T>* position_bias) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kChannels = W::kChannels;
  const W walk(plan);

  A center[kChannels], scale[kChannels], shift[kChannels];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.shift, A(0), shift);
  walk.each([&](int, int64_t sample, int64_t position) {
    const auto v = Vector<T, kSize>::load(x.data + offset_of(x, sample, walk.channel, position));
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      result[k] = (v[k] - center[k % kChannels]) * scale[k % kChannels] + shift[k % kChannels];
    }
    if (kLayout == Layout::kContiguous && position_weight) {
      const auto w = Vector<A, kSize>::load(position_weight + position);
#pragma unroll
      for (int k = 0; k < kSize; ++k) result[k] *= w[k];
    }
    if (kLayout == Layout::kContiguous && position_bias) {
      const auto b = Vector<A, kSize>::load(position_bias + position);
#pragma unroll
      for (int k = 0; k < kSize; ++k) result[k] += b[k];
    }
    Vector<T, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.values[k] = T(result[k]);
    out.store(y.data + offset_of(y, sample, walk.channel, position));
  });
}

template <typename T, Layout kLayout, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    grad_apply_kernel(const Plan plan, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                      const ChannelTensor<T> dx, const Coefficients<Acc<T>> coefficients) {
  using A = Acc<T>;
  using W = Walk<kLayout, kSize>;
  constexpr int kChannels = W::kChannels;
  const W walk(plan);

  A center[kChannels], scale[kChannels], slope[kChannels], shift[kChannels];
  load_coefficients(walk, coefficients.center, A(0), center);
  load_coefficients(walk, coefficients.scale, A(1), scale);
  load_coefficients(walk, coefficients.slope, A(0), slope);
  load_coefficients(walk, coefficients.shift, A(0), shift);
  walk.each([&](int, int64_t sample, int64_t position) {
    const auto g = Vector<T, kSize>::load(dy.data + offset_of(dy, sample, walk.channel, position));
    const auto v = Vector<T, kSize>::load(x.data + offset_of(x, sample, walk.channel, position));
    Vector<T, kSize> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const int c = k % kChannels;
      out.values[k] = T(g[k] * scale[c] + ((v[k] - center[c]) * slope[c] + shift[c]));
    }
    out.store(dx.data + offset_of(dx, sample, walk.channel, position));
  });
}

// Long rows: walked across, so that the sums for dweight and dbias come with the input gradient.
template <typename T, int kSize>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    long_row_backward_kernel(const Plan plan, const LongRowBackward<T, Acc<T>> a) {
  using A = Acc<T>;
  using W = Walk<Layout::kChannelsLast, kSize>;
  NORMOPS_SHARED(A, shared, W::kShared * 2 * kSize);
  const W walk(plan);

  A weight[kSize], sums[2 * kSize] = {};
#pragma unroll
  for (int k = 0; k < kSize; ++k) weight[k] = walk.active && a.weight ? a.weight[walk.channel + k] : A(1);
  walk.each([&](int, int64_t, int64_t row) {
    const auto g = Vector<T, kSize>::load(a.dy.data + offset_of(a.dy, 0, walk.channel, row));
    const auto v = Vector<T, kSize>::load(a.x.data + offset_of(a.x, 0, walk.channel, row));
    const double rstd = a.rstd[row];
    const SplitMean<A> split(a.mean[row]);
    const A scale = A(rstd), low = A(-split.low * rstd);
    if (a.partials) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sums[k] += g[k] * ((v[k] - split.center) * scale + low);
        sums[kSize + k] += g[k];
      }
    }
    if (a.dx.data) {
      const A slope = a.coefficients.slope[row], shift = a.coefficients.shift[row];
      Vector<T, kSize> out;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        out.values[k] = T(g[k] * weight[k] * scale + ((v[k] - split.center) * slope + shift));
      }
      out.store(a.dx.data + offset_of(a.dx, 0, walk.channel, row));
    }
  });
  if (a.partials == nullptr) return;
  walk.sum(sums, shared);
  if (!walk.speaks()) return;
  A* const partial = a.partials + walk.chunk * 2 * plan.channels + walk.channel;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    partial[k] = sums[k];
    partial[plan.channels + k] = sums[kSize + k];
  }
}

}  // namespace normops::cuda
