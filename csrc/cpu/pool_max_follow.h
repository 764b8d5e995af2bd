// Max pooling along winners already found: the values at the taps (the adjoint of backward), or torch's indices.
#pragma once
#include "pool_max_scatter.h"

namespace convlab::cpu::CONVLAB_ISA {

// Follows the tap of every output element to an input pixel: to its value, or to its offset in the plane.
template <class T, bool kIndices>
struct MaxFollow {
  static PoolPlan plan(const PoolArguments<T>& a) {
    Carve carve(nullptr);
    carve.take<int64_t>(kNarrowTaps);
    return {a.geometry.planes() * a.geometry.output_pixels(), 4, carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const bool last = a.layout == Layout::channels_last, narrow = a.narrow();
    const int64_t inner = last ? g.channels : 1;
    int64_t* table = Carve(scratch).take<int64_t>(kNarrowTaps);
    for (int64_t tap = 0; narrow && tap < g.taps(); ++tap) table[tap] = tap_distance(g, tap);

    Cursor at(g.output, begin / inner);
    for (int64_t index = begin; index < end; at.next()) {
      const int64_t first =
          (g.start(0, at.at[0]) * g.input[1] + g.start(1, at.at[1])) * g.input[2] + g.start(2, at.at[2]);
      const int64_t next = std::min(end, (index / inner + 1) * inner);
      for (; index < next; ++index) {
        const int64_t tap = read_tap(a.taps, narrow, index);
        const int64_t pixel = tap < 0 ? -1 : first + (narrow ? table[tap] : tap_distance(g, tap));
        if constexpr (kIndices)
          a.indices[index] = pixel;
        else
          a.output[index] = pixel < 0 ? T{} : a.input[(at.outer * g.input_pixels() + pixel) * inner + index % inner];
      }
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
