#pragma once

// The channel engine where all elements that share a statistic (a slab) fit in the registers of one block, in
// contiguous layout: the three stages in one kernel, and memory is read once.
//
// A slab is made of lines: the samples of a channel, or the channels of a group. Its vectors are dealt to the threads
// in turn, wherever in a line they are. Where the device has clusters, those of one can share a slab, each block with a
// part of its vectors, which in the backward is made of whole channels if a group has several.

#include "any_array.cuh"
#include "epilogue.cuh"
#include "walk.cuh"

namespace normops::cuda {

constexpr int kSlabThreads = 512;

// What launchers know of the slabs.
struct Slabs {
  Divisor groups;
  uint32_t lines, count;  // lines and vectors of a slab
  uint32_t part;          // vectors of a block
};

template <int kSize, bool kCluster>
struct SlabWalk {
  const Plan& plan;
  const Slabs& slabs;
  int64_t row;
  uint32_t slab, group, begin, end;  // of the block's vectors

  __device__ __forceinline__ SlabWalk(const Plan& plan, const Slabs& slabs)
      : plan(plan), slabs(slabs), slab(blockIdx.x), begin(0), end(slabs.count) {
    if constexpr (kCluster) {
      slab = blockIdx.x / cluster_size();
      begin = min(cluster_rank() * slabs.part, slabs.count);
      end = min(begin + slabs.part, slabs.count);
    }
    group = slab;
    row = slabs.groups.split(group);
  }

  // Whether it is for this thread to say what is known of the slab.
  __device__ __forceinline__ bool speaks() const { return threadIdx.x == 0 && (!kCluster || begin == 0); }
  __device__ __forceinline__ bool has(uint32_t thread, int i) const { return begin + thread + i * blockDim.x < end; }

  __device__ __forceinline__ bool one_channel() const { return plan.group_size == 1; }
  __device__ __forceinline__ uint32_t channels() const { return uint32_t(plan.group_size); }
  __device__ __forceinline__ int64_t first_channel() const { return group * plan.group_size; }

  __device__ __forceinline__ Place place(uint32_t thread, int i) const {
    return place_in_lines<kSize>(begin + thread + i * blockDim.x, end, plan.by_line);
  }
  template <typename T>
  __device__ __forceinline__ T* start(const ChannelTensor<T>& x) const {
    return x.data + settled((plan.over_batch ? 0 : row) * x.strides.sample + first_channel() * x.strides.channel);
  }
  template <typename T>
  __device__ __forceinline__ T* at(T* start, const Strides& strides, const Place& place) const {
    const uint32_t step = uint32_t(plan.over_batch ? strides.sample : strides.channel) * uint32_t(sizeof(T));
    return byte_offset(start, uint64_t(place.line) * step + uint64_t(place.position) * sizeof(T));
  }
  __device__ __forceinline__ double count() const { return double(slabs.count) * kSize; }
};

// Dynamic shared memory: weight and bias of every channel, then scale and shift.
template <typename T, int kSize, int kItems, bool kEpilogue, bool kCluster>
__global__ void __launch_bounds__(kSlabThreads, (kItems <= 8 || kSize * sizeof(T) <= 4) && !kEpilogue ? 2 : 1)
    slab_forward_kernel(const Plan plan, const Slabs slabs, const ChannelTensor<const T> x, const ChannelTensor<T> y,
                        const ForwardMerge<Acc<T>> a, const EpilogueIf<T, kEpilogue> epilogue) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared_sums, kWarp);
  NORMOPS_SHARED(A, shared_squares, 2 * kWarp);
  NORMOPS_SHARED(A, told_sum, 1);
  NORMOPS_SHARED(A, told_squares, 2);
  NORMOPS_DYNAMIC_SHARED(A, of_channels);
  const SlabWalk<kSize, kCluster> walk(plan, slabs);
  const int threads = blockDim.x;
  const A inverse = reciprocal(A(slabs.count) * kSize);
  const T* const x_start = walk.start(x);

  Vector<T, kSize> values[kItems];
  uint32_t thread = this_thread();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Place place = walk.place(thread, i);
    values[i] = Vector<T, kSize>::load_if(place.there, walk.at(x_start, x.strides, place));
  }
  // The parameters come in with x: nobody waits for them later. Those of a channel belong to one thread until scale and
  // shift are known.
  const int64_t first = walk.first_channel();
  for (uint32_t c = threadIdx.x; c < walk.channels(); c += threads) {
    of_channels[2 * c] = read_as<A>(a.weight, first + c);
    of_channels[2 * c + 1] = read_as<A>(a.bias, first + c);
  }
  // Here and below, elements are unpacked behind a condition, or they would be kept in registers for the next time.
  A sum[1] = {0};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!walk.has(thread, i)) continue;
    A item = values[i][0];
#pragma unroll
    for (int k = 1; k < kSize; ++k) item += values[i][k];
    sum[0] += item;
  }
  block_sum(sum, threads, shared_sums);
  if constexpr (kCluster) cluster_sum(sum, told_sum);
  const A center = sum[0] * inverse;
  thread = this_thread();
  A sums[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!walk.has(thread, i)) continue;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const A d = values[i][k] - center;
      sums[0] += d;
      sums[1] += d * d;
    }
  }
  block_sum(sums, threads, shared_squares);
  if constexpr (kCluster) cluster_sum(sums, told_squares);
  const A low = sums[0] * inverse, var = sums[1] * inverse - low * low;
  const A rstd = reciprocal_std(var, A(a.eps));
  if (walk.speaks()) {
    const double mean = double(center) + low, variance = var < A(0) ? A(0) : var;
    a.mean[walk.slab] = mean;
    a.var[walk.slab] = variance;
    if (a.running.running[0]) move_running(a.running, 0, walk.slab, mean);
    if (a.running.running[1]) move_running(a.running, 1, walk.slab, variance);
  }
  for (uint32_t c = threadIdx.x; c < walk.channels(); c += threads) {
    const A of_channel = rstd * of_channels[2 * c];
    of_channels[2 * c] = of_channel;
    of_channels[2 * c + 1] -= low * of_channel;
  }
  __syncthreads();
  A scale = of_channels[0], shift = of_channels[1];
  T* const y_start = walk.start(y);
  thread = this_thread();
  const auto normalize = [&](const Place& place, const Vector<T, kSize>& vector, A(&result)[kSize]) {
    if (!walk.one_channel()) {
      scale = of_channels[2 * place.line];
      shift = of_channels[2 * place.line + 1];
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) result[k] = (vector[k] - center) * scale + shift;
  };
  if constexpr (kEpilogue) {
    const T* const residual_start = walk.start(epilogue.other);
    const auto load = [&](int i) {
      const Place place = walk.place(thread, i);
      return Vector<T, kSize>::load_if(place.there && epilogue.other.data,
                                       walk.at(residual_start, epilogue.other.strides, place));
    };
    each_in_turn(
        load,
        [&](int i, const Vector<T, kSize>& vector, const Vector<T, kSize>& residual) {
          const Place place = walk.place(thread, i);
          if (!place.there) return;
          A result[kSize];
          normalize(place, vector, result);
#pragma unroll
          for (int k = 0; k < kSize; ++k) result[k] += residual[k];
          activate(epilogue.activation, epilogue.negative_slope, result);
          store_rounded<kSize>(walk.at(y_start, y.strides, place), result);
        },
        values);
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Place place = walk.place(thread, i);
      if (!place.there) continue;
      A result[kSize];
      normalize(place, values[i], result);
      store_rounded<kSize>(walk.at(y_start, y.strides, place), result);
    }
  }
  if constexpr (kCluster) cluster_sync();  // the last of the others may still read what this block has told
}

// Where the sums of lines are collected: a line's vectors are in so many units, the 32 vectors of a warp.
struct LineUnits {
  uint32_t line_vectors, most;  // units of a line

  NORMOPS_HOST_DEVICE explicit LineUnits(uint32_t line_vectors)
      : line_vectors(line_vectors),
        most(line_vectors % kWarp == 0 ? line_vectors / kWarp : (line_vectors + kWarp - 2) / kWarp + 1) {}

  NORMOPS_HOST_DEVICE uint32_t first(uint32_t line) const { return line * line_vectors / kWarp; }
  NORMOPS_HOST_DEVICE uint32_t count(uint32_t line) const {
    return ((line + 1) * line_vectors - 1) / kWarp - first(line) + 1;
  }
};

// The sums of the lanes whose vectors lie in one line, in the first of them; returns whether this is it.
template <typename A>
__device__ __forceinline__ bool sum_lines(A (&terms)[2], uint32_t along, uint32_t line_vectors) {
  const uint32_t lane = threadIdx.x % kWarp;
  // Of the first lane: how far the line goes on.
  if (__shfl_sync(kAllLanes, line_vectors - along, 0) >= kWarp) {
    sum_lanes(terms, kWarp);
    return lane == 0;
  }
#pragma unroll
  for (uint32_t distance = 1; distance < kWarp; distance *= 2) {
    const A first = __shfl_down_sync(kAllLanes, terms[0], distance);
    const A second = __shfl_down_sync(kAllLanes, terms[1], distance);
    if (lane + distance < kWarp && along + distance < line_vectors) {
      terms[0] += first;
      terms[1] += second;
    }
  }
  return lane == 0 || along == 0;
}

// Dynamic shared memory: of every channel the weight and, with an epilogue, the bias; where there are several, the sums
// of every line in every unit. kGroups: whether the slabs of clusters have several channels; others are asked.
template <typename T, int kSize, int kItems, bool kEpilogue, bool kCluster, bool kGroups>
__global__ void __launch_bounds__(kSlabThreads, sizeof(T) == 2 && kItems <= 4 && !kEpilogue ? 2 : 1)
    slab_backward_kernel(const Plan plan, const Slabs slabs, const ChannelTensor<const T> dy,
                         const ChannelTensor<const T> x, const ChannelTensor<T> dx, const BackwardMerge<Acc<T>> a,
                         const EpilogueIf<T, kEpilogue> epilogue) {
  using A = Acc<T>;
  NORMOPS_SHARED(A, shared, 2 * kWarp);
  NORMOPS_SHARED(A, told, 5);
  NORMOPS_SHARED(double, exact, 2);
  NORMOPS_SHARED(A, told_sums, 2);
  NORMOPS_DYNAMIC_SHARED(A, parameters);
  const SlabWalk<kSize, kCluster> walk(plan, slabs);
  const int threads = blockDim.x;
  const bool one_channel = kCluster ? !kGroups : walk.one_channel();
  const LineUnits units(plan.by_line.divisor());
  constexpr int kEach = kEpilogue ? 2 : 1;  // parameters of a channel
  A* const of_lines = parameters + kEach * walk.channels();

  Vector<T, kSize> grads[kItems], values[kItems];
  const T* const dy_start = walk.start(dy);
  const T* const x_start = walk.start(x);
  uint32_t thread = this_thread();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Place place = walk.place(thread, i);
    grads[i] = Vector<T, kSize>::load_if(place.there, walk.at(dy_start, dy.strides, place));
    values[i] = Vector<T, kSize>::load_if(place.there, walk.at(x_start, x.strides, place));
  }
  const int64_t first = walk.first_channel(), row_start = walk.row * plan.columns;
  for (uint32_t c = threadIdx.x; c < walk.channels(); c += threads) {
    parameters[kEach * c] = read_as<A>(a.weight, first + c);
    if constexpr (kEpilogue) parameters[kEach * c + 1] = read_as<A>(epilogue.bias, first + c);
  }
  if (threadIdx.x == 0) {
    const SplitMean<A> split(a.mean[walk.slab]);
    exact[0] = split.low;
    exact[1] = 1 / sqrt(a.var[walk.slab] + a.eps);
    told[0] = split.center;
    told[1] = A(split.low);
    told[2] = A(exact[1]);
  }
  __syncthreads();
  const A center = told[0], low = told[1], rstd = told[2];

  if constexpr (kEpilogue) {
    A forward_scale, forward_shift;
    const auto read_channel = [&](uint32_t c) {
      forward_scale = rstd * parameters[kEach * c];
      forward_shift = parameters[kEach * c + 1] - low * forward_scale;
    };
    read_channel(0);
    const T* const other_start = walk.start(epilogue.other);
    T* const dresidual_start = walk.start(epilogue.dresidual);
    thread = this_thread();
    const auto load = [&](int i) {
      const Place place = walk.place(thread, i);
      return Vector<T, kSize>::load_if(place.there && epilogue.other.data,
                                       walk.at(other_start, epilogue.other.strides, place));
    };
    each_in_turn(
        load,
        [&](int i, Vector<T, kSize>& grad, const Vector<T, kSize>& value, const Vector<T, kSize>& other) {
          const Place place = walk.place(thread, i);
          if (!place.there) return;
          if (!one_channel) read_channel(place.line);
          A z[kSize], gradient[kSize];
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            z[k] = epilogue.from_output ? other[k] : (value[k] - center) * forward_scale + forward_shift + other[k];
          }
          before_activation<T, kSize>(epilogue.activation, epilogue.negative_slope, grad, z, gradient);
          grad = Vector<T, kSize>::of(gradient);
          if (epilogue.dresidual.data) grad.store(walk.at(dresidual_start, epilogue.dresidual.strides, place));
        },
        grads, values);
  }
  // What a channel's sums of dy and dy * (x - center) mean to the parameters; g and g * xhat are left in the sums.
  const auto finish = [&](uint32_t line, A(&sums)[2]) {
    const A dy_xhat = (sums[1] - low * sums[0]) * rstd;
    const int64_t channel = first + line;
    if (kCluster && one_channel && !walk.speaks()) {
      // The first block says so.
    } else if (a.sums) {
      a.sums[row_start + channel] = dy_xhat;
      a.sums[plan.rows * plan.columns + row_start + channel] = sums[0];
    } else {
      if (a.dweight) write_as(a.dweight, channel, dy_xhat);
      if (a.dbias) write_as(a.dbias, channel, sums[0]);
    }
    sums[0] *= parameters[kEach * line];
    sums[1] = dy_xhat * parameters[kEach * line];
  };
  // The block's lines, whose numbers here begin at 0.
  const uint32_t lines = kCluster ? plan.by_line.quotient(walk.end - walk.begin) : slabs.lines;
  const uint32_t first_line = kCluster ? plan.by_line.quotient(walk.begin) : 0;
  A group_sums[2] = {0, 0};
  thread = this_thread();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    A sums[2] = {0, 0};
    if (walk.has(thread, i)) {  // unpacked behind a condition: not kept in registers
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sums[0] += grads[i][k];
        sums[1] += grads[i][k] * (values[i][k] - center);
      }
    }
    if (one_channel) {
      group_sums[0] += sums[0];
      group_sums[1] += sums[1];
      continue;
    }
    uint32_t along = thread + i * threads;
    const uint32_t unit = along / kWarp, line = plan.by_line.split(along);
    if (sum_lines(sums, along, units.line_vectors) && line < lines) {
      A* const slot = of_lines + 2 * (line * units.most + unit - units.first(line));
      slot[0] = sums[0];
      slot[1] = sums[1];
    }
  }
  if (one_channel) {
    block_sum(group_sums, threads, shared);
    if constexpr (kCluster) cluster_sum(group_sums, told_sums);
    if (threadIdx.x == 0) finish(0, group_sums);
  } else {
    __syncthreads();
    for (uint32_t line = threadIdx.x; line < lines; line += threads) {
      double line_dy = 0, line_dy_x = 0;
      const A* const slots = of_lines + 2 * line * units.most;
      const uint32_t count = units.count(line);
      for (uint32_t u = 0; u < count; ++u) {
        line_dy += slots[2 * u];
        line_dy_x += slots[2 * u + 1];
      }
      A sums[2] = {A(line_dy), A(line_dy_x)};
      finish(first_line + line, sums);
      group_sums[0] += sums[0];
      group_sums[1] += sums[1];
    }
    block_sum(group_sums, threads, shared);
    if constexpr (kCluster) cluster_sum(group_sums, told_sums);
  }
  if constexpr (kCluster) cluster_sync();  // the last of the others may still read what this block has told
  if (dx.data == nullptr) return;
  if (threadIdx.x == 0) {
    const double n = walk.count();
    const InputGradient gradient(exact[1], exact[0], group_sums[0] / n, group_sums[1] / n, /*centered=*/true);
    told[3] = A(gradient.slope);
    told[4] = A(gradient.shift);
  }
  __syncthreads();
  const A slope = told[3], shift = told[4];
  T* const dx_start = walk.start(dx);
  A scale = rstd * parameters[0];
  thread = this_thread();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Place place = walk.place(thread, i);
    if (!place.there) continue;
    if (!one_channel) scale = rstd * parameters[kEach * place.line];
    A result[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) result[k] = grads[i][k] * scale + ((values[i][k] - center) * slope + shift);
    store_rounded<kSize>(walk.at(dx_start, dx.strides, place), result);
  }
}

}  // namespace normops::cuda
