// Pooling of small channels_first planes by the channels_last kernels.
//
// Idea: as many planes as a vector has lanes are transposed into a tile that stays in the L2 cache, pooled there with
// planes for channels, and transposed back. Windows of any kind then cost what they cost in channels_last, whereas rows
// of a few outputs would leave most lanes of pool_rows.h idle.
// Cost: two transpositions besides, about half an instruction per element each way.
// Limits: planes that fit, and enough of them to fill the lanes; taps of one byte.
#pragma once
#include "gemm.h"
#include "pool_taps.h"

namespace convlab::cpu::CONVLAB_ISA {

// Transposes `pixels` columns of `lanes` rows, square by square: fetch(row, column, length) gives up to a vector of a
// row, put(column, vector) takes a column, and the other way round.
template <class A, class Fetch, class Put>
CONVLAB_INLINE void transpose_squares(int64_t pixels, const Fetch& fetch, const Put& put) {
  for (int64_t pixel = 0; pixel < pixels; pixel += lanes<A>) {
    const int64_t length = std::min<int64_t>(lanes<A>, pixels - pixel);
    vec<A> block[lanes<A>];
    CONVLAB_UNROLL for (int i = 0; i < lanes<A>; ++i) block[i] = fetch(i, pixel, length);
    transpose<A>(block);
    CONVLAB_UNROLL for (int i = 0; i < lanes<A>; ++i) put(i, pixel, length, block[i]);
  }
}

// tile[pixel * lanes + plane] from planes[plane * pixels + pixel], and back; planes beyond `count` are zero.
template <class T, class A>
void planes_to_tile(const T* planes, int64_t pixels, int64_t count, A* tile) {
  transpose_squares<A>(
      pixels,
      [&](int plane, int64_t pixel, int64_t length) {
        const T* p = planes + plane * pixels + pixel;
        return plane >= count ? vec<A>{} : length == lanes<A> ? load(p) : load_partial(p, length);
      },
      [&](int i, int64_t pixel, int64_t length, vec<A> v) {
        if (i < length) store(tile + (pixel + i) * lanes<A>, v);
      });
}
template <class T, class A>
void tile_to_planes(const A* tile, int64_t pixels, int64_t count, T* planes) {
  transpose_squares<A>(
      pixels,
      [&](int i, int64_t pixel, int64_t length) { return i < length ? load(tile + (pixel + i) * lanes<A>) : vec<A>{}; },
      [&](int plane, int64_t pixel, int64_t length, vec<A> v) {
        T* p = planes + plane * pixels + pixel;
        if (plane < count && length == lanes<A>)
          store(p, v);
        else if (plane < count)
          store_partial(p, v, length);
      });
}
template <class A>
void taps_to_tile(const uint8_t* planes, int64_t pixels, int64_t count, uint8_t* tile) {
  transpose_squares<A>(
      pixels,
      [&](int plane, int64_t pixel, int64_t length) {
        return plane < count ? (vec<A>)load_taps<A>(planes, true, plane * pixels + pixel, length) : vec<A>{};
      },
      [&](int i, int64_t pixel, int64_t length, vec<A> v) {
        if (i < length) store_taps<A>(tile, true, (pixel + i) * lanes<A>, (vec_mask<A>)v, lanes<A>);
      });
}
template <class A>
void tile_to_taps(const uint8_t* tile, int64_t pixels, int64_t count, uint8_t* planes) {
  transpose_squares<A>(
      pixels,
      [&](int i, int64_t pixel, int64_t length) {
        return i < length ? (vec<A>)load_taps<A>(tile, true, (pixel + i) * lanes<A>, lanes<A>) : vec<A>{};
      },
      [&](int plane, int64_t pixel, int64_t length, vec<A> v) {
        if (plane < count) store_taps<A>(planes, true, plane * pixels + pixel, (vec_mask<A>)v, length);
      });
}

// `Kernel` is the kernel of the same operator, for channels_last tensors of the accumulation type.
template <class T, class Kernel, bool kBackward>
struct Transposed {
  using A = accumulate_t<T>;

  static bool fits(const PoolArguments<T>& a) {
    const PoolGeometry& g = a.geometry;
    const int64_t bytes = (g.input_pixels() + g.output_pixels()) * lanes<A> * static_cast<int64_t>(sizeof(A));
    return a.layout == Layout::channels_first && bytes <= kTileBytes && g.planes() >= lanes<A> && g.taps() > 1 &&
           (a.taps == nullptr || a.narrow());
  }

  static PoolPlan plan(const PoolArguments<T>& a) {
    const PoolPlan inner = Kernel::plan(tile_arguments(a, Tiles(a.geometry, nullptr)));
    return {ceil_divide<int64_t>(a.geometry.planes(), lanes<A>), inner.tasks * inner.cost,
            Tiles(a.geometry, nullptr).bytes + inner.scratch_bytes};
  }

  static void run(const PoolArguments<T>& a, void* memory, int64_t begin, int64_t end) {
    const PoolGeometry& g = a.geometry;
    const Tiles tiles(g, memory);
    const PoolArguments<A> tile = tile_arguments(a, tiles);
    const int64_t tasks = Kernel::plan(tile).tasks, in = g.input_pixels(), out = g.output_pixels();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * lanes<A>, count = std::min<int64_t>(lanes<A>, g.planes() - first);
      uint8_t* taps = a.taps == nullptr ? nullptr : static_cast<uint8_t*>(a.taps) + first * out;
      if constexpr (kBackward) {
        planes_to_tile(a.output + first * out, out, count, tiles.output);
        if (taps != nullptr) taps_to_tile<A>(taps, out, count, tiles.taps);
        Kernel::run(tile, tiles.rest, 0, tasks);
        tile_to_planes(tiles.input, in, count, a.input + first * in);
      } else {
        planes_to_tile(a.input + first * in, in, count, tiles.input);
        Kernel::run(tile, tiles.rest, 0, tasks);
        tile_to_planes(tiles.output, out, count, a.output + first * out);
        if (taps != nullptr) tile_to_taps<A>(tiles.taps, out, count, taps);
      }
    }
  }

 private:
  static constexpr int64_t kTileBytes = 640 << 10;

  struct Tiles {
    A *input, *output;
    uint8_t *taps, *rest;
    int64_t bytes;

    Tiles(const PoolGeometry& g, void* memory) {
      Carve carve(memory);
      input = carve.take<A>(g.input_pixels() * lanes<A>);
      output = carve.take<A>(g.output_pixels() * lanes<A>);
      taps = carve.take<uint8_t>(g.output_pixels() * lanes<A>);
      bytes = carve.used();
      rest = carve.take<uint8_t>(0);
    }
  };

  static PoolArguments<A> tile_arguments(const PoolArguments<T>& a, const Tiles& tiles) {
    PoolArguments<A> tile;
    tile.geometry = a.geometry;
    tile.geometry.batch = 1;
    tile.geometry.channels = lanes<A>;
    tile.layout = Layout::channels_last;
    tile.input = tiles.input;
    tile.output = tiles.output;
    tile.taps = a.taps == nullptr ? nullptr : tiles.taps;
    return tile;
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
