// Pooling, backward, of channels_last windows that do not overlap: kernel = stride, no padding, as 2x2 and global
// pooling have them.
//
// Idea: each window's gradient is read once and written to every tap of the window, to the winner or divided among all.
// Cost: one store per input element. Limits: windows that overlap or are dilated are left to the general kernels.
#pragma once
#include "pool_taps.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T, bool kMax>
struct Disjoint {
  using A = accumulate_t<T>;

  static bool fits(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    if (a.layout != Layout::channels_last || g.adaptive || !taps_fit_lanes(g)) return false;
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      if (g.kernel[axis] != g.stride[axis] || g.padding[axis] != 0 || (g.dilation[axis] != 1 && g.kernel[axis] > 1))
        return false;
    return true;
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t rows = g.output[0] * g.output[1];
    return {g.batch * rows, g.channels * ceil_divide(g.input_pixels(), rows), 0};
  }

  static void run(const PoolArguments<T>& a, void*, int64_t begin, int64_t end) {
    if (a.narrow())
      run_rows<true>(a, begin, end);
    else
      run_rows<false>(a, begin, end);
  }

 private:
  template <bool kNarrow>
  static void run_rows(const PoolArguments<T>& a, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels, row = g.input[2] * C;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t oh = task % g.output[1], od = task / g.output[1] % g.output[0],
                    n = task / g.output[1] / g.output[0];
      const int64_t depth = g.taps_inside(0, od).end, height = g.taps_inside(1, oh).end;
      T* first = a.input + ((n * g.input[0] + od * g.stride[0]) * g.input[1] + oh * g.stride[1]) * row;
      const double row_divisor = kMax ? 1 : static_cast<double>(g.divisor(0, od) * g.divisor(1, oh));
      for (int64_t ow = 0; ow < g.output[2]; ++ow) {
        const int64_t width = g.taps_inside(2, ow).end, from = (task * g.output[2] + ow) * C;
        const A factor = kMax ? A(1) : static_cast<A>(1 / (row_divisor * static_cast<double>(g.divisor(2, ow))));
        T* to = first + ow * g.stride[2] * C;
        for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
          window<kNarrow, vectors, partial>(a, from + c, to + c, depth, height, width, factor, channels);
        });
      }
      clear_rest(g, n, od, oh, depth, height, a.input);
    }
  }

  template <bool kNarrow, int kVectors, bool kPartial>
  CONVLAB_INLINE static void window(const PoolArguments<T>& a, int64_t from, T* to, int64_t depth, int64_t height,
                                    int64_t width, A factor, int64_t channels) {
    const PoolGeometry& g = a.geometry;
    vec<A> grad[kVectors];
    vec_mask<A> winner[kVectors];
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
      const T* p = a.output + from + v * lanes<A>;
      grad[v] = (kPartial ? load_partial(p, channels) : load(p)) * factor;
      if constexpr (kMax) winner[v] = load_taps<A>(a.taps, kNarrow, from + v * lanes<A>, channels);
    }
    for (int64_t kd = 0; kd < depth; ++kd)
      for (int64_t kh = 0; kh < height; ++kh) {
        T* p = to + (kd * g.input[1] + kh) * g.input[2] * g.channels;
        auto tap = static_cast<lane_int<A>>((kd * g.kernel[1] + kh) * g.kernel[2]);
        for (int64_t kw = 0; kw < width; ++kw, p += g.channels, ++tap)
          CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
            vec<A> share = grad[v];
            if constexpr (kMax) share = winner[v] == tap ? share : vec<A>{};
            __builtin_prefetch(p + next_window(g) + v * lanes<A>, 1);
            if constexpr (kPartial)
              store_partial(p, share, channels);
            else
              store(p + v * lanes<A>, share);
          }
      }
  }

  // Zeros for the elements after the last windows, which belong to no window.
  static void clear_rest(const PoolGeometry& g, int64_t n, int64_t od, int64_t oh, int64_t depth, int64_t height,
                         T* input) {
    const int64_t row = g.input[2] * g.channels;
    const auto at = [&](int64_t d, int64_t h) { return input + ((n * g.input[0] + d) * g.input[1] + h) * row; };
    const int64_t covered = std::min(g.input[2], g.output[2] * g.stride[2]) * g.channels;
    const int64_t last_row = oh + 1 == g.output[1] ? g.input[1] : oh * g.stride[1] + height;
    for (int64_t d = od * g.stride[0]; d < od * g.stride[0] + depth; ++d) {
      for (int64_t h = oh * g.stride[1]; covered < row && h < oh * g.stride[1] + height; ++h)
        std::fill(at(d, h) + covered, at(d, h) + row, T{});
      if (oh * g.stride[1] + height < last_row)
        std::fill(at(d, oh * g.stride[1] + height), at(d, last_row - 1) + row, T{});
    }
    if (od + 1 == g.output[0] && oh + 1 == g.output[1])
      for (int64_t d = od * g.stride[0] + depth; d < g.input[0]; ++d) std::fill(at(d, 0), at(d, g.input[1]), T{});
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
