#pragma once

// Which vectors a thread of the channel engine holds, and whom it shares sums with. The stages are written once, over
// either walk. Numbers within a block have 32 bits; what goes beyond that is computed once, in where the block starts.

#include "channel.h"
#include "reduce.cuh"

namespace normops::cuda {

constexpr int kWalkLog2 = 8, kWalkThreads = 1 << kWalkLog2;
constexpr int kWalkWarps = kWalkThreads / kWarp;

// Vectors that a thread has at most. Where sums are taken about a mean, all are read before the first is used;
// elsewhere kBatch of each tensor.
constexpr int kMostItems = 16, kBatch = 4;

__device__ __forceinline__ uint32_t block_number(bool reverse) {
  return reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// A number as it is from here on: the compiler would add what follows to what it is made of, in 64 bits.
__device__ __forceinline__ int64_t settled(int64_t offset) {
#ifndef NORMOPS_EMULATED
  asm("" : "+l"(offset));
#endif
  return offset;
}

// The number of this thread, which where it is asked for again is not what is kept in registers since the last time.
__device__ __forceinline__ uint32_t this_thread() {
  uint32_t thread = threadIdx.x;
#ifndef NORMOPS_EMULATED
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

template <typename T>
__device__ __forceinline__ T* byte_offset(T* pointer, uint64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// A vector of a thread: whether there is one, and where it is, seen from where the block (or the thread) starts.
struct Place {
  bool there;
  uint32_t line, position;
};

// Vector number v of a block that has `count` of them along lines. by_line: vectors of a line.
template <int kSize>
__device__ __forceinline__ Place place_in_lines(uint32_t v, uint32_t count, const Divisor& by_line) {
  const bool there = v < count;
  const uint32_t line = by_line.split(v);
  return {there, line, v * kSize};
}

template <Layout kLayout, int kSize>
struct Walk;

// Along the lines of a column: a block has one chunk of one column.
template <int kSize>
struct Walk<Layout::kContiguous, kSize> {
  static constexpr int kItems = kMostItems;
  static constexpr int kColumns = 1;  // columns that the elements of a vector belong to

  const Plan& plan;
  int64_t row;
  uint32_t column, chunk;

  __device__ __forceinline__ explicit Walk(const Plan& plan, bool reverse = false) : plan(plan) {
    chunk = block_number(reverse);
    column = plan.by_chunks.split(chunk);
    row = plan.by_columns.split(column);
    uint32_t number = chunk;
    const uint32_t whole = plan.cut.cycle.split(number);
    line_ = whole + number * plan.cut.line_step;
    position_ = number * plan.cut.position_step;
    count_ = plan.cut.count(number);
  }

  __device__ __forceinline__ Place place(int i) const {
    return place_in_lines<kSize>(threadIdx.x + i * blockDim.x, count_ / kSize, plan.by_line);
  }
  template <typename T>
  struct Cursor {
    T* start;
    uint32_t step;  // bytes from line to line, which only short lines need

    __device__ __forceinline__ T* next(const Place& place) const {
      return byte_offset(start, uint64_t(place.line) * step + uint64_t(place.position) * sizeof(T));
    }
  };
  template <typename T>
  __device__ __forceinline__ Cursor<T> cursor(const ChannelTensor<T>& x) const {
    const int64_t sample = plan.over_batch ? line_ : row;
    const int64_t offset = sample * x.strides.sample + column * x.strides.channel + position_;
    return {x.data + settled(offset), uint32_t(x.strides.sample) * uint32_t(sizeof(T))};
  }

  __device__ __forceinline__ bool active() const { return true; }
  __device__ __forceinline__ uint32_t count() const { return count_; }
  __device__ __forceinline__ int64_t partial(uint32_t) const {
    return (row * plan.cut.chunks + chunk) * plan.columns + column;
  }

  static constexpr int kShared = kWarp;  // values that the sum of one term takes

  // The sums of the block's columns, for the threads that have them.
  template <typename A>
  __device__ __forceinline__ void sum(A (&terms)[1], A* shared) const {
    block_sum(terms, blockDim.x, shared);
  }
  // f(column of the block, its two sums, what `sum` left for it), by one thread for each column.
  template <typename A, typename F>
  __device__ __forceinline__ void totals(A (&terms)[2], A* shared, const A (&own)[1], const A*, F f) const {
    block_sum(terms, blockDim.x, shared);
    if (threadIdx.x == 0) f(0, terms[0], terms[1], own[0]);
  }

 private:
  int64_t line_, position_;
  uint32_t count_;
};

// Across the lines: a vector holds adjacent columns of one position. Lanes side by side take columns, and threads below
// each other, which share sums, take positions in turns.
template <int kSize>
struct Walk<Layout::kChannelsLast, kSize> {
  static constexpr int kItems = kMostItems;
  static constexpr int kColumns = kSize;

  const Plan& plan;
  int64_t row;
  uint32_t column, chunk;  // the thread's first column

  __device__ __forceinline__ explicit Walk(const Plan& plan, bool reverse = false) : plan(plan) {
    uint32_t tile = block_number(reverse);
    chunk = plan.by_tiles.split(tile);
    row = plan.by_chunks.split(chunk);
    first_column_ = tile << plan.lanes_log2 << kSizeLog2;
    column = first_column_ + (lane() << kSizeLog2);
    uint32_t number = chunk;
    sample_ = plan.cut.cycle.split(number) + number * plan.cut.line_step;
    if (!plan.over_batch) sample_ = row;
    begin_ = number * plan.cut.position_step;
    count_ = plan.cut.count(number);
    const uint32_t first = threadIdx.x >> plan.lanes_log2;
    items_ = active() && first < count_ ? ((count_ - 1 - first) >> (kWalkLog2 - plan.lanes_log2)) + 1 : 0;
  }

  __device__ __forceinline__ Place place(int i) const { return {uint32_t(i) < items_, 0, i * down()}; }
  template <typename T>
  struct Cursor {
    T* at;
    int64_t step;

    __device__ __forceinline__ T* next(const Place&) {
      T* const found = at;
      at += step;
      return found;
    }
  };
  template <typename T>
  __device__ __forceinline__ Cursor<T> cursor(const ChannelTensor<T>& x) const {
    const int64_t offset = sample_ * x.strides.sample + position({}) * x.strides.position + column;
    return {x.data + settled(offset), settled(down() * x.strides.position)};
  }
  __device__ __forceinline__ int64_t position(const Place& place) const {
    return begin_ + (threadIdx.x >> plan.lanes_log2) + place.position;
  }

  __device__ __forceinline__ bool active() const { return column < plan.columns; }
  __device__ __forceinline__ uint32_t count() const { return count_; }
  __device__ __forceinline__ int64_t partial(uint32_t column_of_block) const {
    return (row * plan.cut.chunks + chunk) * plan.columns + first_column_ + column_of_block;
  }

  static constexpr int kShared = kWalkWarps * (kWarp + (kSize == 8 ? 4 : 0));  // with the gaps of slot

  template <typename A>
  __device__ __forceinline__ void sum(A (&terms)[kColumns], A* shared) const {
    to_shared(terms, shared);
    __syncthreads();
    each_column(
        [&](uint32_t, uint32_t k, uint32_t lane) { shared[slot<A>(k, lane)] = down_warps<kColumns>(shared, k, lane); });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kColumns; k += kPack<A>) {
      const Pack<A> pack = *reinterpret_cast<const Pack<A>*>(shared + slot<A>(k, lane()));
#pragma unroll
      for (int p = 0; p < kPack<A>; ++p) terms[k + p] = pack.values[p];
    }
  }
  template <typename A, typename F>
  __device__ __forceinline__ void totals(A (&terms)[2 * kColumns], A* shared, const A (&)[kColumns], const A* sums,
                                         F f) const {
    to_shared(terms, shared);
    __syncthreads();
    each_column([&](uint32_t column_of_block, uint32_t k, uint32_t lane) {
      if (first_column_ + column_of_block >= plan.columns) return;
      f(column_of_block, down_warps<2 * kColumns>(shared, k, lane),
        down_warps<2 * kColumns>(shared, kColumns + k, lane), sums ? sums[slot<A>(k, lane)] : A(0));
    });
  }

 private:
  static constexpr int kSizeLog2 = kSize == 8 ? 3 : kSize == 4 ? 2 : kSize == 2 ? 1 : 0;

  __device__ __forceinline__ uint32_t down() const { return kWalkThreads >> plan.lanes_log2; }
  __device__ __forceinline__ uint32_t lane() const { return threadIdx.x & ((1u << plan.lanes_log2) - 1); }

  // Shared memory is written 16 bytes at a time, so as many terms of a lane lie side by side.
  template <typename A>
  static constexpr int kPack = kSize * int(sizeof(A)) > kVectorBytes ? kVectorBytes / int(sizeof(A)) : kSize;
  template <typename A>
  struct alignas(sizeof(A) * kPack<A>) Pack {
    A values[kPack<A>];
  };
  // With half a row of banks between the packs of a lane, those that are read together lie in different banks.
  template <typename A>
  __device__ __forceinline__ uint32_t slot(uint32_t term, uint32_t lane) const {
    constexpr uint32_t kGap = kSize > kPack<A> ? kWarp / 2 : 0;
    return term / kPack<A> * ((kPack<A> << plan.lanes_log2) + kGap) + lane * kPack<A> + term % kPack<A>;
  }

  // f(column of the block, its number in a vector, lane), by one thread for each, adjacent ones for adjacent threads.
  template <typename F>
  __device__ __forceinline__ void each_column(F f) const {
    if (threadIdx.x >> plan.lanes_log2 < kSize) f(threadIdx.x, threadIdx.x & (kSize - 1), threadIdx.x >> kSizeLog2);
  }

  // The lanes of a warp that have the same columns add up, and the warp's sums go to shared memory.
  template <int kTerms, typename A>
  __device__ __forceinline__ void to_shared(A (&terms)[kTerms], A* shared) const {
    const int lanes = 1 << plan.lanes_log2, warp = threadIdx.x / kWarp;
    for (int distance = kWarp / 2; distance >= lanes; distance /= 2) {
#pragma unroll
      for (int k = 0; k < kTerms; ++k) terms[k] += __shfl_xor_sync(kAllLanes, terms[k], distance);
    }
    if (threadIdx.x % kWarp >= unsigned(lanes)) return;
#pragma unroll
    for (int k = 0; k < kTerms; k += kPack<A>) {
      Pack<A> pack;
#pragma unroll
      for (int p = 0; p < kPack<A>; ++p) pack.values[p] = terms[k + p];
      *reinterpret_cast<Pack<A>*>(shared + slot<A>(warp * kTerms + k, lane())) = pack;
    }
  }
  // In the order of the warps.
  template <int kTerms, typename A>
  __device__ __forceinline__ A down_warps(const A* shared, uint32_t k, uint32_t lane) const {
    const A* at = shared + slot<A>(k, lane);
    const uint32_t step = slot<A>(kTerms, 0);  // from warp to warp
    A total = *at;
#pragma unroll
    for (int w = 1; w < kWalkWarps; ++w) total += *(at += step);
    return total;
  }

  int64_t sample_, begin_;
  uint32_t first_column_, count_, items_;
};

}  // namespace normops::cuda
