// Winograd, forward and backward input: how tiles are transformed (conv_winograd_rows.h has the idea,
// conv_winograd_blocks.h the rest).
//
// F(m x m, R x R) with m + R = 7: a tile of m x m outputs reads 6x6 inputs and becomes 36 rows, one for each pair of
// matrices. Per channel pair that is 36 multiplications instead of 144 for 3x3 kernels (m = 4), 100 for 5x5 (m = 2).
// Kernels of one line of taps, 1x3 or 3x1, have tiles of 4 outputs and 6 rows: 6 multiplications instead of 12.
// Strided kernels see parts of the image, long ones segments of R taps (../winograd_cut.h): per channel, 7x7 with
// stride 2 takes 4 x 36 multiplications for 3x3 outputs instead of 441, and so it does with stride 1. Backward input
// computes the parts of what it writes from one and the same tile of grad_output, each with a panel of weights of its
// own.
// 3x3 with stride 2, F(4x4, 2x2) by halves: a tile of 4x4 outputs reads 9x9 inputs and becomes 9x9 rows, 81
// multiplications instead of 144; 25 pairs of matrices have one row per tile, 10 have 4 and one has 16. Backward input
// reads 5x5 and writes 8x8.
//
// Cost: so many multiplications (with 3x3 kernels, less at borders than whole tiles would take) plus the transforms;
// worth it from about 16 channels with stride 1, 32 with stride 2, 100 with one line of taps; parts and segments count
// as channels.
//
// Limits: error of max|reference| in float32: 1.2e-6 to 4e-6, by halves 0.3e-6 to 0.9e-6. NaN and Inf spread over their
// tile.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T, class Cut>
class WinogradTiles : public WinogradBlocks<T, Cut, WinogradTiles<T, Cut>> {
  using Base = WinogradBlocks<T, Cut, WinogradTiles<T, Cut>>;
  friend Base;

 public:
  using typename Base::A;

  explicit WinogradTiles(const ConvArguments<T>& arguments) : Base(arguments) {
    writes_pairs_ = Cut::kHalves && !forward_;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t padding = t_.geometry.padding[axis + 1];
      first_[axis] = forward_       ? -padding
                     : Cut::kHalves ? (padding + 1) / 2 - 1
                                    : padding / cut_.axis[axis].parts - cut_.axis[axis].spread * reads(axis, 0);
      middle_[axis] = forward_ || padding % 2 == 0 ? 1 : 0;
      outer_pixel_[axis] = padding % 2;
    }
    tile_rows_ = Rows(outputs_[0], outputs_[1]);
    // Vectors that fill a cache line, or its parts would wait for each other.
    past_caches_ = CONVLAB_VECTOR_BYTES == 64 && last_ && t_.past_caches();
  }

 private:
  using Base::block_tiles_, Base::cut_, Base::forward_, Base::last_, Base::outputs_, Base::row_stride_, Base::runs_,
      Base::shallow_, Base::t_;
  using typename Base::Block, typename Base::Scratch, typename Base::Strip;
  using Rows = TileRows<Cut>;
  using Tile = typename Rows::Tile;
  static constexpr int My = Cut::M[0], Mx = Cut::M[1], kLines = Cut::kLines[1];
  static constexpr int kPairs = Cut::kHalves ? 2 : 1;  // pixels that an output may be, along an axis
  static constexpr int64_t kBlockTiles = Cut::kHalves ? 24 : 48, kFewTiles = Cut::kHalves ? 64 : 128;

  // Positions along an axis that `tiles` tiles read; those of none are the taps but one.
  int64_t reads(int axis, int64_t tiles) const {
    return runs_.axis[axis].positions((Cut::kHalves && forward_ ? 2 : 1) * Cut::M[axis] * tiles);
  }
  int64_t strip_size(int64_t tiles) const {
    return std::max(runs_.strip_size(reads(0, 1), reads(1, tiles)),
                    last_ ? 0 : tiles * kPairs * My * kPairs * Mx * kPanel<A>);
  }
  typename Rows::Strip rows_at(Block block, const Strip& strip) const {
    return tile_rows_.strip_at(block.begin, block.begin + strip.tile, block_tiles_);
  }

  // ---- input

  void transform_input(int64_t group, Block block, const Strip& strip, A* input, const Scratch& s) const {
    if constexpr (Cut::kHalves)
      if (forward_) return transform_strip<2>(group, block, strip, input, s);
    transform_strip<1>(group, block, strip, input, s);
  }

  template <int Step>
  void transform_strip(int64_t group, Block block, const Strip& strip, A* input, const Scratch& s) const {
    const auto &along_y = runs_.axis[0], &along_x = runs_.axis[1];
    const int64_t first_y = strip.y * Step * along_y.parts * along_y.spread + first_[0];
    const int64_t first_x = strip.x * Step * along_x.parts * along_x.spread + first_[1];
    const auto rows = rows_at(block, strip);
    // The taps along z in their order: whole vectors are written, so the last of one may reach into the next.
    for (int64_t tap = 0; tap < t_.geometry.kernel[0]; ++tap) {
      const int64_t slice = read_slice(t_.geometry, t_.pass, strip.image.slice, tap);
      if (slice < 0) {
        tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t) { clear_rows(tile, input); });
        input += runs_.count() * runs_.size();
        continue;
      }
      const auto row = tile_row(t_.read, runs_, t_.geometry.groups, group, t_.read_size, strip.image, slice, first_y,
                                first_x, reads(0, 1), reads(1, strip.tiles));
      for_each_run(row, runs_, s.strip, [&](int64_t, auto source) {
        const RowBlocks<A> place{input, row_stride_, 0, row_stride_, row_stride_, 0};
        tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t) {
          transform_input_tile<A, Cut, Step>(tile, source, middle_, place);
          source.advance(Step * Mx);
        });
        input += runs_.size();
      });
    }
  }

  void clear_rows(const Tile& tile, A* input) const {
    for (int i = 0; i < tile.lines(0); ++i)
      for (int j = 0; j < tile.lines(1); ++j)
        std::fill_n(input + tile.row[i][j] * row_stride_, runs_.count() * runs_.size(), A(0));
  }

  // ---- products

  // For `depth` channels of one panel: of each pair of matrices, rows of V times its weights are (or are added to) rows
  // of M.
  void multiply(int64_t panel, Block block, const A* input, const A* u, int64_t point_stride, int64_t depth,
                bool accumulate, const Scratch& s) const {
    const int vectors = this->width_of(panel) / lanes<A>;
    const auto begin = tile_rows_.position(block.begin), end = tile_rows_.position(block.begin + block.tiles);
    for (int y = 0; y < Cut::kMatrices[0]; ++y)
      for (int x = 0; x < Cut::kMatrices[1]; ++x, u += point_stride) {
        const int64_t first = Rows::first_row(y, x, block_tiles_);
        const int64_t count = tile_rows_.rows_before(y, x, end) - tile_rows_.rows_before(y, x, begin);
        this->multiply_rows(input + first * row_stride_, u, depth, vectors, count, accumulate,
                            s.product + first * kPanel<A>, s);
      }
  }

  // ---- output

  // Along an axis, `count` written pixels: first, first + step, ..; those in [begin, end) lie in the tensor.
  struct Pixels {
    int64_t first, step, begin, end;
  };
  Pixels pixels_of(int axis, int64_t panel, const Strip& strip, int64_t output, int64_t outputs) const {
    const int64_t size = t_.written_size[axis + 1];
    if (writes_pairs_) return {2 * output, 1, 0, std::min(2 * outputs, size - 2 * output)};
    const int64_t parts = forward_ ? 1 : cut_.axis[axis].parts, step = cut_.axis[axis].spread * parts;
    int64_t first = step * output + strip.image.residue[axis];
    if (!forward_) first += this->part_of(panel, axis) - t_.geometry.padding[axis + 1] % parts;
    return {first, step, first < 0, std::min(outputs, divide_up(size - first, step))};
  }

  void transform_output(int64_t group, int64_t panel, Block block, const Strip& strip, const Scratch& s) const {
    const int64_t height = t_.written_size[1], width = t_.written_size[2];
    const int64_t first = this->first_column(panel);
    const int64_t columns = std::min(this->panel_columns_, t_.written_channels - first);
    const int64_t stride = t_.written_channels * t_.geometry.groups;
    const Pixels y = pixels_of(0, panel, strip, strip.y, My);
    const auto rows = rows_at(block, strip);
    // Products of few channels are computed here, for some tiles and filters at a time.
    const int64_t together = shallow_ ? Shallow<A>::kVectors * lanes<A> : kPanel<A>;
    const int64_t size = writes_pairs_ ? 2 * Mx : Mx, pitch = strip.tiles * size;
    vec<A> half[Base::kMayBeShallow ? Shallow<A>::kTiles * Shallow<A>::kVectors * kHalf : 1];
    T* image = t_.written + (strip.image.n * t_.written_size[0] + strip.image.slice) * height * width * stride +
               group * t_.written_channels + first;
    const Planes planes{
        t_.written +
            ((strip.image.n * stride + group * t_.written_channels + first) * t_.written_size[0] + strip.image.slice) *
                height * width,
        t_.written_pixels(), width, y, pixels_of(1, panel, strip, strip.x, strip.tiles * Mx)};
    for (int64_t k = 0; k < columns; k += together) {
      const Columns some{k, std::min(columns, k + together), columns};
      tile_rows_.for_each_tile(rows, strip.tiles, [&](const Tile& tile, int64_t index) {
        const vec<A>* sums = shallow_ ? multiply_columns(tile, index, group, panel, some, s, half) : nullptr;
        if (last_) {
          const Pixels x = pixels_of(1, panel, strip, strip.x + index * Mx, Mx);
          untransform_tile(tile, sums, some, t_.epilogue, image + (y.first * width + x.first) * stride,
                           y.step * width * stride, x.step * stride, y, x, s);
        } else {
          if (k == 0) planes.expect(columns * index / strip.tiles, columns * (index + 1) / strip.tiles);
          const Columns whole{some.begin, some.end, round_up(columns, lanes<A>)};
          untransform_tile(tile, sums, whole, Epilogue<A>{}, s.strip + index * size * kPanel<A>, pitch * kPanel<A>,
                           int64_t{kPanel<A>}, y, Pixels{0, 1, 0, size}, s);
        }
      });
    }
    if (last_) return;
    const int64_t pixels = planes.x.end - planes.x.begin;
    for (int64_t i = y.begin; i < y.end; ++i)
      store_lines(t_.epilogue, s.strip + (i * pitch + planes.x.begin) * kPanel<A>, pixels, columns, planes.line(0, i),
                  planes.plane, planes.x.step);
  }

  // Where a strip's outputs lie in an NCHW tensor.
  struct Planes {
    T* first;  // of the slice
    int64_t plane, width;
    Pixels y, x;

    T* line(int64_t column, int64_t i) const {
      return first + column * plane + (y.first + i * y.step) * width + x.first + x.begin * x.step;
    }
    // Asks for what some columns will write: lines are too short for the processor to foresee it.
    void expect(int64_t begin, int64_t end) const {
      for (int64_t column = begin; column < end; ++column)
        for (int64_t i = y.begin; i < y.end; ++i) {
          const T* from = line(column, i);
          for (int64_t j = 0; j < (x.end - x.begin) * x.step; j += 64 / sizeof(T)) __builtin_prefetch(from + j, 1);
        }
    }
  };

  // Columns of a panel, of which `all` are written.
  struct Columns {
    int64_t begin, end, all;
  };

  // Tile `index` of a strip, transformed along y. Computed for several tiles at the first of them.
  const vec<A>* multiply_columns(const Tile& tile, int64_t index, int64_t group, int64_t panel, const Columns& columns,
                                 const Scratch& s, vec<A>* half) const {
    if constexpr (Base::kMayBeShallow) {
      const Shallow<A> product{s.input,
                               row_stride_,
                               this->packed(group, panel) + columns.begin,
                               this->point_stride(this->depth_),
                               this->width_of(panel),
                               this->depth_};
      if (index % product.kTiles == 0) {
        if (columns.end - columns.begin > lanes<A>)
          product.template multiply_columns<Cut, 2>(tile, half);
        else
          product.template multiply_columns<Cut, 1>(tile, half);
      }
      return half + index % product.kTiles * product.kVectors * kHalf;
    }
    return nullptr;
  }

  static constexpr int kHalf = kPairs * My * kLines;

  // The outputs of one tile, plus the bias, through the epilogue, `line` and `pixel` elements apart; from sums
  // transformed along y, or null: from the products.
  template <class U>
  void untransform_tile(const Tile& tile, const vec<A>* sums, const Columns& columns, const Epilogue<U>& epilogue,
                        U* corner, int64_t line, int64_t pixel, const Pixels& y, const Pixels& x,
                        const Scratch& s) const {
    vec<A> buffer[kHalf];
    for (int64_t k = columns.begin; k < columns.end; k += lanes<A>) {
      const vec<A>* half = buffer;
      if (sums)
        half = sums + (k - columns.begin) / lanes<A> * kHalf;
      else
        untransform_columns(tile, s.product + k, buffer);
      const vec<A> start = load(s.bias + k);
      with_outputs<Cut, 1>(tile.outputs[1], [&](auto outputs) {
        constexpr int m = outputs();
        for (int64_t i = y.begin; i < y.end; ++i) {
          vec<A> output[kPairs * m];
          combine<1, m>(half + i * kLines, outer_pixel_[1], output, 1);
          U* target = corner + i * line + k;
          CONVLAB_UNROLL for (int j = 0; j < kPairs * m; ++j, target += pixel) {
            if (j < x.begin || j >= x.end) continue;
            if (past_caches_) {
              epilogue.template store<true>(target, output[j] + start);
              continue;
            }
            __builtin_prefetch(target + kPairs * m * pixel);  // the next tile's
            if (k + lanes<A> <= columns.all)
              epilogue.store(target, output[j] + start);
            else
              epilogue.store_partial(target, output[j] + start, columns.all - k);
          }
          if (!epilogue.gated()) continue;
          target = corner + i * line + k;
          for (int64_t j = x.begin; j < std::min<int64_t>(x.end, kPairs * m); ++j)
            epilogue.open_gate(target + j * pixel, std::min<int64_t>(lanes<A>, columns.all - k));
        }
      });
    }
  }

  void untransform_columns(const Tile& tile, const A* product, vec<A>* half) const {
    with_outputs<Cut, 0>(tile.outputs[0], [&](auto outputs) {
      constexpr int m = outputs(), count = Cut::kHalves ? 2 * m + 1 : m + Cut::R[0] - 1;
      for (int j = 0; j < tile.lines(1); ++j) {
        vec<A> row[count];
        CONVLAB_UNROLL for (int i = 0; i < count; ++i) row[i] = load(product + tile.row[i][j] * kPanel<A>);
        combine<0, m>(row, outer_pixel_[0], half + j, kLines);
      }
    });
  }

  // From the points, and the rows of the middle tap, to outputs: their sum forward, side by side in backward input.
  template <int Axis, int Outputs>
  CONVLAB_INLINE void combine(const vec<A>* row, int64_t outer_pixel, vec<A>* y, int y_step) const {
    constexpr int R = Cut::R[Axis];
    if constexpr (!Cut::kHalves) {
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
  bool writes_pairs_, past_caches_;
  // Along each axis: the first pixel read by tile 0; the middle tap's first pixel, in a tile; which pixel of a pair the
  // outer taps write (backward input).
  int64_t first_[2], middle_[2], outer_pixel_[2];
};

}  // namespace convlab::cpu::CONVLAB_ISA
