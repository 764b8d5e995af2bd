// Winograd, forward and backward input: how tiles are transformed (conv_winograd_rows.h has the idea,
// conv_winograd_blocks.h the rest).
//
// Stride 1, F(4x4, 3x3): a tile of 4x4 outputs reads 6x6 inputs and becomes 36 rows, one for each pair of matrices: 36
// multiplications per channel pair instead of 144.
// Stride 2, F(4x4, 2x2) by phases: a tile of 4x4 outputs reads 9x9 inputs and becomes 9x9 rows, 81 multiplications
// instead of 144; 25 pairs of matrices have one row per tile, 10 have 4 and one has 16. Backward input reads 5x5 and
// writes 8x8.
//
// Cost: so many multiplications (less at borders than whole tiles would take) plus the transforms; worth it from about
// 16 channels with stride 1, 32 with stride 2.
//
// Limits: error of max|reference| in float32: 1.2e-6 to 4e-6 with stride 1, 0.3e-6 to 0.9e-6 with stride 2. NaN and
// Inf spread over their tile.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T, int R>
class WinogradTiles : public WinogradBlocks<T, WinogradTiles<T, R>> {
  using Base = WinogradBlocks<T, WinogradTiles<T, R>>;
  friend Base;

 public:
  using typename Base::A;

  explicit WinogradTiles(const ConvArguments<T>& arguments) : Base(arguments, M * pixels_of_output(arguments)) {
    const bool forward = t_.pass == Pass::forward;
    writes_pairs_ = R == 2 && !forward;
    read_step_ = R == 2 && forward ? 2 : 1;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t padding = t_.geometry.padding[axis + 1];
      first_[axis] = forward ? -padding : R == 3 ? padding - 2 : (padding + 1) / 2 - 1;
      middle_[axis] = forward || padding % 2 == 0 ? 1 : 0;
      outer_pixel_[axis] = padding % 2;
    }
    const int64_t pixels = pixels_of_output(arguments);
    tile_rows_ = Rows(divide_up(t_.written_size[1], pixels), divide_up(t_.written_size[2], pixels));
  }

 private:
  using Base::block_tiles_, Base::last_, Base::row_stride_, Base::strip_stride_, Base::t_, Base::tile_size_;
  using typename Base::Block, typename Base::Scratch, typename Base::Strip;
  using Rows = TileRows<R>;
  using Tile = typename Rows::Tile;
  static constexpr int M = Rows::M, kLines = Rows::kLines, kMatrices = Rows::kMatrices;
  static constexpr int kPairs = R == 2 ? 2 : 1;  // pixels that an output may be, along an axis
  static constexpr int64_t kRows = Rows::kRows, kBlockTiles = R == 3 ? 48 : 24, kFewTiles = R == 3 ? 128 : 64;

  using WeightTransform = CONVLAB_ISA::WeightTransform<R>;

  // Pixels of an output of a tile, along an axis: with stride 2, backward input writes pairs.
  static int64_t pixels_of_output(const ConvArguments<T>& arguments) {
    return R == 2 && arguments.pass == Pass::backward_input ? 2 : 1;
  }
  int64_t strip_size(int64_t tiles) const {
    constexpr int64_t read = (R == 3 ? 1 : 2) * M;  // pixels from tile to tile, at most
    return std::max((read * tiles + R - 1) * (read + R - 1) * strip_stride_,
                    tiles * kPairs * M * kPairs * M * kPanel<A>);
  }
  typename Rows::Strip rows_at(Block block, const Strip& strip) const {
    return tile_rows_.strip_at(block.begin, block.begin + strip.tile, block_tiles_);
  }

  // ---- input

  void transform_input(int64_t group, Block block, const Strip& strip, A* input, const Scratch& s) const {
    if constexpr (R == 2)
      if (read_step_ == 2) return transform_strip<2>(group, block, strip, input, s);
    transform_strip<1>(group, block, strip, input, s);
  }

  template <int Step>
  void transform_strip(int64_t group, Block block, const Strip& strip, A* input, const Scratch& s) const {
    constexpr int64_t step = Step * M;  // pixels from tile to tile
    const int64_t y = strip.y / tile_size_ * step + first_[0], x = strip.x / tile_size_ * step + first_[1];
    const int64_t height = t_.read_size[1], width = t_.read_size[2], channels = t_.read_channels;
    const auto rows = rows_at(block, strip);
    // The taps along z in their order: whole vectors are written, so the last of one may reach into the next.
    for (int64_t tap = 0; tap < t_.geometry.kernel[0]; ++tap, input += channels) {
      const int64_t n = strip.image / t_.written_size[0], z = strip.image % t_.written_size[0];
      const int64_t slice = read_slice(t_.geometry, t_.pass, z, tap);
      const auto transform_tiles = [&](auto source) {
        tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t) {
          transform_input_tile<A, R, Step>(tile, source, middle_, [&](int64_t channel) {
            return [to = input + channel, stride = row_stride_](int64_t row) { return to + row * stride; };
          });
          source.advance(step);
        });
      };
      if (slice < 0) {
        tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t) { clear_rows(tile, input); });
      } else if (last_) {
        const int64_t stride = channels * t_.geometry.groups;
        const T* image = t_.read + (n * t_.read_size[0] + slice) * height * width * stride + group * channels;
        transform_tiles(
            TileSource<T>{image + (y * width + x) * stride, width * stride, stride, y, height, x, width, channels});
      } else {
        const int64_t lines = step + R - 1, columns = strip.tiles * step + R - 1, stride = strip_stride_;
        const int64_t plane = t_.read_pixels();
        const T* image = t_.read + (n * t_.geometry.groups + group) * channels * plane + slice * height * width;
        fill_strip(image, channels, plane, height, width, y, x, lines, columns, stride, s.strip);
        transform_tiles(
            TileSource<A>{s.strip, columns * stride, stride, 0, lines, 0, columns, round_up(channels, lanes<A>)});
      }
    }
  }

  void clear_rows(const Tile& tile, A* input) const {
    for (int i = 0; i < tile.lines(0); ++i)
      for (int j = 0; j < tile.lines(1); ++j) std::fill_n(input + tile.row[i][j] * row_stride_, t_.read_channels, A(0));
  }

  // ---- products

  // For `depth` channels of one panel: of each pair of matrices, rows of V times its weights are (or are added to) rows
  // of M.
  void multiply(int64_t panel, Block block, const A* input, const A* u, int64_t point_stride, int64_t depth,
                bool accumulate, const Scratch& s) const {
    const int vectors = panel_width<A>(t_.written_channels, panel) / lanes<A>;
    const auto begin = tile_rows_.position(block.begin), end = tile_rows_.position(block.begin + block.tiles);
    for (int y = 0; y < kMatrices; ++y)
      for (int x = 0; x < kMatrices; ++x, u += point_stride) {
        const int64_t first = Rows::first_row(y, x, block_tiles_);
        const int64_t count = tile_rows_.rows_before(y, x, end) - tile_rows_.rows_before(y, x, begin);
        this->multiply_rows(input + first * row_stride_, u, depth, vectors, count, accumulate,
                            s.product + first * kPanel<A>, s);
      }
  }

  // ---- output

  void transform_output(int64_t group, int64_t panel, Block block, const Strip& strip, const Scratch& s) const {
    const int64_t height = t_.written_size[1], width = t_.written_size[2];
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t stride = t_.written_channels * t_.geometry.groups;
    const int64_t lines = std::min(tile_size_, height - strip.y);
    const auto rows = rows_at(block, strip);
    if (last_) {
      T* image = t_.written + strip.image * height * width * stride + group * t_.written_channels + first;
      tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t index) {
        const int64_t x = strip.x + index * tile_size_;
        untransform_tile(tile, s.product, s.bias, columns, t_.epilogue, image + (strip.y * width + x) * stride,
                         width * stride, stride, lines, std::min(tile_size_, width - x));
      });
      return;
    }
    const int64_t pixels = std::min(strip.tiles * tile_size_, width - strip.x), pitch = strip.tiles * tile_size_;
    tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t index) {
      untransform_tile(tile, s.product, s.bias, round_up(columns, lanes<A>), Epilogue<A>{},
                       s.strip + index * tile_size_ * kPanel<A>, pitch * kPanel<A>, int64_t{kPanel<A>}, lines,
                       std::min(tile_size_, pixels - index * tile_size_));
    });
    const int64_t n = strip.image / t_.written_size[0], z = strip.image % t_.written_size[0];
    const int64_t plane = t_.written_pixels();
    T* image = t_.written + (n * stride + group * t_.written_channels + first) * plane + z * height * width;
    for (int64_t i = 0; i < lines; ++i)
      store_lines(t_.epilogue, s.strip + i * pitch * kPanel<A>, pixels, columns,
                  image + (strip.y + i) * width + strip.x, plane);
  }

  // The outputs of one tile, plus the bias, through the epilogue; writes `lines` x `pixels` of them.
  template <class U>
  void untransform_tile(const Tile& tile, const A* product, const A* bias, int64_t columns, const Epilogue<U>& epilogue,
                        U* corner, int64_t line, int64_t pixel, int64_t lines, int64_t pixels) const {
    for (int64_t k = 0; k < columns; k += lanes<A>) {
      const bool whole = k + lanes<A> <= columns;
      vec<A> half[kPairs * M * kLines];
      with_outputs(tile.outputs[0], [&](auto outputs) {
        constexpr int m = outputs(), count = R == 2 ? 2 * m + 1 : m + 2;
        for (int j = 0; j < tile.lines(1); ++j) {
          vec<A> row[count];
          CONVLAB_UNROLL for (int i = 0; i < count; ++i) row[i] = load(product + tile.row[i][j] * kPanel<A> + k);
          combine<m>(row, outer_pixel_[0], half + j, kLines);
        }
      });
      const vec<A> start = load(bias + k);
      with_outputs(tile.outputs[1], [&](auto outputs) {
        constexpr int m = outputs();
        for (int64_t i = 0; i < lines; ++i) {
          vec<A> y[kPairs * m];
          combine<m>(half + i * kLines, outer_pixel_[1], y, 1);
          U* target = corner + i * line + k;
          CONVLAB_UNROLL for (int j = 0; j < kPairs * m; ++j, target += pixel) {
            if (R == 2 && j >= pixels) break;
            __builtin_prefetch(target + kPairs * m * pixel);  // the next tile's
            if (whole)
              epilogue.store(target, y[j] + start);
            else
              epilogue.store_partial(target, y[j] + start, columns - k);
          }
        }
      });
    }
  }

  // From the points, and the rows of the middle tap, to outputs: their sum forward, side by side in backward input.
  template <int Outputs>
  CONVLAB_INLINE void combine(const vec<A>* row, int64_t outer_pixel, vec<A>* y, int y_step) const {
    if constexpr (R == 3) {
      transform<OutputTransform<Outputs, R>, A>(row, 1, y, y_step);
    } else {
      vec<A> outer[Outputs];
      transform<OutputTransform<Outputs, R>, A>(row, 1, outer, 1);
      CONVLAB_UNROLL for (int i = 0; i < Outputs; ++i) {
        const vec<A> middle = row[Outputs + 1 + i];
        if (writes_pairs_) {
          y[(2 * i + outer_pixel) * y_step] = outer[i];
          y[(2 * i + 1 - outer_pixel) * y_step] = middle;
        } else {
          y[i * y_step] = outer[i] + middle;
        }
      }
    }
  }

  Rows tile_rows_;
  bool writes_pairs_;
  int64_t read_step_;
  // Along each axis: the first pixel read by tile 0; the middle tap's first pixel, in a tile; which pixel of a pair the
  // outer taps write (backward input).
  int64_t first_[2], middle_[2], outer_pixel_[2];
};

}  // namespace convlab::cpu::CONVLAB_ISA
