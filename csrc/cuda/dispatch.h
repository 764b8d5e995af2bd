// From the values in a launcher's arguments to template parameters. Host code.
#pragma once
#include <cstdint>
#include <limits>

#include "../dtypes.h"

namespace convlab::cuda {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// body(value of the element type), which returns an error code.
template <class Body>
int with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::bfloat16:
      return body(bfloat16{});
    case Dtype::float16:
      return body(float16{});
  }
  return kInvalidValue;
}

// Smaller indices are kept in 32 bits. The emulator can be told to keep none, so that small problems test the others.
#if defined(__CUDACC__)
constexpr int64_t narrow_indices() { return std::numeric_limits<int32_t>::max() / 2; }
#else
int64_t narrow_indices();  // csrc/emulator/scheduler.cpp
#endif

// body(int32_t{}) if no index passes `largest`, else body(int64_t{}).
template <class Body>
int with_index(int64_t largest, const Body& body) {
  if (largest < narrow_indices()) return body(int32_t{});
  return body(int64_t{});
}

// A width as a template parameter.
template <int N>
struct Width {
  static constexpr int value = N;
};

// Whether vectors of `width` elements can be read at every multiple of `width` elements from `pointer`.
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace convlab::cuda
