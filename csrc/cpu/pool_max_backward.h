// Max pooling, backward.
//
// Idea: every input element sums the outputs whose tap names it. No two tasks write the same element, so there are no
// atomics and the order of the sums is fixed. By layout:
// - channels_last: list the (output, tap) pairs that can name a pixel, compare a vector of channels with each.
// - channels_first: rows of output gradients and taps, padded, in a ring; each phase of an input row is a sum of
//   masked, shifted rows, and the phases are dealt back together.
// - planes that one task owns: outputs add to their winners; see pool_max_scatter.h.
// - otherwise: each row of the input scans the windows over it.
// Cost: one comparison per window over an input element. Limits: see by_rows().
#pragma once
#include "pool_disjoint.h"
#include "pool_max_scatter.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct MaxBackwardLast {
  using A = accumulate_t<T>;
  struct Row {  // of the output, above a row of the input
    int64_t first;
    lane_int<A> tap;
  };
  struct Step {  // a window over a column of the input: from its row's first element, and which tap meets the column
    int64_t window;
    lane_int<A> tap;
  };
  // Which windows are over a column is the same in every row, so it is found once for a block of columns.
  struct Column {
    const Step *first, *last;
    bool uniform;  // the next columns of its phase, kTogether with it, differ by one window each and nothing else
  };
  struct Scratch {
    int64_t size;  // of a block
    Row* rows;
    Step* steps;
    Column* columns;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      size = std::clamp<int64_t>(kMaxSpan / g.overlap(2), 1, kColumns);
      rows = carve.take<Row>(g.overlap(0) * g.overlap(1));
      steps = carve.take<Step>(size * g.overlap(2));
      columns = carve.take<Column>(size);
      bytes = carve.used();
    }
  };
  static constexpr int kTogether = 4;  // vectors summed at a time, to hide latencies: of a pixel or of a phase

  static bool fits(const PoolArguments<T>& a) {
    return a.layout == Layout::channels_last && taps_fit_lanes(a.geometry);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t overlap = g.overlap(0) * g.overlap(1) * g.overlap(2);
    return {g.batch * g.input_pixels(), g.channels * (1 + overlap), Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    with_streams<T>(streams_grad_input(a), [&](auto stream) {
      if (a.narrow())
        run_pixels<true, stream.value>(a, Scratch(a.geometry, memory), begin, end);
      else
        run_pixels<false, stream.value>(a, Scratch(a.geometry, memory), begin, end);
    });
  }

  template <bool kNarrow, bool kStream>
  static void run_pixels(const PoolArguments<T>& a, const Scratch& s, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels;
    int64_t known_block = -1;
    Cursor at(g.input, begin);
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t rows = list_rows(g, at, s.rows), block = at.at[2] / s.size, first = block * s.size;
      if (block != known_block) list_columns(g, s, first, std::min(s.size, g.input[2] - first));
      known_block = block;
      const int64_t run = std::min(at.run(end - pixel), first + s.size - at.at[2]);
      const Column* columns = s.columns + at.at[2] - first;
      T* to = a.input + pixel * C;
      constexpr int64_t kChannels = kTogether * lanes<A>;
      int64_t c = C / kChannels * kChannels;  // pixel by pixel, so that memory is read in long runs
      for (int64_t w = 0; w < run; ++w)
        for (int64_t from = 0; from < c; from += kChannels)
          sum<kNarrow, kStream, kTogether, false>(a, s.rows, rows, columns[w], from, lanes<A>, lanes<A>,
                                                  to + w * C + from, lanes<A>);
      for (; c + lanes<A> <= C; c += lanes<A>)
        sum_phases<kNarrow, kStream, false>(a, s.rows, rows, columns, run, c, lanes<A>, to + c);
      if (c < C) sum_phases<kNarrow, kStream, true>(a, s.rows, rows, columns, run, c, C - c, to + c);
      pixel += run;
      at.skip(run);
    }
  }

  // One vector of channels of `run` pixels, phase by phase.
  template <bool kNarrow, bool kStream, bool kPartial>
  static void sum_phases(const PoolArguments<T>& a, const Row* rows, int64_t count, const Column* columns, int64_t run,
                         int64_t c, int64_t channels, T* to) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels, step = g.adaptive ? 1 : g.stride[2];
    for (int64_t phase = 0; phase < std::min(step, run); ++phase)
      for (int64_t w = phase; w < run;)
        if (columns[w].uniform && w + (kTogether - 1) * step < run) {
          sum<kNarrow, kStream, kTogether, kPartial>(a, rows, count, columns[w], c, C, step * C, to + w * C, channels);
          w += kTogether * step;
        } else {
          sum<kNarrow, kStream, 1, kPartial>(a, rows, count, columns[w], c, C, step * C, to + w * C, channels);
          w += step;
        }
  }

  static int64_t list_rows(const PoolGeometry& g, const Cursor& at, Row* rows) {
    const Range over_d = g.windows_over(0, at.at[0]), over_h = g.windows_over(1, at.at[1]);
    int64_t count = 0;
    for (int64_t od = over_d.begin; od < over_d.end; ++od)
      for (int64_t oh = over_h.begin; oh < over_h.end; ++oh) {
        const int64_t kd = g.tap_at(0, od, at.at[0]), kh = g.tap_at(1, oh, at.at[1]);
        if (kd < 0 || kh < 0) continue;
        rows[count++] = {((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2] * g.channels,
                         static_cast<lane_int<A>>((kd * g.kernel[1] + kh) * g.kernel[2])};
      }
    return count;
  }

  static void list_columns(const PoolGeometry& g, const Scratch& s, int64_t first, int64_t count) {
    Step* step = s.steps;
    for (int64_t i = 0; i < count; ++i) {
      s.columns[i].first = step;
      const Range over = g.windows_over(2, first + i);
      for (int64_t ow = over.begin; ow < over.end; ++ow) {
        const int64_t kw = g.tap_at(2, ow, first + i);
        if (kw >= 0) *step++ = {ow * g.channels, static_cast<lane_int<A>>(kw)};
      }
      s.columns[i].last = step;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t ahead = (kTogether - 1) * g.stride[2], size = s.columns[i].last - s.columns[i].first;
      s.columns[i].uniform = !g.adaptive && size > 0 && i + ahead < count;
      for (int64_t next = i; s.columns[i].uniform && next <= i + ahead; next += g.stride[2]) {
        const Column& other = s.columns[next];
        s.columns[i].uniform = other.last - other.first == size && other.first->tap == s.columns[i].first->tap;
      }
    }
  }

  // Vectors `from_step` elements apart in the output and `to_step` apart in the input.
  template <bool kNarrow, bool kStream, int kVectors, bool kPartial>
  CONVLAB_INLINE static void sum(const PoolArguments<T>& a, const Row* rows, int64_t count, const Column& column,
                                 int64_t c, int64_t from_step, int64_t to_step, T* to, int64_t channels) {
    vec<A> total[kVectors] = {};
    for (const Row* row = rows; row < rows + count; ++row)
      for (const Step* step = column.first; step < column.last; ++step) {
        const lane_int<A> tap = row->tap + step->tap;
        int64_t from = row->first + step->window + c;
        CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v, from += from_step) {
          __builtin_prefetch(a.output + from + 2 * a.geometry.channels);
          const vec<A> grad = kPartial ? load_partial(a.output + from, channels) : load(a.output + from);
          total[v] = add_where<A, kNarrow>(total[v], grad, a.taps, from, tap, kPartial ? channels : lanes<A>);
        }
      }
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v, to += to_step) {
      if constexpr (kPartial)
        store_partial(to, total[v], channels);
      else
        store_whole<kStream>(to, total[v]);
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

template <class T>
struct MaxBackward {
  using ByTiles = Transposed<T, MaxBackward<accumulate_t<T>>, true>;
  using ByWindows = Disjoint<T, true>;

  static PoolPlan plan(const PoolArguments<T>& a) {
    if (ByWindows::fits(a)) return ByWindows::plan(a);
    if (MaxBackwardScatter<T>::fits(a)) return MaxBackwardScatter<T>::plan(a);
    if (ByTiles::fits(a)) return ByTiles::plan(a);
    if (MaxBackwardLast<T>::fits(a)) return MaxBackwardLast<T>::plan(a);
    if (MaxBackwardRows<T>::fits(a)) return MaxBackwardRows<T>::plan(a);
    return MaxBackwardScan<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    if (ByWindows::fits(a)) return ByWindows::run(a, scratch, begin, end);
    if (MaxBackwardScatter<T>::fits(a)) return MaxBackwardScatter<T>::run(a, scratch, begin, end);
    if (ByTiles::fits(a)) return ByTiles::run(a, scratch, begin, end);
    if (MaxBackwardLast<T>::fits(a)) return MaxBackwardLast<T>::run(a, scratch, begin, end);
    if (MaxBackwardRows<T>::fits(a)) return MaxBackwardRows<T>::run(a, scratch, begin, end);
    MaxBackwardScan<T>::run(a, scratch, begin, end);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
