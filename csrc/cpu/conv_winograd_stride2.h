// Winograd for 3x3 kernels with stride 2, forward and backward input, by phases: how a tile is transformed
// (conv_winograd_blocks.h has the rest).
//
// Idea, along one axis: output i reads 2i-p, 2i+1-p and 2i+2-p. The outer two taps are a 2-tap filter with stride 1 on
// the pixels of one parity, the middle tap is a product with those of the other. F(4, 2) makes 5 points of the first;
// the 4 pixels of the second stay as they are, 4 rows of a matrix product with one and the same weight. In two
// dimensions a tile of 4x4 outputs reads 9x9 inputs and becomes 9x9 rows, which 6x6 matrices of weights serve: 25 of
// them have one row per tile, 10 have 4 and one has 16. Back, an output is what its points give plus its own row.
// Backward input reads 5x5 and writes 8x8: pixels of one parity see the 2-tap filter, the others the middle tap.
// The last tile of a line has only the outputs left over, 1 to 4: F(m, 2) takes m of the 4 finite points, and what its
// weights would differ by is in its B^T, so that small maps waste nothing: L outputs have 2L + ceil(L/4) rows.
// The points are fractions of two, so that the matrices are exact and mirrored rows are found, near the +-0.4 and
// +-1.2 of the least error.
// Cost: 81 multiplications per channel pair instead of 144, plus the transforms; worth it from about 32 channels.
// Limits: error 0.3e-6 to 0.9e-6 of max|reference| in float32. NaN and Inf spread over their tile.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr double kPhasePoints[4] = {13.0 / 32, -13.0 / 32, 19.0 / 16, -19.0 / 16};

// F(Outputs, 2) on the first Outputs points and infinity. The odd rows are negated, here and in the weights, so that
// rows of opposite points are mirrored.
template <int Outputs>
struct PhaseMatrices {
  static constexpr int M = Outputs, N = M + 1;
  double input[N][N]{};   // B^T
  double output[M][N]{};  // A^T

  constexpr PhaseMatrices() {
    for (int j = 0; j < N; ++j) {
      double polynomial[N + 1] = {1};  // product of (x - point[k]) over k != j
      int degree = 0;
      for (int k = 0; k < M; ++k) {
        if (k == j) continue;
        for (int i = degree + 1; i > 0; --i) polynomial[i] = polynomial[i - 1] - kPhasePoints[k] * polynomial[i];
        polynomial[0] *= -kPhasePoints[k];
        ++degree;
      }
      double scale = j % 2 && j < M ? -1 : 1;
      for (int k = M; k < 4 && j < M; ++k) scale *= kPhasePoints[j] - kPhasePoints[k];
      for (int i = 0; i < N; ++i) input[j][i] = scale * polynomial[i];
      double power = 1;
      for (int i = 0; i < M; ++i, power *= j < M ? kPhasePoints[j] : 0) output[i][j] = j < M ? power : i == M - 1;
    }
  }
};
template <int M>
constexpr PhaseMatrices<M> phase_matrices{};

// G of all tiles: the points of the outer taps, then the middle tap.
struct PhaseWeights {
  double matrix[6][3]{};

  constexpr PhaseWeights() {
    for (int j = 0; j < 4; ++j) {
      double scale = j % 2 ? -1 : 1;
      for (int k = 0; k < 4; ++k) scale *= k == j ? 1 : kPhasePoints[j] - kPhasePoints[k];
      matrix[j][0] = 1 / scale;
      matrix[j][2] = kPhasePoints[j] / scale;
    }
    matrix[4][2] = matrix[5][1] = 1;
  }
};
constexpr PhaseWeights phase_weights{};

template <class T>
class WinogradStride2 : public WinogradBlocks<T, WinogradStride2<T>> {
  using Base = WinogradBlocks<T, WinogradStride2<T>>;
  friend Base;

 public:
  using typename Base::A;

  explicit WinogradStride2(const ConvArguments<T>& arguments)
      : Base(arguments, arguments.pass == Pass::forward ? M : 2 * M), forward_(arguments.pass == Pass::forward) {
    const ConvGeometry& g = t_.geometry;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t padding = g.padding[axis + 1];
      first_[axis] = forward_ ? -padding : (padding + 1) / 2 - 1;
      middle_[axis] = forward_ || padding % 2 == 0 ? 1 : 0;
      outer_pixel_[axis] = padding % 2;
      outputs_[axis] = forward_ ? t_.written_size[axis + 1] : divide_up(t_.written_size[axis + 1], 2);
      for (int m = 0; m < kMatrices; ++m)
        axis_rows_[axis][m] = (tiles_[axis] - 1) * rows_of(m, M) + rows_of(m, tile_outputs(axis, tiles_[axis] - 1));
    }
  }

 private:
  using Base::block_tiles_, Base::last_, Base::row_stride_, Base::t_, Base::tile_size_, Base::tiles_;
  using typename Base::Block, typename Base::Scratch, typename Base::Strip;
  static constexpr int M = 4;               // outputs of a tile along an axis; of backward input, pairs of them
  static constexpr int kLines = 2 * M + 1;  // at most: read forward, and between the transforms
  static constexpr int kMatrices = 6;       // along an axis: the finite points, infinity, the middle tap
  static constexpr int64_t kRows = kLines * kLines, kBlockTiles = 24, kFewTiles = 32;

  static constexpr const auto& weight_matrix() { return phase_weights.matrix; }

  int64_t strip_size(int64_t tiles) const {
    const int64_t read = (2 * tiles * M + 1) * kLines * row_stride_, written = tiles * 2 * M * 2 * M * kPanel<A>;
    return std::max(read, written);
  }

  // ---- rows: of one matrix they follow each other, in the order of the tiles

  // Rows of a tile of m outputs, along an axis.
  static int64_t rows_of(int matrix, int64_t m) { return matrix == 5 ? m : matrix == 4 || matrix < m; }
  // Where the rows of a pair of matrices start; there is room for block_tiles_ full tiles.
  int64_t first_row(int y, int x) const { return block_tiles_ * (y < 5 ? y * kLines + x : 5 * kLines + 4 * x); }
  int64_t tile_outputs(int axis, int64_t tile) const { return std::min<int64_t>(M, outputs_[axis] - tile * M); }

  struct Position {
    int64_t n, y, x;
  };
  Position position(int64_t tile) const {
    return {tile / tiles_[1] / tiles_[0], tile / tiles_[1] % tiles_[0], tile % tiles_[1]};
  }
  // Rows of all tiles before the one at a position.
  int64_t rows_before(int my, int mx, const Position& p) const {
    const int64_t lines = p.n * axis_rows_[0][my] + p.y * rows_of(my, M);
    return lines * axis_rows_[1][mx] + (p.x > 0 ? rows_of(my, tile_outputs(0, p.y)) * p.x * rows_of(mx, M) : 0);
  }

  // A strip: the first row, of each pair of matrices, of its first tile.
  struct Rows {
    int64_t outputs;  // of its tiles, along y
    int64_t first[kMatrices][kMatrices];
  };
  Rows rows_at(Block block, const Strip& strip) const {
    const Position begin = position(block.begin), here = {strip.n, strip.y / tile_size_, strip.x / tile_size_};
    Rows rows;
    rows.outputs = tile_outputs(0, here.y);
    for (int y = 0; y < kMatrices; ++y)
      for (int x = 0; x < kMatrices; ++x)
        rows.first[y][x] = first_row(y, x) + rows_before(y, x, here) - rows_before(y, x, begin);
    return rows;
  }

  // One tile: its outputs along the axes, and the row of each of its points.
  struct Tile {
    int64_t outputs[2];
    int64_t row[kLines][kLines];

    int lines(int axis) const { return 2 * static_cast<int>(outputs[axis]) + 1; }
  };
  Tile tile_at(const Strip& strip, const Rows& rows, int64_t index) const {
    Tile tile;
    tile.outputs[0] = rows.outputs;
    tile.outputs[1] = tile_outputs(1, strip.x / tile_size_ + index);
    const int m[2] = {static_cast<int>(tile.outputs[0]), static_cast<int>(tile.outputs[1])};
    int64_t first[kMatrices][kMatrices];
    for (int y = 0; y < kMatrices; ++y)
      for (int x = 0; x < kMatrices; ++x) first[y][x] = rows.first[y][x] + index * rows_of(y, m[0]) * rows_of(x, M);
    for (int i = 0; i < tile.lines(0); ++i) {
      const int y = i < m[0] ? i : i == m[0] ? 4 : 5;
      const int64_t down = y == 5 ? i - m[0] - 1 : 0;
      for (int j = 0; j < m[1]; ++j) tile.row[i][j] = first[y][j] + down;
      tile.row[i][m[1]] = first[y][4] + down;
      for (int j = 0; j < m[1]; ++j) tile.row[i][m[1] + 1 + j] = first[y][5] + down * m[1] + j;
    }
    return tile;
  }

  // body(integral_constant m): the transforms are compiled for each number of outputs.
  template <class Body>
  static void with_outputs(int64_t m, const Body& body) {
    switch (m) {
      case 1:
        return body(std::integral_constant<int, 1>{});
      case 2:
        return body(std::integral_constant<int, 2>{});
      case 3:
        return body(std::integral_constant<int, 3>{});
      default:
        return body(std::integral_constant<int, 4>{});
    }
  }

  // ---- input

  void transform_input(int64_t group, Block block, const Strip& strip, A* input, const Scratch& s) const {
    const int64_t step = forward_ ? 2 * M : M;  // pixels read from tile to tile
    const int64_t y = strip.y / tile_size_ * step + first_[0], x = strip.x / tile_size_ * step + first_[1];
    const int64_t height = t_.read_size[1], width = t_.read_size[2], channels = t_.read_channels;
    const Rows rows = rows_at(block, strip);
    if (last_) {
      const int64_t stride = channels * t_.geometry.groups;
      const T* image = t_.read + strip.n * height * width * stride + group * channels;
      for (int64_t tile = 0; tile < strip.tiles; ++tile) {
        const int64_t left = x + tile * step;
        transform_tile(tile_at(strip, rows, tile), image + (y * width + left) * stride, width * stride, stride, y,
                       height, left, width, input);
      }
      return;
    }
    const int64_t lines = step + 1, columns = strip.tiles * step + 1;
    const T* image = t_.read + (strip.n * t_.geometry.groups + group) * channels * height * width;
    fill_strip(image, channels, height, width, y, x, lines, columns, row_stride_, s.strip);
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      transform_tile<A>(tile_at(strip, rows, tile), s.strip + tile * step * row_stride_, columns * row_stride_,
                        row_stride_, 0, lines, tile * step, columns, input);
  }

  // One tile for all channels; pixel (i, j) of it is at corner + i*line + j*pixel, and is read if y+i lies in
  // [0, height) and x+j in [0, width).
  template <class U>
  void transform_tile(const Tile& tile, const U* corner, int64_t line, int64_t pixel, int64_t y, int64_t height,
                      int64_t x, int64_t width, A* target) const {
    const int64_t step = forward_ ? 2 : 1, lines = tile.outputs[0] * step + 1, pixels = tile.outputs[1] * step + 1;
    const int64_t begin = std::clamp<int64_t>(-x, 0, pixels), end = std::clamp<int64_t>(width - x, begin, pixels);
    for (int64_t c = 0; c < t_.read_channels; c += lanes<A>) {
      const bool whole = (std::is_same_v<U, A> && !last_) || c + lanes<A> <= t_.read_channels;
      vec<A> half[kLines * kLines];
      with_outputs(tile.outputs[1], [&](auto outputs) {
        constexpr int m = outputs();
        for (int64_t i = 0; i < lines; ++i) {
          vec<A> d[kLines];
          const U* from = corner + i * line + c;
          const bool outside = y + i < 0 || y + i >= height;
          for (int64_t j = 0; j < (outside ? pixels : begin); ++j) d[j] = vec<A>{};
          for (int64_t j = outside ? pixels : begin; j < end; ++j) {
            const U* at = from + j * pixel;
            __builtin_prefetch(at + lanes<A>);  // the next channels: too short a run for the processor to foresee
            d[j] = whole ? load(at) : load_partial(at, t_.read_channels - c);
          }
          for (int64_t j = outside ? pixels : end; j < pixels; ++j) d[j] = vec<A>{};
          vec<A>* to = half + i * kLines;
          points<m>(d, step, to, 1);
          CONVLAB_UNROLL for (int j = 0; j < m; ++j) to[m + 1 + j] = d[step * j + middle_[1]];
        }
      });
      with_outputs(tile.outputs[0], [&](auto outputs) {
        constexpr int m = outputs();
        for (int j = 0; j < tile.lines(1); ++j) {
          vec<A> point[m + 1];
          points<m>(half + j, step * kLines, point, 1);
          CONVLAB_UNROLL for (int i = 0; i <= m; ++i) store(target + tile.row[i][j] * row_stride_ + c, point[i]);
          CONVLAB_UNROLL for (int i = 0; i < m; ++i)
              store(target + tile.row[m + 1 + i][j] * row_stride_ + c, half[(step * i + middle_[0]) * kLines + j]);
        }
      });
    }
  }

  template <int Outputs>
  CONVLAB_INLINE static void points(const vec<A>* from, int64_t step, vec<A>* to, int to_step) {
    vec<A> d[Outputs + 1];
    CONVLAB_UNROLL for (int i = 0; i <= Outputs; ++i) d[i] = from[i * step];
    transform<A>(phase_matrices<Outputs>.input, d, 1, to, to_step);
  }

  // ---- products

  void multiply(int64_t panel, Block block, const A* input, const A* u, int64_t point_stride, int64_t depth,
                bool accumulate, const Scratch& s) const {
    const int vectors = panel_width<A>(t_.written_channels, panel) / lanes<A>;
    const Position begin = position(block.begin), end = position(block.begin + block.tiles);
    for (int y = 0; y < kMatrices; ++y)
      for (int x = 0; x < kMatrices; ++x, u += point_stride) {
        const int64_t count = rows_before(y, x, end) - rows_before(y, x, begin);
        this->multiply_rows(input + first_row(y, x) * row_stride_, u, depth, vectors, count, accumulate,
                            s.product + first_row(y, x) * kPanel<A>, s);
      }
  }

  // ---- output

  void transform_output(int64_t group, int64_t panel, Block block, const Strip& strip, const Scratch& s) const {
    const int64_t height = t_.written_size[1], width = t_.written_size[2];
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t stride = t_.written_channels * t_.geometry.groups;
    const int64_t lines = std::min(tile_size_, height - strip.y);
    const Rows rows = rows_at(block, strip);
    if (last_) {
      T* image = t_.written + strip.n * height * width * stride + group * t_.written_channels + first;
      for (int64_t tile = 0; tile < strip.tiles; ++tile) {
        const int64_t x = strip.x + tile * tile_size_;
        untransform_tile(tile_at(strip, rows, tile), s.product, s.bias, columns, t_.epilogue,
                         image + (strip.y * width + x) * stride, width * stride, stride, lines,
                         std::min(tile_size_, width - x));
      }
      return;
    }
    const int64_t pixels = std::min(strip.tiles * tile_size_, width - strip.x), pitch = strip.tiles * tile_size_;
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      untransform_tile<A>(tile_at(strip, rows, tile), s.product, s.bias, round_up(columns, lanes<A>), Epilogue<A>{},
                          s.strip + tile * tile_size_ * kPanel<A>, pitch * kPanel<A>, kPanel<A>, lines,
                          std::min(tile_size_, pixels - tile * tile_size_));
    T* image = t_.written + (strip.n * stride + group * t_.written_channels + first) * height * width;
    for (int64_t i = 0; i < lines; ++i)
      this->store_lines(s.strip + i * pitch * kPanel<A>, pixels, columns, image + (strip.y + i) * width + strip.x,
                        height * width);
  }

  // The outputs of one tile, plus the bias, through the epilogue; writes `lines` x `pixels` of them.
  template <class U>
  void untransform_tile(const Tile& tile, const A* product, const A* bias, int64_t columns, const Epilogue<U>& epilogue,
                        U* corner, int64_t line, int64_t pixel, int64_t lines, int64_t pixels) const {
    for (int64_t k = 0; k < columns; k += lanes<A>) {
      const bool whole = k + lanes<A> <= columns;
      vec<A> half[2 * M * kLines];
      with_outputs(tile.outputs[0], [&](auto outputs) {
        constexpr int m = outputs();
        for (int j = 0; j < tile.lines(1); ++j) {
          vec<A> row[2 * m + 1];
          CONVLAB_UNROLL for (int i = 0; i <= 2 * m; ++i) row[i] = load(product + tile.row[i][j] * kPanel<A> + k);
          combine<m>(row, outer_pixel_[0], half + j, kLines);
        }
      });
      const vec<A> start = load(bias + k);
      with_outputs(tile.outputs[1], [&](auto outputs) {
        constexpr int m = outputs();
        for (int64_t i = 0; i < lines; ++i) {
          vec<A> y[2 * M];
          combine<m>(half + i * kLines, outer_pixel_[1], y, 1);
          U* target = corner + i * line + k;
          for (int64_t j = 0; j < pixels; ++j, target += pixel)
            if (whole)
              epilogue.store(target, y[j] + start);
            else
              epilogue.store_partial(target, y[j] + start, columns - k);
        }
      });
    }
  }

  // From the points and the rows of the middle tap to outputs: their sum forward, side by side in backward input.
  template <int Outputs>
  CONVLAB_INLINE void combine(const vec<A>* row, int64_t outer_pixel, vec<A>* y, int64_t y_step) const {
    vec<A> outer[Outputs];
    transform<A>(phase_matrices<Outputs>.output, row, 1, outer, 1);
    CONVLAB_UNROLL for (int i = 0; i < Outputs; ++i) {
      const vec<A> middle = row[Outputs + 1 + i];
      if (forward_) {
        y[i * y_step] = outer[i] + middle;
      } else {
        y[(2 * i + outer_pixel) * y_step] = outer[i];
        y[(2 * i + 1 - outer_pixel) * y_step] = middle;
      }
    }
  }

  bool forward_;
  // Along each axis: the first pixel read by tile 0; the middle tap's first pixel, in a tile; which pixel of a pair the
  // outer taps write (backward input); all outputs or pairs; an image's rows per matrix.
  int64_t first_[2], middle_[2], outer_pixel_[2], outputs_[2], axis_rows_[2][kMatrices];
};

}  // namespace convlab::cpu::CONVLAB_ISA
