// Max pooling, forward.
//
// Idea, by layout:
// - channels_last: a vector of channels runs over the taps of its window.
// - channels_first: every input row is reduced along the width once, lane by output (the row dealt into phases), and
//   the reduced rows, kept in a ring, are then reduced over height and depth. The winner of a row carries its tap.
// - otherwise (adaptive, long or giant windows): one window at a time, a vector running along its rows; only pieces
//   that beat the maximum so far are searched for the place.
// Cost: channels_last taps() comparisons per output, channels_first kernel width times (input rows / output rows) plus
// kernel height times depth. Limits: see by_rows().
#pragma once
#include "pool_transposed.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class A>
constexpr A lowest = -std::numeric_limits<A>::infinity();

// Windows without a tap inside the input exist only where taps can step over the whole input.
inline bool may_miss_input(const PoolGeometry& g) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.padding[axis] > 0 && g.dilation[axis] > g.input[axis]) return true;
  return false;
}

template <class T, bool kTaps>
struct MaxLast {
  using A = accumulate_t<T>;
  struct Row {
    const T* first;
    int64_t tap;
  };

  static bool fits(const PoolArguments<T>& a) {
    return a.layout == Layout::channels_last && taps_fit_lanes(a.geometry) && !may_miss_input(a.geometry);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<Row>(g.kernel[0] * g.kernel[1]);
    return {g.batch * g.output_pixels(), g.channels * g.taps(), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels;
    const int64_t step = g.dilation[2] * C;
    Row* rows = Carve(scratch).take<Row>(g.kernel[0] * g.kernel[1]);
    Cursor at(g.output, begin);
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t count = list(a, at, rows), run = at.run(end - pixel);
      for (int64_t ow = at.at[2]; ow < at.at[2] + run; ++ow, ++pixel) {
        const Range in_w = g.taps_inside(2, ow);
        const int64_t w = (g.start(2, ow) + in_w.begin * g.dilation[2]) * C;
        for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
          window<vectors, partial>(a, rows, count, w + c, in_w, step, pixel * C + c, channels);
        });
      }
      at.skip(run);
    }
  }

  // The rows of the input under a row of the output.
  static int64_t list(const PoolArguments<T>& a, const Cursor& at, Row* rows) {
    const PoolGeometry& g = a.geometry;
    const Range in_d = g.taps_inside(0, at.at[0]), in_h = g.taps_inside(1, at.at[1]);
    const int64_t first_d = g.start(0, at.at[0]), first_h = g.start(1, at.at[1]);
    int64_t count = 0;
    for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
      for (int64_t kh = in_h.begin; kh < in_h.end; ++kh) {
        const int64_t d = first_d + kd * g.dilation[0], h = first_h + kh * g.dilation[1];
        const int64_t row = (at.outer * g.input[0] + d) * g.input[1] + h;
        rows[count++] = {a.input + row * g.input[2] * g.channels, (kd * g.kernel[1] + kh) * g.kernel[2]};
      }
    return count;
  }

  template <int kVectors, bool kPartial>
  CONVLAB_INLINE static void window(const PoolArguments<T>& a, const Row* rows, int64_t count, int64_t from, Range taps,
                                    int64_t step, int64_t to, int64_t channels) {
    const int64_t ahead = next_window(a.geometry);
    const auto fetch = [&](const T* p) { return kPartial ? load_partial(p, channels) : load(p); };
    const auto tap_of = [&](const Row& row) { return vec_mask<A>{} + static_cast<lane_int<A>>(row.tap + taps.begin); };
    Best<A> best[kVectors];
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v)
        best[v] = {fetch(rows[0].first + from + v * lanes<A>), tap_of(rows[0])};
    for (int64_t row = 0; row < count; ++row) {
      const T* p = rows[row].first + from;
      vec_mask<A> tap = tap_of(rows[row]);
      for (int64_t kw = taps.begin; kw < taps.end; ++kw, p += step, tap += 1)
        CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
          __builtin_prefetch(p + ahead + v * lanes<A>);
          best[v].template consider<kTaps>(fetch(p + v * lanes<A>), tap);
        }
    }
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v, to += lanes<A>) {
      if constexpr (kPartial)
        store_partial(a.output + to, best[v].value, channels);
      else
        store(a.output + to, best[v].value);
      if constexpr (kTaps) store_taps<A>(a.taps, a.narrow(), to, best[v].tap, channels);
    }
  }
};

template <class T, bool kTaps>
struct MaxRows {
  using A = accumulate_t<T>;
  using Int = lane_int<A>;
  struct Row {
    const A* value;
    const Int* tap;
    int64_t first_tap;
  };
  struct Scratch {
    int64_t room, columns, ring, slots;
    A *piles, *values;
    Int *winners, *first_inside;
    int64_t *tags, *offset;
    Row* rows;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      columns = std::min(g.output[2], kColumns);
      ring = ring_size(g.span(1));
      slots = g.kernel[0] * ring;
      room = phase_room<A>((columns - 1) * g.stride[2] + g.span(2), g.stride[2]);
      piles = carve.take<A>(room * g.stride[2]);
      values = carve.take<A>(slots * kColumns);
      winners = carve.take<Int>(kTaps ? slots * kColumns : 0);
      first_inside = carve.take<Int>(kTaps ? kColumns : 0);
      tags = carve.take<int64_t>(slots);
      offset = carve.take<int64_t>(g.kernel[2]);
      rows = carve.take<Row>(g.kernel[0] * g.kernel[1]);
      bytes = carve.used();
    }
  };

  static bool fits(const PoolArguments<T>& a) {
    return a.layout == Layout::channels_first && by_rows(a.geometry) && !may_miss_input(a.geometry);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t tasks = g.planes() * row_chunks(g.output[2]) * g.output[0] * g.output[1];
    return {tasks, std::min(g.output[2], kColumns) * g.taps(), Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const Scratch s(g, memory);
    std::fill_n(s.tags, s.slots, int64_t{-1});
    for (int64_t kw = 0; kw < g.kernel[2]; ++kw)
      s.offset[kw] = kw * g.dilation[2] % g.stride[2] * s.room + kw * g.dilation[2] / g.stride[2];
    const int64_t grid[kMaxSpatial] = {row_chunks(g.output[2]), g.output[0], g.output[1]};
    int64_t known_column = -1;
    Cursor at(grid, begin);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t column = at.at[0] * kColumns, od = at.at[1], oh = at.at[2];
      const int64_t columns = std::min(kColumns, g.output[2] - column);
      if (kTaps && column != known_column)
        for (int64_t ow = 0; ow < columns; ++ow)
          s.first_inside[ow] = static_cast<Int>(g.taps_inside(2, column + ow).begin);
      known_column = column;
      const Range in_d = g.taps_inside(0, od), in_h = g.taps_inside(1, oh);
      int64_t count = 0;
      for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
        for (int64_t kh = in_h.begin; kh < in_h.end; ++kh) {
          const int64_t d = g.start(0, od) + kd * g.dilation[0], h = g.start(1, oh) + kh * g.dilation[1];
          const int64_t slot = kd * s.ring + (h & (s.ring - 1));
          const int64_t row = (at.outer * g.input[0] + d) * g.input[1] + h;
          const int64_t tag = row * grid[0] + at.at[0];
          if (s.tags[slot] != tag) reduce_width(a, s, a.input + row * g.input[2], column, columns, slot);
          s.tags[slot] = tag;
          s.rows[count++] = {s.values + slot * kColumns, s.winners + slot * kColumns,
                             (kd * g.kernel[1] + kh) * g.kernel[2]};
        }
      reduce_rows(a, s, count, ((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2] + column, columns);
    }
  }

  static void reduce_width(const PoolArguments<T>& a, const Scratch& s, const T* row, int64_t column, int64_t columns,
                           int64_t slot) {
    const PoolGeometry& g = a.geometry;
    const int64_t stride = g.stride[2], span = (columns - 1) * stride + g.span(2);
    deal(row, g.input[2], column * stride - g.padding[2], span, stride, s.room, lowest<A>, s.piles);
    for (int64_t ow = 0; ow < columns; ow += lanes<A>) {
      Best<A> best = {broadcast(lowest<A>), {}};
      if constexpr (kTaps) best.tap = load_lanes<A>(s.first_inside + ow);
      vec_mask<A> tap = {};
      for (int64_t kw = 0; kw < g.kernel[2]; ++kw, tap += 1)
        best.template consider<kTaps>(load(s.piles + s.offset[kw] + ow), tap);
      store(s.values + slot * kColumns + ow, best.value);
      if constexpr (kTaps) store_lanes<A>(s.winners + slot * kColumns + ow, best.tap);
    }
  }

  static void reduce_rows(const PoolArguments<T>& a, const Scratch& s, int64_t count, int64_t output, int64_t columns) {
    const auto tap_of = [](const Row& row, int64_t ow) {
      if constexpr (kTaps)
        return load_lanes<A>(row.tap + ow) + static_cast<Int>(row.first_tap);
      else
        return vec_mask<A>{};
    };
    for (int64_t ow = 0; ow < columns; ow += lanes<A>) {
      Best<A> best = {load(s.rows[0].value + ow), tap_of(s.rows[0], ow)};
      for (int64_t row = 1; row < count; ++row)
        best.template consider<kTaps>(load(s.rows[row].value + ow), tap_of(s.rows[row], ow));
      const int64_t left = std::min<int64_t>(lanes<A>, columns - ow);
      if (left == lanes<A>)
        store(a.output + output + ow, best.value);
      else
        store_partial(a.output + output + ow, best.value, left);
      if constexpr (kTaps) store_taps<A>(a.taps, a.narrow(), output + ow, best.tap, left);
    }
  }
};

// The general case, in either layout: a task is a piece of one row of the output of one channel.
template <class T>
struct MaxWindows {
  using A = accumulate_t<T>;
  static constexpr int64_t kPiece = 256;  // taps between two looks at whether the maximum has changed
  struct Column {
    int64_t start;
    Range inside;
  };

  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<Column>(kColumns);
    const int64_t tasks = g.planes() * row_chunks(g.output[2]) * g.output[0] * g.output[1];
    return {tasks, std::min(g.output[2], kColumns) * g.taps(), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const bool last = a.layout == Layout::channels_last;
    const int64_t pixel_stride = last ? g.channels : 1;
    Column* columns = Carve(scratch).take<Column>(kColumns);
    const int64_t grid[kMaxSpatial] = {row_chunks(g.output[2]), g.output[0], g.output[1]};
    int64_t known_chunk = -1;
    Cursor at(grid, begin);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t first = at.at[0] * kColumns, count = std::min(kColumns, g.output[2] - first);
      const int64_t od = at.at[1], oh = at.at[2];
      if (at.at[0] != known_chunk)
        for (int64_t i = 0; i < count; ++i) columns[i] = {g.start(2, first + i), g.taps_inside(2, first + i)};
      known_chunk = at.at[0];
      const auto plane = [&](int64_t pixels) {
        return last ? at.outer / g.channels * pixels * g.channels + at.outer % g.channels : at.outer * pixels;
      };
      const Range in_d = g.taps_inside(0, od), in_h = g.taps_inside(1, oh);
      const int64_t d = g.start(0, od), h = g.start(1, oh), step = g.dilation[2] * pixel_stride;
      const T* input = a.input + plane(g.input_pixels());
      int64_t to = plane(g.output_pixels()) + ((od * g.output[1] + oh) * g.output[2] + first) * pixel_stride;
      for (int64_t i = 0; i < count; ++i, to += pixel_stride) {
        const Range in_w = columns[i].inside;
        A best = lowest<A>;
        int64_t tap = -1;
        for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
          for (int64_t kh = in_h.begin; kh < in_h.end; ++kh) {
            const int64_t row = (d + kd * g.dilation[0]) * g.input[1] + h + kh * g.dilation[1];
            const T* p = input + (row * g.input[2] + columns[i].start) * pixel_stride;
            const int64_t row_tap = (kd * g.kernel[1] + kh) * g.kernel[2];
            for (int64_t kw = in_w.begin; kw < in_w.end; kw += kPiece)
              search(p + kw * step, std::min(kPiece, in_w.end - kw), step, row_tap + kw, best, tap);
          }
        a.output[to] = from_accumulate<T>(best);
        if (a.taps != nullptr) write_tap(a.taps, a.narrow(), to, tap);
      }
    }
  }

  static void search(const T* p, int64_t count, int64_t step, int64_t first_tap, A& best, int64_t& tap) {
    if (step == 1 && count >= lanes<A>) {
      const A top = contiguous_maximum(p, count);
      if (tap >= 0 && top <= best) return;
      if (top == top) {
        if (tap >= 0 && !(top > best)) return;  // a NaN stands
        best = top;
        for (tap = first_tap; to_accumulate(*p) != top; ++p) ++tap;
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const A value = to_accumulate(p[i * step]);
      if (tap < 0 || value > best || value != value) {
        best = value;
        tap = first_tap + i;
      }
    }
  }

  static A contiguous_maximum(const T* p, int64_t count) {
    vec<A> top = load(p + count - lanes<A>);  // overlaps the last full vector: a maximum may count twice
    for (int64_t i = 0; i + lanes<A> <= count; i += lanes<A>) top = maximum(top, load(p + i));
    A result = top[0];
    for (int lane = 1; lane < lanes<A>; ++lane)
      if (top[lane] > result || top[lane] != top[lane]) result = top[lane];
    return result;
  }
};

template <class T>
struct MaxForward {
  using ByTiles = Transposed<T, MaxForward<accumulate_t<T>>, false>;

  static PoolPlan plan(const PoolArguments<T>& a) {
    if (ByTiles::fits(a)) return ByTiles::plan(a);
    if (MaxLast<T, true>::fits(a)) return MaxLast<T, true>::plan(a);
    if (MaxRows<T, true>::fits(a)) return MaxRows<T, true>::plan(a);
    return MaxWindows<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const bool taps = a.taps != nullptr;
    if (ByTiles::fits(a)) return ByTiles::run(a, scratch, begin, end);
    if (MaxLast<T, true>::fits(a))
      return taps ? MaxLast<T, true>::run(a, scratch, begin, end) : MaxLast<T, false>::run(a, scratch, begin, end);
    if (MaxRows<T, true>::fits(a))
      return taps ? MaxRows<T, true>::run(a, scratch, begin, end) : MaxRows<T, false>::run(a, scratch, begin, end);
    MaxWindows<T>::run(a, scratch, begin, end);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
