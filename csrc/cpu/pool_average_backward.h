// Average pooling, backward: every input element sums the gradients of the windows over it, each divided as in
// forward. See pool_average.h for the idea.
#pragma once
#include "pool_average.h"
#include "pool_disjoint.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct AverageBackwardLast {
  using A = accumulate_t<T>;
  struct Share {
    int64_t output;
    A factor;
  };
  struct Scratch {
    Share *rows, *shares;
    int64_t bytes;

    Scratch(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      rows = carve.take<Share>(g.overlap(0) * g.overlap(1));
      shares = carve.take<Share>(g.overlap(0) * g.overlap(1) * g.overlap(2));
      bytes = carve.used();
    }
  };

  static bool fits(const PoolArguments<T>& a) { return a.layout == Layout::channels_last; }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t overlap = g.overlap(0) * g.overlap(1) * g.overlap(2);
    return {g.batch * g.input_pixels(), g.channels * (1 + overlap), Scratch(g, nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels;
    const Scratch s(g, memory);
    Cursor at(g.input, begin);
    for (int64_t pixel = begin; pixel < end;) {
      const Range over_d = g.windows_over(0, at.at[0]), over_h = g.windows_over(1, at.at[1]);
      int64_t rows = 0;
      for (int64_t od = over_d.begin; od < over_d.end; ++od)
        for (int64_t oh = over_h.begin; oh < over_h.end; ++oh)
          s.rows[rows++] = {((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2],
                            static_cast<A>(g.divisor(0, od) * g.divisor(1, oh))};
      const int64_t run = at.run(end - pixel);
      Range over_w = g.windows_over(2, at.at[2]);
      for (int64_t w = at.at[2]; w < at.at[2] + run; ++w, ++pixel) {
        over_w = g.next_windows(2, w, over_w);
        int64_t count = 0;
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t ow = over_w.begin; ow < over_w.end; ++ow)
            s.shares[count++] = {(s.rows[row].output + ow) * C,
                                 A(1) / (s.rows[row].factor * static_cast<A>(g.divisor(2, ow)))};
        T* to = a.input + pixel * C;
        for_channels<A>(C, [&](auto vectors, auto partial, int64_t c, int64_t channels) {
          sum<vectors, partial>(a, s.shares, count, c, channels, to + c);
        });
      }
      at.skip(run);
    }
  }

  template <int kVectors, bool kPartial>
  CONVLAB_INLINE static void sum(const PoolArguments<T>& a, const Share* shares, int64_t count, int64_t c,
                                 int64_t channels, T* to) {
    vec<A> total[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* p = a.output + shares[i].output + c;
      const vec<A> factor = broadcast(shares[i].factor);
      CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) total[v] +=
          (kPartial ? load_partial(p, channels) : load(p + v * lanes<A>)) * factor;
    }
    CONVLAB_UNROLL for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPartial)
        store_partial(to, total[v], channels);
      else
        store(to + v * lanes<A>, total[v]);
    }
  }
};

// channels_first and one window, as global averages have: every plane is one value.
template <class T>
struct AverageBackwardGlobal {
  using A = accumulate_t<T>;

  static bool fits(const PoolArguments<T>& a) { return AverageGlobal<T>::fits(a); }
  static PoolPlan plan(const PoolArguments<T>& a) { return {a.geometry.planes(), a.geometry.input_pixels(), 0}; }
  static void run(const PoolArguments<T>& a, void*, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t pixels = g.input_pixels(), first[kMaxSpatial] = {0, 0, 0};
    const A factor = A(1) / static_cast<A>(divisor(g, first));
    for (int64_t plane = begin; plane < end; ++plane) {
      const vec<A> share = broadcast(to_accumulate(a.output[plane]) * factor);
      T* p = a.input + plane * pixels;
      int64_t i = 0;
      for (; i + lanes<A> <= pixels; i += lanes<A>) store(p + i, share);
      if (i < pixels) store_partial(p + i, share, pixels - i);
    }
  }
};

// channels_first: the gradient rows over an input row are added first, which leaves a one-dimensional problem.
template <class T>
struct AverageBackwardRows {
  using A = accumulate_t<T>;
  static constexpr int64_t kPiece = kColumns * 4;
  struct Scratch {
    int64_t room, reach;
    A *piles, *grads, *factors;
    int64_t bytes;

    Scratch(const PoolGeometry& g, bool phases, void* memory) {
      Carve carve(memory);
      reach = phases ? (g.span(2) - 1) / g.stride[2] : 0;
      room = phase_room<A>(kPiece, 1);
      piles = carve.take<A>(room * (phases ? g.stride[2] : 1));
      grads = carve.take<A>(phase_room<A>(kPiece + reach, 1));
      factors = carve.take<A>(phase_room<A>(kPiece + reach, 1));
      bytes = carve.used();
    }
  };

  static int64_t chunks(const PoolGeometry& g) {
    return by_rows(g) ? ceil_divide(ceil_divide(g.input[2] + g.padding[2], g.stride[2]), kPiece)
                      : ceil_divide(g.input[2], kPiece);
  }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t cost = std::min(g.input[2], kPiece) * (1 + g.overlap(0) * g.overlap(1) + g.overlap(2));
    return {g.planes() * chunks(g) * g.input[0] * g.input[1], cost, Scratch(g, by_rows(g), nullptr).bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const bool phases = by_rows(g);
    const Scratch s(g, phases, memory);
    const int64_t grid[kMaxSpatial] = {chunks(g), g.input[0], g.input[1]};
    Range known = {-1, -1};
    Cursor at(grid, begin);
    RowWindows over(g, at.at[1], at.at[2]);
    for (int64_t task = begin; task < end; ++task, at.next()) {
      if (task > begin) over.next(g, at.at[1], at.at[2]);
      const int64_t column = at.at[0] * kPiece;
      T* row = a.input + ((at.outer * g.input[0] + at.at[1]) * g.input[1] + at.at[2]) * g.input[2];
      if (phases) {
        const int64_t stride = g.stride[2];
        const int64_t columns = std::min(kPiece, ceil_divide(g.input[2] + g.padding[2], stride) - column);
        add_rows(a, s, at.outer, over, {column - s.reach, column + columns}, known);
        for (int64_t phase = 0; phase < stride; ++phase) shift(g, s, phase, columns);
        collect(s.piles, stride, s.room, column * stride - g.padding[2], columns * stride, row, g.input[2]);
      } else {
        const int64_t columns = std::min(kPiece, g.input[2] - column);
        std::fill_n(s.piles, columns, A{});
        const Range over_w = {g.windows_over(2, column).begin, g.windows_over(2, column + columns - 1).end};
        for (int64_t ow = over_w.begin; ow < over_w.end; ow += kPiece) {
          const Range some = {ow, std::min(over_w.end, ow + kPiece)};
          add_rows(a, s, at.outer, over, some, known);
          spread(g, s, some, {column, column + columns});
        }
        collect(s.piles, 1, s.room, 0, columns, row + column, columns);
      }
    }
  }

  // grads[i] = sum over the windows (od, oh) above this row of grad[od, oh, wanted.begin + i] / divisor.
  static void add_rows(const PoolArguments<T>& a, const Scratch& s, int64_t plane, const RowWindows& over, Range wanted,
                       Range& known) {
    const PoolGeometry& g = a.geometry;
    const int64_t begin = std::max<int64_t>(0, wanted.begin), end = std::min(wanted.end, g.output[2]);
    if (known.begin != wanted.begin || known.end != wanted.end) {
      std::fill_n(s.grads, wanted.size(), A{});
      for (int64_t ow = begin; ow < end; ++ow) s.factors[ow - wanted.begin] = A(1) / static_cast<A>(g.divisor(2, ow));
      known = wanted;
    }
    bool first = true;
    for (int64_t od = over.over_d.begin; od < over.over_d.end; ++od)
      for (int64_t oh = over.over_h.begin; oh < over.over_h.end; ++oh, first = false) {
        const T* row = a.output + ((plane * g.output[0] + od) * g.output[1] + oh) * g.output[2];
        const A factor = A(1) / static_cast<A>(g.divisor(0, od) * g.divisor(1, oh));
        for (int64_t ow = begin; ow < end; ow += lanes<A>) {
          const int64_t left = std::min<int64_t>(lanes<A>, end - ow);
          A* sum = s.grads + ow - wanted.begin;
          const vec<A> grad = left == lanes<A> ? load(row + ow) : load_partial(row + ow, left);
          const vec<A> share = grad * (load(s.factors + ow - wanted.begin) * factor);
          const vec<A> total = first ? share : load(sum) + share;
          if (left == lanes<A>)
            store(sum, total);
          else
            store_partial(sum, total, left);
        }
      }
    if (first && begin < end) std::fill(s.grads + begin - wanted.begin, s.grads + end - wanted.begin, A{});
  }

  static void shift(const PoolGeometry& g, const Scratch& s, int64_t phase, int64_t columns) {
    for (int64_t place = 0; place < columns; place += lanes<A>) {
      vec<A> total = {};
      for (int64_t kw = phase; kw < g.kernel[2]; kw += g.stride[2])
        total += load(s.grads + s.reach + place - kw / g.stride[2]);
      store(s.piles + phase * s.room + place, total);
    }
  }

  static void spread(const PoolGeometry& g, const Scratch& s, Range windows, Range columns) {
    for (int64_t ow = windows.begin; ow < windows.end; ++ow) {
      const Range in = g.taps_inside(2, ow);
      const int64_t begin = std::max(columns.begin, g.start(2, ow) + in.begin);
      const int64_t end = std::min(columns.end, g.start(2, ow) + in.end);
      const A share = s.grads[ow - windows.begin];
      for (int64_t w = begin; w < end; ++w) s.piles[w - columns.begin] += share;
    }
  }
};

template <class T>
struct AverageBackward {
  using ByTiles = Transposed<T, AverageBackward<accumulate_t<T>>, true>;
  using ByWindows = Disjoint<T, false>;

  static PoolPlan plan(const PoolArguments<T>& a) {
    if (ByWindows::fits(a)) return ByWindows::plan(a);
    if (AverageBackwardLast<T>::fits(a)) return AverageBackwardLast<T>::plan(a);
    if (AverageBackwardGlobal<T>::fits(a)) return AverageBackwardGlobal<T>::plan(a);
    if (ByTiles::fits(a)) return ByTiles::plan(a);
    return AverageBackwardRows<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    if (ByWindows::fits(a)) return ByWindows::run(a, scratch, begin, end);
    if (AverageBackwardLast<T>::fits(a)) return AverageBackwardLast<T>::run(a, scratch, begin, end);
    if (AverageBackwardGlobal<T>::fits(a)) return AverageBackwardGlobal<T>::run(a, scratch, begin, end);
    if (ByTiles::fits(a)) return ByTiles::run(a, scratch, begin, end);
    AverageBackwardRows<T>::run(a, scratch, begin, end);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
