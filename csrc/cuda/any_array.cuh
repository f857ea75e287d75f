#pragma once

// Parameters of channels are few, so they are read in their own dtype and no kernel is compiled for each.

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

}  // namespace normops::cuda
