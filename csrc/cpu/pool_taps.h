// Reading, writing and comparing taps: which position of its window won a maximum.
#pragma once
#include "pool_rows.h"

namespace convlab::cpu::CONVLAB_ISA {

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

// taps[at + lane] for the first `count` lanes, which are all of them in most calls.
template <class A>
CONVLAB_INLINE void store_taps(void* taps, bool narrow, int64_t at, vec_mask<A> tap, int64_t count) {
  if (narrow) {
    const auto bytes = __builtin_convertvector(tap, narrow_lanes<A>);
    uint8_t* p = static_cast<uint8_t*>(taps) + at;
    if (count == lanes<A>)
      std::memcpy(p, &bytes, sizeof bytes);
    else
      for (int64_t lane = 0; lane < count; ++lane) p[lane] = bytes[lane];
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
      for (int64_t lane = 0; lane < count; ++lane) bytes[lane] = p[lane];
    return __builtin_convertvector(bytes, vec_mask<A>);
  }
  vec_mask<A> wide = {};
  for (int64_t lane = 0; lane < count; ++lane)
    wide[lane] = static_cast<lane_int<A>>(static_cast<const int64_t*>(taps)[at + lane]);
  return wide;
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
    if constexpr (kTaps) {
      tap = candidate > value ? candidate_tap : (candidate != candidate ? candidate_tap : tap);
      value = candidate > value ? candidate : (candidate != candidate ? candidate : value);
    } else {
      value = maximum(value, candidate);
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
