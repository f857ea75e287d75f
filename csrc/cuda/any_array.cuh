#pragma once

#include "channel.h"
#include "vectors.cuh"

namespace normops::cuda {

template <typename A>
__device__ __forceinline__ A read_as(const AnyArray& array, int64_t i) {
  if (array.data == nullptr) return A(array.absent);
  switch (array.type) {
    case ElementType::kFloat:
      return A(static_cast<const float*>(array.data)[i]);
    case ElementType::kDouble:
      return A(static_cast<const double*>(array.data)[i]);
    case ElementType::kHalf:
      return A(static_cast<float>(static_cast<const c10::Half*>(array.data)[i]));
    default:
      return A(static_cast<float>(static_cast<const c10::BFloat16*>(array.data)[i]));
  }
}

template <typename A>
__device__ __forceinline__ void write_as(const AnyOutput& array, int64_t i, A value) {
  switch (array.type) {
    case ElementType::kFloat:
      static_cast<float*>(array.data)[i] = float(value);
      break;
    case ElementType::kDouble:
      static_cast<double*>(array.data)[i] = double(value);
      break;
    case ElementType::kHalf:
      static_cast<c10::Half*>(array.data)[i] = c10::Half(float(value));
      break;
    default:
      static_cast<c10::BFloat16*>(array.data)[i] = c10::BFloat16(float(value));
  }
}

__device__ __forceinline__ void move_running(const RunningStats& a, int which, int64_t channel, double statistic) {
  const AnyOutput running = a.running[which];
  const int64_t i = channel * a.stride[which];
  const double old = read_as<double>({running.data, running.type, 0}, i);
  write_as(running, i, (1 - a.momentum) * old + a.momentum * a.correction[which] * statistic);
}

}  // namespace normops::cuda
