// Winograd's backward-weight pass: the adjoint of F(4x4, 3x3) in its weights.
//
// With y = A^T [(G w G^T) * (B^T x B)] A, the gradient of w is G^T [ sum over tiles of (B^T x B) * (A dy A^T) ] G. So
// both tensors are transformed tile by tile, 36 products sum over tiles, and the sums are transformed back once.
// Tiles come in rounds of at most kRoundTiles: the threads first transform the round's tiles of both tensors into
// shared memory, then every block of sums (some input channels x a panel of filters, all 36 points) adds the round's
// products to itself. A block belongs to one task, so there is no reduction: same bits for every number of threads.
// Cost: multiply_adds()/4 plus the transforms and, per round, reading and writing the sums.
// Memory: 4 x the weights for the sums if there are several rounds, and 36 x kRoundTiles x (input channels + filters).
// Limits: as in conv_winograd_tiles.h; each chain of additions covers one round.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class WinogradWeight {
 public:
  using A = accumulate_t<T>;
  static constexpr int M = 4, R = 3, N = M + R - 1, kPoints = N * N;

  explicit WinogradWeight(const ConvArguments<T>& arguments) : arguments_(arguments), g_(arguments.geometry) {
    last_ = arguments.layout == Layout::channels_last;
    channels_ = g_.in_channels_per_group();
    filters_ = g_.out_channels_per_group();
    for (int axis = 0; axis < 2; ++axis) tiles_[axis] = divide_up(g_.output[axis + 1], M);
    tile_rows_ = g_.batch * tiles_[0];
    // A round is whole rows of tiles.
    round_rows_ = std::min(tile_rows_, std::max<int64_t>(1, kRoundTiles / tiles_[1]));
    rounds_ = divide_up(tile_rows_, round_rows_);
    round_rows_ = divide_up(tile_rows_, rounds_);
    round_tiles_ = round_rows_ * tiles_[1];
    channel_blocks_ = divide_up(channels_, lanes<A>);
    panels_ = divide_up(filters_, kPanel<A>);
    block_pitch_ = round_tiles_ * lanes<A> + lanes<A>;
    // Large blocks read the transformed tensors less often; how they are cut does not change a sum.
    int64_t vectors = kBlockVectors;
    while (vectors > 1 && g_.groups * divide_up(channel_blocks_, vectors) * panels_ < enough_tasks(arguments.threads))
      vectors /= 2;
    block_channels_ = vectors * lanes<A>;
    blocks_ = divide_up(channel_blocks_, vectors);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.rounds = rounds_;
    plan.prepare_tasks = g_.groups * round_rows_ * 2;
    plan.run_tasks = g_.groups * blocks_ * panels_;
    Carver count(nullptr);
    carve_shared(count);
    plan.shared_bytes = count.used();
    Carver scratch(nullptr);
    carve(scratch);
    plan.scratch_bytes = scratch.used();
    return plan;
  }

  // One row of tiles, of the input or of grad_output.
  void prepare(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const Shared shared = carve_shared();
    const int64_t row = task / 2 % round_rows_, group = task / 2 / round_rows_;
    const int64_t index = arguments_.round * round_rows_ + row, first = row * tiles_[1];
    const bool input = task % 2 == 0;
    A* target = input ? shared.input + group * kPoints * channel_blocks_ * block_pitch_
                      : shared.gradient + group * kPoints * panels_ * panel_size();
    if (index >= tile_rows_) {
      clear(input, target, first);
      return;
    }
    const int64_t n = index / tiles_[0], y = index % tiles_[0] * M;
    if (input)
      transform_input(group, n, y, first, target, s);
    else
      transform_gradient(group, n, y, first, target, s);
  }

  // All points of one block of sums; after the last round, the block's weights.
  void run(void* scratch, int64_t task) const {
    const Shared shared = carve_shared();
    const Block block = block_at(task);
    const int width = panel_width<A>(filters_, block.panel);
    const int64_t tiles = divide_up(block.rows, kTileRows);
    Carver carver(scratch);
    const Scratch s = carve(carver);
    A* sums = rounds_ == 1 ? s.sums : shared.sums + task * sums_size();
    const A* row[kTileRows];
    A* output[kTileRows];
    TileProduct<A> product;
    product.rows = row;
    product.outputs = output;
    product.depth = round_tiles_;
    product.accumulate = arguments_.round > 0;
    for (int p = 0; p < kPoints; ++p) {
      const A* input = shared.input + (block.group * kPoints + p) * channel_blocks_ * block_pitch_;
      const A* gradient = shared.gradient + ((block.group * kPoints + p) * panels_ + block.panel) * panel_size();
      product.panels = &gradient;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = block.rows * tile / tiles, height = block.rows * (tile + 1) / tiles - begin;
        for (int64_t r = 0; r < height; ++r) {
          const int64_t channel = block.first_channel + begin + r;
          row[r] = input + channel / lanes<A> * block_pitch_ + channel % lanes<A>;
          output[r] = sums + (p * block_channels_ + begin + r) * kPanel<A>;
        }
        tile_kernel<A, lanes<A>>(static_cast<int>(height), width / lanes<A>)(product);
      }
    }
    if (arguments_.round == rounds_ - 1) store_weights(block, sums, s.weights);
  }

 private:
  static constexpr int64_t kRoundTiles = 128;
  static constexpr int64_t kBlockVectors = 2;  // of channels in a block: its sums stay in L2
  static constexpr int64_t kFilterPitch = round_up(lanes<A> * R * R, lanes<A>);

  struct Shared {
    A* input;     // [group][point][channel/lanes][tile][lane]
    A* gradient;  // [group][point][panel][tile][filter of the panel]
    A* sums;      // [task][point][channel of the block][filter of the panel]; unused with one round
  };
  Shared carve_shared(Carver& carver) const {
    return {carver.take<A>(g_.groups * kPoints * channel_blocks_ * block_pitch_),
            carver.take<A>(g_.groups * kPoints * panels_ * panel_size()),
            carver.take<A>(rounds_ == 1 ? 0 : g_.groups * blocks_ * panels_ * sums_size())};
  }
  Shared carve_shared() const {
    Carver carver(arguments_.shared);
    return carve_shared(carver);
  }
  struct Scratch {
    A* strip;    // [y][x][channel], channels first only
    A* sums;     // of one block, if there is one round
    A* weights;  // [weight of a filter][filter of the panel] of some channels, then transposed
  };
  Scratch carve(Carver& carver) const {
    return {carver.take<A>(last_ ? 0 : N * (tiles_[1] * M + R - 1) * strip_stride()),
            carver.take<A>(rounds_ == 1 ? sums_size() : 0), carver.take<A>(2 * lanes<A> * kFilterPitch)};
  }

  // Some input channels and a panel of filters of one group.
  struct Block {
    int64_t group, panel, first_channel, rows;
  };
  Block block_at(int64_t task) const {
    const int64_t first = task / panels_ % blocks_ * block_channels_;
    return {task / panels_ / blocks_, task % panels_, first, std::min(block_channels_, channels_ - first)};
  }

  // G^T sums G of one block, into the weight: for each vector of filters and of channels, [channel and tap][filter] is
  // transposed, so that every filter's weights are written as they lie in memory.
  void store_weights(const Block& block, const A* sums, A* weights) const {
    constexpr const auto& matrices = winograd_adjoint<M, R>;
    const int width = panel_width<A>(filters_, block.panel);
    const bool taps_together = arguments_.weight_stride_tap == 1;
    A* transposed = weights + lanes<A> * kFilterPitch;
    for (int lane = 0; lane < width; lane += lanes<A>)
      for (int64_t begin = 0; begin < block.rows; begin += lanes<A>) {
        const int64_t channels = std::min<int64_t>(lanes<A>, block.rows - begin);
        for (int64_t c = 0; c < channels; ++c) {
          vec<A> half[R * N], w[R * R];
          for (int x = 0; x < N; ++x) {
            vec<A> u[N];
            CONVLAB_UNROLL for (int y = 0; y < N; ++y) u[y] =
                load(sums + ((y * N + x) * block_channels_ + begin + c) * kPanel<A> + lane);
            transform<A>(matrices.weight, u, 1, half + x, N);
          }
          CONVLAB_UNROLL for (int y = 0; y < R; ++y) transform<A>(matrices.weight, half + y * N, 1, w + y * R, 1);
          for (int tap = 0; tap < R * R; ++tap)
            store(weights + (taps_together ? c * R * R + tap : tap * channels + c) * lanes<A>, w[tap]);
        }
        transpose_matrix(weights, lanes<A>, channels * R * R, lanes<A>, transposed, kFilterPitch);
        const int64_t first = block.panel * kPanel<A> + lane, count = std::min<int64_t>(lanes<A>, filters_ - first);
        T* target = arguments_.weight + (block.group * filters_ + first) * arguments_.weight_stride_filter() +
                    (block.first_channel + begin) * arguments_.weight_stride_channel;
        const Epilogue<T> plain;
        for (int64_t k = 0; k < count; ++k, target += arguments_.weight_stride_filter())
          if (taps_together)
            plain.store_row(target, transposed + k * kFilterPitch, channels * R * R);
          else
            for (int tap = 0; tap < R * R; ++tap)
              plain.store_row(target + tap * arguments_.weight_stride_tap,
                              transposed + k * kFilterPitch + tap * channels, channels);
      }
  }

  int64_t strip_stride() const { return round_up(std::max(channels_, filters_), lanes<A>) + lanes<A>; }
  int64_t panel_size() const { return round_tiles_ * kPanel<A> + lanes<A>; }
  int64_t sums_size() const { return kPoints * block_channels_ * kPanel<A>; }

  // A row of tiles behind the last: its products must be zero.
  void clear(bool input, A* target, int64_t first) const {
    for (int64_t p = 0; p < kPoints; ++p) {
      for (int64_t b = 0; input && b < channel_blocks_; ++b) {
        A* begin = target + (p * channel_blocks_ + b) * block_pitch_ + first * lanes<A>;
        std::fill(begin, begin + tiles_[1] * lanes<A>, A(0));
      }
      for (int64_t b = 0; !input && b < panels_; ++b) {
        const int width = panel_width<A>(filters_, b);
        A* begin = target + (p * panels_ + b) * panel_size() + first * width;
        std::fill(begin, begin + tiles_[1] * width, A(0));
      }
    }
  }

  void transform_input(int64_t group, int64_t n, int64_t y, int64_t first, A* target, const Scratch& s) const {
    const Plane<T> plane = {arguments_.input, g_.groups, channels_, g_.input[1], g_.input[2]};
    each_tile<N>(plane, group, n, y - g_.padding[1], -g_.padding[2], s, [&](int64_t tile, const auto& load_pixel) {
      for (int64_t c = 0; c < channels_; c += lanes<A>) {
        vec<A> half[N * N], d[N], point[N];
        for (int i = 0; i < N; ++i) {
          CONVLAB_UNROLL for (int j = 0; j < N; ++j) d[j] = load_pixel(i, j, c);
          transform<A>(winograd<M, R>.input, d, 1, half + i * N, 1);
        }
        A* to = target + c / lanes<A> * block_pitch_ + (first + tile) * lanes<A>;
        for (int j = 0; j < N; ++j) {
          transform<A>(winograd<M, R>.input, half + j, N, point, 1);
          CONVLAB_UNROLL for (int i = 0; i < N; ++i) store(to + (i * N + j) * channel_blocks_ * block_pitch_, point[i]);
        }
      }
    });
  }

  void transform_gradient(int64_t group, int64_t n, int64_t y, int64_t first, A* target, const Scratch& s) const {
    const Plane<T> plane = {arguments_.output, g_.groups, filters_, g_.output[1], g_.output[2]};
    each_tile<M>(plane, group, n, y, 0, s, [&](int64_t tile, const auto& load_pixel) {
      for (int64_t k = 0; k < filters_; k += lanes<A>) {
        vec<A> half[M * N], d[M], point[N];
        for (int i = 0; i < M; ++i) {
          CONVLAB_UNROLL for (int j = 0; j < M; ++j) d[j] = load_pixel(i, j, k);
          transform<A>(winograd_adjoint<M, R>.output, d, 1, half + i * N, 1);
        }
        const int64_t panel = k / kPanel<A>;
        const int width = panel_width<A>(filters_, panel);
        A* to = target + panel * panel_size() + (first + tile) * width + k % kPanel<A>;
        for (int j = 0; j < N; ++j) {
          transform<A>(winograd_adjoint<M, R>.output, half + j, N, point, 1);
          CONVLAB_UNROLL for (int i = 0; i < N; ++i) store(to + (i * N + j) * panels_ * panel_size(), point[i]);
        }
      }
    });
  }

  template <class U>
  struct Plane {
    const U* data;
    int64_t groups, channels, height, width;
  };

  // Calls visit(tile, load_pixel) for a row of tiles of Size x Size pixels whose first corner is (y, x);
  // load_pixel(i, j, channel) is a vector of channels, zeros outside the image.
  template <int Size, class Visit>
  void each_tile(const Plane<T>& plane, int64_t group, int64_t n, int64_t y, int64_t x, const Scratch& s,
                 const Visit& visit) const {
    const int64_t channels = plane.channels;
    if (last_) {
      const int64_t stride = channels * plane.groups;
      const T* image = plane.data + n * plane.height * plane.width * stride + group * channels;
      for (int64_t tile = 0; tile < tiles_[1]; ++tile) {
        const int64_t left = x + tile * M;
        if (y >= 0 && y + Size <= plane.height && left >= 0 && left + Size <= plane.width && channels % lanes<A> == 0) {
          const T* corner = image + (y * plane.width + left) * stride;
          visit(tile, [&](int i, int j, int64_t c) { return load(corner + (i * plane.width + j) * stride + c); });
          continue;
        }
        visit(tile, [&](int i, int j, int64_t c) {
          const int64_t row = y + i, column = left + j;
          if (row < 0 || row >= plane.height || column < 0 || column >= plane.width) return vec<A>{};
          const T* from = image + (row * plane.width + column) * stride + c;
          return c + lanes<A> <= channels ? load(from) : load_partial(from, channels - c);
        });
      }
      return;
    }
    const int64_t columns = tiles_[1] * M + R - 1, stride = strip_stride();
    const T* image = plane.data + (n * plane.groups + group) * channels * plane.height * plane.width;
    fill_strip(image, channels, plane.height, plane.width, y, x, Size, columns, stride, s.strip);
    for (int64_t tile = 0; tile < tiles_[1]; ++tile)
      visit(tile, [&](int i, int j, int64_t c) { return load(s.strip + (i * columns + tile * M + j) * stride + c); });
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& g_;
  bool last_;
  int64_t channels_, filters_, tiles_[2], tile_rows_, round_rows_, rounds_, round_tiles_, channel_blocks_, panels_;
  int64_t block_pitch_, block_channels_, blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
