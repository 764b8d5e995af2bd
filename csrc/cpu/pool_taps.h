// Reading, writing and comparing taps: which position of its window won a maximum.
#pragma once
#include "pool_rows.h"

namespace convlab::cpu::CONVLAB_ISA {

inline bool taps_fit_lanes(const PoolGeometry& g) { return g.taps() <= std::numeric_limits<int32_t>::max(); }

// Lanes of integers as wide as those of vec<A>.
template <class A>
using lane_int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

typedef uint8_t narrow_float_lanes __attribute__((vector_size(lanes<float>)));
typedef uint8_t narrow_double_lanes __attribute__((vector_size(lanes<double>)));
template <class A>
using narrow_lanes = std::conditional_t<sizeof(A) == 8, narrow_double_lanes, narrow_float_lanes>;

template <class A>
CONVLAB_INLINE vec_mask<A> load_lanes(const lane_int<A>* p) {
  vec_mask<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
CONVLAB_INLINE void store_lanes(lane_int<A>* p, vec_mask<A> v) {
  std::memcpy(p, &v, sizeof v);
}

// Lanes to bytes and back. The compiler would move them one by one.
template <class A>
CONVLAB_INLINE narrow_lanes<A> to_bytes(vec_mask<A> tap) {
#if defined(CONVLAB_AVX512)
  if constexpr (sizeof(A) == 4)
    return (narrow_lanes<A>)_mm512_cvtepi32_epi8((__m512i)tap);
  else
    return (narrow_lanes<A>)(_mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)tap)));
#else
  narrow_lanes<A> bytes;
  for (int lane = 0; lane < lanes<A>; ++lane) bytes[lane] = static_cast<uint8_t>(tap[lane]);
  return bytes;
#endif
}
template <class A>
CONVLAB_INLINE vec_mask<A> from_bytes(narrow_lanes<A> bytes) {
#if defined(CONVLAB_AVX512)
  if constexpr (sizeof(A) == 4)
    return (vec_mask<A>)_mm512_cvtepu8_epi32((__m128i)bytes);
  else
    return (vec_mask<A>)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128((long long)bytes));
#elif defined(CONVLAB_AVX2)
  if constexpr (sizeof(A) == 4)
    return (vec_mask<A>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
  else
    return (vec_mask<A>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)bytes));
#else
  return __builtin_convertvector(bytes, vec_mask<A>);
#endif
}

// memcpy of fewer bytes than a vector of taps has.
template <class Bytes>
CONVLAB_INLINE void store_some_bytes(uint8_t* to, const Bytes* from, int64_t count) {
#if defined(CONVLAB_AVX512)
  __m128i whole = {};
  std::memcpy(&whole, from, sizeof *from);
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1u), whole);
#else
  std::memcpy(to, from, static_cast<size_t>(count));
#endif
}
template <class Bytes>
CONVLAB_INLINE void load_some_bytes(Bytes* to, const uint8_t* from, int64_t count) {
#if defined(CONVLAB_AVX512)
  const __m128i whole = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1u), from);
  std::memcpy(to, &whole, sizeof *to);
#else
  std::memcpy(to, from, static_cast<size_t>(count));
#endif
}

// taps[at + lane] for the first `count` lanes, which are all of them in most calls.
template <class A>
CONVLAB_INLINE void store_taps(void* taps, bool narrow, int64_t at, vec_mask<A> tap, int64_t count) {
  if (narrow) {
    const narrow_lanes<A> bytes = to_bytes<A>(tap);
    uint8_t* p = static_cast<uint8_t*>(taps) + at;
    if (count == lanes<A>)
      std::memcpy(p, &bytes, sizeof bytes);
    else
      store_some_bytes(p, &bytes, count);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) static_cast<int64_t*>(taps)[at + lane] = tap[lane];
  }
}
template <class A>
CONVLAB_INLINE vec_mask<A> load_taps(const void* taps, bool narrow, int64_t at, int64_t count) {
  if (narrow) {
    narrow_lanes<A> bytes = {};
    const uint8_t* p = static_cast<const uint8_t*>(taps) + at;
    if (count == lanes<A>)
      std::memcpy(&bytes, p, sizeof bytes);
    else
      load_some_bytes(&bytes, p, count);
    return from_bytes<A>(bytes);
  }
  vec_mask<A> wide = {};
  for (int64_t lane = 0; lane < count; ++lane)
    wide[lane] = static_cast<lane_int<A>>(static_cast<const int64_t*>(taps)[at + lane]);
  return wide;
}

// total + grad in those of the first `count` lanes whose taps[at + lane] is `tap`.
template <class A, bool kNarrow>
CONVLAB_INLINE vec<A> add_where(vec<A> total, vec<A> grad, const void* taps, int64_t at, lane_int<A> tap,
                                int64_t count) {
#if defined(CONVLAB_AVX512)
  if constexpr (kNarrow) {  // bytes are compared as they are
    const uint8_t* p = static_cast<const uint8_t*>(taps) + at;
    __m128i bytes = {};
    if (count < lanes<A>)
      bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1u), p);
    else
      std::memcpy(&bytes, p, static_cast<size_t>(lanes<A>));
    const __mmask16 hit = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(tap)));
    if constexpr (sizeof(A) == 4)
      return (vec<A>)_mm512_mask_add_ps((__m512)total, hit, (__m512)total, (__m512)grad);
    else
      return (vec<A>)_mm512_mask_add_pd((__m512d)total, static_cast<__mmask8>(hit), (__m512d)total, (__m512d)grad);
  }
#endif
  return total + (load_taps<A>(taps, kNarrow, at, count) == tap ? grad : vec<A>{});
}

// One tap; -1 if the window has none inside the input.
inline int64_t read_tap(const void* taps, bool narrow, int64_t at) {
  if (!narrow) return static_cast<const int64_t*>(taps)[at];
  const uint8_t tap = static_cast<const uint8_t*>(taps)[at];
  return tap == kNarrowTaps ? -1 : tap;
}
inline void write_tap(void* taps, bool narrow, int64_t at, int64_t tap) {
  if (narrow)
    static_cast<uint8_t*>(taps)[at] = static_cast<uint8_t>(tap);  // -1 becomes 255
  else
    static_cast<int64_t*>(taps)[at] = tap;
}

// The best of the taps seen so far. As in torch the first of equal values wins, and the last NaN.
template <class A>
struct Best {
  vec<A> value;
  vec_mask<A> tap;

  template <bool kTaps>
  CONVLAB_INLINE void consider(vec<A> candidate, vec_mask<A> candidate_tap) {
    if constexpr (kTaps) tap = candidate > value ? candidate_tap : (candidate != candidate ? candidate_tap : tap);
    value = candidate > value ? candidate : (candidate != candidate ? candidate : value);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
