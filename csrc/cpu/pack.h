#pragma once

// Registers full of elements, and the loops over memory that every kernel is written with. Included only by the
// files compiled once per instruction set: everything here lives in a namespace named after the instruction set,
// and has internal linkage, so that no symbol compiled for one processor can be linked into the code of another.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../statistics.h"
#include "kernels.h"

#define NORMOPS_INLINE __attribute__((always_inline)) inline

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// How many elements of a pack are in memory: all of them, or (at the end of a line) the first `count`.
struct Full {};
struct Tail {
  int64_t count;
};

// One register's worth of T, held as accumulation type: one vector for float and double, two for 16-bit types.
template <typename T>
struct Pack {
  using A = Acc<T>;
  using Vec = at::vec::Vectorized<A>;
  static constexpr int kParts = sizeof(A) / sizeof(T);
  static constexpr int64_t kLanes = Vec::size();
  static constexpr int64_t kSize = kParts * kLanes;

  Vec part[kParts];

  NORMOPS_INLINE Pack() : Pack(A(0)) {}
  NORMOPS_INLINE Pack(A value) {
    for (int i = 0; i < kParts; ++i) part[i] = Vec(value);
  }

  NORMOPS_INLINE static int64_t lanes_in(int part, Tail tail) {
    return std::min(std::max(tail.count - part * kLanes, int64_t(0)), kLanes);
  }

  // From elements of type T, or of the accumulation type (weights, coefficients). Lanes past the tail are zero.
  template <typename U, typename Lanes>
  NORMOPS_INLINE static Pack load(const U* source, Lanes lanes) {
    static_assert(std::is_same_v<U, T> || std::is_same_v<U, A>);
    constexpr bool kFull = std::is_same_v<Lanes, Full>;
    Pack result;
    if constexpr (std::is_same_v<U, A>) {
      for (int i = 0; i < kParts; ++i) {
        if constexpr (kFull)
          result.part[i] = Vec::loadu(source + i * kLanes);
        else if (lanes_in(i, lanes) > 0)
          result.part[i] = Vec::loadu(source + i * kLanes, lanes_in(i, lanes));
      }
    } else {
      using Narrow = at::vec::Vectorized<T>;
      Narrow narrow;
      if constexpr (kFull)
        narrow = Narrow::loadu(source);
      else
        narrow = Narrow::loadu(source, lanes.count);
      std::tie(result.part[0], result.part[1]) = at::vec::convert_to_float<T>(narrow);
    }
    return result;
  }

  template <typename U, typename Lanes>
  NORMOPS_INLINE void store(U* target, Lanes lanes) const {
    static_assert(std::is_same_v<U, T> || std::is_same_v<U, A>);
    constexpr bool kFull = std::is_same_v<Lanes, Full>;
    if constexpr (std::is_same_v<U, A>) {
      for (int i = 0; i < kParts; ++i) {
        if constexpr (kFull)
          part[i].store(target + i * kLanes);
        else if (lanes_in(i, lanes) > 0)
          part[i].store(target + i * kLanes, lanes_in(i, lanes));
      }
    } else {
      const auto narrow = at::vec::convert_from_float<T>(part[0], part[1]);
      if constexpr (kFull)
        narrow.store(target);
      else
        narrow.store(target, lanes.count);
    }
  }

  // Zero past the tail: for terms of a sum that are not zero where x is.
  NORMOPS_INLINE Pack masked(Full) const { return *this; }
  NORMOPS_INLINE Pack masked(Tail tail) const {
    Pack result;
    for (int i = 0; i < kParts; ++i) {
      const Vec index = Vec::arange(A(i * kLanes), A(1));
      result.part[i] = Vec::blendv(Vec(A(0)), part[i], index < Vec(A(tail.count)));
    }
    return result;
  }

  NORMOPS_INLINE A sum() const {
    Vec total = part[0];
    for (int i = 1; i < kParts; ++i) total = total + part[i];
    if constexpr (std::is_same_v<A, float>) {
      return at::vec::vec_reduce_all<A>([](Vec& a, Vec& b) { return a + b; }, total);
    } else {
      A lanes[kLanes];
      total.store(lanes);
      for (int64_t step = kLanes / 2; step > 0; step /= 2) {
        for (int64_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
      }
      return lanes[0];
    }
  }

  NORMOPS_INLINE friend Pack operator+(Pack a, const Pack& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] + b.part[i];
    return a;
  }
  NORMOPS_INLINE friend Pack operator-(Pack a, const Pack& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] - b.part[i];
    return a;
  }
  NORMOPS_INLINE friend Pack operator*(Pack a, const Pack& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] * b.part[i];
    return a;
  }
  NORMOPS_INLINE friend Pack fmadd(const Pack& a, const Pack& b, Pack c) {
    for (int i = 0; i < kParts; ++i) c.part[i] = at::vec::fmadd(a.part[i], b.part[i], c.part[i]);
    return c;
  }
};

template <typename F, int... I>
NORMOPS_INLINE void unroll(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int kCount, typename F>
NORMOPS_INLINE void unroll(F f) {
  unroll(std::make_integer_sequence<int, kCount>{}, f);
}

// body(j, lanes, u) for each pack of [0, length), starting at element j. `u` in [0, kUnroll) says which of the
// packs in flight it is: sums kept per u do not wait for each other.
template <typename T, int kUnroll = 1, typename Body>
NORMOPS_INLINE void sweep(int64_t length, Body body) {
  constexpr int64_t kSize = Pack<T>::kSize;
  int64_t j = 0;
  for (; j + kUnroll * kSize <= length; j += kUnroll * kSize) {
    unroll<kUnroll>([&](auto u) { body(j + u * kSize, Full{}, u); });
  }
  for (; j + kSize <= length; j += kSize) body(j, Full{}, std::integral_constant<int, 0>{});
  if (j < length) body(j, Tail{length - j}, std::integral_constant<int, 0>{});
}

// Sums of kTerms quantities along a line: term(j, lanes, sums) adds the pack at j to sums[0..kTerms).
template <typename T, int kTerms, typename Term>
NORMOPS_INLINE std::array<Acc<T>, kTerms> sum_along(int64_t length, Term term) {
  constexpr int kUnroll = 4 / Pack<T>::kParts;
  Pack<T> sums[kUnroll][kTerms];
  sweep<T, kUnroll>(length, [&](int64_t j, auto lanes, auto u) { term(j, lanes, sums[u]); });
  std::array<Acc<T>, kTerms> result;
  for (int k = 0; k < kTerms; ++k) {
    Pack<T> total = sums[0][k];
    for (int u = 1; u < kUnroll; ++u) total = total + sums[u][k];
    result[k] = total.sum();
  }
  return result;
}

// Sums of kTerms quantities across lines, one per element of the line: term(line, j, lanes, sums) adds the pack
// at j of one line. Four lines at a time, so that the sums (kTerms arrays, `stride` apart) are loaded and stored once
// for four lines and memory is read in a few long streams.
template <typename T, int kTerms, typename Term>
NORMOPS_INLINE void sum_across(int64_t lines, int64_t length, Acc<T>* sums, int64_t stride, Term term) {
  const auto add = [&](int64_t first, auto count) {
    sweep<T>(length, [&](int64_t j, auto lanes, auto) {
      Pack<T> totals[kTerms];
      for (int k = 0; k < kTerms; ++k) totals[k] = Pack<T>::load(sums + k * stride + j, lanes);
      unroll<count>([&](auto i) { term(first + i, j, lanes, totals); });
      for (int k = 0; k < kTerms; ++k) totals[k].store(sums + k * stride + j, lanes);
    });
  };
  int64_t line = 0;
  for (; line + 4 <= lines; line += 4) add(line, std::integral_constant<int, 4>{});
  for (; line < lines; ++line) add(line, std::integral_constant<int, 1>{});
}

// Sums in float are taken over at most this many elements before they go on in double.
constexpr int64_t kChunk = 4096;

// Mean and M2 by the corrected two-pass formula, chunk by chunk while the chunk is in cache. Deviations are taken
// from the rounded mean; their own mean is what rounding lost, so it sharpens both results at no cost.
template <typename T>
std::pair<double, double> moments_along(const T* x, int64_t length) {
  double mean = 0, m2 = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const T* chunk = x + begin;
    const int64_t n = std::min(kChunk, length - begin);
    const auto [total] = sum_along<T, 1>(
        n, [&](int64_t j, auto lanes, Pack<T>* sums) { sums[0] = sums[0] + Pack<T>::load(chunk + j, lanes); });
    const Acc<T> center = total / Acc<T>(n);
    const auto [first, second] = sum_along<T, 2>(n, [&](int64_t j, auto lanes, Pack<T>* sums) {
      const Pack<T> d = (Pack<T>::load(chunk + j, lanes) - center).masked(lanes);
      sums[0] = sums[0] + d;
      sums[1] = fmadd(d, d, sums[1]);
    });
    const double chunk_mean = double(center) + double(first) / n;
    const double chunk_m2 = double(second) - double(first) * first / n;
    MomentsMerge(begin, n)(mean, m2, chunk_mean, chunk_m2);
  }
  return {mean, m2};
}

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
