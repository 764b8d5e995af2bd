// Winograd's backward-weight pass: the adjoint of the forward pass in its weights.
//
// With y = A^T [(G w G^T) * (B^T x B)] A, the gradient of w is G^T [ sum over tiles of (B^T x B) * (A dy A^T) ] G. So
// both tensors are transformed tile by tile into rows (conv_winograd_rows.h), each of which belongs to one of 36
// matrices of sums; rows of channels times rows of filters are added up there, and the sums are transformed back once.
// Tiles come in rounds of at most kRoundTiles, or more with few channels: the threads first transform the round's tiles
// of both tensors into shared memory, then every block of sums (some input channels x a panel of filters, all 36
// matrices) adds the round's products to itself. A block belongs to one task, so there is no reduction: same bits for
// every number of threads. In 3-D the slices of grad_output are images, and each tap along z has sums of its own, over
// the slices that it reads. Cost: the forward pass's, and, per round, reading and writing the sums. Memory: 4 x the
// weights for the sums if there are several rounds, and a round's rows x (input channels + filters). Limits: as
// forward; each chain of additions covers at most kDepth rows of a round.
#pragma once
#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T, class Cut>
class WinogradWeight {
 public:
  using A = accumulate_t<T>;

  explicit WinogradWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        g_(arguments.geometry),
        spread_(g_.dilation[1]),
        tile_rows_(divide_up(g_.output[1], spread_), divide_up(g_.output[2], spread_)),
        runs_(Cut::kHalves ? 1 : g_.stride[1], spread_, g_.in_channels_per_group(), arguments.layout),
        filter_runs_(1, spread_, g_.out_channels_per_group(), arguments.layout) {
    last_ = arguments.layout == Layout::channels_last;
    run_channels_ = round_up(runs_.size(), lanes<A>);
    channels_ = runs_.parts == 1 ? runs_.size() : runs_.count() * run_channels_;
    filters_ = g_.out_channels_per_group();
    for (int axis = 0; axis < 2; ++axis) tiles_[axis] = divide_up(divide_up(g_.output[axis + 1], spread_), M);
    slices_ = g_.kernel[0];
    lines_ = g_.batch * g_.output[0] * spread_ * spread_ * tiles_[0];
    // A round is whole lines of tiles; with few channels, more of them fit into the cache.
    const int64_t round_tiles = std::max(kRoundTiles, kRoundTiles * kRoundChannels / (channels_ + filters_));
    round_lines_ = std::min(lines_, std::max<int64_t>(1, round_tiles / tiles_[1]));
    rounds_ = divide_up(lines_, round_lines_);
    round_lines_ = divide_up(lines_, rounds_);
    room_ = round_lines_ * tiles_[1] | 1;
    channel_blocks_ = divide_up(channels_, lanes<A>);
    panels_ = divide_up(filters_, kPanel<A>);
    // Large blocks read the transformed tensors less often; how they are cut does not change a sum.
    int64_t vectors = kBlockVectors;
    while (vectors > 1 &&
           g_.groups * slices_ * divide_up(channel_blocks_, vectors) * panels_ < enough_tasks(arguments.threads))
      vectors /= 2;
    block_channels_ = vectors * lanes<A>;
    blocks_ = divide_up(channel_blocks_, vectors);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.rounds = rounds_;
    plan.prepare_tasks = g_.groups * round_lines_ * (slices_ + 1);
    plan.run_tasks = g_.groups * slices_ * blocks_ * panels_;
    Carver count(nullptr);
    carve_shared(count);
    plan.shared_bytes = count.used();
    Carver scratch(nullptr);
    carve(scratch);
    plan.scratch_bytes = scratch.used();
    return plan;
  }

  // One line of tiles, of the input through a tap along z or of grad_output.
  void prepare(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t part = task % (slices_ + 1), index = task / (slices_ + 1), group = index / round_lines_;
    const int64_t line = arguments_.round * round_lines_ + index % round_lines_;
    if (line >= lines_) return;
    if (part < slices_)
      transform_input(group, part, line, s);
    else
      transform_gradient(group, line, s);
  }

  // All matrices of one block of sums; after the last round, the block's weights.
  void run(void* scratch, int64_t task) const {
    const Shared shared = carve_shared();
    const Block block = block_at(task);
    const int width = panel_width<A>(filters_, block.panel);
    const int64_t tiles = divide_up(block.channels, kTileRows);
    Carver carver(scratch);
    const Scratch s = carve(carver);
    A* sums = rounds_ == 1 ? s.sums : shared.sums + task * sums_size();
    const A* input = shared.input + (block.group * slices_ + block.slice) * channel_blocks_ * pitch(lanes<A>);
    const A* gradient = shared.gradient + (block.group * panels_ + block.panel) * pitch(kPanel<A>);
    const auto begin = tile_rows_.position(round_begin());
    const auto end = tile_rows_.position(std::min(lines_, (arguments_.round + 1) * round_lines_) * tiles_[1]);
    const A* row[kTileRows];
    A* output[kTileRows];
    TileProduct<A> product;
    product.rows = row;
    product.outputs = output;
    for (int y = 0; y < N; ++y)
      for (int x = 0; x < N; ++x) {
        const int64_t depth = tile_rows_.rows_before(y, x, end) - tile_rows_.rows_before(y, x, begin);
        for (int64_t done = 0; done == 0 || done < depth; done += kDepth) {  // sums of no rows are zeros
          const int64_t first = Rows::first_row(y, x, room_) + done;
          const A* panel = gradient + first * width;
          product.panels = &panel;
          product.depth = std::min(kDepth, depth - done);
          product.accumulate = arguments_.round > 0 || done > 0;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t top = block.channels * tile / tiles, height = block.channels * (tile + 1) / tiles - top;
            for (int64_t r = 0; r < height; ++r) {
              const int64_t channel = block.first_channel + top + r;
              row[r] = input + channel / lanes<A> * pitch(lanes<A>) + first * lanes<A> + channel % lanes<A>;
              output[r] = sums + ((y * N + x) * block_channels_ + top + r) * kPanel<A>;
            }
            tile_kernel<A, lanes<A>>(static_cast<int>(height), width / lanes<A>)(product);
          }
        }
      }
    if (arguments_.round == rounds_ - 1) store_weights(block, sums, s.weights);
  }

 private:
  using Rows = TileRows<Cut>;
  static constexpr int M = Cut::M, R = Cut::R, N = Rows::kMatrices, kTaps = Cut::kTaps;
  static constexpr int kStep = Cut::kHalves ? 2 : 1;  // pixels of a run read per output, along an axis
  static constexpr int64_t kRoundTiles = Cut::kHalves ? 64 : 128, kRoundChannels = 128;
  static constexpr int64_t kBlockVectors = 2;  // of channels in a block: its sums stay in L2
  static constexpr int64_t kFilterPitch = round_up(lanes<A> * kTaps * kTaps, lanes<A>);

  struct Shared {
    A* input;     // [group][tap along z][channel/lanes][row][lane]
    A* gradient;  // [group][panel][row][filter of the panel]
    A* sums;      // [task][matrix][channel of the block][filter of the panel]; unused with one round
  };
  Shared carve_shared(Carver& carver) const {
    return {carver.take<A>(g_.groups * slices_ * channel_blocks_ * pitch(lanes<A>)),
            carver.take<A>(g_.groups * panels_ * pitch(kPanel<A>)),
            carver.take<A>(rounds_ == 1 ? 0 : g_.groups * slices_ * blocks_ * panels_ * sums_size())};
  }
  Shared carve_shared() const {
    Carver carver(arguments_.shared);
    return carve_shared(carver);
  }
  struct Scratch {
    A* strip;    // conv_winograd_source.h
    A* sums;     // of one block, if there is one round
    A* weights;  // [weight of a filter][filter of the panel] of some channels, then transposed
  };
  Scratch carve(Carver& carver) const {
    const int64_t input = runs_.strip_size(kStep * M + R - 1, tiles_[1] * kStep * M + R - 1);
    const int64_t gradient = filter_runs_.strip_size(M, tiles_[1] * M);
    return {carver.take<A>(std::max(input, gradient)), carver.take<A>(rounds_ == 1 ? sums_size() : 0),
            carver.take<A>(2 * lanes<A> * kFilterPitch)};
  }
  int64_t sums_size() const { return N * N * block_channels_ * kPanel<A>; }
  int64_t round_begin() const { return arguments_.round * round_lines_ * tiles_[1]; }
  // Elements between the rows of blocks of `width` channels or filters; off a power of two.
  int64_t pitch(int64_t width) const { return (Rows::kRows * room_ + 1) * width; }

  // Some input channels and a panel of filters of one group, and a tap along z.
  struct Block {
    int64_t group, slice, panel, first_channel, channels;
  };
  Block block_at(int64_t task) const {
    const int64_t first = task / panels_ % blocks_ * block_channels_, outer = task / panels_ / blocks_;
    return {outer / slices_, outer % slices_, task % panels_, first, std::min(block_channels_, channels_ - first)};
  }

  // ---- transforms of a line of tiles

  void transform_input(int64_t group, int64_t tap, int64_t line, const Scratch& s) const {
    constexpr int64_t step = kStep * M, middle[2] = {1, 1};
    A* target = carve_shared().input + (group * slices_ + tap) * channel_blocks_ * pitch(lanes<A>);
    const WinogradImage image = image_of(line);
    const int64_t slice = read_slice(g_, Pass::backward_weight, image.slice, tap);
    if (slice < 0) return clear_rows(target, line);
    const int64_t y = line % tiles_[0] * step * runs_.parts * spread_ - g_.padding[1];
    const auto row = tile_row(arguments_.input, runs_, g_.groups, group, g_.input, image, slice, y, -g_.padding[2],
                              step + R - 1, tiles_[1] * step + R - 1);
    visit_tiles(row, runs_, line, step, s, [&](const Tile& tile, int64_t run, const TileSource<A>& source) {
      A* to = target + run * run_channels_ / lanes<A> * pitch(lanes<A>);
      transform_input_tile<A, Cut, kStep>(tile, source, middle,
                                          RowBlocks<A>{to, lanes<A>, pitch(lanes<A>), lanes<A>, channels_, 0});
    });
  }

  void clear_rows(A* target, int64_t line) const {
    const auto strip = tile_rows_.strip_at(round_begin(), line * tiles_[1], room_);
    tile_rows_.for_each_tile(strip, tiles_[1], [&](const Tile& tile, int64_t) {
      for (int64_t block = 0; block < channel_blocks_; ++block)
        for (int i = 0; i < tile.lines(0); ++i)
          for (int j = 0; j < tile.lines(1); ++j)
            store(target + block * pitch(lanes<A>) + tile.row[i][j] * lanes<A>, vec<A>{});
    });
  }

  void transform_gradient(int64_t group, int64_t line, const Scratch& s) const {
    A* target = carve_shared().gradient + group * panels_ * pitch(kPanel<A>);
    const WinogradImage image = image_of(line);
    const auto row = tile_row(arguments_.output, filter_runs_, g_.groups, group, g_.output, image, image.slice,
                              line % tiles_[0] * M * spread_, 0, M, tiles_[1] * M);
    const int64_t last = (panels_ - 1) * kPanel<A>;
    const RowBlocks<A> place{target,    kPanel<A>, pitch(kPanel<A>),
                             kPanel<A>, last,      panel_width<A>(filters_, panels_ - 1)};
    visit_tiles(row, filter_runs_, line, M, s, [&](const Tile& tile, int64_t, const TileSource<A>& source) {
      transform_gradient_tile<A, Cut>(tile, source, place);
    });
  }

  WinogradImage image_of(int64_t line) const { return winograd_image(line / tiles_[0], g_.output[0], spread_); }

  // Calls visit(tile, run, source) for each tile of a line; tiles are `step` pixels of a run apart.
  template <class Visit>
  void visit_tiles(const TileRow<T>& row, const Runs<T>& runs, int64_t line, int64_t step, const Scratch& s,
                   const Visit& visit) const {
    const auto strip = tile_rows_.strip_at(round_begin(), line * tiles_[1], room_);
    for_each_run(row, runs, s.strip, [&](int64_t run, auto source) {
      tile_rows_.for_each_tile(strip, tiles_[1], [&](const Tile& tile, int64_t) {
        visit(tile, run, source);
        source.advance(step);
      });
    });
  }

  // ---- weights

  // G^T sums G of one block, into the weight: for each vector of filters and of channels, [channel and tap][filter] is
  // transposed, so that every filter's weights are written as they lie in memory.
  void store_weights(const Block& block, const A* sums, A* weights) const {
    const int width = panel_width<A>(filters_, block.panel);
    const bool taps_together = arguments_.weight_stride_tap == 1 || runs_.parts > 1;
    A* transposed = weights + lanes<A> * kFilterPitch;
    for (int lane = 0; lane < width; lane += lanes<A>)
      for (int64_t begin = 0; begin < block.channels; begin += lanes<A>) {
        const int64_t channels = std::min<int64_t>(lanes<A>, block.channels - begin);
        for (int64_t c = 0; c < channels; ++c) {
          vec<A> half[kTaps * N], w[kTaps * kTaps];
          for (int x = 0; x < N; ++x) {
            vec<A> u[N];
            CONVLAB_UNROLL for (int y = 0; y < N; ++y) u[y] =
                load(sums + ((y * N + x) * block_channels_ + begin + c) * kPanel<A> + lane);
            transform<WeightAdjoint<Cut>, A>(u, 1, half + x, N);
          }
          CONVLAB_UNROLL for (int y = 0; y < kTaps; ++y)
              transform<WeightAdjoint<Cut>, A>(half + y * N, 1, w + y * kTaps, 1);
          for (int tap = 0; tap < kTaps * kTaps; ++tap)
            store(weights + (taps_together ? c * kTaps * kTaps + tap : tap * channels + c) * lanes<A>, w[tap]);
        }
        transpose_matrix(weights, lanes<A>, channels * kTaps * kTaps, lanes<A>, transposed, kFilterPitch);
        if (runs_.parts > 1) {
          store_parts(block, begin, lane, transposed);
          continue;
        }
        const int64_t first = block.panel * kPanel<A> + lane, count = std::min<int64_t>(lanes<A>, filters_ - first);
        T* target = arguments_.weight + (block.group * filters_ + first) * arguments_.weight_stride_filter() +
                    (block.first_channel + begin) * arguments_.weight_stride_channel +
                    block.slice * kTaps * kTaps * arguments_.weight_stride_tap;
        const Epilogue<T> plain;
        for (int64_t k = 0; k < count; ++k, target += arguments_.weight_stride_filter())
          if (taps_together && slices_ == 1)
            plain.store_row(target, transposed + k * kFilterPitch, channels * kTaps * kTaps);
          else if (taps_together)
            for (int64_t c = 0; c < channels; ++c)
              plain.store_row(target + c * arguments_.weight_stride_channel,
                              transposed + k * kFilterPitch + c * kTaps * kTaps, kTaps * kTaps);
          else
            for (int tap = 0; tap < kTaps * kTaps; ++tap)
              plain.store_row(target + tap * arguments_.weight_stride_tap,
                              transposed + k * kFilterPitch + tap * channels, channels);
      }
  }

  // With parts, the taps of a vector of channels, [filter][channel][tap of the part], lie apart in the kernel.
  void store_parts(const Block& block, int64_t begin, int lane, const A* transposed) const {
    const int64_t first = block.panel * kPanel<A> + lane, count = std::min<int64_t>(lanes<A>, filters_ - first);
    const int64_t parts = runs_.parts, run = (block.first_channel + begin) / run_channels_;
    const int64_t in_run = (block.first_channel + begin) % run_channels_;
    for (int64_t c = 0; c < std::min<int64_t>(lanes<A>, runs_.size() - in_run); ++c) {
      const int64_t part_y = runs_.joined ? run : run / parts;
      const int64_t part_x = runs_.joined ? (in_run + c) / runs_.channels : run % parts;
      T* target = arguments_.weight + (block.group * filters_ + first) * arguments_.weight_stride_filter() +
                  (in_run + c) % runs_.channels * arguments_.weight_stride_channel +
                  block.slice * g_.kernel[1] * g_.kernel[2] * arguments_.weight_stride_tap;
      for (int tap = 0; tap < kTaps * kTaps; ++tap) {
        const int64_t y = tap / kTaps * parts + part_y, x = tap % kTaps * parts + part_x;
        if (y >= g_.kernel[1] || x >= g_.kernel[2]) continue;
        T* to = target + (y * g_.kernel[2] + x) * arguments_.weight_stride_tap;
        for (int64_t k = 0; k < count; ++k)
          Epilogue<T>{}.store_one(to + k * arguments_.weight_stride_filter(),
                                  transposed[k * kFilterPitch + c * kTaps * kTaps + tap]);
      }
    }
  }

  using Tile = typename Rows::Tile;
  const ConvArguments<T>& arguments_;
  const ConvGeometry& g_;
  int64_t spread_;  // the dilation
  Rows tile_rows_;
  Runs<T> runs_, filter_runs_;  // of the input and of grad_output
  bool last_;
  int64_t slices_;                   // of the kernel: taps along z
  int64_t run_channels_, channels_;  // with parts, runs are filled up to whole vectors
  int64_t filters_, tiles_[2], lines_, round_lines_, rounds_, channel_blocks_, panels_;
  int64_t room_;  // for tiles of a round; odd, or the rows of a tile would share cache sets
  int64_t block_channels_, blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
