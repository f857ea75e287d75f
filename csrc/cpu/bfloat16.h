#pragma once

// bfloat16 in registers. A word of memory holds two neighbours; taken apart by a shift and a mask they become two float
// vectors, one of the even and one of the odd elements. That is a third of the work of widening them in order, and the
// order does not matter to a sum, nor to a line whose coefficients lie in the same order.

#include <ATen/cpu/vec/vec.h>

#define NORMOPS_INLINE __attribute__((always_inline)) inline

namespace normops::cpu::CPU_CAPABILITY {
namespace {

using Floats = at::vec::Vectorized<float>;

#if defined(CPU_CAPABILITY_AVX512)

constexpr bool kSplitBFloat16 = true;
using Words = __m512i;

NORMOPS_INLINE Words load_words(const void* source) { return _mm512_loadu_si512(source); }
NORMOPS_INLINE void store_words(void* target, Words words) { _mm512_storeu_si512(target, words); }

NORMOPS_INLINE Floats even_floats(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
NORMOPS_INLINE Floats odd_floats(Words words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)));
}

// To nearest even in the upper half of each word; a NaN stays one.
NORMOPS_INLINE Words rounded(__m512 v) {
  const Words bits = _mm512_castps_si512(v);
  const Words last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Words sum = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
NORMOPS_INLINE Words join_words(Floats even, Floats odd) {
  return _mm512_mask_mov_epi16(rounded(odd), 0x55555555, _mm512_srli_epi32(rounded(even), 16));
}

#elif defined(CPU_CAPABILITY_AVX2)

constexpr bool kSplitBFloat16 = true;
using Words = __m256i;

NORMOPS_INLINE Words load_words(const void* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}
NORMOPS_INLINE void store_words(void* target, Words words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), words);
}

NORMOPS_INLINE Floats even_floats(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
NORMOPS_INLINE Floats odd_floats(Words words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)));
}

NORMOPS_INLINE Words rounded(__m256 v) {
  const Words bits = _mm256_castps_si256(v);
  const Words last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Words sum = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
  const Words nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan);
}
NORMOPS_INLINE Words join_words(Floats even, Floats odd) {
  return _mm256_blend_epi16(rounded(odd), _mm256_srli_epi32(rounded(even), 16), 0x55);
}

#else

constexpr bool kSplitBFloat16 = false;

#endif

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
