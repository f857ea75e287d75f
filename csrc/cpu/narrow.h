#pragma once

// Between 16-bit elements and float registers. Half is widened in memory order. A 32-bit word of bfloat16 holds two
// neighbours; taken apart by a shift and a mask they become one vector of the even elements and one of the odd ones,
// for a third of the work. The order does not matter to a sum, nor to a line whose coefficients lie in the same order.
// Rounding back takes most of the instructions of a bfloat16 loop, but where the processor has one for it
// (AVX512_BF16: it flushes results below 2^-126 to zero).

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <tuple>

#define NORMOPS_INLINE __attribute__((always_inline)) inline

// On x86 the set without vector instructions is there to compare with, and for processors that hardly run torch: it is
// neither unrolled nor flat, which would take build time. Elsewhere it is the one that is used.
#if defined(CPU_CAPABILITY_DEFAULT) && (defined(__x86_64__) || defined(_M_X64))
#define NORMOPS_PLAIN 1
#else
#define NORMOPS_PLAIN 0
#endif

// A kernel: everything it calls is inlined into it, but for other kernels. Left to itself, the compiler passes the
// registers of a loop through memory from lambda to lambda. With the checks of a sanitizer in everything that is
// inlined, it would take minutes for a file.
#if NORMOPS_PLAIN || defined(NORMOPS_SANITIZED)
#define NORMOPS_KERNEL void
#else
#define NORMOPS_KERNEL __attribute__((flatten, noinline)) void
#endif

namespace normops::cpu::CPU_CAPABILITY {
namespace {

using Floats = at::vec::Vectorized<float>;

template <typename T>
NORMOPS_INLINE std::tuple<Floats, Floats> widen(const at::vec::Vectorized<T>& elements) {
  return at::vec::convert_to_float<T>(elements);
}

template <typename T>
NORMOPS_INLINE at::vec::Vectorized<T> narrow(const Floats& first, const Floats& second) {
  return at::vec::convert_from_float<T>(first, second);
}

#if defined(CPU_CAPABILITY_AVX512)

constexpr bool kSplitBFloat16 = true;

template <>
NORMOPS_INLINE std::tuple<Floats, Floats> widen(const at::vec::Vectorized<c10::BFloat16>& elements) {
  const __m512i words = elements;
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)))};
}

#if defined(__AVX512BF16__)

template <>
NORMOPS_INLINE at::vec::Vectorized<c10::BFloat16> narrow(const Floats& even, const Floats& odd) {
  alignas(64) static constexpr uint16_t kInterleave[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
}

#else

// To nearest even in the upper half of each word. A NaN is replaced by the plainest one first: it stays one.
NORMOPS_INLINE __m512i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(_mm512_fixupimm_ps(v, v, _mm512_set1_epi32(0x33), 0));
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(sum, is_odd, sum, _mm512_set1_epi32(1));
}

template <>
NORMOPS_INLINE at::vec::Vectorized<c10::BFloat16> narrow(const Floats& even, const Floats& odd) {
  return _mm512_mask_mov_epi16(rounded(odd), 0x55555555, _mm512_srli_epi32(rounded(even), 16));
}

#endif

#elif defined(CPU_CAPABILITY_AVX2)

constexpr bool kSplitBFloat16 = true;

template <>
NORMOPS_INLINE std::tuple<Floats, Floats> widen(const at::vec::Vectorized<c10::BFloat16>& elements) {
  const __m256i words = elements;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)))};
}

NORMOPS_INLINE __m256i rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan);
}

template <>
NORMOPS_INLINE at::vec::Vectorized<c10::BFloat16> narrow(const Floats& even, const Floats& odd) {
  return _mm256_blend_epi16(rounded(odd), _mm256_srli_epi32(rounded(even), 16), 0x55);
}

#else

constexpr bool kSplitBFloat16 = false;

#endif

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
