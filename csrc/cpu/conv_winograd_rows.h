// How tiles of a Winograd convolution become rows of matrix products, and back.
//
// SixPoints<Ry, Rx>: a tile of m outputs along an axis is F(m, R), m + R - 1 points. m is 7 - R, or 1 along an axis
// that is not transformed, with R = 1 and one matrix.
//
// Halves, 3 taps with stride 2: output i reads 2i-p, 2i+1-p and 2i+2-p. The outer two taps are a 2-tap filter with
// stride 1 on the pixels of one parity, F(m, 2), m + 1 points; the middle tap is a product with those of the other, m
// rows of a matrix product with one and the same weight. Backward input reads m + 1 pixels and writes pairs: pixels of
// one parity see the 2-tap filter, the others the middle tap. m is 4.
//
// Along each transformed axis there are 6 matrices of weights: 5 points and infinity, or 4, infinity and the middle
// tap. A pair of them, one per axis, is a product of its own, and every tile has some rows of it. With 3 taps, the last
// tile of a line has only the outputs left over, and so fewer points (winograd_matrices.h), so that small maps waste
// nothing.
#pragma once
#include "conv_winograd_source.h"
#include "winograd_transform.h"

namespace convlab::cpu::CONVLAB_ISA {

// How a kernel's taps along the axes y and x become matrices.
struct Halves {
  static constexpr bool kHalves = true, kSmallerTiles = true;
  static constexpr int kTaps[2] = {3, 3}, kMatrices[2] = {6, 6};
  static constexpr int M[2] = {4, 4}, R[2] = {2, 2};              // F(M, R)
  static constexpr int kLines[2] = {2 * M[0] + 1, 2 * M[1] + 1};  // rows of a tile, at most
};
template <int Ry, int Rx>
struct SixPoints {
  static constexpr bool kHalves = false;
  static constexpr bool kSmallerTiles = Ry == 3 && Rx == 3;  // others are rare: code for each number of outputs is not
  static constexpr int kTaps[2] = {Ry, Rx}, kMatrices[2] = {Ry == 1 ? 1 : 6, Rx == 1 ? 1 : 6};
  static constexpr int M[2] = {Ry == 1 ? 1 : 7 - Ry, Rx == 1 ? 1 : 7 - Rx}, R[2] = {Ry, Rx};
  static constexpr int kLines[2] = {kMatrices[0], kMatrices[1]};
};
// What threads that transform tiles for themselves alone may take, together.
constexpr int64_t kApartBytes = int64_t{64} << 20;
// How many tiles have 36 rows.
template <class Cut>
constexpr int64_t kTilesOf36Rows = std::max(1, 36 / (Cut::kMatrices[0] * Cut::kMatrices[1]));

// The rows of tiles, counted in the order of images, rows of tiles and columns.
template <class Cut>
class TileRows {
 public:
  static constexpr int kLinesY = Cut::kLines[0], kLinesX = Cut::kLines[1], kRows = kLinesY * kLinesX;
  static constexpr int kMatricesY = Cut::kMatrices[0], kMatricesX = Cut::kMatrices[1];

  TileRows() = default;
  TileRows(int64_t height, int64_t width) : outputs_{height, width} {
    for (int axis = 0; axis < 2; ++axis) {
      tiles_[axis] = divide_up(outputs_[axis], Cut::M[axis]);
      for (int m = 0; m < Cut::kMatrices[axis]; ++m)
        axis_rows_[axis][m] = (tiles_[axis] - 1) * rows_of(axis, m, Cut::M[axis]) +
                              rows_of(axis, m, tile_outputs(axis, tiles_[axis] - 1));
    }
  }

  // Where the rows of a pair of matrices start; there is room for `tiles` full tiles.
  static int64_t first_row(int y, int x, int64_t tiles) {
    if (!Cut::kHalves) return tiles * (y * kMatricesX + x);
    return tiles * (y < 5 ? y * kLinesX + x : 5 * kLinesX + Cut::M[0] * x);
  }

  struct Position {
    int64_t n, y, x;
  };
  Position position(int64_t tile) const {
    return {tile / tiles_[1] / tiles_[0], tile / tiles_[1] % tiles_[0], tile % tiles_[1]};
  }
  // Rows of all tiles before one.
  int64_t rows_before(int my, int mx, const Position& at) const {
    const int64_t lines = at.n * axis_rows_[0][my] + at.y * rows_of(0, my, Cut::M[0]);
    const int64_t columns = at.x * rows_of(1, mx, Cut::M[1]);
    return lines * axis_rows_[1][mx] + (at.x > 0 ? rows_of(0, my, tile_outputs(0, at.y)) * columns : 0);
  }

  // Tiles of a block that lie in one row of tiles.
  struct Strip {
    int64_t outputs;                        // of its tiles, along y
    int64_t column;                         // of the first tile
    int64_t first[kMatricesY][kMatricesX];  // of each pair of matrices, the first row of the first tile
  };
  // `room`: for how many full tiles there is room in the block.
  Strip strip_at(int64_t block_begin, int64_t tile, int64_t room) const {
    const Position begin = position(block_begin), at = position(tile);
    Strip strip;
    strip.outputs = tile_outputs(0, at.y);
    strip.column = at.x;
    for (int y = 0; y < kMatricesY; ++y)
      for (int x = 0; x < kMatricesX; ++x)
        strip.first[y][x] = first_row(y, x, room) + rows_before(y, x, at) - rows_before(y, x, begin);
    return strip;
  }

  // One tile: its outputs along the axes, and the row of each of its points.
  struct Tile {
    int64_t outputs[2];
    int64_t row[kLinesY][kLinesX];

    int lines(int axis) const {
      return static_cast<int>(Cut::kHalves ? 2 * outputs[axis] + 1 : outputs[axis] + Cut::R[axis] - 1);
    }
  };
  // visit(tile, its number) for the first `count` tiles of a strip.
  template <class Visit>
  void for_each_tile(const Strip& strip, int64_t count, const Visit& visit) const {
    Tile tile;
    int64_t step[kLinesY][kLinesX];
    for (int64_t index = 0; index < count; ++index) {
      if (index == 0 || strip.column + index == tiles_[1] - 1)
        place_tile(strip, index, tile, step);
      else
        for (int i = 0; i < kLinesY; ++i)
          for (int j = 0; j < kLinesX; ++j) tile.row[i][j] += step[i][j];
      visit(static_cast<const Tile&>(tile), index);
    }
  }

 private:
  // Rows of a tile of m outputs, along an axis.
  static int64_t rows_of(int axis, int matrix, int64_t m) {
    if (!Cut::kHalves) return matrix == Cut::kMatrices[axis] - 1 || matrix < m + Cut::R[axis] - 2;
    return matrix == 5 ? m : matrix == 4 || matrix < m;
  }
  int64_t tile_outputs(int axis, int64_t tile) const {
    constexpr const int(&most)[2] = Cut::M;
    return Cut::kSmallerTiles ? std::min<int64_t>(most[axis], outputs_[axis] - tile * most[axis]) : most[axis];
  }

  // Tile `index` of a strip, and how far its rows are from those of the tile before.
  void place_tile(const Strip& strip, int64_t index, Tile& tile, int64_t (&step)[kLinesY][kLinesX]) const {
    tile.outputs[0] = strip.outputs;
    tile.outputs[1] = tile_outputs(1, strip.column + index);
    for (int i = 0; i < kLinesY; ++i)
      for (int j = 0; j < kLinesX; ++j) tile.row[i][j] = step[i][j] = 0;  // a smaller tile has fewer
    const int lines = tile.lines(0), columns = tile.lines(1);
    for (int i = 0; i < lines; ++i) {
      const Line y = line(0, i, tile.outputs[0]);
      for (int j = 0; j < columns; ++j) {
        const Line x = line(1, j, tile.outputs[1]);
        step[i][j] = rows_of(0, y.matrix, tile.outputs[0]) * rows_of(1, x.matrix, Cut::M[1]);
        tile.row[i][j] = strip.first[y.matrix][x.matrix] + index * step[i][j] +
                         y.index * rows_of(1, x.matrix, tile.outputs[1]) + x.index;
      }
    }
  }

  // Which matrix row i of a tile of m outputs belongs to, and the how many-th of its rows it is: finite points,
  // infinity, the middle tap.
  struct Line {
    int matrix;
    int64_t index;
  };
  static Line line(int axis, int i, int64_t m) {
    const int64_t finite = m + Cut::R[axis] - 2;
    if (i < finite) return {i, 0};
    if (i == finite) return {Cut::kHalves ? 4 : Cut::kMatrices[axis] - 1, 0};
    return {5, i - finite - 1};
  }

  int64_t outputs_[2], tiles_[2], axis_rows_[2][6];
};

// G of every tile along an axis, [matrix][tap], and its transpose.
template <class Cut, int Axis>
struct TileMatrices {
  static constexpr int kTaps = Cut::kTaps[Axis], kMatrices = Cut::kMatrices[Axis];
  double weight[kMatrices][kTaps]{}, adjoint[kTaps][kMatrices]{};

  constexpr TileMatrices() {
    constexpr const auto& points = winograd<Cut::M[Axis], Cut::R[Axis]>.weight;
    for (int j = 0; j < static_cast<int>(std::size(points)); ++j)
      for (int tap = 0; tap < Cut::R[Axis]; ++tap) weight[j][Cut::kHalves ? 2 * tap : tap] = points[j][tap];
    if (Cut::kHalves) weight[5][1] = 1;
    for (int tap = 0; tap < kTaps; ++tap)
      for (int j = 0; j < kMatrices; ++j) adjoint[tap][j] = weight[j][tap];
  }
};
template <class Cut, int Axis>
constexpr TileMatrices<Cut, Axis> tile_matrices{};

template <class Cut, int Axis>
struct WeightTransform {
  static constexpr const auto& matrix = tile_matrices<Cut, Axis>.weight;
};
template <class Cut, int Axis>
struct WeightAdjoint {
  static constexpr const auto& matrix = tile_matrices<Cut, Axis>.adjoint;
};

// body(integral_constant m): transforms are compiled for each number of outputs.
template <class Cut, int Axis, class Body>
CONVLAB_INLINE void with_outputs(int64_t m, const Body& body) {
  if constexpr (Cut::kSmallerTiles) {
    static_assert(Cut::M[Axis] == 4);
    switch (m) {
      case 1:
        return body(std::integral_constant<int, 1>{});
      case 2:
        return body(std::integral_constant<int, 2>{});
      case 3:
        return body(std::integral_constant<int, 3>{});
      default:
        break;
    }
  }
  body(std::integral_constant<int, Cut::M[Axis]>{});
}

// Where the rows of a tile go: blocks of `width` channels are `pitch` elements apart, rows of a block `stride`, or
// `last_stride` from channel `last` on. Only channels begin..end are wanted, in whole blocks.
template <class A>
struct RowBlocks {
  A* target;
  int64_t width, pitch, stride, last, last_stride;
  int64_t begin = 0, end = INT64_MAX;

  // Walks the vectors of channels.
  struct Walk {
    const RowBlocks blocks;
    A* block = blocks.target + blocks.begin / blocks.width * blocks.pitch;
    int64_t channel = blocks.begin, within = 0;

    A* row() const { return block + within; }  // number 0
    int64_t stride() const { return channel < blocks.last ? blocks.stride : blocks.last_stride; }
    void advance() {
      channel += lanes<A>, within += lanes<A>;
      if (within == blocks.width) within = 0, block += blocks.pitch;
    }
  };
};

// The input of one tile, for all channels. Along an axis, Step pixels are read per output (2 forward with stride 2),
// and the middle tap's first one is number `middle`.
template <class A, class Cut, int Step>
void transform_input_tile(const typename TileRows<Cut>::Tile& tile, const TileSource<A>& source,
                          const int64_t (&middle)[2], const RowBlocks<A>& place) {
  constexpr int Ry = Cut::R[0], Rx = Cut::R[1], kRead = Step * Cut::M[0] + Ry - 1, kLines = Cut::kLines[1];
  static_assert(kRead <= 9 && (Cut::kHalves || Step == 1));
  for (typename RowBlocks<A>::Walk to{place}; to.channel < source.channels; to.advance()) {
    A* const row_0 = to.row();
    const int64_t stride = to.stride();
    vec<A> half[kRead * kLines];
    with_outputs<Cut, 1>(tile.outputs[1], [&](auto outputs) {
      constexpr int m = outputs(), points = m + Rx - 1;
      for (int64_t i = 0; i < Step * tile.outputs[0] + Ry - 1; ++i) {
        vec<A> d[Step * m + Rx - 1];
        source.template load_line<Step * m + Rx - 1, Step * m>(i, to.channel, d);
        vec<A>* line = half + i * kLines;
        transform<InputTransform<m, Rx>, A>(d, Step, line, 1);
        if constexpr (Cut::kHalves)
          CONVLAB_UNROLL for (int j = 0; j < m; ++j) line[points + j] = d[Step * j + middle[1]];
      }
    });
    with_outputs<Cut, 0>(tile.outputs[0], [&](auto outputs) {
      constexpr int m = outputs(), points = m + Ry - 1;
      for (int j = 0; j < tile.lines(1); ++j) {
        vec<A> point[points];
        transform<InputTransform<m, Ry>, A>(half + j, Step * kLines, point, 1);
        CONVLAB_UNROLL for (int i = 0; i < points; ++i) store(row_0 + tile.row[i][j] * stride, point[i]);
        if constexpr (Cut::kHalves)
          CONVLAB_UNROLL for (int i = 0; i < m; ++i)
              store(row_0 + tile.row[points + i][j] * stride, half[(Step * i + middle[0]) * kLines + j]);
      }
    });
  }
}

// The gradient of a tile's outputs with respect to its rows, which is the output transform's transpose.
template <class A, class Cut>
void transform_gradient_tile(const typename TileRows<Cut>::Tile& tile, const TileSource<A>& source,
                             const RowBlocks<A>& place) {
  constexpr int kLines = Cut::kLines[1];
  const auto spread = [](auto outputs, auto taps, const vec<A>* from, int from_stride, vec<A>* to) {
    constexpr int m = outputs();
    transform<OutputAdjoint<m, taps()>, A>(from, from_stride, to, 1);
    if constexpr (Cut::kHalves) CONVLAB_UNROLL for (int i = 0; i < m; ++i) to[m + 1 + i] = from[i * from_stride];
  };
  const int64_t end = std::min(place.end, source.channels);
  for (typename RowBlocks<A>::Walk to{place}; to.channel < end; to.advance()) {
    A* const row_0 = to.row();
    const int64_t stride = to.stride();
    vec<A> half[Cut::M[0] * kLines];
    with_outputs<Cut, 1>(tile.outputs[1], [&](auto outputs) {
      for (int64_t i = 0; i < tile.outputs[0]; ++i) {
        vec<A> d[outputs()];
        source.template load_line<outputs(), outputs()>(i, to.channel, d);
        spread(outputs, std::integral_constant<int, Cut::R[1]>{}, d, 1, half + i * kLines);
      }
    });
    with_outputs<Cut, 0>(tile.outputs[0], [&](auto outputs) {
      constexpr int m = outputs(), count = Cut::kHalves ? 2 * m + 1 : m + Cut::R[0] - 1;
      for (int j = 0; j < tile.lines(1); ++j) {
        vec<A> row[count];
        spread(outputs, std::integral_constant<int, Cut::R[0]>{}, half + j, kLines, row);
        CONVLAB_UNROLL for (int i = 0; i < count; ++i) store(row_0 + tile.row[i][j] * stride, row[i]);
      }
    });
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
