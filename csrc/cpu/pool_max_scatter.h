// Max pooling, backward: the kernels that follow taps to their winners, instead of asking each input who chose it.
//
// Idea: a plane, or a piece of a row, belongs to one task, which walks the windows over it in order and adds each
// gradient where its tap points. So there are no atomics, and the order of the sums is fixed.
// Cost: a few scalar instructions per window, however many windows overlap.
#pragma once
#include "pool_max.h"

namespace convlab::cpu::CONVLAB_ISA {

// Of the pixel of a tap from that of tap 0, in a plane of the input.
inline int64_t tap_distance(const PoolGeometry& g, int64_t tap) {
  const int64_t kw = tap % g.kernel[2], kh = tap / g.kernel[2] % g.kernel[1], kd = tap / g.kernel[2] / g.kernel[1];
  return (kd * g.dilation[0] * g.input[1] + kh * g.dilation[1]) * g.input[2] + kw * g.dilation[2];
}

// Outputs add to their winners in planes that one task owns. channels_first does so where the plane lies, if it holds
// the type that sums have; else in scratch, channels_last a vector's worth of channels at a time, so that lines are
// used up.
template <class T>
struct MaxBackwardScatter {
  using A = accumulate_t<T>;
  static constexpr int64_t kMaxElements = 1 << 18;  // of the planes of a task, so that they stay in cache
  static constexpr int64_t kEnoughPlanes = 16;      // to keep threads busy, if they are large
  struct Scratch {
    A* sums;
    int64_t *distance, *start[kMaxSpatial];
    int64_t bytes;

    Scratch(const PoolGeometry& g, int64_t block, void* memory) {
      Carve carve(memory);
      sums = carve.take<A>(in_place(block) ? 0 : g.input_pixels() * block);
      distance = carve.take<int64_t>(kNarrowTaps + 1);
      for (int axis = 0; axis < kMaxSpatial; ++axis) start[axis] = carve.take<int64_t>(g.output[axis]);
      bytes = carve.used();
    }
  };

  static constexpr bool in_place(int64_t block) { return std::is_same_v<T, A> && block == 1; }
  static int64_t block(const PoolArguments<T>& a) { return a.layout == Layout::channels_last ? lanes<A> : 1; }
  static bool fits(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    if (!a.narrow() || std::max(g.input_pixels(), g.output_pixels()) * block(a) > kMaxElements) return false;
    if (a.layout == Layout::channels_first && in_place(1))
      return g.planes() >= kEnoughPlanes || g.input_pixels() <= kMaxSpan;
    // Windows over one input from which comparing with each of them takes longer; measured.
    constexpr int64_t kOverlap = 64;
    if (g.overlap(0) * g.overlap(1) * g.overlap(2) >= kOverlap) return true;
    return a.layout == Layout::channels_first && (!by_rows(g) || g.output[2] < 2 * lanes<A>);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t cost = (g.input_pixels() + 4 * g.output_pixels()) * block(a);
    return {g.batch * ceil_divide(g.channels, block(a)), cost, Scratch(g, block(a), nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const Scratch s(g, block(a), memory);
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      for (int64_t o = 0; o < g.output[axis]; ++o) s.start[axis][o] = g.start(axis, o);
    for (int64_t tap = 0; tap < g.taps(); ++tap) s.distance[tap] = tap_distance(g, tap);
    const int64_t blocks = ceil_divide(g.channels, block(a)), C = g.channels;
    for (int64_t task = begin; task < end; ++task) {
      if (a.layout == Layout::channels_first) {
        T* plane = a.input + task * g.input_pixels();
        if constexpr (in_place(1)) {
          add<1>(a, s, plane, task * g.output_pixels(), 1, 1);
        } else {
          add<1>(a, s, s.sums, task * g.output_pixels(), 1, 1);
          copy<1>(s.sums, g.input_pixels(), plane, 1, 1);
        }
      } else {
        const int64_t image = task / blocks, c = task % blocks * lanes<A>;
        const int64_t channels = std::min<int64_t>(lanes<A>, C - c);
        add<lanes<A>>(a, s, s.sums, image * g.output_pixels() * C + c, C, channels);
        copy<lanes<A>>(s.sums, g.input_pixels(), a.input + image * g.input_pixels() * C + c, C, channels);
      }
    }
  }

  template <int64_t kBlock>
  static void add(const PoolArguments<T>& a, const Scratch& s, A* sums, int64_t from, int64_t step, int64_t channels) {
    const PoolGeometry& g = a.geometry;
    std::fill_n(sums, g.input_pixels() * kBlock, A{});
    const uint8_t* taps = static_cast<const uint8_t*>(a.taps);
    for (int64_t od = 0; od < g.output[0]; ++od)
      for (int64_t oh = 0; oh < g.output[1]; ++oh) {
        const int64_t row = (s.start[0][od] * g.input[1] + s.start[1][oh]) * g.input[2];
        for (int64_t ow = 0; ow < g.output[2]; ++ow, from += step)
          for (int64_t c = 0; c < (kBlock == 1 ? 1 : channels); ++c) {
            const uint8_t tap = taps[from + c];
            if (tap == kNarrowTaps) continue;
            sums[(row + s.start[2][ow] + s.distance[tap]) * kBlock + c] += to_accumulate(a.output[from + c]);
          }
      }
  }

  template <int64_t kBlock>
  static void copy(const A* sums, int64_t pixels, T* to, int64_t step, int64_t channels) {
    if constexpr (kBlock == 1)
      collect(sums, 1, 0, 0, pixels, to, pixels);
    else
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        store_partial(to + pixel * step, load(sums + pixel * kBlock), channels);
  }
};

// The general case, in either layout: a task is a piece of one input row of one channel.
template <class T>
struct MaxBackwardScan {
  using A = accumulate_t<T>;
  static constexpr int64_t kPiece = 1024;

  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<A>(kPiece);
    const int64_t tasks = g.planes() * ceil_divide(g.input[2], kPiece) * g.input[0] * g.input[1];
    return {tasks, std::min(g.input[2], kPiece), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const bool last = a.layout == Layout::channels_last, narrow = a.narrow();
    const int64_t pixel_stride = last ? g.channels : 1;
    A* piece = Carve(scratch).take<A>(kPiece);
    const int64_t grid[kMaxSpatial] = {ceil_divide(g.input[2], kPiece), g.input[0], g.input[1]};
    Cursor at(grid, begin);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t w = at.at[0] * kPiece, width = std::min(kPiece, g.input[2] - w), d = at.at[1], h = at.at[2];
      const int64_t image = at.outer / g.channels, channel = at.outer % g.channels;
      const auto plane = [&](int64_t pixels) {
        return last ? image * pixels * g.channels + channel : at.outer * pixels;
      };
      std::fill_n(piece, width, A{});
      const Range over_d = g.windows_over(0, d), over_h = g.windows_over(1, h);
      const Range over_w = {g.windows_over(2, w).begin, g.windows_over(2, w + width - 1).end};
      for (int64_t od = over_d.begin; od < over_d.end; ++od)
        for (int64_t oh = over_h.begin; oh < over_h.end; ++oh) {
          const int64_t kd = g.tap_at(0, od, d), kh = g.tap_at(1, oh, h);
          if (kd < 0 || kh < 0) continue;
          const int64_t first_tap = (kd * g.kernel[1] + kh) * g.kernel[2];
          const int64_t row = plane(g.output_pixels()) + (od * g.output[1] + oh) * g.output[2] * pixel_stride;
          for (int64_t ow = over_w.begin; ow < over_w.end; ++ow) {
            const int64_t kw = read_tap(a.taps, narrow, row + ow * pixel_stride) - first_tap;
            if (kw < 0 || kw >= g.kernel[2]) continue;
            const int64_t place = g.start(2, ow) + kw * g.dilation[2] - w;
            if (place >= 0 && place < width) piece[place] += to_accumulate(a.output[row + ow * pixel_stride]);
          }
        }
      T* row = a.input + plane(g.input_pixels()) + ((d * g.input[1] + h) * g.input[2] + w) * pixel_stride;
      for (int64_t i = 0; i < width; ++i) row[i * pixel_stride] = from_accumulate<T>(piece[i]);
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
