// Average pooling, forward and backward; adaptive and global averages too.
//
// Idea, as for the maximum: channels_last runs a vector of channels over the window. channels_first sums each input
// row along the width once (dealt into phases, lane by output), keeps these sums in a ring and adds them over height
// and depth; long and adaptive windows are summed one at a time along their rows. Backward spreads each gradient,
// divided once, over its window: channels_last lists the windows over a pixel; channels_first adds the gradient rows
// over an input row first and then their shifted phases, or fills long windows.
// Cost: as for the maximum. Long sums are made of short ones, so that float rounding does not pile up.
// Limits: see by_rows().
#pragma once
#include "pool_transposed.h"

namespace convlab::cpu::CONVLAB_ISA {

// What the sum over the window of output (od, oh, ow) is divided by.
inline int64_t divisor(const PoolGeometry& g, const int64_t* o) {
  return g.divisor(0, o[0]) * g.divisor(1, o[1]) * g.divisor(2, o[2]);
}

template <class T>
struct AverageLast {
  using A = accumulate_t<T>;

  static bool fits(const PoolArguments<T>& a) { return a.layout == Layout::channels_last; }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<const T*>(g.kernel[0] * g.kernel[1]);
    return {g.batch * g.output_pixels(), g.channels * g.taps(), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels, ahead = next_window(g);
    const T** rows = Carve(scratch).take<const T*>(g.kernel[0] * g.kernel[1]);
    Cursor at(g.output, begin);
    for (int64_t pixel = begin; pixel < end;) {
      const Range in_d = g.taps_inside(0, at.at[0]), in_h = g.taps_inside(1, at.at[1]);
      const int64_t d = g.start(0, at.at[0]), h = g.start(1, at.at[1]);
      int64_t count = 0;
      for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
        for (int64_t kh = in_h.begin; kh < in_h.end; ++kh)
          rows[count++] = a.input + ((at.outer * g.input[0] + d + kd) * g.input[1] + h + kh) * g.input[2] * C;
      const int64_t row_divisor = g.divisor(0, at.at[0]) * g.divisor(1, at.at[1]);
      const int64_t run = at.run(end - pixel);
      for (int64_t ow = at.at[2]; ow < at.at[2] + run; ++ow, ++pixel) {
        const Range in_w = g.taps_inside(2, ow);
        const int64_t w = (g.start(2, ow) + in_w.begin) * C;
        const vec<A> divide = broadcast(static_cast<A>(row_divisor * g.divisor(2, ow)));
        T* to = a.output + pixel * C;
        for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
          window<vectors, partial>(rows, count, in_w.size(), C, w + c, ahead, divide, to + c, channels);
        });
      }
      at.skip(run);
    }
  }

  template <int kVectors, bool kPartial>
  CONVLAB_INLINE static void window(const T* const* rows, int64_t count, int64_t width, int64_t C, int64_t from,
                                    int64_t ahead, vec<A> divide, T* to, int64_t channels) {
    constexpr int64_t kPiece = 256;
    vec<A> total[kVectors] = {};
    for (int64_t row = 0; row < count; ++row) {
      const T* p = rows[row] + from;
      for (int64_t w = 0; w < width; w += kPiece) {
        const int64_t end = std::min(width, w + kPiece);
        vec<A> piece[kVectors] = {};
        for (int64_t i = w; i < end; ++i, p += C) CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
            __builtin_prefetch(p + ahead + v * lanes<A>);
            piece[v] += kPartial ? load_partial(p + v * lanes<A>, channels) : load(p + v * lanes<A>);
          }
        CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) total[v] += piece[v];
      }
    }
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPartial)
        store_partial(to, total[v] / divide, channels);
      else
        store(to + v * lanes<A>, total[v] / divide);
    }
  }
};

template <class T>
struct AverageRows {
  using A = accumulate_t<T>;
  struct Scratch {
    int64_t room, ring, slots;
    A *piles, *sums, *divisors;
    int64_t *tags, *offset;
    const A** rows;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      ring = ring_size(g.kernel[1]);
      slots = g.kernel[0] * ring;
      room = phase_room<A>((std::min(g.output[2], kColumns) - 1) * g.stride[2] + g.span(2), g.stride[2]);
      piles = carve.take<A>(room * g.stride[2]);
      sums = carve.take<A>(slots * kColumns);
      divisors = carve.take<A>(kColumns);
      tags = carve.take<int64_t>(slots);
      offset = carve.take<int64_t>(g.kernel[2]);
      rows = carve.take<const A*>(slots);
      bytes = carve.used();
    }
  };

  static bool fits(const PoolArguments<T>& a) { return a.layout == Layout::channels_first && by_rows(a.geometry); }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t tasks = g.planes() * row_chunks(g.output[2]) * g.output[0] * g.output[1];
    return {tasks, std::min(g.output[2], kColumns) * g.taps(), Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const Scratch s(g, memory);
    std::fill_n(s.tags, s.slots, int64_t{-1});
    for (int64_t kw = 0; kw < g.kernel[2]; ++kw) s.offset[kw] = kw % g.stride[2] * s.room + kw / g.stride[2];
    const int64_t grid[kMaxSpatial] = {row_chunks(g.output[2]), g.output[0], g.output[1]};
    int64_t known_column = -1;
    Cursor at(grid, begin);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t column = at.at[0] * kColumns, od = at.at[1], oh = at.at[2];
      const int64_t columns = std::min(kColumns, g.output[2] - column);
      if (column != known_column)
        for (int64_t ow = 0; ow < columns; ++ow) s.divisors[ow] = static_cast<A>(g.divisor(2, column + ow));
      known_column = column;
      const Range in_d = g.taps_inside(0, od), in_h = g.taps_inside(1, oh);
      int64_t count = 0;
      for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
        for (int64_t kh = in_h.begin; kh < in_h.end; ++kh) {
          const int64_t h = g.start(1, oh) + kh, slot = kd * s.ring + (h & (s.ring - 1));
          const int64_t row = (at.outer * g.input[0] + g.start(0, od) + kd) * g.input[1] + h;
          const int64_t tag = row * grid[0] + at.at[0];
          if (s.tags[slot] != tag) sum_width(a, s, a.input + row * g.input[2], column, columns, slot);
          s.tags[slot] = tag;
          s.rows[count++] = s.sums + slot * kColumns;
        }
      const vec<A> divide = broadcast(static_cast<A>(g.divisor(0, od) * g.divisor(1, oh)));
      T* output = a.output + ((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2] + column;
      for (int64_t ow = 0; ow < columns; ow += lanes<A>) {
        vec<A> total = load(s.rows[0] + ow);
        for (int64_t row = 1; row < count; ++row) total += load(s.rows[row] + ow);
        total /= divide * load(s.divisors + ow);
        if (ow + lanes<A> <= columns)
          store(output + ow, total);
        else
          store_partial(output + ow, total, columns - ow);
      }
    }
  }

  static void sum_width(const PoolArguments<T>& a, const Scratch& s, const T* row, int64_t column, int64_t columns,
                        int64_t slot) {
    const PoolGeometry& g = a.geometry;
    const int64_t stride = g.stride[2], span = (columns - 1) * stride + g.kernel[2];
    deal(row, g.input[2], column * stride - g.padding[2], span, stride, s.room, A{}, s.piles);
    for (int64_t ow = 0; ow < columns; ow += lanes<A>) {
      vec<A> total = load(s.piles + s.offset[0] + ow);
      for (int64_t kw = 1; kw < g.kernel[2]; ++kw) total += load(s.piles + s.offset[kw] + ow);
      store(s.sums + slot * kColumns + ow, total);
    }
  }
};

// channels_first, any window: rows are added over height and depth first, if the piece of them fits, and then each
// window is summed along the width.
template <class T>
struct AverageWindows {
  using A = accumulate_t<T>;
  struct Column {
    int64_t start, width, divisor;
  };

  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<Column>(kColumns);
    carve.take<A>(kMaxSpan);
    const int64_t tasks = g.planes() * row_chunks(g.output[2]) * g.output[0] * g.output[1];
    return {tasks, std::min(g.output[2], kColumns) * g.taps(), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    Carve carve(scratch);
    Column* columns = carve.take<Column>(kColumns);
    A* sums = carve.take<A>(kMaxSpan);
    const int64_t grid[kMaxSpatial] = {row_chunks(g.output[2]), g.output[0], g.output[1]};
    int64_t known_chunk = -1;
    Cursor at(grid, begin);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t first = at.at[0] * kColumns, count = std::min(kColumns, g.output[2] - first);
      if (at.at[0] != known_chunk)
        for (int64_t i = 0; i < count; ++i) {
          const Range inside = g.taps_inside(2, first + i);
          columns[i] = {g.start(2, first + i) + inside.begin, inside.size(), g.divisor(2, first + i)};
        }
      known_chunk = at.at[0];
      const int64_t od = at.at[1], oh = at.at[2];
      const Range in_d = g.taps_inside(0, od), in_h = g.taps_inside(1, oh);
      const int64_t d = at.outer * g.input[0] + g.start(0, od), h = g.start(1, oh);
      const auto row = [&](int64_t kd, int64_t kh) { return a.input + ((d + kd) * g.input[1] + h + kh) * g.input[2]; };
      const int64_t row_divisor = g.divisor(0, od) * g.divisor(1, oh);
      T* output = a.output + ((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2] + first;
      const int64_t left = columns[0].start, span = columns[count - 1].start + columns[count - 1].width - left;
      const bool rows_first = count > 1 && span <= kMaxSpan;
      if (rows_first) {
        std::fill_n(sums, span, A{});
        for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
          for (int64_t kh = in_h.begin; kh < in_h.end; ++kh) add(row(kd, kh) + left, span, sums);
      }
      for (int64_t i = 0; i < count; ++i) {
        A total = 0;
        if (rows_first) {
          total = AverageWindows<A>::sum(sums + columns[i].start - left, columns[i].width);
        } else {
          for (int64_t kd = in_d.begin; kd < in_d.end; ++kd)
            for (int64_t kh = in_h.begin; kh < in_h.end; ++kh)
              total += sum(row(kd, kh) + columns[i].start, columns[i].width);
        }
        output[i] = from_accumulate<T>(total / static_cast<A>(row_divisor * columns[i].divisor));
      }
    }
  }

  static void add(const T* p, int64_t count, A* sums) {
    int64_t i = 0;
    for (; i + lanes<A> <= count; i += lanes<A>) store(sums + i, load(sums + i) + load(p + i));
    if (i < count)
      store_partial(sums + i, load_partial(sums + i, count - i) + load_partial(p + i, count - i), count - i);
  }

  static A sum(const T* p, int64_t count) {
    if (count < lanes<A>) {
      A total = 0;
      for (int64_t i = 0; i < count; ++i) total += to_accumulate(p[i]);
      return total;
    }
    constexpr int64_t kPiece = 64 * lanes<A>;
    double total = 0;
    for (; count > 0; p += kPiece, count -= kPiece) {
      vec<A> even = {}, odd = {};
      const int64_t length = std::min(count, kPiece);
      int64_t i = 0;
      for (; i + 2 * lanes<A> <= length; i += 2 * lanes<A>) {
        even += load(p + i);
        odd += load(p + i + lanes<A>);
      }
      for (; i < length; i += lanes<A>) even += load_partial(p + i, std::min<int64_t>(lanes<A>, length - i));
      total += static_cast<double>(sum_lanes<A>(even + odd));
    }
    return static_cast<A>(total);
  }
};

// channels_first and one window, as global averages have.
template <class T>
struct AverageGlobal {
  static bool fits(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    return a.layout == Layout::channels_first && g.output_pixels() == 1 && g.kernel[2] == g.input_pixels();
  }
  static PoolPlan plan(const PoolArguments<T>& a) { return {a.geometry.planes(), a.geometry.input_pixels(), 0}; }
  static void run(const PoolArguments<T>& a, void*, int64_t begin, int64_t end) {
    const int64_t pixels = a.geometry.input_pixels(), first[kMaxSpatial] = {0, 0, 0};
    const auto divide = static_cast<accumulate_t<T>>(divisor(a.geometry, first));
    for (int64_t plane = begin; plane < end; ++plane)
      a.output[plane] = from_accumulate<T>(AverageWindows<T>::sum(a.input + plane * pixels, pixels) / divide);
  }
};

template <class T>
struct AverageForward {
  using ByTiles = Transposed<T, AverageForward<accumulate_t<T>>, false>;

  static PoolPlan plan(const PoolArguments<T>& a) {
    if (AverageLast<T>::fits(a)) return AverageLast<T>::plan(a);
    if (AverageGlobal<T>::fits(a)) return AverageGlobal<T>::plan(a);
    if (ByTiles::fits(a)) return ByTiles::plan(a);
    if (AverageRows<T>::fits(a)) return AverageRows<T>::plan(a);
    return AverageWindows<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    if (AverageLast<T>::fits(a)) return AverageLast<T>::run(a, scratch, begin, end);
    if (AverageGlobal<T>::fits(a)) return AverageGlobal<T>::run(a, scratch, begin, end);
    if (ByTiles::fits(a)) return ByTiles::run(a, scratch, begin, end);
    if (AverageRows<T>::fits(a)) return AverageRows<T>::run(a, scratch, begin, end);
    AverageWindows<T>::run(a, scratch, begin, end);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
