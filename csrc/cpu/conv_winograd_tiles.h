// Winograd F(4x4, 3x3), stride 1, forward and backward input: how a tile is transformed (conv_winograd_blocks.h has the
// rest).
//
// Idea: a tile of 4x4 outputs reads 6x6 inputs, which are transformed to 36 points: 36 multiplications per channel pair
// instead of 144. V[point][tile][channel] times U[point] is M[point][tile][column].
// Cost: multiply_adds()/4 (more where 4 does not divide the output) plus the transforms, worth it from about 16
// channels.
// Limits: error 1.2e-6 to 4e-6 of max|reference| in float32 (../winograd_matrices.h). NaN and Inf spread over their
// tile.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class WinogradTiles : public WinogradBlocks<T, WinogradTiles<T>> {
  using Base = WinogradBlocks<T, WinogradTiles<T>>;
  friend Base;

 public:
  using typename Base::A;
  static constexpr int M = 4, R = 3, N = M + R - 1, kPoints = N * N;

  explicit WinogradTiles(const ConvArguments<T>& arguments) : Base(arguments, M) {
    const ConvGeometry& g = t_.geometry;
    for (int axis = 0; axis < 2; ++axis)
      first_[axis] = t_.pass == Pass::forward ? -g.padding[axis + 1] : g.padding[axis + 1] - (R - 1);
  }

 private:
  using Base::block_tiles_, Base::last_, Base::row_stride_, Base::t_;
  using typename Base::Block, typename Base::Scratch, typename Base::Strip;
  static constexpr int64_t kRows = kPoints, kBlockTiles = 48, kFewTiles = 64;

  static constexpr const auto& weight_matrix() { return winograd<M, R>.weight; }

  int64_t strip_size(int64_t tiles) const {
    return (tiles * M + R - 1) * N * std::max<int64_t>(row_stride_, kPanel<A>);
  }

  // ---- input

  void transform_input(int64_t group, Block, const Strip& strip, A* input, const Scratch& s) const {
    const int64_t y = strip.y + first_[0], x = strip.x + first_[1];
    const int64_t height = t_.read_size[1], width = t_.read_size[2];
    if (last_) {
      const int64_t stride = t_.read_channels * t_.geometry.groups;
      const T* image = t_.read + strip.n * height * width * stride + group * t_.read_channels;
      for (int64_t tile = 0; tile < strip.tiles; ++tile)
        transform_tile(image + (y * width + x + tile * M) * stride, width * stride, stride, y, height, x + tile * M,
                       width, input + (strip.tile + tile) * row_stride_);
      return;
    }
    const int64_t columns = strip.tiles * M + R - 1;
    const T* image = t_.read + (strip.n * t_.geometry.groups + group) * t_.read_channels * height * width;
    fill_strip(image, t_.read_channels, height, width, y, x, N, columns, row_stride_, s.strip);
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      transform_tile<A>(s.strip + tile * M * row_stride_, columns * row_stride_, row_stride_, 0, N, tile * M, columns,
                        input + (strip.tile + tile) * row_stride_);
  }

  // B^T d B of one tile for all channels; pixel (i, j) of it is at corner + i*line + j*pixel, and is read if y+i lies
  // in [0, height) and x+j in [0, width).
  template <class U>
  void transform_tile(const U* corner, int64_t line, int64_t pixel, int64_t y, int64_t height, int64_t x, int64_t width,
                      A* target) const {
    constexpr const auto& matrices = winograd<M, R>;
    const bool inside = y >= 0 && y + N <= height && x >= 0 && x + N <= width;
    const int64_t point_stride = block_tiles_ * row_stride_;
    for (int64_t c = 0; c < t_.read_channels; c += lanes<A>) {
      const bool whole = std::is_same_v<U, A> && !last_ ? true : c + lanes<A> <= t_.read_channels;
      vec<A> half[N * N];
      for (int i = 0; i < N; ++i) {
        vec<A> d[N];
        const U* from = corner + i * line + c;
        if (inside && whole) {
          CONVLAB_UNROLL for (int j = 0; j < N; ++j) d[j] = load(from + j * pixel);
        } else {
          for (int j = 0; j < N; ++j) {
            const bool present = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width;
            d[j] = !present ? vec<A>{}
                   : whole  ? load(from + j * pixel)
                            : load_partial(from + j * pixel, t_.read_channels - c);
          }
        }
        transform<A>(matrices.input, d, 1, half + i * N, 1);
      }
      for (int j = 0; j < N; ++j) {
        vec<A> point[N];
        transform<A>(matrices.input, half + j, N, point, 1);
        CONVLAB_UNROLL for (int i = 0; i < N; ++i) store(target + (i * N + j) * point_stride + c, point[i]);
      }
    }
  }

  // ---- products

  // M[point][tile] (+)= V[point][tile][channels] U[point][channels] for `depth` channels of one panel.
  void multiply(int64_t panel, Block block, const A* input, const A* u, int64_t point_stride, int64_t depth,
                bool accumulate, const Scratch& s) const {
    const int vectors = panel_width<A>(t_.written_channels, panel) / lanes<A>;
    for (int p = 0; p < kPoints; ++p)
      this->multiply_rows(input + p * block_tiles_ * row_stride_, u + p * point_stride, depth, vectors, block.tiles,
                          accumulate, s.product + p * block_tiles_ * kPanel<A>, s);
  }

  // ---- output

  void transform_output(int64_t group, int64_t panel, Block, const Strip& strip, const Scratch& s) const {
    const int64_t height = t_.written_size[1], width = t_.written_size[2];
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t lines = std::min<int64_t>(M, height - strip.y);
    const int64_t stride = t_.written_channels * t_.geometry.groups;
    if (last_) {
      T* image = t_.written + strip.n * height * width * stride + group * t_.written_channels + first;
      for (int64_t tile = 0; tile < strip.tiles; ++tile) {
        const int64_t x = strip.x + tile * M;
        untransform_tile(s.product + (strip.tile + tile) * kPanel<A>, s.bias, columns, t_.epilogue,
                         image + (strip.y * width + x) * stride, width * stride, stride, lines,
                         std::min<int64_t>(M, width - x));
      }
      return;
    }
    const int64_t pixels = std::min(strip.tiles * M, width - strip.x), pitch = strip.tiles * M;
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      untransform_tile<A>(s.product + (strip.tile + tile) * kPanel<A>, s.bias, round_up(columns, lanes<A>),
                          Epilogue<A>{}, s.strip + tile * M * kPanel<A>, pitch * kPanel<A>, kPanel<A>, M, M);
    T* image = t_.written + (strip.n * stride + group * t_.written_channels + first) * height * width;
    for (int64_t i = 0; i < lines; ++i)
      this->store_lines(s.strip + i * pitch * kPanel<A>, pixels, columns, image + (strip.y + i) * width + strip.x,
                        height * width);
  }

  // A^T m A of one tile, plus the bias, through the epilogue; writes `lines` x `pixels` of the M x M outputs.
  template <class U>
  void untransform_tile(const A* product, const A* bias, int64_t columns, const Epilogue<U>& epilogue, U* corner,
                        int64_t line, int64_t pixel, int64_t lines, int64_t pixels) const {
    constexpr const auto& matrices = winograd<M, R>;
    const int64_t point_stride = block_tiles_ * kPanel<A>;
    for (int64_t k = 0; k < columns; k += lanes<A>) {
      const bool whole = k + lanes<A> <= columns;
      vec<A> half[M * N];
      for (int j = 0; j < N; ++j) {
        vec<A> m[N];
        CONVLAB_UNROLL for (int i = 0; i < N; ++i) m[i] = load(product + (i * N + j) * point_stride + k);
        transform<A>(matrices.output, m, 1, half + j, N);
      }
      const vec<A> start = load(bias + k);
      for (int64_t i = 0; i < lines; ++i) {
        vec<A> y[M];
        transform<A>(matrices.output, half + i * N, 1, y, 1);
        CONVLAB_UNROLL for (int j = 0; j < M; ++j) {
          if (j >= pixels) break;
          U* target = corner + i * line + j * pixel + k;
          if (whole)
            epilogue.store(target, y[j] + start);
          else
            epilogue.store_partial(target, y[j] + start, columns - k);
        }
      }
    }
  }

  int64_t first_[2];
};

}  // namespace convlab::cpu::CONVLAB_ISA
