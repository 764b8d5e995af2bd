// Average pooling, backward: every input element sums the gradients of the windows over it, each divided as in
// forward. See pool_average.h for the idea.
#pragma once
#include "pool_average.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct AverageBackwardLast {
  using A = accumulate_t<T>;
  struct Share {
    int64_t output;
    A factor;
  };

  static bool fits(const PoolArguments<T>& a) { return a.layout == Layout::channels_last; }
  static int64_t overlap(const PoolGeometry& g) { return g.overlap(0) * g.overlap(1) * g.overlap(2); }
  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    Carve carve(nullptr);
    carve.take<Share>(overlap(g));
    return {g.batch * g.input_pixels(), g.channels * (1 + overlap(g)), carve.used()};
  }

  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const int64_t C = g.channels;
    Share* shares = Carve(scratch).take<Share>(overlap(g));
    Cursor at(g.input, begin);
    for (int64_t pixel = begin; pixel < end; ++pixel, at.next()) {
      const Range over_d = g.windows_over(0, at.at[0]), over_h = g.windows_over(1, at.at[1]);
      const Range over_w = g.windows_over(2, at.at[2]);
      int64_t count = 0, o[kMaxSpatial];
      for (o[0] = over_d.begin; o[0] < over_d.end; ++o[0])
        for (o[1] = over_h.begin; o[1] < over_h.end; ++o[1])
          for (o[2] = over_w.begin; o[2] < over_w.end; ++o[2]) {
            const int64_t output = ((at.outer * g.output[0] + o[0]) * g.output[1] + o[1]) * g.output[2] + o[2];
            shares[count++] = {output * C, A(1) / static_cast<A>(divisor(g, o))};
          }
      int64_t c = 0;
      for (; c + lanes<A> <= C; c += lanes<A>) {
        vec<A> total = {};
        for (int64_t i = 0; i < count; ++i) total += load(a.output + shares[i].output + c) * shares[i].factor;
        store(a.input + pixel * C + c, total);
      }
      if (c < C) {
        vec<A> total = {};
        for (int64_t i = 0; i < count; ++i)
          total += load_partial(a.output + shares[i].output + c, C - c) * shares[i].factor;
        store_partial(a.input + pixel * C + c, total, C - c);
      }
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
    for (int64_t task = begin; task < end; ++task, at.next()) {
      const int64_t column = at.at[0] * kPiece;
      T* row = a.input + ((at.outer * g.input[0] + at.at[1]) * g.input[1] + at.at[2]) * g.input[2];
      if (phases) {
        const int64_t stride = g.stride[2];
        const int64_t columns = std::min(kPiece, ceil_divide(g.input[2] + g.padding[2], stride) - column);
        add_rows(a, s, at, {column - s.reach, column + columns}, known);
        for (int64_t phase = 0; phase < stride; ++phase) shift(g, s, phase, columns);
        collect(s.piles, stride, s.room, column * stride - g.padding[2], columns * stride, row, g.input[2]);
      } else {
        const int64_t columns = std::min(kPiece, g.input[2] - column);
        std::fill_n(s.piles, columns, A{});
        const Range over = {g.windows_over(2, column).begin, g.windows_over(2, column + columns - 1).end};
        for (int64_t ow = over.begin; ow < over.end; ow += kPiece) {
          const Range some = {ow, std::min(over.end, ow + kPiece)};
          add_rows(a, s, at, some, known);
          spread(g, s, some, {column, column + columns});
        }
        collect(s.piles, 1, s.room, 0, columns, row + column, columns);
      }
    }
  }

  // grads[i] = sum over the windows (od, oh) above this row of grad[od, oh, wanted.begin + i] / divisor.
  static void add_rows(const PoolArguments<T>& a, const Scratch& s, const Cursor& at, Range wanted, Range& known) {
    const PoolGeometry& g = a.geometry;
    const int64_t begin = std::max<int64_t>(0, wanted.begin), end = std::min(wanted.end, g.output[2]);
    if (known.begin != wanted.begin || known.end != wanted.end) {
      std::fill_n(s.grads, wanted.size(), A{});
      for (int64_t ow = begin; ow < end; ++ow) s.factors[ow - wanted.begin] = A(1) / static_cast<A>(g.divisor(2, ow));
      known = wanted;
    }
    const Range over_d = g.windows_over(0, at.at[1]), over_h = g.windows_over(1, at.at[2]);
    bool first = true;
    for (int64_t od = over_d.begin; od < over_d.end; ++od)
      for (int64_t oh = over_h.begin; oh < over_h.end; ++oh, first = false) {
        const T* row = a.output + ((at.outer * g.output[0] + od) * g.output[1] + oh) * g.output[2];
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
  static PoolPlan plan(const PoolArguments<T>& a) {
    return AverageBackwardLast<T>::fits(a) ? AverageBackwardLast<T>::plan(a) : AverageBackwardRows<T>::plan(a);
  }
  static void run(const PoolArguments<T>& a, void* scratch, int64_t begin, int64_t end) {
    if (AverageBackwardLast<T>::fits(a)) return AverageBackwardLast<T>::run(a, scratch, begin, end);
    AverageBackwardRows<T>::run(a, scratch, begin, end);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
