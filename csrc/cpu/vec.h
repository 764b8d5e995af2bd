// Vectors of the widest registers of the instruction set being compiled, by the compiler's vector extension:
// `vec<float>` and `vec<double>` support + - * / and comparisons as they are. Storage types of 16 bits are
// converted on load and store, so that kernels see float or double alone.
#pragma once
#include "isa.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class A>
struct vec_of;
template <>
struct vec_of<float> {
  typedef float type __attribute__((vector_size(CONVLAB_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(CONVLAB_VECTOR_BYTES)));
};
template <>
struct vec_of<double> {
  typedef double type __attribute__((vector_size(CONVLAB_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(CONVLAB_VECTOR_BYTES)));
};
template <class A>
using vec = typename vec_of<A>::type;
template <class A>
using vec_mask = typename vec_of<A>::mask;  // of a comparison: all ones or all zeros per lane
template <class A>
constexpr int lanes = CONVLAB_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class A>
CONVLAB_INLINE vec<A> broadcast(A value) {
  return value - vec<A>{};  // exact for every value, so the compiler drops it; adding to zero would not be
}

// Keeps a loaded vector in a register: gcc 12 otherwise folds the load into every instruction that uses it.
template <class V>
CONVLAB_INLINE void pin(V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

// The same for an address that is to be counted up, not computed anew each time.
template <class T>
CONVLAB_INLINE void pin_pointer(T*& pointer) {
  asm("" : "+r"(pointer));
}

CONVLAB_INLINE vec<float> load(const float* p) {
  vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CONVLAB_INLINE vec<double> load(const double* p) {
  vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CONVLAB_INLINE void store(float* p, vec<float> v) { std::memcpy(p, &v, sizeof v); }
CONVLAB_INLINE void store(double* p, vec<double> v) { std::memcpy(p, &v, sizeof v); }

// Past the caches, to aligned memory: for outputs that no cache would keep. Ends with store_fence().
CONVLAB_INLINE void store_streaming(float* p, vec<float> v) {
#if defined(CONVLAB_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(CONVLAB_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
CONVLAB_INLINE void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

typedef uint16_t vec_half_bits __attribute__((vector_size(CONVLAB_VECTOR_BYTES / 2)));
typedef uint32_t vec_bits __attribute__((vector_size(CONVLAB_VECTOR_BYTES)));

CONVLAB_INLINE vec<float> load(const bfloat16* p) {
  vec_half_bits half;
  std::memcpy(&half, p, sizeof half);
  return (vec<float>)(__builtin_convertvector(half, vec_bits) << 16);
}
CONVLAB_INLINE void store(bfloat16* p, vec<float> v) {
#if defined(CONVLAB_BF16)  // the same but for subnormal results, which become zero
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  const vec_bits bits = (vec_bits)v;
  const vec_bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vec_bits result = v != v ? vec_bits{} + 0x7fc0u : rounded;
  const vec_half_bits half = __builtin_convertvector(result, vec_half_bits);
#endif
  std::memcpy(p, &half, sizeof half);
}

CONVLAB_INLINE vec<float> load(const float16* p) {
#if defined(CONVLAB_AVX512)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CONVLAB_AVX2)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> v;
  for (int lane = 0; lane < lanes<float>; ++lane) v[lane] = to_accumulate(p[lane]);
  return v;
#endif
}
CONVLAB_INLINE void store(float16* p, vec<float> v) {
#if defined(CONVLAB_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(CONVLAB_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < lanes<float>; ++lane) p[lane] = from_accumulate<float16>(v[lane]);
#endif
}

// The first `count` lanes; the others are zero on load and untouched in memory on store.
#if defined(CONVLAB_AVX2)
constexpr int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};  // from 8 - count on: of the first lanes
#endif
template <class T>
CONVLAB_INLINE vec<accumulate_t<T>> load_partial(const T* p, int64_t count) {
  constexpr int width = lanes<accumulate_t<T>>;
#if defined(CONVLAB_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return (vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
  if constexpr (std::is_same_v<T, double>)
    return (vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p);
#elif defined(CONVLAB_AVX2)
  const auto mask = [](int64_t words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMasks + 8 - words));
  };
  if constexpr (std::is_same_v<T, float>) return (vec<float>)_mm256_maskload_ps(p, mask(count));
  if constexpr (std::is_same_v<T, double>) return (vec<double>)_mm256_maskload_pd(p, mask(2 * count));
#endif
  T buffer[width] = {};
  std::memcpy(static_cast<void*>(buffer), p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <class T>
CONVLAB_INLINE void store_partial(T* p, vec<accumulate_t<T>> v, int64_t count) {
  constexpr int width = lanes<accumulate_t<T>>;
#if defined(CONVLAB_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
    return;
  }
  if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), (__m512d)v);
    return;
  }
#elif defined(CONVLAB_AVX2)
  if constexpr (std::is_same_v<T, float>) {  // a masked store takes longer on many CPUs
    if (count == width) return store(p, v);
    __m128 part = _mm256_castps256_ps128((__m256)v);
    if (count & 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (count & 1) _mm_store_ss(p, part);
    return;
  }
#endif
  T buffer[width];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, static_cast<size_t>(count) * sizeof(T));
}

// a*b + c, rounded once where the instruction set has it. Written with intrinsics because results that are
// computed twice (a mask in forward and again in backward) must not depend on what the compiler contracts.
CONVLAB_INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) {
#if defined(CONVLAB_AVX512)
  return (vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(CONVLAB_AVX2)
  return (vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
CONVLAB_INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) {
#if defined(CONVLAB_AVX512)
  return (vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(CONVLAB_AVX2)
  return (vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <class A>
CONVLAB_INLINE A sum_lanes(vec<A> v) {  // pairwise, always in the same order
#if defined(CONVLAB_AVX512)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps((__m512)v);
#endif
  A value[lanes<A>];
  store(value, v);
  CONVLAB_UNROLL for (int half = lanes<A> / 2; half > 0; half /= 2)
      CONVLAB_UNROLL for (int lane = 0; lane < half; ++lane) value[lane] += value[lane + half];
  return value[0];
}

// max as torch defines it: NaN if either is NaN.
template <class V>
CONVLAB_INLINE V maximum(V a, V b) {
  return a != a ? a : (b > a ? b : (b != b ? b : a));
}
// One bit per lane of a mask, and back.
template <class A>
using lane_bits = std::conditional_t<(lanes<A> > 8), uint16_t, uint8_t>;
template <class A>
CONVLAB_INLINE lane_bits<A> bits_of(vec_mask<A> mask) {
  [[maybe_unused]] constexpr bool is_float = sizeof(A) == 4;
#if defined(CONVLAB_AVX512)
  if constexpr (is_float) return static_cast<lane_bits<A>>(_mm512_movepi32_mask((__m512i)mask));
  if constexpr (!is_float) return static_cast<lane_bits<A>>(_mm512_movepi64_mask((__m512i)mask));
#elif defined(CONVLAB_AVX2)
  if constexpr (is_float) return static_cast<lane_bits<A>>(_mm256_movemask_ps((__m256)mask));
  if constexpr (!is_float) return static_cast<lane_bits<A>>(_mm256_movemask_pd((__m256d)mask));
#else
  int bits = 0;
  for (int lane = 0; lane < lanes<A>; ++lane) bits |= (mask[lane] & 1) << lane;
  return static_cast<lane_bits<A>>(bits);
#endif
}
template <class A>
CONVLAB_INLINE vec_mask<A> mask_of(lane_bits<A> bits) {
  vec_mask<A> bit;
  CONVLAB_UNROLL for (int lane = 0; lane < lanes<A>; ++lane) bit[lane] = 1 << lane;
  return ((vec_mask<A>{} + bits) & bit) != 0;
}

// `Bounds` on every lane.
template <class A>
struct VectorBounds {
  vec<A> lower, upper;

  CONVLAB_INLINE explicit VectorBounds(const Bounds<A>& bounds)
      : lower(broadcast(bounds.lower)), upper(broadcast(bounds.upper)) {}

  CONVLAB_INLINE vec<A> clamped(vec<A> v) const {
    v = v < lower ? lower : v;
    return upper < v ? upper : v;
  }
  CONVLAB_INLINE vec_mask<A> stops(vec<A> v) const { return (v <= lower) | (v >= upper); }
};

}  // namespace convlab::cpu::CONVLAB_ISA
