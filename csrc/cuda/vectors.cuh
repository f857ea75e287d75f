#pragma once

// Elements in registers, and how they get there: 16 bytes at a time where everything lies on 16-byte boundaries,
// element by element where not. Which of the two is decided once per launch.
//
// A vector is kept as the words that were loaded. Were it kept as elements, unpacking 16-bit ones would belong to the
// load, and a thread would wait for each load before the next.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../statistics.h"
#include "platform.cuh"

namespace normops::cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kFullVector = kVectorBytes / int(sizeof(T));

// How elements lie in 32-bit words: `get` widens number k, `put` rounds kCount of them.
template <typename T>
struct Words {
  static constexpr int kEach = int(sizeof(T)) / 4;

  static __device__ __forceinline__ T get(const uint32_t* words, int k) {
    T value;
    std::memcpy(&value, words + k * kEach, sizeof(T));
    return value;
  }
  template <int kCount>
  static __device__ __forceinline__ void put(uint32_t* words, const T* values) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) std::memcpy(words + k * kEach, values + k, sizeof(T));
  }
};

// Two to a word, the first in its lower half.
template <typename T>
struct HalfWords {
  template <int kCount>
  static __device__ __forceinline__ void put(uint32_t* words, const float* values) {
    if constexpr (kCount == 1) {
      words[0] = T(values[0]).x;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) words[k / 2] = pair(values[k], values[k + 1]);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
#ifdef NORMOPS_EMULATED
    return T(low).x | uint32_t(T(high).x) << 16;
#else
    uint32_t word;
    if constexpr (std::is_same_v<T, c10::Half>) {
      const __half2 rounded = __floats2half2_rn(low, high);
      std::memcpy(&word, &rounded, sizeof(word));
    } else {
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);
      std::memcpy(&word, &rounded, sizeof(word));
    }
    return word;
#endif
  }
};

template <>
struct Words<c10::BFloat16> : HalfWords<c10::BFloat16> {
  static __device__ __forceinline__ float get(const uint32_t* words, int k) {
    return __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
  }
};

template <>
struct Words<c10::Half> : HalfWords<c10::Half> {
  static __device__ __forceinline__ float get(const uint32_t* words, int k) {
    return static_cast<float>(c10::Half(uint16_t(words[k / 2] >> (k % 2 * 16)), c10::Half::from_bits()));
  }
};

#ifdef NORMOPS_EMULATED
// One access to g++ too, which would take one for each word: the emulator counts them.
using FourWords = uint32_t __attribute__((vector_size(kVectorBytes), may_alias));
#endif

template <typename T, int kSize>
struct Vector {
  static constexpr int kBytes = int(sizeof(T)) * kSize;
  static constexpr bool kWide = kBytes % kVectorBytes == 0;
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;

  uint32_t words[kWords];

  __device__ __forceinline__ Acc<T> operator[](int k) const { return Words<T>::get(words, k); }

  static __device__ __forceinline__ Vector load(const T* from) {
    Vector v;
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const T* const part = from + i * 4 / int(sizeof(T));
#ifdef NORMOPS_EMULATED
        const FourWords four = *reinterpret_cast<const volatile FourWords*>(part);
        for (int k = 0; k < 4; ++k) v.words[i + k] = four[k];
#else
        const uint4 four = *reinterpret_cast<const uint4*>(part);
        v.words[i] = four.x, v.words[i + 1] = four.y, v.words[i + 2] = four.z, v.words[i + 3] = four.w;
#endif
      }
    } else {
      static_assert(kSize == 1);
      const Raw raw = *reinterpret_cast<const Raw*>(from);
      v.words[0] = uint32_t(raw);
      if constexpr (kWords == 2) v.words[1] = uint32_t(raw >> 32);
    }
    return v;
  }

  static __device__ __forceinline__ Vector zero() { return {}; }

  // Zeros where the condition does not hold; nothing is read there.
  static __device__ __forceinline__ Vector load_if(bool condition, const T* from) {
    return condition ? load(from) : zero();
  }

  static __device__ __forceinline__ Vector of(const Acc<T>* values) {
    Vector v;
    Words<T>::template put<kSize>(v.words, values);
    return v;
  }

  // To global memory. The compiler takes four 32-bit stores for one of 128 bits unless it is told.
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        T* const part = to + i * 4 / int(sizeof(T));
#ifdef NORMOPS_EMULATED
        const FourWords four = {words[i], words[i + 1], words[i + 2], words[i + 3]};
        *reinterpret_cast<volatile FourWords*>(part) = four;
#else
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(part)), "r"(words[i]),
                     "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                     : "memory");
#endif
      }
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<Raw*>(to) = words[0] | Raw(words[1]) << 32;
    } else {
      *reinterpret_cast<Raw*>(to) = Raw(words[0]);
    }
  }

 private:
  using Raw = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
};

// Rounded to T and stored.
template <int kSize, typename T>
__device__ __forceinline__ void store_rounded(T* to, const Acc<T> (&values)[kSize]) {
  Vector<T, kSize>::of(values).store(to);
}

// Values of the type of the arithmetic, 16 bytes at a time.
template <int kSize, typename A>
__device__ __forceinline__ void load_values(const A* from, A (&values)[kSize]) {
  const auto v = Vector<A, kSize>::load(from);
#pragma unroll
  for (int k = 0; k < kSize; ++k) values[k] = v[k];
}

}  // namespace normops::cuda
