// Winograd with few channels: products and output transform in one.
//
// Idea: with 12 channels (an image's 3, in 4 parts) a product has 12 multiply-adds per sum, so writing 36 sums to the
// cache and reading them again for the output transform costs as much as computing them. Here the sums of 3 points of a
// column, for some tiles and two vectors of filters, are computed in registers, and a column is transformed as soon as
// its 6 points are there. Every load of a weight is used for all tiles, every element of a row for both vectors.
// Cost: per tile and vector of filters, 36 multiply-adds per channel and the output transform.
// Limits: a panel's weights for two vectors should fit into the L1 cache, hence few channels; all tiles have all
// points.
#pragma once
#include "conv_winograd_rows.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class A>
struct Shallow {
  static constexpr int kTiles = kTileVectors == 4 ? 4 : 2, kVectors = 2;  // at a time
  static constexpr int kPart = 3;                                         // points, too: 12 or 24 sums
  static constexpr int64_t kMostDepth = 12, kBlockTiles = 12;

  const A* input;  // V[row][channel]
  int64_t row_stride;
  const A* weights;  // U[point][channel][column], from the first column wanted
  int64_t point_stride, width;
  int64_t depth;

  // half[tile][vector][output along y][point along x] of kTiles tiles that follow each other in a row of tiles; what
  // belongs to tiles beyond its end has no meaning.
  template <class Cut, int Vectors>
  __attribute__((noinline)) void multiply_columns(const typename TileRows<Cut>::Tile& tile, vec<A>* half) const {
    constexpr int points = Cut::kLines[0];
    static_assert(!Cut::kHalves && points % kPart == 0 && points == Cut::kLines[1]);
    for (int x = 0; x < points; ++x) {
      vec<A> column[kTiles][Vectors][points];
      CONVLAB_UNROLL for (int y = 0; y < points; y += kPart) {
        const A *row[kPart], *weight[kPart];
        vec<A> sum[kPart][kTiles][Vectors];
        CONVLAB_UNROLL for (int i = 0; i < kPart; ++i) {
          row[i] = input + tile.row[y + i][x] * row_stride;
          weight[i] = weights + ((y + i) * points + x) * point_stride;
          CONVLAB_UNROLL for (int t = 0; t < kTiles; ++t) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
              sum[i][t][v] = vec<A>{};
        }
        for (int64_t d = 0; d < depth; ++d) CONVLAB_UNROLL for (int i = 0; i < kPart; ++i) {
            vec<A> w[Vectors];
            CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
              w[v] = load(weight[i] + d * width + v * lanes<A>);
              pin(w[v]);
            }
            CONVLAB_UNROLL for (int t = 0; t < kTiles; ++t) {
              vec<A> element = broadcast(row[i][d + t * row_stride]);
              pin(element);
              CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[i][t][v] = fma(element, w[v], sum[i][t][v]);
            }
          }
        CONVLAB_UNROLL for (int i = 0; i < kPart; ++i) CONVLAB_UNROLL for (int t = 0; t < kTiles; ++t)
            CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) column[t][v][y + i] = sum[i][t][v];
      }
      CONVLAB_UNROLL for (int t = 0; t < kTiles; ++t) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
          transform<OutputTransform<Cut::M[0], Cut::R[0]>, A>(
              column[t][v], 1, half + (t * kVectors + v) * Cut::M[0] * points + x, points);
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
