// What a register tile loads, broadcasts and multiplies.
//
// Operands are of the type that sums are kept in: 16-bit tensors are widened while they are packed. The exception is
// bfloat16 where the CPU has vdpbf16ps: its operands stay as they are, and each step of the reduction takes two
// neighbouring elements of a row, and of each column, whose two products are added to the sum in float32: twice the
// multiply-adds per instruction, from half the memory. Packed columns therefore hold pairs, [step][column][2], rows
// are read as they lie in memory, and an odd count is filled up with a zero.
// Limits: vdpbf16ps takes subnormal operands and sums (below 2^-126) as zero, whatever the process's settings.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

#if defined(CONVLAB_BF16)
template <class T>
using operand_t = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, accumulate_t<T>>;
#else
template <class T>
using operand_t = accumulate_t<T>;
#endif

// Elements of a row that one step multiplies.
template <class S>
constexpr int products = is_reduced<S> ? 2 : 1;

template <class S>
struct Operand {
  using vector = vec<S>;
  static CONVLAB_INLINE vector load(const S* columns) { return CONVLAB_ISA::load(columns); }
  static CONVLAB_INLINE vector broadcast(const S* element) { return CONVLAB_ISA::broadcast(*element); }
  static CONVLAB_INLINE vec<S> multiply_add(vector a, vector b, vec<S> sum) { return fma(a, b, sum); }
};

#if defined(CONVLAB_BF16)
template <>
struct Operand<bfloat16> {
  using vector = vec_bits;  // not __m512i, which may alias anything: gcc would keep copies in memory
  static CONVLAB_INLINE vector load(const bfloat16* columns) { return (vec_bits)_mm512_loadu_si512(columns); }
  static CONVLAB_INLINE vector broadcast(const bfloat16* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return (vec_bits)_mm512_set1_epi32(bits);
  }
  static CONVLAB_INLINE vec<float> multiply_add(vector a, vector b, vec<float> sum) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// ---- packing of pairs

// target[2*i] = first[i * step], target[2*i + 1] = second[i * step]; second may be null, which stands for zeros.
template <int Step>
inline void interleave(const bfloat16* first, const bfloat16* second, int64_t step, int64_t count, bfloat16* target) {
  int64_t i = 0;
#if defined(CONVLAB_AVX512)
  const auto widened = [](const bfloat16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  const auto join = [&](__m512i low, __m512i high) {
    _mm512_storeu_si512(target + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  };
  if constexpr (Step == 1) {
    for (; i + 16 <= count; i += 16) join(widened(first + i), second ? widened(second + i) : __m512i{});
    if (i < count) {
      const auto mask = static_cast<__mmask16>((1u << (count - i)) - 1u);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + i));
      const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + i)) : __m512i{};
      _mm512_mask_storeu_epi32(target + 2 * i, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    return;
  }
  if constexpr (Step == 2) {  // element 2*i + 1 of the last pair loaded may lie past the end
    const __m512i low_half = _mm512_set1_epi32(0xffff);
    for (; i + 16 < count; i += 16)
      join(_mm512_and_si512(_mm512_loadu_si512(first + 2 * i), low_half),
           second ? _mm512_loadu_si512(second + 2 * i) : __m512i{});
  }
#endif
  const int64_t distance = Step ? Step : step;
  for (; i < count; ++i) {
    target[2 * i] = first[i * distance];
    target[2 * i + 1] = second ? second[i * distance] : bfloat16{0};
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
