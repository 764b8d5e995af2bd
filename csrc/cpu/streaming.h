// Outputs written past the caches.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

// Whether an output is written past the caches: if it is large and would not stay there, as it and what the call mainly
// reads fill a common last level, and if vectors of its runs of `run` elements are aligned.
constexpr int64_t kCachedBytes = int64_t{24} << 20, kLeastStreamedBytes = int64_t{8} << 20;
template <class T>
bool streams(const T* output, int64_t elements, int64_t run, int64_t read_elements) {
  constexpr int64_t size = sizeof(T);
  return std::is_same_v<T, float> && elements * size >= kLeastStreamedBytes &&
         (elements + read_elements) * size >= kCachedBytes && run % lanes<float> == 0 &&
         reinterpret_cast<uintptr_t>(output) % CONVLAB_VECTOR_BYTES == 0;
}

// Calls body(std::bool_constant) and waits for what it wrote past the caches.
template <class T, class Body>
CONVLAB_INLINE void with_streams(bool streams, const Body& body) {
  if constexpr (std::is_same_v<T, float>)
    if (streams) {
      body(std::true_type{});
      return store_fence();
    }
  body(std::false_type{});
}

template <bool kStream, class T>
CONVLAB_INLINE void store_whole(T* p, vec<accumulate_t<T>> v) {
  if constexpr (kStream && std::is_same_v<T, float>)
    store_streaming(p, v);
  else
    store(p, v);
}

}  // namespace convlab::cpu::CONVLAB_ISA
