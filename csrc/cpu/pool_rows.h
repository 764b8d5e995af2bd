// What max and average pooling share: walking a grid, carving scratch memory, and rows dealt into phases.
//
// Phases make a strided window loadable by vectors when width is the contiguous axis (NCHW): a row is dealt like
// cards into `stride` piles, after which the inputs that one tap meets in neighbouring outputs are neighbours.
#pragma once
#include "pool_kernels.h"
#include "streaming.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int64_t kColumns = 256;   // outputs of a row worked on at a time, so that scratch stays in L1
constexpr int64_t kMaxPhases = 8;   // beyond, windows hardly overlap and are long enough to be vectors themselves
constexpr int64_t kMaxSpan = 4096;  // of a window along the width, for scratch of bounded size
constexpr int64_t kMaxRows = 256;   // of a window, likewise

// From an element of a channels_last window to the same one two windows on, for prefetches: a window read a few
// channels at a time is too scattered for the hardware to see the next ones coming.
inline int64_t next_window(const PoolGeometry& g) { return g.output[2] > 1 ? 2 * g.stride[2] * g.channels : 0; }

// Whether rows are pooled lane by output: neighbouring outputs in neighbouring lanes.
inline bool by_rows(const PoolGeometry& g) {
  return !g.adaptive && g.stride[2] <= kMaxPhases && g.span(2) <= kMaxSpan && g.kernel[0] <= kMaxRows &&
         g.kernel[0] * g.span(1) <= kMaxRows;
}
inline int64_t row_chunks(int64_t columns) { return ceil_divide(columns, kColumns); }

// Hands out aligned pieces of a scratch buffer; over a null buffer it only measures.
class Carve {
 public:
  explicit Carve(void* scratch) : base_(static_cast<char*>(scratch)) {}
  template <class U>
  U* take(int64_t count) {
    U* piece = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Whether the gradient of the input, channels last, is written past the caches.
template <class T>
bool streams_grad_input(const PoolArguments<T>& a) {
  const PoolGeometry& g = a.geometry;
  return streams(a.input, g.batch * g.input_pixels() * g.channels, g.channels,
                 g.batch * g.output_pixels() * g.channels);
}

// Walks the cells of an outer x depth x height x width grid in order.
struct Cursor {
  const int64_t* size;
  int64_t outer, at[kMaxSpatial];

  Cursor(const int64_t* spatial, int64_t flat) : size(spatial) {
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      at[axis] = flat % size[axis];
      flat /= size[axis];
    }
    outer = flat;
  }
  void next() {
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      if (++at[axis] < size[axis]) return;
      at[axis] = 0;
    }
    ++outer;
  }
  // The rest of this row, or what of it comes before `left` cells are used up.
  int64_t run(int64_t left) const { return std::min(left, size[2] - at[2]); }
  void skip(int64_t cells) {  // within a row
    at[2] += cells - 1;
    next();
  }
};

template <class A, size_t... I>
CONVLAB_INLINE void unzip(vec<A> low, vec<A> high, vec<A>& even, vec<A>& odd, std::index_sequence<I...>) {
  even = __builtin_shufflevector(low, high, (2 * I)...);
  odd = __builtin_shufflevector(low, high, (2 * I + 1)...);
}
template <class A, size_t... I>
CONVLAB_INLINE void zip(vec<A> even, vec<A> odd, vec<A>& low, vec<A>& high, std::index_sequence<I...>) {
  low = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * sizeof...(I))...);
  high = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * sizeof...(I) + sizeof...(I) / 2)...);
}

// Windows over the rows of the input, taken in order: divides at the start of a plane only.
struct RowWindows {
  Range over_d, over_h;

  RowWindows(const PoolGeometry& g, int64_t d, int64_t h) { restart(g, d, h); }
  void restart(const PoolGeometry& g, int64_t d, int64_t h) {
    over_d = g.windows_over(0, d);
    over_h = g.windows_over(1, h);
  }
  void next(const PoolGeometry& g, int64_t d, int64_t h) {
    if (h == 0)
      restart(g, d, h);
    else
      over_h = g.next_windows(1, h, over_h);
  }
};

// A ring of at least `rows` rows, found by mask.
constexpr int64_t ring_size(int64_t rows) {
  int64_t size = 1;
  while (size < rows) size *= 2;
  return size;
}

// Calls body(vectors, partial, channel, count) over the channels of a pixel: four vectors at a time, to hide the
// latency of what is done with each, then single ones, then what is left of the last.
template <class A, class Body>
CONVLAB_INLINE void for_channels(int64_t channels, const Body& body) {
  constexpr int64_t L = lanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) body(std::integral_constant<int, 4>{}, std::false_type{}, c, L);
  for (; c + L <= channels; c += L) body(std::integral_constant<int, 1>{}, std::false_type{}, c, L);
  if (c < channels) body(std::integral_constant<int, 1>{}, std::true_type{}, c, channels - c);
}

// Elements that one phase of a row of `span` elements takes in scratch, with room for vectors that overhang.
template <class A>
constexpr int64_t phase_room(int64_t span, int64_t phases) {
  return (span / phases + 1 + 2 * lanes<A>) / lanes<A> * lanes<A>;
}

// piles[(u % phases) * room + u / phases] = row[first + u] for u in [0, span), or `fill` outside [0, width).
template <class T, class A>
void deal(const T* row, int64_t width, int64_t first, int64_t span, int64_t phases, int64_t room, A fill, A* piles) {
  constexpr int64_t L = lanes<A>;
  const int64_t begin = std::clamp<int64_t>(-first, 0, span), end = std::clamp<int64_t>(width - first, begin, span);
  row += first;
  const auto fill_outside = [=](int64_t from, int64_t to) {
    if (from == to) return;
    for (int64_t phase = from % phases, slot = from / phases; from < to; ++from) {
      piles[phase * room + slot] = fill;
      if (++phase == phases) phase = 0, ++slot;
    }
  };
  int64_t u = begin;
  if (phases == 1) {
    for (; u + L <= end; u += L) store(piles + u, load(row + u));
    if (u < end) store(piles + u, load_partial(row + u, end - u));
  } else if (phases == 2) {
    if (u % 2 != 0 && u < end) piles[room + u / 2] = to_accumulate(row[u]), ++u;
    for (; u < end; u += 2 * L) {
      const int64_t left = end - u;
      const vec<A> low = left >= L ? load(row + u) : load_partial(row + u, left);
      const vec<A> high =
          left >= 2 * L ? load(row + u + L) : (left > L ? load_partial(row + u + L, left - L) : vec<A>{});
      vec<A> even, odd;
      unzip<A>(low, high, even, odd, std::make_index_sequence<L>());
      store(piles + u / 2, even);
      store(piles + room + u / 2, odd);
    }
  } else {
    for (int64_t phase = 0; phase < phases; ++phase) {
      int64_t slot = ceil_divide(begin - phase, phases);
      if (slot < 0) slot = 0;
      A* pile = piles + phase * room;
      for (int64_t from = slot * phases + phase; from < end; from += phases) pile[slot++] = to_accumulate(row[from]);
    }
  }
  fill_outside(0, begin);
  fill_outside(end, span);
}

// The way back: row[first + u] = piles[...] for those u in [0, span) that lie inside [0, width).
template <class T, class A>
void collect(const A* piles, int64_t phases, int64_t room, int64_t first, int64_t span, T* row, int64_t width) {
  constexpr int64_t L = lanes<A>;
  const int64_t begin = std::clamp<int64_t>(-first, 0, span), end = std::clamp<int64_t>(width - first, begin, span);
  row += first;
  int64_t u = begin;
  if (phases == 1) {
    for (; u + L <= end; u += L) store(row + u, load(piles + u));
    if (u < end) store_partial(row + u, load(piles + u), end - u);
  } else if (phases == 2) {
    if (u % 2 != 0 && u < end) row[u] = from_accumulate<T>(piles[room + u / 2]), ++u;
    for (; u < end; u += 2 * L) {
      vec<A> low, high;
      zip<A>(load(piles + u / 2), load(piles + room + u / 2), low, high, std::make_index_sequence<L>());
      const int64_t left = end - u;
      if (left >= L)
        store(row + u, low);
      else
        store_partial(row + u, low, left);
      if (left >= 2 * L)
        store(row + u + L, high);
      else if (left > L)
        store_partial(row + u + L, high, left - L);
    }
  } else {
    for (int64_t phase = u % phases, slot = u / phases; u < end; ++u) {
      row[u] = from_accumulate<T>(piles[phase * room + slot]);
      if (++phase == phases) phase = 0, ++slot;
    }
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
