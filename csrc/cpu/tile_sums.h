// A block of sums in four tiles, while a reduction over steps of channels and over taps runs.
//
// Idea: 32 rows times 32 columns. Each step and tap loads 2 + 2 tiles for 4 products or, if elements are sums of
// several parts (bfloat16_parts.h), 14 for 24 (float32) and 12 for 16 (float16). Rows lie a constant distance apart, so
// they are read where they are; columns are packed as tiles.
#pragma once
#include "bfloat16_parts.h"
#include "tiles.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int kTilesWide = 2;  // tiles of sums along either side
constexpr int64_t kSumEdge = kTilesWide * kTileEdge, kSumBlock = kSumEdge * kSumEdge;

// A vector of columns of a step, `first` and on, in the tiles of all parts: pairs of their 32 terms are rows.
template <int Parts>
CONVLAB_INLINE void store_columns(const vec<float> (&term)[kTileDepth], int64_t first, char* columns) {
  columns += first / kTileEdge * kTileBytes + first % kTileEdge * 4;
  for (int64_t pair = 0; pair < kTileDepth / 2; ++pair, columns += kTileRowBytes) {
    vec_bits joined[Parts];
    split_pair(term[2 * pair], term[2 * pair + 1], joined);
    for (int part = 0; part < Parts; ++part)
      std::memcpy(columns + part * kTilesWide * kTileBytes, &joined[part], sizeof joined[part]);
  }
}

// Rows times columns, summed over steps of 32 channels and, within each, over taps.
struct TileSum {
  const char* rows;      // of the first tap, part and step
  int64_t row_pitch;     // from position to position, in bytes
  int64_t part_pitch;    // from part to part of a position
  const char* columns;   // [step][tap][part][tile]
  int64_t step_columns;  // bytes of a step of them
  int64_t steps, taps;
  const int64_t *row_offset, *column_offset;  // [tap], in bytes
  float* sums;                                // [row][kSumEdge]
  bool accumulate;                            // to what is there
};

// Between the products of a tap, which take the tile unit 16 cycles each, there is time for other work: aside().
template <int Parts, int Rows, int Columns, class Aside>
void sum_tiles(Tiles& tiles, const TileSum& t, Aside& aside) {
  constexpr auto products = part_products<Parts>();
  constexpr auto count = static_cast<int>(products.size());
  const auto each = [](auto size, const auto& body) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (body(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, size()>{});
  };
  constexpr std::integral_constant<int, Rows> rows;
  constexpr std::integral_constant<int, Columns> columns;
  const auto each_sum = [&](const auto& body) {
    each(rows, [&](auto i) {
      each(columns, [&](auto j) {
        body(std::integral_constant<int, 2 * i() + j()>{}, t.sums + i() * kTileEdge * kSumEdge + j() * kTileEdge);
      });
    });
  };
  constexpr int64_t sum_pitch = kSumEdge * sizeof(float);
  if (t.accumulate)
    each_sum([&](auto tile, const float* sums) { tiles.load<tile()>(sums, sum_pitch); });
  else
    each_sum([&](auto tile, const float*) { tiles.zero<tile()>(); });
  const char *from = t.rows, *weights = t.columns;
  for (int64_t step = 0; step < t.steps; ++step, from += kTileRowBytes, weights += t.step_columns)
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      const char *row = from + t.row_offset[tap], *column = weights + t.column_offset[tap];
      each(std::integral_constant<int, count>{}, [&](auto p) {
        constexpr int last = p() > 0 ? p() - 1 : 0, row_part = products[p()].row, column_part = products[p()].column;
        if constexpr (p() == 0 || row_part != products[last].row)
          each(rows, [&](auto i) {
            tiles.load<4 + i()>(row + row_part * t.part_pitch + i() * kTileEdge * t.row_pitch, t.row_pitch);
          });
        if constexpr (p() == 0 || column_part != products[last].column)
          each(columns, [&](auto j) {
            tiles.load<6 + j()>(column + (column_part * kTilesWide + j()) * kTileBytes, kTileRowBytes);
          });
        each(rows,
             [&](auto i) { each(columns, [&](auto j) { tiles.multiply_add<2 * i() + j(), 4 + i(), 6 + j()>(); }); });
      });
      aside();
    }
  each_sum([&](auto tile, float* sums) { tiles.store<tile()>(sums, sum_pitch); });
}

template <int Parts, class Aside>
void sum_tiles(Tiles& tiles, bool both_rows, bool both_columns, const TileSum& t, Aside&& aside) {
  if (both_rows)
    both_columns ? sum_tiles<Parts, 2, 2>(tiles, t, aside) : sum_tiles<Parts, 2, 1>(tiles, t, aside);
  else
    both_columns ? sum_tiles<Parts, 1, 2>(tiles, t, aside) : sum_tiles<Parts, 1, 1>(tiles, t, aside);
}

inline void add_block(const float* sums, float* total) {
  for (int64_t i = 0; i < kSumBlock; i += lanes<float>) store(total + i, load(total + i) + load(sums + i));
}

}  // namespace convlab::cpu::CONVLAB_ISA
