// Numbers as sums of bfloat16, so that tiles (tiles.h) can multiply them.
//
// bfloat16 has 8 significant bits: one is itself, float16 (11 bits) is exactly the sum of two, float32 (24 bits) of
// three, each what is left when the ones before are taken off. A product of two sums is the sum of the products of
// their parts; those below 2^-24 of the whole are left out: 1, 4 and 6 products remain. All are added up in float32.
// (The idea is that of Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations", 2019.)
// Limits: an infinity is no such sum, and makes NaN, as do the 0.4 % of the float32 range that round up to it.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
constexpr int bfloat16_parts = std::is_same_v<T, bfloat16>  ? 1
                               : std::is_same_v<T, float16> ? 2
                                                            : 3;

struct PartPair {
  int row, column;  // which part of either factor
};
// One factor changes from product to product.
template <int Parts>
constexpr auto part_products() {
  if constexpr (Parts == 1)
    return std::array<PartPair, 1>{{{0, 0}}};
  else if constexpr (Parts == 2)
    return std::array<PartPair, 4>{{{0, 1}, {0, 0}, {1, 0}, {1, 1}}};
  else
    return std::array<PartPair, 6>{{{0, 2}, {0, 1}, {0, 0}, {2, 0}, {1, 0}, {1, 1}}};
}

// The first `count` elements, at most a vector of them, and zeros.
template <class T>
CONVLAB_INLINE vec<float> load_some(const T* source, int64_t count) {
  return count <= 0 ? vec<float>{} : count >= lanes<float> ? load(source) : load_partial(source, count);
}
// The same of elements `stride` apart.
template <class T>
CONVLAB_INLINE vec<float> load_strided(const T* source, int64_t stride, int64_t count) {
  if (count <= 0 || stride == 1) return load_some(source, count);
#if defined(CONVLAB_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(static_cast<int32_t>(stride)));
    const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
    return (vec<float>)_mm512_mask_i32gather_ps(__m512{}, mask, index, source, sizeof(T));
  }
#endif
  vec<float> value{};
  for (int64_t i = 0; i < std::min<int64_t>(lanes<float>, count); ++i) value[i] = to_accumulate(source[i * stride]);
  return value;
}

// Each part in the upper halves of 32 bits. The last one is exact.
template <int Parts>
CONVLAB_INLINE void split(vec<float> value, vec_bits (&part)[Parts]) {
  CONVLAB_UNROLL for (int p = 0; p < Parts; ++p) {
    const bool rounds = p + 1 < Parts;
    part[p] = ((vec_bits)value + (rounds ? 0x8000u : 0u)) & 0xffff0000u;
    if (rounds) value -= (vec<float>)part[p];
  }
}

// The parts of two vectors side by side, lane by lane: the rows of a tile of columns.
template <int Parts>
CONVLAB_INLINE void split_pair(vec<float> first, vec<float> second, vec_bits (&pair)[Parts]) {
  vec_bits low[Parts], high[Parts];
  split(first, low);
  split(second, high);
  CONVLAB_UNROLL for (int p = 0; p < Parts; ++p) pair[p] = low[p] >> 16 | high[p];
}

// The upper halves of two vectors in a row, and of one.
CONVLAB_INLINE void store_upper_halves(vec_bits first, vec_bits second, void* target) {
#if defined(CONVLAB_AVX512)
  alignas(64) static constexpr auto odd = [] {
    std::array<uint16_t, 32> indices{};
    for (uint16_t i = 0; i < 32; ++i) indices[i] = static_cast<uint16_t>(2 * i + 1);
    return indices;
  }();
  _mm512_storeu_si512(target,
                      _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(odd.data()), (__m512i)second));
#else
  const vec_half_bits half[] = {__builtin_convertvector(first >> 16, vec_half_bits),
                                __builtin_convertvector(second >> 16, vec_half_bits)};
  std::memcpy(target, half, sizeof half);
#endif
}
CONVLAB_INLINE void store_upper_halves(vec_bits bits, void* target) {
  const vec_half_bits half = __builtin_convertvector(bits >> 16, vec_half_bits);
  std::memcpy(target, &half, sizeof half);
}

}  // namespace convlab::cpu::CONVLAB_ISA
