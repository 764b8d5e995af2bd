// Winograd F(4x4, 3x3), forward and backward input.
//
// Idea: each tile of 4x4 outputs is transformed to 36 points, where convolution is a product over channels alone: 36
// multiplications per channel pair instead of 144. The three steps are fused over blocks of tiles, so that neither
// the transformed input nor the products leave the cache: transform a block's tiles for all channels,
// V[point][tile][channel]; per panel of written channels 36 matrix products M[point][tile][column]; transform back.
// Weights are transformed once per call, U[panel][point][channel][column]. NCHW tensors go through a strip buffer in
// NHWC order per row of tiles. Backward input is the same with rotated weights, the roles of the channels exchanged.
// Few tiles (small maps, small batches) would make the transformed weights, four times the weights, the traffic that
// counts. Then the roles turn: the tiles are transformed first, all of them, and each task takes a panel of weights,
// transforms some channels of it, and multiplies all tiles with them while they are in cache.
// Cost: multiply_adds()/4 (more where 4 does not divide the output) plus the transforms, worth it from about 16
// channels. Memory: many tiles, 4 x weights shared, and per thread 36 x tiles of a block x (channels + panel); few
// tiles, 36 x at most kFewTiles x channels shared, and per thread one panel's chunk. Never proportional to the batch.
// Limits: error 1.2e-6 to 4e-6 of max|reference| in float32 (winograd_transform.h). NaN and Inf spread over their tile.
#pragma once
#include "conv_gather.h"
#include "conv_gemm_channels_last.h"
#include "winograd_transform.h"

namespace convlab::cpu::CONVLAB_ISA {

// One image of NC(D)HW -> [y][x][channel]: Lines lines of `columns` pixels from (y, x) on, zeros outside the image.
template <int Lines, class T>
void fill_strip(const T* image, int64_t channels, int64_t height, int64_t width, int64_t y, int64_t x, int64_t columns,
                int64_t stride, accumulate_t<T>* strip) {
  using A = accumulate_t<T>;
  const int64_t begin = std::clamp<int64_t>(-x, 0, columns), end = std::clamp<int64_t>(width - x, begin, columns);
  for (int i = 0; i < Lines; ++i) {
    A* line = strip + i * columns * stride;
    const bool outside = y + i < 0 || y + i >= height;
    const int64_t from = outside ? columns : begin, to = outside ? columns : end;
    std::fill(line, line + from * stride, A(0));
    std::fill(line + to * stride, line + columns * stride, A(0));
    for (int64_t c = 0; from < to && c < channels; c += lanes<A>)
      transpose_matrix(image + (c * height + y + i) * width + x + from, height * width,
                       std::min<int64_t>(lanes<A>, channels - c), to - from, line + from * stride + c, stride);
  }
}

template <class T>
class WinogradTiles {
 public:
  using A = accumulate_t<T>;
  static constexpr int M = 4, R = 3, N = M + R - 1, kPoints = N * N;

  explicit WinogradTiles(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    last_ = arguments.layout == Layout::channels_last;
    for (int axis = 0; axis < 2; ++axis) {
      first_[axis] = t_.pass == Pass::forward ? -g.padding[axis + 1] : g.padding[axis + 1] - (R - 1);
      tiles_[axis] = divide_up(t_.written_size[axis + 1], M);
    }
    panels_ = divide_up(t_.written_channels, kPanel<A>);
    row_stride_ = round_up(t_.read_channels, lanes<A>) + lanes<A>;  // off a power of two: rows would share cache sets
    all_tiles_ = g.batch * tiles_[0] * tiles_[1];
    few_tiles_ = all_tiles_ <= kFewTiles && g.groups * panels_ >= arguments.threads;
    const int64_t share = divide_up(all_tiles_ * g.groups, enough_tasks(arguments.threads));
    block_tiles_ = few_tiles_ ? all_tiles_ : std::clamp<int64_t>(round_up(share, kTileRows), kTileRows, kBlockTiles);
    blocks_ = divide_up(all_tiles_, block_tiles_);
    chunk_ = std::min(t_.read_channels, few_tiles_ ? kFewTilesChunk : kDepth);
    group_weights_ = panels_ * kPoints * point_stride(t_.read_channels);
  }

  ConvPlan plan() const {
    const int64_t groups = t_.geometry.groups;
    ConvPlan plan;
    plan.prepare_tasks = few_tiles_ ? groups * t_.geometry.batch * tiles_[0]
                                    : groups * panels_ * divide_up(t_.read_channels, kPreparedChannels);
    plan.packs_weight = !few_tiles_;
    plan.run_tasks = groups * (few_tiles_ ? panels_ : blocks_);
    plan.shared_bytes = groups * (few_tiles_ ? input_size() : group_weights_) * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void prepare(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    if (few_tiles_) {  // one row of tiles
      const int64_t rows = t_.geometry.batch * tiles_[0], row = task % rows, group = task / rows;
      for_each_strip(row * tiles_[1], tiles_[1], [&](Strip strip) {
        strip.tile = row * tiles_[1];
        transform_input(group, strip, static_cast<A*>(arguments_.shared) + group * input_size(), s);
      });
      return;
    }
    const int64_t channel_blocks = divide_up(t_.read_channels, kPreparedChannels);
    const int64_t begin = task % channel_blocks * kPreparedChannels, panel = task / channel_blocks % panels_;
    const int64_t group = task / channel_blocks / panels_;
    const int64_t end = std::min(t_.read_channels, begin + kPreparedChannels);
    transform_weights(group, panel, begin, end, point_stride(t_.read_channels),
                      weights(group, panel) + begin * panel_width<A>(t_.written_channels, panel), s);
  }

  void run(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t parts = few_tiles_ ? panels_ : blocks_, group = task / parts, part = task % parts;
    if (few_tiles_) {
      const A* input = static_cast<const A*>(arguments_.shared) + group * input_size();
      for (int64_t begin = 0; begin < t_.read_channels; begin += chunk_) {
        const int64_t end = std::min(t_.read_channels, begin + chunk_);
        transform_weights(group, part, begin, end, point_stride(chunk_), s.weights, s);
        multiply(part, input + begin, s.weights, point_stride(chunk_), end - begin, all_tiles_, begin > 0, s);
      }
      write_panel(group, part, 0, all_tiles_, s);
      return;
    }
    const int64_t begin = part * block_tiles_, count = std::min(block_tiles_, all_tiles_ - begin);
    for_each_strip(begin, count, [&](const Strip& strip) { transform_input(group, strip, s.input, s); });
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int width = panel_width<A>(t_.written_channels, panel);
      for (int64_t c = 0; c < t_.read_channels; c += chunk_)
        multiply(panel, s.input + c, weights(group, panel) + c * width, point_stride(t_.read_channels),
                 std::min(chunk_, t_.read_channels - c), count, c > 0, s);
      write_panel(group, panel, begin, count, s);
    }
  }

 private:
  static constexpr int64_t kBlockTiles = 48;
  static constexpr int64_t kFewTiles = 64;
  static constexpr int64_t kFewTilesChunk = 64;  // 36 points x 64 channels x 64 columns of float: 0.6 MB
  static constexpr int64_t kPreparedChannels = 16;

  struct Scratch {
    A* input;    // V[point][tile][channel], unless it is shared
    A* product;  // M[point][tile][column]
    A* weights;  // a chunk of U[point][channel][column], unless they are shared
    A* strip;    // [y][x][channel or column], NCHW only
    A* filters;  // [channel][tap][lane]
    A* bias;     // of one panel
    const A** rows;
    A** outputs;
  };

  Scratch carve(Carver& carver) const {
    const int64_t strip_tiles = std::min(block_tiles_, tiles_[1]);
    const int64_t strip = (strip_tiles * M + R - 1) * N * std::max<int64_t>(row_stride_, kPanel<A>);
    return {carver.take<A>(few_tiles_ ? 0 : input_size()),
            carver.take<A>(kPoints * block_tiles_ * kPanel<A>),
            carver.take<A>(few_tiles_ ? kPoints * point_stride(chunk_) : 0),
            carver.take<A>(last_ ? 0 : strip),
            carver.take<A>(kPreparedChannels * R * R * lanes<A>),
            carver.take<A>(kPanel<A>),
            carver.take<const A*>(kTileRows),
            carver.take<A*>(kTileRows)};
  }

  int64_t input_size() const { return kPoints * block_tiles_ * row_stride_; }
  // Between the points of a panel of weights; off a power of two, as 36 streams are written at once.
  static int64_t point_stride(int64_t channels) { return channels * kPanel<A> + lanes<A>; }

  A* weights(int64_t group, int64_t panel) const {
    return static_cast<A*>(arguments_.shared) + group * group_weights_ +
           panel * kPoints * point_stride(t_.read_channels);
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

  // ---- weights

  // G w G^T of the channels begin..end of one panel, to target + point*point_stride + (channel-begin)*width.
  void transform_weights(int64_t group, int64_t panel, int64_t begin, int64_t end, int64_t point_stride, A* target,
                         const Scratch& s) const {
    constexpr const auto& matrices = winograd<M, R>;
    const int width = panel_width<A>(t_.written_channels, panel);
    for (int64_t block = begin; block < end; block += kPreparedChannels)
      for (int lane = 0; lane < width; lane += lanes<A>) {
        const int64_t first = panel * kPanel<A> + lane, channels = std::min(kPreparedChannels, end - block);
        load_filters(group, block, channels, first, std::min<int64_t>(lanes<A>, t_.written_channels - first),
                     s.filters);
        for (int64_t c = 0; c < channels; ++c) {
          vec<A> w[R * R], half[N * R];
          CONVLAB_UNROLL for (int tap = 0; tap < R * R; ++tap) {
            // Backward input sees the filter rotated by 180 degrees.
            const int from = t_.pass == Pass::forward ? tap : R * R - 1 - tap;
            w[tap] = load(s.filters + (c * R * R + from) * lanes<A>);
          }
          CONVLAB_UNROLL for (int x = 0; x < R; ++x) transform<A>(matrices.weight, w + x, R, half + x, R);
          A* out = target + (block - begin + c) * width + lane;
          CONVLAB_UNROLL for (int y = 0; y < N; ++y) {
            vec<A> point[N];
            transform<A>(matrices.weight, half + y * R, 1, point, 1);
            CONVLAB_UNROLL for (int x = 0; x < N; ++x) store(out + (y * N + x) * point_stride, point[x]);
          }
        }
      }
  }

  // The taps between read channels block.. and the written channels first.., as [channel][tap][lane].
  void load_filters(int64_t group, int64_t block, int64_t channels, int64_t first, int64_t count, A* filters) const {
    constexpr int taps = R * R;
    const T* source = arguments_.weight + t_.weight_offset(arguments_, group, block, first);
    const int64_t lane_stride = t_.weight_offset(arguments_, 0, 0, 1);
    const int64_t channel_stride = t_.weight_offset(arguments_, 0, 1, 0), tap_stride = arguments_.weight_stride_tap;
    if (tap_stride == 1 && channel_stride == taps) {
      transpose_matrix(source, lane_stride, count, channels * taps, filters, lanes<A>);
    } else if (tap_stride == 1) {
      for (int64_t c = 0; c < channels; ++c)
        transpose_matrix(source + c * channel_stride, lane_stride, count, taps, filters + c * taps * lanes<A>,
                         lanes<A>);
    } else if (channel_stride == 1) {
      for (int tap = 0; tap < taps; ++tap)
        transpose_matrix(source + tap * tap_stride, lane_stride, count, channels, filters + tap * lanes<A>,
                         taps * lanes<A>);
    } else {  // lanes are contiguous
      for (int64_t c = 0; c < channels; ++c)
        for (int tap = 0; tap < taps; ++tap) {
          const T* from = source + c * channel_stride + tap * tap_stride;
          store(filters + (c * taps + tap) * lanes<A>, count == lanes<A> ? load(from) : load_partial(from, count));
        }
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

  void transform_input(int64_t group, const Strip& strip, A* input, const Scratch& s) const {
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
    fill_strip<N>(image, t_.read_channels, height, width, y, x, columns, row_stride_, s.strip);
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
  void multiply(int64_t panel, const A* input, const A* u, int64_t point_stride, int64_t depth, int64_t count,
                bool accumulate, const Scratch& s) const {
    const int vectors = panel_width<A>(t_.written_channels, panel) / lanes<A>;
    const int64_t tiles = divide_up(count, kTileRows);
    TileProduct<A> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    product.panels = &u;
    product.depth = depth;
    product.accumulate = accumulate;
    for (int p = 0; p < kPoints; ++p, u += point_stride)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
        for (int64_t r = 0; r < height; ++r) {
          s.rows[r] = input + (p * block_tiles_ + row + r) * row_stride_;
          s.outputs[r] = s.product + (p * block_tiles_ + row + r) * kPanel<A>;
        }
        tile_kernel<A, 1>(static_cast<int>(height), vectors)(product);
      }
  }

  // ---- output

  void write_panel(int64_t group, int64_t panel, int64_t begin, int64_t count, const Scratch& s) const {
    load_bias(group, panel, s.bias);
    for_each_strip(begin, count, [&](const Strip& strip) { transform_output(group, panel, strip, s); });
  }

  void transform_output(int64_t group, int64_t panel, const Strip& strip, const Scratch& s) const {
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
      store_lines(s.strip + i * pitch * kPanel<A>, pixels, columns, image + (strip.y + i) * width + strip.x,
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

  // [pixel][column] -> one line of each column's plane
  void store_lines(const A* strip, int64_t pixels, int64_t columns, T* target, int64_t plane) const {
    for (int64_t k = 0; k < columns; k += lanes<A>)
      for (int64_t x = 0; x < pixels; x += lanes<A>) {
        const int64_t count = std::min<int64_t>(lanes<A>, pixels - x);
        vec<A> block[lanes<A>];
        for (int64_t j = 0; j < lanes<A>; ++j) block[j] = j < count ? load(strip + (x + j) * kPanel<A> + k) : vec<A>{};
        transpose<A>(block);
        for (int64_t j = 0; j < std::min<int64_t>(lanes<A>, columns - k); ++j) {
          T* to = target + (k + j) * plane + x;
          if (count == lanes<A>)
            t_.epilogue.store(to, block[j]);
          else
            t_.epilogue.store_partial(to, block[j], count);
        }
      }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_;
  bool few_tiles_;
  int64_t first_[2], tiles_[2], panels_, row_stride_, all_tiles_, block_tiles_, blocks_, chunk_, group_weights_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
