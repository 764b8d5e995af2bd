// Max pooling, backward, and its companions that follow taps: gather and indices.
//
// Idea: every input element sums the outputs whose tap names it. No two tasks write the same element, so there are no
// atomics and the order of the sums is fixed. By layout:
// - channels_last: list the (output, tap) pairs that can name a pixel, compare a vector of channels with each.
// - channels_first: rows of output gradients and taps, padded, in a ring; each phase of an input row is a sum of
//   masked, shifted rows, and the phases are dealt back together.
// - small planes under many windows, and adaptive ones: outputs add to their winners in a private copy of the plane.
// - otherwise: each row of the input scans the windows over it.
// Cost: one comparison per window over an input element. Limits: see by_rows().
#pragma once
#include "pool_disjoint.h"
#include "pool_max.h"

namespace convlab::cpu::CONVLAB_ISA {

// Of the pixel of a tap from that of tap 0, in a plane of the input.
inline int64_t tap_distance(const PoolGeometry& g, int64_t tap) {
  const int64_t kw = tap % g.kernel[2], kh = tap / g.kernel[2] % g.kernel[1], kd = tap / g.kernel[2] / g.kernel[1];
  return (kd * g.dilation[0] * g.input[1] + kh * g.dilation[1]) * g.input[2] + kw * g.dilation[2];
}

template <class T>
struct MaxBackwardLast {
  using A = accumulate_t<T>;
  struct Row {  // of the output, above a row of the input
    int64_t first, tap;
  };
  struct Pair {
    int64_t output;
    lane_int<A> tap;
  };
  struct Scratch {
    Row* rows;
    Pair* pairs;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      rows = carve.take<Row>(g.overlap(0) * g.overlap(1));
      pairs = carve.take<Pair>(g.overlap(0) * g.overlap(1) * g.overlap(2));
      bytes = carve.used();
    }
  };

  static bool fits(const PoolArguments<T>& a) {
    return a.layout == Layout::channels_last && taps_fit_lanes(a.geometry);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t overlap = g.overlap(0) * g.overlap(1) * g.overlap(2);
    return {g.batch * g.input_pixels(), g.channels * (1 + overlap), Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    if (a.narrow())
      run_pixels<true>(a, Scratch(a.geometry, memory), begin, end);
    else
      run_pixels<false>(a, Scratch(a.geometry, memory), begin, end);
  }

  template <bool kNarrow>
  static void run_pixels(const PoolArguments<T>& a, const Scratch& s, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels;
    Cursor at(g.input, begin);
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t rows = list_rows(g, at, s.rows), run = at.run(end - pixel);
      Range over_w = g.windows_over(2, at.at[2]);
      for (int64_t w = at.at[2]; w < at.at[2] + run; ++w, ++pixel) {
        over_w = g.next_windows(2, w, over_w);
        int64_t count = 0;
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t ow = over_w.begin; ow < over_w.end; ++ow) {
            const int64_t kw = g.tap_at(2, ow, w);
            if (kw < 0) continue;
            s.pairs[count++] = {(s.rows[row].first + ow) * C, static_cast<lane_int<A>>(s.rows[row].tap + kw)};
          }
        T* to = a.input + pixel * C;
        for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
          sum<kNarrow, vectors, partial>(a, s.pairs, count, c, channels, to + c);
        });
      }
      at.skip(run);
    }
  }

  static int64_t list_rows(const PoolGeometry& g, const Cursor& at, Row* rows) {
    const Range over_d = g.windows_over(0, at.at[0]), over_h = g.windows_over(1, at.at[1]);
    int64_t count = 0;
    for (int64_t od = over_d.begin; od < over_d.end; ++od)
      for (int64_t oh = over_h.begin; oh < over_h.end; ++oh) {
        const int64_t kd = g.tap_at(0, od, at.at[0]), kh = g.tap_at(1, oh, at.at[1]);
        if (kd < 0 || kh < 0) continue;
        rows[count++] = {((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2],
                         (kd * g.kernel[1] + kh) * g.kernel[2]};
      }
    return count;
  }

  template <bool kNarrow, int kVectors, bool kPartial>
  CONVLAB_INLINE static void sum(const PoolArguments<T>& a, const Pair* pairs, int64_t count, int64_t c,
                                 int64_t channels, T* to) {
    const int64_t ahead = 2 * a.geometry.channels;
    vec<A> total[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const vec_mask<A> tap = vec_mask<A>{} + pairs[i].tap;
      CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t from = pairs[i].output + c + v * lanes<A>;
        __builtin_prefetch(a.output + from + ahead);
        const vec_mask<A> hit = load_taps<A>(a.taps, kNarrow, from, channels) == tap;
        const vec<A> grad = kPartial ? load_partial(a.output + from, channels) : load(a.output + from);
        total[v] += hit ? grad : vec<A>{};
      }
    }
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPartial)
        store_partial(to, total[v], channels);
      else
        store(to + v * lanes<A>, total[v]);
    }
  }
};

template <class T>
struct MaxBackwardRows {
  using A = accumulate_t<T>;
  using Int = lane_int<A>;
  struct Row {
    const A* grad;
    const Int* tap;
    Int first_tap;
  };
  struct Step {
    int64_t shift;
    Int kw;
  };
  // Positions of an input row are counted from the start of window 0: position u = w + padding is dealt to phase
  // u % stride, place u / stride, and tap kw of window `place - kw * dilation / stride` meets it there.
  struct Scratch {
    int64_t room, reach, ring_d, ring_h, slots;
    A *piles, *grads;
    Int* taps;
    int64_t *tags, *phase_end;
    Step* steps;
    Row* rows;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      reach = (g.span(2) - 1) / g.stride[2];
      ring_d = ring_size(g.overlap(0));
      ring_h = ring_size(g.overlap(1));
      slots = ring_d * ring_h;
      room = phase_room<A>(kColumns + reach, 1);
      piles = carve.take<A>(phase_room<A>(kColumns, 1) * g.stride[2]);
      grads = carve.take<A>(slots * room);
      taps = carve.take<Int>(slots * room);
      tags = carve.take<int64_t>(slots);
      phase_end = carve.take<int64_t>(g.stride[2]);
      steps = carve.take<Step>(g.kernel[2]);
      rows = carve.take<Row>(slots);
      bytes = carve.used();
    }
  };

  static bool fits(const PoolArguments<T>& a) { return a.layout == Layout::channels_first && by_rows(a.geometry); }
  static int64_t chunks(const PoolGeometry& g) {
    return row_chunks(ceil_divide(g.input[2] + g.padding[2], g.stride[2]));
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t cost = std::min(g.input[2], kColumns * g.stride[2]) * (1 + g.taps() / g.stride[1]);
    return {g.planes() * chunks(g) * g.input[0] * g.input[1], cost, Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t stride = g.stride[2];
    const Scratch s(g, memory);
    std::fill_n(s.tags, s.slots, int64_t{-1});
    int64_t steps = 0;
    for (int64_t phase = 0; phase < stride; ++phase) {
      for (int64_t kw = 0; kw < g.kernel[2]; ++kw)
        if (kw * g.dilation[2] % stride == phase)
          s.steps[steps++] = {kw * g.dilation[2] / stride, static_cast<Int>(kw)};
      s.phase_end[phase] = steps;
    }
    const int64_t grid[kMaxSpatial] = {chunks(g), g.input[0], g.input[1]};
    const int64_t places = ceil_divide(g.input[2] + g.padding[2], stride);
    Cursor at(grid, begin);
    RowWindows over(g, at.at[1], at.at[2]);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t column = at.at[0] * kColumns, d = at.at[1], h = at.at[2];
      const int64_t columns = std::min(kColumns, places - column);
      if (task > begin) over.next(g, d, h);
      int64_t count = 0;
      for (int64_t od = over.over_d.begin; od < over.over_d.end; ++od)
        for (int64_t oh = over.over_h.begin; oh < over.over_h.end; ++oh) {
          const int64_t kd = g.tap_at(0, od, d), kh = g.tap_at(1, oh, h);
          if (kd < 0 || kh < 0) continue;
          const int64_t slot = (od & (s.ring_d - 1)) * s.ring_h + (oh & (s.ring_h - 1));
          const int64_t row = (at.outer * g.output[0] + od) * g.output[1] + oh;
          const int64_t tag = row * grid[0] + at.at[0];
          if (s.tags[slot] != tag) fetch(a, s, row * g.output[2], column, columns, slot);
          s.tags[slot] = tag;
          s.rows[count++] = {s.grads + slot * s.room + s.reach, s.taps + slot * s.room + s.reach,
                             static_cast<Int>((kd * g.kernel[1] + kh) * g.kernel[2])};
        }
      sum_rows(s, count, stride, columns);
      T* row = a.input + ((at.outer * g.input[0] + d) * g.input[1] + h) * g.input[2];
      collect(s.piles, stride, phase_room<A>(kColumns, 1), column * stride - g.padding[2], columns * stride, row,
              g.input[2]);
    }
  }

  // Gradients and taps of outputs [column - reach, column + columns), zeros where there are none.
  static void fetch(const PoolArguments<T>& a, const Scratch& s, int64_t row, int64_t column, int64_t columns,
                    int64_t slot) {
    const int64_t first = column - s.reach, span = columns + s.reach, width = a.geometry.output[2];
    deal(a.output + row, width, first, span, 1, s.room, A{}, s.grads + slot * s.room);
    const int64_t end = std::min(span, width - first);
    for (int64_t i = std::max<int64_t>(0, -first); i < end; i += lanes<A>) {
      const int64_t left = std::min<int64_t>(lanes<A>, end - i);
      store_lanes<A>(s.taps + slot * s.room + i, load_taps<A>(a.taps, a.narrow(), row + first + i, left));
    }
  }

  static void sum_rows(const Scratch& s, int64_t count, int64_t phases, int64_t columns) {
    int64_t begin = 0;
    for (int64_t phase = 0; phase < phases; begin = s.phase_end[phase++]) {
      A* pile = s.piles + phase * phase_room<A>(kColumns, 1);
      for (int64_t place = 0; place < columns; place += lanes<A>) {
        vec<A> total = {};
        for (int64_t row = 0; row < count; ++row)
          for (int64_t step = begin; step < s.phase_end[phase]; ++step) {
            const int64_t from = place - s.steps[step].shift;
            const vec_mask<A> hit = load_lanes<A>(s.rows[row].tap + from) == s.rows[row].first_tap + s.steps[step].kw;
            total += hit ? load(s.rows[row].grad + from) : vec<A>{};
          }
        store(pile + place, total);
      }
    }
  }
};

// Small planes whose windows overlap a lot, or unevenly: outputs add to their winners in a copy of the plane in
// scratch, which one task owns. channels_last takes a vector's worth of channels at a time, so that lines are used up.
template <class T>
struct MaxBackwardScatter {
  using A = accumulate_t<T>;
  static constexpr int64_t kMaxElements = 1 << 16;
  struct Scratch {
    A* sums;
    int64_t *distance, *start[kMaxSpatial];
    int64_t bytes;

    Scratch(const PoolGeometry& g, int64_t block, void* memory) {
      Carve carve(memory);
      sums = carve.take<A>(g.input_pixels() * block);
      distance = carve.take<int64_t>(kNarrowTaps + 1);
      for (int axis = 0; axis < kMaxSpatial; ++axis) start[axis] = carve.take<int64_t>(g.output[axis]);
      bytes = carve.used();
    }
  };

  static int64_t block(const PoolArguments<T>& a) { return a.layout == Layout::channels_last ? lanes<A> : 1; }
  static bool fits(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    if (!a.narrow() || std::max(g.input_pixels(), g.output_pixels()) * block(a) > kMaxElements) return false;
    // Windows over one input from which comparing with each of them takes longer; measured.
    const int64_t worthwhile = a.layout == Layout::channels_last ? 25 : 9;
    if (g.overlap(0) * g.overlap(1) * g.overlap(2) >= worthwhile) return true;
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
        add<1>(a, s, task * g.output_pixels(), 1, 1);
        copy<1>(s.sums, g.input_pixels(), a.input + task * g.input_pixels(), 1, 1);
      } else {
        const int64_t image = task / blocks, c = task % blocks * lanes<A>;
        const int64_t channels = std::min<int64_t>(lanes<A>, C - c);
        add<lanes<A>>(a, s, image * g.output_pixels() * C + c, C, channels);
        copy<lanes<A>>(s.sums, g.input_pixels(), a.input + image * g.input_pixels() * C + c, C, channels);
      }
    }
  }

  template <int64_t kBlock>
  static void add(const PoolArguments<T>& a, const Scratch& s, int64_t from, int64_t step, int64_t channels) {
    const PoolGeometry& g = a.geometry;
    std::fill_n(s.sums, g.input_pixels() * kBlock, A{});
    const uint8_t* taps = static_cast<const uint8_t*>(a.taps);
    for (int64_t od = 0; od < g.output[0]; ++od)
      for (int64_t oh = 0; oh < g.output[1]; ++oh) {
        const int64_t row = (s.start[0][od] * g.input[1] + s.start[1][oh]) * g.input[2];
        for (int64_t ow = 0; ow < g.output[2]; ++ow, from += step)
          for (int64_t c = 0; c < (kBlock == 1 ? 1 : channels); ++c) {
            const uint8_t tap = taps[from + c];
            if (tap == kNarrowTaps) continue;
            s.sums[(row + s.start[2][ow] + s.distance[tap]) * kBlock + c] += to_accumulate(a.output[from + c]);
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

template <class T>
struct MaxBackward {
  using ByTiles = Transposed<T, MaxBackward<accumulate_t<T>>, true>;
  using ByWindows = Disjoint<T, true>;

  static PoolPlan plan(const PoolArguments<T>& a) {
    if (ByWindows::fits(a)) return ByWindows::plan(a);
    if (ByTiles::fits(a)) return ByTiles::plan(a);
    if (MaxBackwardScatter<T>::fits(a)) return MaxBackwardScatter<T>::plan(a);
    if (MaxBackwardLast<T>::fits(a)) return MaxBackwardLast<T>::plan(a);
    if (MaxBackwardRows<T>::fits(a)) return MaxBackwardRows<T>::plan(a);
    return MaxBackwardScan<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    if (ByWindows::fits(a)) return ByWindows::run(a, scratch, begin, end);
    if (ByTiles::fits(a)) return ByTiles::run(a, scratch, begin, end);
    if (MaxBackwardScatter<T>::fits(a)) return MaxBackwardScatter<T>::run(a, scratch, begin, end);
    if (MaxBackwardLast<T>::fits(a)) return MaxBackwardLast<T>::run(a, scratch, begin, end);
    if (MaxBackwardRows<T>::fits(a)) return MaxBackwardRows<T>::run(a, scratch, begin, end);
    MaxBackwardScan<T>::run(a, scratch, begin, end);
  }
};

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
