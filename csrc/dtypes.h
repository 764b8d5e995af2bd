// Element types of the kernels. Storage types are what tensors hold; every kernel accumulates in
// `accumulate_t<T>`: float for the 16-bit types and float32, double for float64.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace convlab {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// Bit-compatible with c10::BFloat16 and c10::Half, without their headers.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct accumulate {
  using type = T;
};
template <>
struct accumulate<bfloat16> {
  using type = float;
};
template <>
struct accumulate<float16> {
  using type = float;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

template <class T>
constexpr bool is_reduced = !std::is_same_v<T, accumulate_t<T>>;

CONVLAB_HD inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
CONVLAB_HD inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

CONVLAB_HD inline float to_accumulate(float value) { return value; }
CONVLAB_HD inline double to_accumulate(double value) { return value; }
CONVLAB_HD inline float to_accumulate(bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
CONVLAB_HD inline float to_accumulate(float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));  // inf, nan
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and is exact for subnormals too.
  return bits_to_float(float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f) | sign);
#endif
}

template <class T>
CONVLAB_HD T from_accumulate(accumulate_t<T> value) {
  return value;
}
// Both round to nearest, ties to even, as torch does.
template <>
CONVLAB_HD inline bfloat16 from_accumulate<bfloat16>(float value) {
  if (value != value) return {0x7fc0};
  const uint32_t bits = float_to_bits(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
CONVLAB_HD inline float16 from_accumulate<float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: let float addition do the rounding at 2^-24
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000u))};
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13))};
#endif
}

}  // namespace convlab
