#pragma once

// Elements in registers, and how they get there: 16 bytes at a time where everything lies on 16-byte boundaries,
// element by element where not. Which of the two is decided once per launch.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../statistics.h"
#include "platform.cuh"

namespace normops::cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kFullVector = kVectorBytes / int(sizeof(T));

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kVectorBytes ? sizeof(T) * kSize : kVectorBytes) Vector {
  T values[kSize];

  __device__ __forceinline__ Acc<T> operator[](int k) const { return static_cast<Acc<T>>(values[k]); }

  static __device__ __forceinline__ Vector load(const T* from) {
    Vector v;
    constexpr int kBytes = int(sizeof(T)) * kSize;
    if constexpr (kBytes % kVectorBytes == 0) {
      uint4 words[kBytes / kVectorBytes];
#pragma unroll
      for (int i = 0; i < kBytes / kVectorBytes; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
      std::memcpy(&v, words, kBytes);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) v.values[k] = from[k];
    }
    return v;
  }

  static __device__ __forceinline__ Vector zero() {
    Vector v;
#pragma unroll
    for (int k = 0; k < kSize; ++k) v.values[k] = T(0.0f);
    return v;
  }

  // Zeros where the condition does not hold; nothing is read there.
  static __device__ __forceinline__ Vector load_if(bool condition, const T* from) {
    return condition ? load(from) : zero();
  }

  __device__ __forceinline__ Vector& operator+=(const Vector& other) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] += other.values[k];
    return *this;
  }

  __device__ __forceinline__ void store(T* to) const {
    constexpr int kBytes = int(sizeof(T)) * kSize;
    if constexpr (kBytes % kVectorBytes == 0) {
      uint4 words[kBytes / kVectorBytes];
      std::memcpy(words, this, kBytes);
#pragma unroll
      for (int i = 0; i < kBytes / kVectorBytes; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) to[k] = values[k];
    }
  }
};

}  // namespace normops::cuda
