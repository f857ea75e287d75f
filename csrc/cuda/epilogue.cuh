#pragma once

// What follows a norm in the same pass: an activation and a residual, from the formulas of activation.h. Kernels have
// it as a variant of their own, in which the activation is a branch that all threads take alike; so that nine formulas
// are not written out for every vector of a thread, its vectors take turns in one place of the code.

#include "../activation.h"
#include "walk.cuh"

namespace normops::cuda {

struct NoEpilogue {};
template <typename T, bool kThere>
using EpilogueIf = std::conditional_t<kThere, ChannelEpilogue<T>, NoEpilogue>;

// A number as activation.h wants them.
template <typename A>
struct Number {
  A v;

  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator+(Number a, Number b) { return {a.v + b.v}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator+(Number a, double b) { return {a.v + A(b)}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator-(Number a, double b) { return {a.v - A(b)}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator-(double a, Number b) { return {A(a) - b.v}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator-(Number a) { return {-a.v}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator*(Number a, Number b) { return {a.v * b.v}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator*(Number a, double b) { return {a.v * A(b)}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number operator/(Number a, Number b) { return {divided(a.v, b.v)}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number exp(Number z) {
    if constexpr (sizeof(A) == 4) {
      return {::expf(z.v)};
    } else {
      return {::exp(z.v)};
    }
  }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number erf(Number z) {
    if constexpr (sizeof(A) == 4) {
      return {::erff(z.v)};
    } else {
      return {::erf(z.v)};
    }
  }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number sigmoid(Number z) { return {divided(A(1), A(1) + exp(-z).v)}; }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number clamp(Number z, double least, double most) {  // NaN stays NaN
    return {z.v < A(least) ? A(least) : z.v > A(most) ? A(most) : z.v};
  }
  friend NORMOPS_HOST_DEVICE __forceinline__ Number choose(Number z, double limit, double above, double otherwise) {
    return {z.v > A(limit) ? A(above) : A(otherwise)};
  }

 private:
  static NORMOPS_HOST_DEVICE __forceinline__ float divided(float a, float b) {
#if defined(__CUDA_ARCH__) || defined(NORMOPS_EMULATED)
    return __fdividef(a, b);
#else
    return a / b;  // never called, but compiled
#endif
  }
  static NORMOPS_HOST_DEVICE __forceinline__ double divided(double a, double b) { return a / b; }
};

// f(activation) with the struct that `kind` stands for.
template <size_t kPlace = 0, typename F>
__device__ __forceinline__ void with_device_activation(int kind, const F& f) {
  if constexpr (kPlace < std::tuple_size_v<Activations>) {
    if (kind == int(kPlace) + 1) {
      f(std::tuple_element_t<kPlace, Activations>{});
    } else {
      with_device_activation<kPlace + 1>(kind, f);
    }
  }
}

template <int kSize, typename A>
__device__ __forceinline__ void activate(int kind, A slope, A (&values)[kSize]) {
  with_device_activation(kind, [&](auto f) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[k] = f.value(Number<A>{values[k]}, slope).v;
  });
}

// The gradient before the activation: dy times the derivative at z.
template <typename T, int kSize>
__device__ __forceinline__ void before_activation(int kind, Acc<T> slope, const Vector<T, kSize>& dy,
                                                  const Acc<T> (&z)[kSize], Acc<T> (&gradient)[kSize]) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) gradient[k] = dy[k];
  with_device_activation(kind, [&](auto f) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] *= f.derivative(Number<Acc<T>>{z[k]}, slope).v;
  });
}

// The first `kTurn` of an array each to the place before it, the first to the last.
template <int kTurn, int kCount, typename V>
__device__ __forceinline__ void turn(V (&v)[kCount]) {
  const V first = v[0];
#pragma unroll
  for (int i = 1; i < kTurn; ++i) v[i - 1] = v[i];
  v[kTurn - 1] = first;
}

// f(i, vectors[i]..., other) for all i, from one place in the code: registers cannot be indexed, so the vectors take
// turns at being the first. `load(i)` reads the others, kBatch of which are under way together.
template <int kCount, typename Load, typename F, typename... V>
__device__ __forceinline__ void each_in_turn(const Load& load, const F& f, V (&... vectors)[kCount]) {
  constexpr int kTogether = kCount < kBatch ? kCount : kBatch;
  static_assert(kCount % kTogether == 0);
#pragma unroll 1
  for (int first = 0; first < kCount; first += kTogether) {
    decltype(load(0)) others[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) others[i] = load(first + i);
#pragma unroll 1
    for (int i = 0; i < kTogether; ++i) {
      f(first + i, vectors[0]..., others[0]);
      (turn<kTogether>(vectors), ...);
      turn<kTogether>(others);
    }
    if constexpr (kCount > kTogether) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) (turn<kCount>(vectors), ...);
    }
  }
}

}  // namespace normops::cuda
