// Outputs written past the caches.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

// Whether an output is written past the caches: if no cache keeps it until it is read again (from half of a common last
// level on; smaller ones are better kept), and vectors of runs of `run` elements are aligned.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;
template <class T>
bool streams(const T* output, int64_t elements, int64_t run) {
  return std::is_same_v<T, float> && elements * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes &&
         run % lanes<float> == 0 && reinterpret_cast<uintptr_t>(output) % CONVLAB_VECTOR_BYTES == 0;
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
