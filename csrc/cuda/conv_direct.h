// What the kernels without tensor cores share: how the threads of a block divide channels among them.
#pragma once
#include "conv_phase.h"

namespace convlab::cuda {

constexpr int kDirectThreads = 256;

// Channels that a thread reads at once: 16 bytes of float32 and float64, 8 of the 16-bit types, whose sums are as wide
// as those of float32.
template <class T>
constexpr int kDirectWidth = sizeof(T) == 8 ? 2 : 4;

// Whether vectors of channels, of groups of `filters` and `channels`, can be read and written.
template <class T>
bool direct_vectors_fit(const ConvArguments& a, int64_t filters, int64_t channels) {
  constexpr int width = kDirectWidth<T>;
  constexpr int64_t bytes = width * sizeof(T);
  return a.layout == Layout::channels_last && filters % width == 0 && channels % width == 0 &&
         aligned(a.input, bytes) && aligned(a.output, bytes) && aligned(a.residual, bytes);
}

// How many threads of a block take neighbouring vectors of channels: a power of two, as many of a warp as have work,
// and few enough that `bytes_per_lane` of shared memory each stay under `most_bytes`; 0 if even one is too much.
inline int direct_lanes(int64_t vectors, int64_t bytes_per_lane, int64_t most_bytes) {
  int lanes = 32;
  while (lanes > 4 && ceil_divide<int64_t>(vectors, lanes) * lanes > vectors + vectors / 8) lanes /= 2;
  while (lanes > 0 && lanes * bytes_per_lane > most_bytes) lanes /= 2;
  return lanes;
}

}  // namespace convlab::cuda
