// Pooling, backward, of channels_last windows that do not overlap: kernel = stride, no padding, as 2x2 and global
// pooling have them.
//
// Idea: row by row of the input, each window's gradient is written to its taps in that row, to the winner or divided
// among all, so that what is written is one run.
// Cost: one store per input element, one read of the gradient and of the taps per row of the window. Limits: windows
// that overlap or are dilated are left to the general kernels.
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
    with_streams<T>(streams_grad_input(a), [&](auto stream) {
      if (a.narrow())
        run_rows<true, stream.value>(a, begin, end);
      else
        run_rows<false, stream.value>(a, begin, end);
    });
  }

 private:
  template <bool kNarrow, bool kStream>
  static void run_rows(const PoolArguments<T>& a, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels, row = g.input[2] * C;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t oh = task % g.output[1], od = task / g.output[1] % g.output[0],
                    n = task / g.output[1] / g.output[0];
      const int64_t depth = g.taps_inside(0, od).end, height = g.taps_inside(1, oh).end;
      T* first = a.input + ((n * g.input[0] + od * g.stride[0]) * g.input[1] + oh * g.stride[1]) * row;
      for (int64_t kd = 0; kd < depth; ++kd)
        for (int64_t kh = 0; kh < height; ++kh)
          write_row<kNarrow, kStream>(a, task, od, oh, (kd * g.kernel[1] + kh) * g.kernel[2],
                                      first + (kd * g.input[1] + kh) * row);
      clear_rest(g, n, od, oh, depth, height, a.input);
    }
  }

  // One row of the input under a row of windows.
  template <bool kNarrow, bool kStream>
  static void write_row(const PoolArguments<T>& a, int64_t task, int64_t od, int64_t oh, int64_t first_tap, T* to) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels, last = g.output[2] - 1;
    const double row_divisor = kMax ? 1 : static_cast<double>(g.divisor(0, od) * g.divisor(1, oh));
    const auto factor_of = [&](int64_t ow) {
      return kMax ? A(1) : static_cast<A>(1 / (row_divisor * static_cast<double>(g.divisor(2, ow))));
    };
    const A factor = factor_of(0);  // of all windows but the last, which ceil_mode may cut short
    for (int64_t ow = 0; ow <= last; ++ow, to += g.stride[2] * C) {
      const int64_t width = ow < last ? g.kernel[2] : g.taps_inside(2, ow).end, from = (task * g.output[2] + ow) * C;
      const A share = ow < last ? factor : factor_of(ow);
      for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
        write<kNarrow, kStream, vectors, partial>(a, from + c, to + c, first_tap, width, C, share, channels);
      });
    }
  }

  template <bool kNarrow, bool kStream, int kVectors, bool kPartial>
  CONVLAB_INLINE static void write(const PoolArguments<T>& a, int64_t from, T* to, int64_t first_tap, int64_t width,
                                   int64_t C, A factor, int64_t channels) {
    vec<A> grad[kVectors];
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
      const T* p = a.output + from + v * lanes<A>;
      grad[v] = kPartial ? load_partial(p, channels) : load(p);
      if constexpr (!kMax) grad[v] *= factor;
    }
    for (int64_t kw = 0; kw < width; ++kw, to += C) {
      const auto tap = static_cast<lane_int<A>>(first_tap + kw);
      CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
        vec<A> share = grad[v];
        if constexpr (kMax)
          share =
              add_where<A, kNarrow>(vec<A>{}, share, a.taps, from + v * lanes<A>, tap, kPartial ? channels : lanes<A>);
        if constexpr (kPartial)
          store_partial(to, share, channels);
        else
          store_whole<kStream>(to + v * lanes<A>, share);
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
