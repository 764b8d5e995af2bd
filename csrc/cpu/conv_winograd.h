// Winograd convolution F(4x4, 3x3): forward and backward input of 3x3 layers with stride 1.
//
// Idea: each tile of 4x4 outputs is transformed to 36 points, where convolution is a product over channels alone: 36
// multiplications per channel pair instead of 144. The three steps are fused over blocks of tiles, so that neither
// the transformed input nor the products leave the cache: transform a block's tiles for all channels,
// V[point][tile][channel]; per panel of written channels 36 matrix products M[point][tile][column]; transform back.
// Weights are transformed once per call, U[panel][point][channel][column]. NCHW tensors go through a strip buffer in
// NHWC order per row of tiles. Backward input is the same with rotated weights, the roles of the channels exchanged.
// Cost: multiply_adds()/4 (more where 4 does not divide the output) plus the transforms, worth it from about 32 channels
// and where tiles outweigh the 4 times larger weights. Memory: 36/9 of the weights; per thread 36 x tiles x (channels
// + panel), bounded by the block, never by the batch.
// Limits: error 1.2e-6 to 4e-6 of max|reference| in float32 (winograd_transform.h). NaN and Inf spread over their tile.
#pragma once
#include "conv_gather.h"
#include "conv_gemm_channels_last.h"
#include "winograd_transform.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class Winograd {
 public:
  using A = accumulate_t<T>;
  static constexpr int M = 4, R = 3, N = M + R - 1, kPoints = N * N;

  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    return body(Winograd(arguments));
  }

  explicit Winograd(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    last_ = arguments.layout == Layout::channels_last;
    for (int axis = 0; axis < 2; ++axis) {
      first_[axis] = t_.pass == Pass::forward ? -g.padding[axis + 1] : g.padding[axis + 1] - (R - 1);
      tiles_[axis] = divide_up(t_.written_size[axis + 1], M);
    }
    panels_ = divide_up(t_.written_channels, kPanel<A>);
    padded_channels_ = round_up(t_.read_channels, lanes<A>);
    row_stride_ = padded_channels_ + lanes<A>;  // off a power of two: rows would share cache sets
    group_weights_ = kPoints * t_.read_channels * round_up(t_.written_channels, lanes<A>);
    all_tiles_ = g.batch * tiles_[0] * tiles_[1];
    const int64_t share = divide_up(all_tiles_ * g.groups, enough_tasks(arguments.threads));
    block_tiles_ = std::clamp<int64_t>(round_up(share, kTileRows), kTileRows, kBlockTiles);
    blocks_ = divide_up(all_tiles_, block_tiles_);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.prepare_tasks = t_.geometry.groups * panels_ * divide_up(t_.read_channels, kPreparedChannels);
    plan.run_tasks = t_.geometry.groups * blocks_;
    plan.shared_bytes = t_.geometry.groups * group_weights_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // G w G^T of some channels of one panel.
  void prepare(int64_t task) const {
    const int64_t channel_blocks = divide_up(t_.read_channels, kPreparedChannels);
    const int64_t block = task % channel_blocks, panel = task / channel_blocks % panels_;
    const int64_t group = task / channel_blocks / panels_;
    const int width = panel_width<A>(t_.written_channels, panel);
    A* target = weights(group, panel);
    const int64_t point_stride = t_.read_channels * width;
    const int64_t end = std::min(t_.read_channels, (block + 1) * kPreparedChannels);
    constexpr const auto& matrices = winograd<M, R>;
    for (int64_t channel = block * kPreparedChannels; channel < end; ++channel)
      for (int lane = 0; lane < width; lane += lanes<A>) {
        const int64_t first = panel * kPanel<A> + lane;
        vec<A> w[R * R], half[N * R], point[N * N];
        load_filters(group, channel, first, std::min<int64_t>(lanes<A>, t_.written_channels - first), w);
        CONVLAB_UNROLL for (int x = 0; x < R; ++x) transform<A>(matrices.weight, w + x, R, half + x, R);
        CONVLAB_UNROLL for (int y = 0; y < N; ++y) transform<A>(matrices.weight, half + y * R, 1, point + y * N, 1);
        for (int p = 0; p < kPoints; ++p) store(target + p * point_stride + channel * width + lane, point[p]);
      }
  }

  void run(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t group = task / blocks_, begin = task % blocks_ * block_tiles_;
    const int64_t count = std::min(block_tiles_, all_tiles_ - begin);
    for_each_strip(begin, count, [&](const Strip& strip) { transform_input(group, strip, s); });
    for (int64_t panel = 0; panel < panels_; ++panel) {
      multiply(group, panel, count, s);
      load_bias(group, panel, s.bias);
      for_each_strip(begin, count, [&](const Strip& strip) { transform_output(group, panel, strip, s); });
    }
  }

 private:
  static constexpr int64_t kBlockTiles = 36;
  static constexpr int64_t kPreparedChannels = 16;

  struct Scratch {
    A* input;            // V[point][tile][channel]
    A* product;          // M[point][tile][column]
    A* strip;            // [y][x][channel or column], NCHW only
    A* bias;             // of one panel
    const A** rows;
    A** outputs;
  };

  Scratch carve(Carver& carver) const {
    const int64_t strip = (block_tiles_ * M + R - 1) * N * std::max<int64_t>(row_stride_, kPanel<A>);
    return {carver.take<A>(kPoints * block_tiles_ * row_stride_),
            carver.take<A>(kPoints * block_tiles_ * kPanel<A>),
            carver.take<A>(last_ ? 0 : strip),
            carver.take<A>(kPanel<A>),
            carver.take<const A*>(kTileRows),
            carver.take<A*>(kTileRows)};
  }

  A* weights(int64_t group, int64_t panel) const {
    return static_cast<A*>(arguments_.shared) + group * group_weights_ +
           panel * kPanel<A> * kPoints * t_.read_channels;
  }

  // Tiles of a block that lie in one row of tiles of one image.
  struct Strip {
    int64_t n, y, x;      // image, first written pixel
    int64_t tile, tiles;  // first in the block, and how many
  };
  template <class Visit>
  void for_each_strip(int64_t begin, int64_t count, const Visit& visit) const {
    for (int64_t tile = 0; tile < count;) {
      const int64_t index = begin + tile, column = index % tiles_[1], row = index / tiles_[1] % tiles_[0];
      const int64_t length = std::min(tiles_[1] - column, count - tile);
      visit(Strip{index / tiles_[1] / tiles_[0], row * M, column * M, tile, length});
      tile += length;
    }
  }

  // The taps between one read channel and `count` written ones; backward input sees the filter rotated by 180 degrees.
  void load_filters(int64_t group, int64_t channel, int64_t first, int64_t count, vec<A> (&w)[R * R]) const {
    const T* source = arguments_.weight + t_.weight_offset(arguments_, group, channel, first);
    const int64_t stride = t_.weight_offset(arguments_, 0, 0, 1);
    for (int tap = 0; tap < R * R; ++tap) {
      const T* from = source + (t_.pass == Pass::forward ? tap : R * R - 1 - tap) * arguments_.weight_stride_tap;
      A lane[lanes<A>] = {};
      for (int64_t i = 0; i < count; ++i) lane[i] = to_accumulate(from[i * stride]);
      w[tap] = load(lane);
    }
  }

  void load_bias(int64_t group, int64_t panel, A* bias) const {
    for (int64_t j = 0; j < kPanel<A>; ++j) {
      const int64_t channel = panel * kPanel<A> + j;
      const bool present = t_.bias && channel < t_.written_channels;
      bias[j] = present ? to_accumulate(t_.bias[group * t_.written_channels + channel]) : A(0);
    }
  }

  // ---- input

  void transform_input(int64_t group, const Strip& strip, const Scratch& s) const {
    const int64_t y = strip.y + first_[0], x = strip.x + first_[1];
    const int64_t height = t_.read_size[1], width = t_.read_size[2];
    if (last_) {
      const int64_t stride = t_.read_channels * t_.geometry.groups;
      const T* image = t_.read + strip.n * height * width * stride + group * t_.read_channels;
      for (int64_t tile = 0; tile < strip.tiles; ++tile)
        transform_tile(image + (y * width + x + tile * M) * stride, width * stride, stride, y, height, x + tile * M,
                       width, s.input + (strip.tile + tile) * row_stride_);
      return;
    }
    const int64_t columns = strip.tiles * M + R - 1;
    fill_strip(group, strip.n, y, x, columns, s.strip);
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      transform_tile<A>(s.strip + tile * M * row_stride_, columns * row_stride_, row_stride_, 0, N, tile * M, columns,
                        s.input + (strip.tile + tile) * row_stride_);
  }

  // B^T d B of one tile for all channels; pixel (i, j) of it is at corner + i*line + j*pixel, and is read if y+i lies
  // in [0, height) and x+j in [0, width).
  template <class U>
  void transform_tile(const U* corner, int64_t line, int64_t pixel, int64_t y, int64_t height, int64_t x,
                      int64_t width, A* target) const {
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

  // NCHW -> [y][x][channel] of N lines and `columns` pixels from (y, x), zeros outside the image.
  void fill_strip(int64_t group, int64_t n, int64_t y, int64_t x, int64_t columns, A* strip) const {
    const int64_t height = t_.read_size[1], width = t_.read_size[2];
    const int64_t begin = std::clamp<int64_t>(-x, 0, columns), end = std::clamp<int64_t>(width - x, begin, columns);
    const T* image = t_.read + (n * t_.geometry.groups + group) * t_.read_channels * height * width;
    for (int i = 0; i < N; ++i) {
      A* line = strip + i * columns * row_stride_;
      const bool outside = y + i < 0 || y + i >= height;
      const int64_t from = outside ? columns : begin, to = outside ? columns : end;
      std::fill(line, line + from * row_stride_, A(0));
      std::fill(line + to * row_stride_, line + columns * row_stride_, A(0));
      for (int64_t c = 0; from < to && c < t_.read_channels; c += lanes<A>)
        transpose_matrix(image + (c * height + y + i) * width + x + from, height * width,
                         std::min<int64_t>(lanes<A>, t_.read_channels - c), to - from, line + from * row_stride_ + c,
                         row_stride_);
    }
  }

  // ---- products

  void multiply(int64_t group, int64_t panel, int64_t count, const Scratch& s) const {
    const int width = panel_width<A>(t_.written_channels, panel);
    const int64_t tiles = divide_up(count, kTileRows);
    TileProduct<A> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    const A* u = weights(group, panel);
    product.panels = &u;
    for (int p = 0; p < kPoints; ++p, u += t_.read_channels * width)
      for (int64_t begin = 0; begin < t_.read_channels; begin += kDepth) {
        product.depth = std::min(kDepth, t_.read_channels - begin);
        product.row_offset = begin;
        product.panel_offset = begin * width;
        product.accumulate = begin > 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
          for (int64_t r = 0; r < height; ++r) {
            s.rows[r] = s.input + (p * block_tiles_ + row + r) * row_stride_;
            s.outputs[r] = s.product + (p * block_tiles_ + row + r) * kPanel<A>;
          }
          tile_kernel<A, 1>(static_cast<int>(height), width / lanes<A>)(product);
        }
      }
  }

  // ---- output

  void transform_output(int64_t group, int64_t panel, const Strip& strip, const Scratch& s) const {
    const int64_t height = t_.written_size[1], width = t_.written_size[2];
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t lines = std::min<int64_t>(M, height - strip.y);
    const int64_t stride = t_.written_channels * t_.geometry.groups;
    if (last_) {
      T* image = t_.written + strip.n * height * width * stride + group * t_.written_channels + first;
      for (int64_t tile = 0; tile < strip.tiles; ++tile) {
        const int64_t x = strip.x + tile * M;
        untransform_tile(s.product + (strip.tile + tile) * kPanel<A>, s.bias, columns,
                         image + (strip.y * width + x) * stride, width * stride, stride, lines,
                         std::min<int64_t>(M, width - x));
      }
      return;
    }
    const int64_t pixels = std::min(strip.tiles * M, width - strip.x), pitch = strip.tiles * M;
    for (int64_t tile = 0; tile < strip.tiles; ++tile)
      untransform_tile<A>(s.product + (strip.tile + tile) * kPanel<A>, s.bias, round_up(columns, lanes<A>),
                          s.strip + tile * M * kPanel<A>, pitch * kPanel<A>, kPanel<A>, M, M);
    T* image = t_.written + (strip.n * stride + group * t_.written_channels + first) * height * width;
    for (int64_t i = 0; i < lines; ++i)
      store_lines(s.strip + i * pitch * kPanel<A>, pixels, columns,
                  image + (strip.y + i) * width + strip.x, height * width);
  }

  // A^T m A of one tile, plus the bias; writes `lines` x `pixels` of the M x M outputs.
  template <class U>
  void untransform_tile(const A* product, const A* bias, int64_t columns, U* corner, int64_t line, int64_t pixel,
                        int64_t lines, int64_t pixels) const {
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
            store(target, y[j] + start);
          else
            store_partial(target, y[j] + start, columns - k);
        }
      }
    }
  }

  // [pixel][column] -> one line of each column's plane
  static void store_lines(const A* strip, int64_t pixels, int64_t columns, T* target, int64_t plane) {
    for (int64_t k = 0; k < columns; k += lanes<A>)
      for (int64_t x = 0; x < pixels; x += lanes<A>) {
        const int64_t count = std::min<int64_t>(lanes<A>, pixels - x);
        vec<A> block[lanes<A>];
        for (int64_t j = 0; j < lanes<A>; ++j) block[j] = j < count ? load(strip + (x + j) * kPanel<A> + k) : vec<A>{};
        transpose<A>(block);
        for (int64_t j = 0; j < std::min<int64_t>(lanes<A>, columns - k); ++j) {
          T* to = target + (k + j) * plane + x;
          if (count == lanes<A>)
            store(to, block[j]);
          else
            store_partial(to, block[j], count);
        }
      }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_;
  int64_t first_[2], tiles_[2], panels_, padded_channels_, row_stride_, group_weights_, all_tiles_, block_tiles_, blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
