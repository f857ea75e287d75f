#pragma once

// Registers full of elements, and the loop over memory that every kernel is written with. Included only by the
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

#include "kernels.h"
#include "narrow.h"

// add(table.f32) and so on, for all types. Of AVX512_BF16 only bfloat16 has a use.
#ifdef __AVX512BF16__
#define NORMOPS_FOR_EACH_TYPE(add, table) add(table.bf16);
#else
#define NORMOPS_FOR_EACH_TYPE(add, table) \
  add(table.f32);                         \
  add(table.f64);                         \
  add(table.f16);                         \
  add(table.bf16);
#endif

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Kernels with a mask are compiled with it and without; but once in the set without vector instructions, and those that
// take sums once for types that few use: they ask at each pack.
template <typename T>
constexpr bool kRare = NORMOPS_PLAIN || !(std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>);

// How many elements of a pack are in memory: all of them, or (at the end of a line) the first `count`.
struct Full {};
struct Tail {
  int64_t count;
};

// The same, of which only those count whose word has its bits set.
template <typename T, typename Lanes>
struct Marked {
  Lanes lanes;
  const Acc<T>* words;
};

// The first elements of a register, and zeros. Some of at::vec are loads and stores with masks, behind which sanitizers
// do not look: for these, one by one.
template <typename T>
NORMOPS_INLINE at::vec::Vectorized<T> load_tail(const T* source, int64_t count) {
#ifdef NORMOPS_SANITIZED
  T whole[at::vec::Vectorized<T>::size()] = {};
  std::copy_n(source, count, whole);
  return at::vec::Vectorized<T>::loadu(whole);
#else
  return at::vec::Vectorized<T>::loadu(source, count);
#endif
}
template <typename T>
NORMOPS_INLINE void store_tail(const at::vec::Vectorized<T>& elements, T* target, int64_t count) {
#ifdef NORMOPS_SANITIZED
  T whole[at::vec::Vectorized<T>::size()];
  elements.store(whole);
  std::copy_n(whole, count, target);
#else
  elements.store(target, count);
#endif
}

// Which elements of a line the lanes of a register's worth of T hold: one vector for float and double, two for 16-bit
// types. They are in memory order, but for bfloat16 in the order in which it is cheapest to take apart (narrow.h).
template <typename T>
struct PackOrder {
  static constexpr int kParts = sizeof(Acc<T>) / sizeof(T);
  static constexpr int64_t kLanes = at::vec::Vectorized<Acc<T>>::size();
  static constexpr int64_t kSize = kParts * kLanes;
  static constexpr bool kSplit = std::is_same_v<T, c10::BFloat16> && kSplitBFloat16;

  // Where element j of a line lies in pack order.
  static constexpr int64_t position(int64_t j) {
    return kSplit ? j / kSize * kSize + j % 2 * kLanes + j % kSize / 2 : j;
  }
};

// The elements of one pack, in pack order.
template <typename T>
constexpr auto kElements = [] {
  std::array<Acc<T>, PackOrder<T>::kSize> elements{};
  for (int64_t j = 0; j < PackOrder<T>::kSize; ++j) elements[PackOrder<T>::position(j)] = Acc<T>(j);
  return elements;
}();

// One register's worth of T, held as accumulation type. Arrays of coefficients that go with a line of T are kept in
// pack order, padded to whole packs.
template <typename T>
struct Pack : PackOrder<T> {
  using A = Acc<T>;
  using Vec = at::vec::Vectorized<A>;
  using PackOrder<T>::kParts;
  using PackOrder<T>::kLanes;

  Vec part[kParts];

  NORMOPS_INLINE Pack() : Pack(A(0)) {}
  NORMOPS_INLINE Pack(A value) {
    for (int i = 0; i < kParts; ++i) part[i] = Vec(value);
  }

  // Elements of the line; those past the tail are zero.
  template <typename Lanes>
  NORMOPS_INLINE static Pack load(const T* source, Lanes lanes) {
    const auto elements = [&] {
      if constexpr (std::is_same_v<Lanes, Full>)
        return at::vec::Vectorized<T>::loadu(source);
      else
        return load_tail(source, lanes.count);
    }();
    Pack result;
    if constexpr (kParts == 1)
      result.part[0] = elements;
    else
      std::tie(result.part[0], result.part[1]) = widen<T>(elements);
    return result;
  }

  template <typename Lanes>
  NORMOPS_INLINE static Pack load(const T* source, const Marked<T, Lanes>& marked) {
    return load(source, marked.lanes);
  }

  template <typename Lanes>
  NORMOPS_INLINE void store(T* target, Lanes lanes) const {
    const auto elements = [&] {
      if constexpr (kParts == 1)
        return part[0];
      else
        return narrow<T>(part[0], part[1]);
    }();
    if constexpr (std::is_same_v<Lanes, Full>)
      elements.store(target);
    else
      store_tail(elements, target, lanes.count);
  }

  // A whole pack of an array in pack order.
  NORMOPS_INLINE static Pack load_packed(const A* source) {
    Pack result;
    for (int i = 0; i < kParts; ++i) result.part[i] = Vec::loadu(source + i * kLanes);
    return result;
  }
  NORMOPS_INLINE void store_packed(A* target) const {
    for (int i = 0; i < kParts; ++i) part[i].store(target + i * kLanes);
  }

  // Zero past the tail: for terms of a sum that are not zero where x is.
  NORMOPS_INLINE Pack masked(Full) const { return *this; }
  NORMOPS_INLINE Pack masked(Tail tail) const {
    Pack result;
    for (int i = 0; i < kParts; ++i) {
      const Vec index = Vec::loadu(kElements<T>.data() + i * kLanes);
      result.part[i] = Vec::blendv(Vec(A(0)), part[i], index < Vec(A(tail.count)));
    }
    return result;
  }

  // Zero, whatever it was, where a word has no bit set.
  NORMOPS_INLINE Pack masked_by(const A* words) const {
    if (kRare<T> && !words) return *this;
    Pack result;
    for (int i = 0; i < kParts; ++i) result.part[i] = part[i] & Vec::loadu(words + i * kLanes);
    return result;
  }
  template <typename Lanes>
  NORMOPS_INLINE Pack masked(const Marked<T, Lanes>& marked) const {
    return masked_by(marked.words).masked(marked.lanes);
  }

  NORMOPS_INLINE Vec sum_of_parts() const {
    Vec total = part[0];
    for (int i = 1; i < kParts; ++i) total = total + part[i];
    return total;
  }

  NORMOPS_INLINE A sum() const {
    const Vec total = sum_of_parts();
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

// `yes` where a > b, or where a <= b, and `no` elsewhere: NaN is neither. Comparisons of AVX-512 give a mask, of which
// at::vec makes a vector, and of that a mask again to blend by.
template <typename Vec>
NORMOPS_INLINE Vec where_above(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<Vec, Floats>) return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
#endif
  return Vec::blendv(no, yes, a > b);
}
template <typename Vec>
NORMOPS_INLINE Vec where_at_most(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<Vec, Floats>) return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), no, yes);
#endif
  return Vec::blendv(no, yes, a <= b);
}

// Between pack order and arrays in memory order.
template <typename T>
NORMOPS_INLINE Pack<T> load_natural(const Acc<T>* source, Full) {
  Pack<T> result = Pack<T>::load_packed(source);
  if constexpr (PackOrder<T>::kSplit) {
    std::tie(result.part[0], result.part[1]) = at::vec::deinterleave2<Acc<T>>(result.part[0], result.part[1]);
  }
  return result;
}
template <typename T>
NORMOPS_INLINE void store_natural(Pack<T> pack, Acc<T>* target, Full) {
  if constexpr (PackOrder<T>::kSplit) {
    std::tie(pack.part[0], pack.part[1]) = at::vec::interleave2<Acc<T>>(pack.part[0], pack.part[1]);
  }
  pack.store_packed(target);
}
template <typename T>
NORMOPS_INLINE Pack<T> load_natural(const Acc<T>* source, Tail tail) {
  Acc<T> whole[Pack<T>::kSize] = {};
  std::copy_n(source, tail.count, whole);
  return load_natural<T>(whole, Full{});
}
template <typename T>
NORMOPS_INLINE void store_natural(const Pack<T>& pack, Acc<T>* target, Tail tail) {
  Acc<T> whole[Pack<T>::kSize];
  store_natural<T>(pack, whole, Full{});
  std::copy_n(whole, tail.count, target);
}

// The sums of the lanes of several vectors, a power of two of them: each step adds the odd elements of all vectors to
// the even ones and puts the halves of two vectors into one, which is far less work than summing one after the other. A
// sum does not depend on what the other vectors hold.
template <typename T, int kCount>
NORMOPS_INLINE std::array<Acc<T>, kCount> sums_of(typename Pack<T>::Vec (&vectors)[kCount]) {
  using Vec = typename Pack<T>::Vec;
  constexpr int64_t kLanes = Pack<T>::kLanes;
  const auto add_neighbours = [](const Vec& a, const Vec& b) {
    const auto [even, odd] = at::vec::deinterleave2<Acc<T>>(a, b);
    return even + odd;
  };
  int64_t left = kCount;
  for (int64_t step = 1; step < kLanes; step *= 2) {
    left = left > 1 ? left / 2 : 1;
    for (int64_t i = 0; i < left; ++i) {
      vectors[i] = kCount == 1 || step >= kCount ? add_neighbours(vectors[0], vectors[0])
                                                 : add_neighbours(vectors[2 * i], vectors[2 * i + 1]);
    }
  }
  Acc<T> lanes[kLanes];
  vectors[0].store(lanes);
  std::array<Acc<T>, kCount> result;
  std::copy_n(lanes, kCount, result.begin());
  return result;
}

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

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
