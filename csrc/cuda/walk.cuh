#pragma once

// Which elements a thread of the channel engine holds, and whom it shares sums with. The stages are written once, over
// either walk.

#include "channel.h"
#include "reduce.cuh"

namespace normops::cuda {

constexpr int kWalkThreads = 256, kWalkBlocks = 1;
constexpr int kWalkWarps = kWalkThreads / kWarp;

// Vectors a thread holds at a time. Across lines there is nothing to gain from a group of lanes, so a thread holds
// more.
constexpr int items_of(Layout layout, int size) { return layout == Layout::kContiguous && size > 1 ? 8 : 16; }

template <Layout kLayout, int kSize>
struct Walk;

// Along the lines of a channel: `lanes` adjacent threads share a chunk, and all elements of a thread one channel.
template <int kSize>
struct Walk<Layout::kContiguous, kSize> {
  static constexpr int kItems = items_of(Layout::kContiguous, kSize);
  static constexpr int kChannels = 1;  // of the elements of a vector

  const Plan& plan;
  int64_t row, channel, chunk;
  bool active;

  __device__ __forceinline__ explicit Walk(const Plan& plan) : plan(plan) {
    const int64_t thread = int64_t(blockIdx.x) * kWalkThreads + threadIdx.x;
    const int64_t unit = thread / plan.lanes, line = unit / plan.cut.chunks;
    lane_ = int(thread - unit * plan.lanes);
    chunk = unit - line * plan.cut.chunks;
    row = line / plan.channels;
    channel = line - row * plan.channels;
    active = row < plan.rows;
    const int64_t first = chunk * plan.cut.pieces_per_chunk;
    pieces_ = active ? int(min(plan.cut.pieces_per_chunk, plan.cut.total_pieces - first)) : 0;
    line_ = first / plan.cut.pieces;
    piece_ = first - line_ * plan.cut.pieces;
  }

  // f(item, sample, position) for the vectors the thread holds.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    int64_t line = line_, piece = piece_;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t position = (piece * plan.lanes + lane_) * kSize;
      if (i < pieces_ && position < plan.cut.positions) f(i, plan.over_batch ? line : row, position);
      if (++piece == plan.cut.pieces) {
        piece = 0;
        ++line;
      }
    }
  }

  template <int kTerms, typename A>
  __device__ __forceinline__ void sum(A (&terms)[kTerms], A*) const {
    sum_lanes(terms, plan.lanes);
  }
  // The thread that speaks for those it shares sums with, and where the chunk's partial is kept.
  __device__ __forceinline__ bool speaks() const { return active && lane_ == 0; }
  __device__ __forceinline__ int64_t partial(int) const {
    return (row * plan.channels + channel) * plan.cut.chunks + chunk;
  }
  static constexpr int kShared = 1;

 private:
  int lane_, pieces_;
  int64_t line_, piece_;
};

// Across the lines: a vector holds adjacent channels of one position. Threads of one column share sums.
template <int kSize>
struct Walk<Layout::kChannelsLast, kSize> {
  static constexpr int kItems = items_of(Layout::kChannelsLast, kSize);
  static constexpr int kChannels = kSize;

  const Plan& plan;
  int64_t row, channel, chunk;
  bool active;

  __device__ __forceinline__ explicit Walk(const Plan& plan) : plan(plan) {
    const int64_t columns = int64_t(plan.lanes) * kSize;
    const int64_t tiles = (plan.channels + columns - 1) / columns;
    const int64_t down = int64_t(blockIdx.x) / tiles, tile = blockIdx.x - down * tiles;
    row = down / plan.cut.chunks;
    chunk = down - row * plan.cut.chunks;
    channel = tile * columns + threadIdx.x % plan.lanes * kSize;
    active = channel < plan.channels;
    const int64_t sample = chunk / plan.cut.pieces;
    sample_ = plan.over_batch ? sample : row;
    begin_ = (chunk - sample * plan.cut.pieces) * plan.cut.span;
  }

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    const int down = kWalkThreads / plan.lanes, thread = threadIdx.x / plan.lanes;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t position = begin_ + i * down + thread;
      if (active && position < plan.cut.positions) f(i, sample_, position);
    }
  }

  // Lanes of one column first, then the warps, in order.
  template <int kTerms, typename A>
  __device__ __forceinline__ void sum(A (&terms)[kTerms], A* shared) const {
    const int lanes = plan.lanes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = threadIdx.x % lanes;
    for (int distance = kWarp / 2; distance >= lanes; distance /= 2) {
#pragma unroll
      for (int k = 0; k < kTerms; ++k) terms[k] += __shfl_xor_sync(kAllLanes, terms[k], distance);
    }
    if (lane < lanes) {
#pragma unroll
      for (int k = 0; k < kTerms; ++k) shared[(warp * kTerms + k) * lanes + lane] = terms[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      A total = shared[k * lanes + column];
      for (int w = 1; w < kWalkWarps; ++w) total += shared[(w * kTerms + k) * lanes + column];
      terms[k] = total;
    }
  }
  __device__ __forceinline__ bool speaks() const { return active && threadIdx.x < plan.lanes; }
  __device__ __forceinline__ int64_t partial(int k) const {
    return (row * plan.cut.chunks + chunk) * plan.channels + channel + k;
  }
  static constexpr int kShared = kWalkWarps * kWarp;

 private:
  int64_t sample_, begin_;
};

template <typename T>
__device__ __forceinline__ int64_t offset_of(const ChannelTensor<T>& tensor, int64_t sample, int64_t channel,
                                             int64_t position) {
  return sample * tensor.strides.sample + channel * tensor.strides.channel + position * tensor.strides.position;
}

}  // namespace normops::cuda
