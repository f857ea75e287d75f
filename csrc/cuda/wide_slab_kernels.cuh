#pragma once

// Small planes whose lengths are no multiples of a vector's, in a batch whose samples share statistics: all stages in
// one kernel, and memory is read once. A block has as many channels as are whole vectors together, a line of which lies
// in every sample. A thread has the same vector of the line in all samples that it takes, so its elements belong to the
// same channels there: to one, and from some element on to the next.

#include "any_array.cuh"
#include "slab_kernels.cuh"

namespace normops::cuda {

constexpr int kMostWideChannels = 8;  // of 16-bit planes of odd lengths

// What launchers know of them.
struct WideSlabs {
  Divisor by_line, by_plane;  // vectors of a line, elements of a plane
  uint32_t channels;          // of a block
  uint32_t depth, samples;    // threads that take samples in turns
};

template <int kSize>
struct WideSlabWalk {
  const WideSlabs& slabs;
  int64_t first_channel;
  uint32_t own, next;  // the channels of the thread's elements, among those of the block
  uint32_t of_own;     // how many of its elements belong to the first

  __device__ __forceinline__ explicit WideSlabWalk(const WideSlabs& slabs)
      : slabs(slabs), first_channel(int64_t(blockIdx.x) * slabs.channels) {
    uint32_t vector = threadIdx.x;
    first_sample_ = slabs.by_line.split(vector);
    element_ = vector * kSize;
    own = slabs.by_plane.quotient(element_);
    of_own = min(uint32_t(kSize), (own + 1) * plane() - element_);
    next = own + (of_own < kSize);
  }

  __device__ __forceinline__ uint32_t plane() const { return slabs.by_plane.divisor(); }
  __device__ __forceinline__ uint32_t count() const { return slabs.samples * plane(); }  // elements of a channel
  __device__ __forceinline__ bool has(uint32_t thread, int i) const {
    const uint32_t first = slabs.by_line.quotient(thread);
    return first < slabs.depth && first + i * slabs.depth < slabs.samples;
  }
  // f(item) for the vectors that the thread has. What is unpacked behind a condition is not kept in registers.
  template <int kItems, typename F>
  __device__ __forceinline__ void each_item(const F& f) const {
    const uint32_t thread = this_thread();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (has(thread, i)) f(i);
    }
  }
  template <typename T>
  __device__ __forceinline__ T* start(const ChannelTensor<T>& x) const {
    return x.data + settled(first_sample_ * x.strides.position + first_channel * plane() + element_);
  }
  template <typename T>
  __device__ __forceinline__ int64_t step(const ChannelTensor<T>& x) const {
    return slabs.depth * x.strides.position;
  }

  // For each of the thread's elements what is known of its channel.
  template <typename A>
  __device__ __forceinline__ void spread(const A* of_channels, A (&values)[kSize]) const {
    const A first = of_channels[own], second = of_channels[next];
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] = uint32_t(k) < of_own ? first : second;
  }

  // f(channel, sums), by one thread for each channel of the block, of what the threads have for each of their elements.
  // `shared` holds 2 * kTerms * kSlabThreads values.
  template <int kTerms, typename A, typename F>
  __device__ __forceinline__ void each_sum(const A (&terms)[kTerms][kSize], A* shared, const F& f) const {
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      A first = 0, second = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        first += uint32_t(k) < of_own ? terms[t][k] : A(0);
        second += uint32_t(k) < of_own ? A(0) : terms[t][k];
      }
      shared[2 * t * kSlabThreads + threadIdx.x] = first;
      shared[(2 * t + 1) * kSlabThreads + threadIdx.x] = second;
    }
    __syncthreads();
    const uint32_t line = slabs.by_line.divisor(), lane = threadIdx.x % kWarp;
    for (uint32_t c = threadIdx.x / kWarp; c < slabs.channels; c += blockDim.x / kWarp) {
      const uint32_t begin = c * plane(), last = (begin + plane() - 1) / kSize;
      A sums[kTerms] = {};
      for (uint32_t v = begin / kSize + lane; v <= last; v += kWarp) {
        const A* from = shared + (v * kSize < begin ? kSlabThreads : 0) + v;
        for (uint32_t y = 0; y < slabs.depth; ++y, from += line) {
#pragma unroll
          for (int t = 0; t < kTerms; ++t) sums[t] += from[2 * t * kSlabThreads];
        }
      }
      sum_lanes(sums, kWarp);
      if (lane == 0) f(c, sums);
    }
    __syncthreads();
  }

 private:
  uint32_t first_sample_, element_;
};

template <typename T, int kSize, int kItems>
__global__ void __launch_bounds__(kSlabThreads, 1)
    wide_slab_forward_kernel(const WideSlabs slabs, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                             const ForwardMerge<Acc<T>> a) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared_sums, 2 * kSlabThreads);
  NORMOPS_SHARED(A, shared_squares, 4 * kSlabThreads);
  NORMOPS_SHARED(A, centers, kMostWideChannels);
  // First the weights and the biases.
  NORMOPS_SHARED(A, scales, kMostWideChannels);
  NORMOPS_SHARED(A, shifts, kMostWideChannels);
  const WideSlabWalk<kSize> walk(slabs);
  Vector<T, kSize> values[kItems];
  const T* const x_start = walk.start(x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    values[i] = Vector<T, kSize>::load_if(walk.has(threadIdx.x, i), x_start + i * walk.step(x));
  }
  if (threadIdx.x < slabs.channels) {
    scales[threadIdx.x] = read_as<A>(a.weight, walk.first_channel + threadIdx.x);
    shifts[threadIdx.x] = read_as<A>(a.bias, walk.first_channel + threadIdx.x);
  }
  const A inverse = reciprocal(A(walk.count()));
  A sums[1][kSize] = {};
  walk.template each_item<kItems>([&](int i) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sums[0][k] += values[i][k];
  });
  walk.each_sum(sums, shared_sums, [&](uint32_t c, const A(&of)[1]) { centers[c] = of[0] * inverse; });
  A center[kSize], moments[2][kSize] = {};
  walk.spread(centers, center);
  walk.template each_item<kItems>([&](int i) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values[i][k] - center[k];
      moments[0][k] += d;
      moments[1][k] += d * d;
    }
  });
  walk.each_sum(moments, shared_squares, [&](uint32_t c, const A(&of)[2]) {
    const A low = of[0] * inverse, var = of[1] * inverse - low * low;
    const A scale = reciprocal_std(var, A(a.eps)) * scales[c];
    scales[c] = scale;
    shifts[c] -= low * scale;
    const int64_t channel = walk.first_channel + c;
    const double mean = double(centers[c]) + low, variance = var < A(0) ? A(0) : var;
    a.mean[channel] = mean;
    a.var[channel] = variance;
    if (a.running.running[0]) move_running(a.running, 0, channel, mean);
    if (a.running.running[1]) move_running(a.running, 1, channel, variance);
  });
  A scale[kSize], shift[kSize];
  walk.spread(scales, scale);
  walk.spread(shifts, shift);
  T* const y_start = walk.start(y);
  walk.template each_item<kItems>([&](int i) {
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) result[k] = (values[i][k] - center[k]) * scale[k] + shift[k];
    store_rounded<kSize>(y_start + i * walk.step(y), result);
  });
}

template <typename T, int kSize, int kItems>
__global__ void __launch_bounds__(kSlabThreads, 1)
    wide_slab_backward_kernel(const WideSlabs slabs, const ChannelTensor<const T> dy, const ChannelTensor<const T> x,
                              const ChannelTensor<T> dx, const BackwardMerge<Acc<T>> a) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared, 4 * kSlabThreads);
  NORMOPS_SHARED(A, centers, kMostWideChannels);
  NORMOPS_SHARED(A, scales, kMostWideChannels);
  NORMOPS_SHARED(A, slopes, kMostWideChannels);
  NORMOPS_SHARED(A, shifts, kMostWideChannels);
  NORMOPS_SHARED(double, lows, kMostWideChannels);
  NORMOPS_SHARED(double, rstds, kMostWideChannels);
  const WideSlabWalk<kSize> walk(slabs);
  Vector<T, kSize> grads[kItems], values[kItems];
  const T* const dy_start = walk.start(dy);
  const T* const x_start = walk.start(x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    grads[i] = Vector<T, kSize>::load_if(walk.has(threadIdx.x, i), dy_start + i * walk.step(dy));
    values[i] = Vector<T, kSize>::load_if(walk.has(threadIdx.x, i), x_start + i * walk.step(x));
  }
  if (const uint32_t c = threadIdx.x; c < slabs.channels) {
    const int64_t channel = walk.first_channel + c;
    const SplitMean<A> split(a.mean[channel]);
    centers[c] = split.center;
    lows[c] = split.low;
    rstds[c] = 1 / sqrt(a.var[channel] + a.eps);
    scales[c] = read_as<A>(a.weight, channel);
  }
  __syncthreads();
  A center[kSize], sums[2][kSize] = {};
  walk.spread(centers, center);
  walk.template each_item<kItems>([&](int i) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[0][k] += grads[i][k];
      sums[1][k] += grads[i][k] * (values[i][k] - center[k]);
    }
  });
  walk.each_sum(sums, shared, [&](uint32_t c, const A(&of)[2]) {
    const int64_t channel = walk.first_channel + c;
    const A weight = scales[c], dy_xhat = (of[1] - A(lows[c]) * of[0]) * A(rstds[c]);
    if (a.dweight) write_as(a.dweight, channel, dy_xhat);
    if (a.dbias) write_as(a.dbias, channel, of[0]);
    const double n = walk.count();
    const InputGradient gradient(rstds[c], lows[c], of[0] * weight / n, dy_xhat * weight / n, /*centered=*/true);
    scales[c] = A(rstds[c]) * weight;
    slopes[c] = A(gradient.slope);
    shifts[c] = A(gradient.shift);
  });
  if (dx.data == nullptr) return;
  A scale[kSize], slope[kSize], shift[kSize];
  walk.spread(scales, scale);
  walk.spread(slopes, slope);
  walk.spread(shifts, shift);
  T* const dx_start = walk.start(dx);
  walk.template each_item<kItems>([&](int i) {
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      result[k] = grads[i][k] * scale[k] + ((values[i][k] - center[k]) * slope[k] + shift[k]);
    }
    store_rounded<kSize>(dx_start + i * walk.step(dx), result);
  });
}

}  // namespace normops::cuda
