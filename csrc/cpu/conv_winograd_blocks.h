// What Winograd's kernels share, forward and backward input: blocks of tiles, panels of weights, the order of the
// steps.
//
// Idea: each tile of outputs is transformed to points, where convolution is a product over channels alone. The three
// steps are fused over blocks of tiles, so that neither the transformed input nor the products leave the cache:
// transform a block's tiles for all channels, V[row][channel]; per panel of written channels matrix products with
// 6 x 6 matrices of weights, M[row][column]; transform back. Weights are transformed once per call,
// U[panel][point][channel][column]. NCHW tensors go through a strip buffer in NHWC order per row of tiles. Backward
// input is the same with rotated weights, the roles of the channels exchanged.
// In 3-D, each written slice is an image of its own, whose read channels are those of all the slices that its taps
// along z read, zeros outside the tensor: a row of V has [tap along z][channel], and so has U.
// Few tiles (small maps, small batches) would make the transformed weights, four times the weights, the traffic that
// counts. Then the roles turn: the tiles are transformed first, all of them, and each task takes a panel of weights,
// transforms some channels of it, and multiplies all tiles with them while they are in cache. Where each thread has
// many panels it transforms all tiles for itself: to read what another core has just written takes longer, several
// times across the parts of a processor, and no thread waits for another. Memory: many tiles, 36 weights (6 of one line
// of taps) packed for each filter, channel and cell (4 x those of a 3x3 kernel), and per thread the rows of a block x
// (channels + panel); few tiles, the rows of at most kFewTiles x channels shared or per thread, and per thread one
// panel's chunk. Never proportional to the batch.
#pragma once
#include <numeric>

#include "conv_lines.h"
#include "conv_winograd_shallow.h"

namespace convlab::cpu::CONVLAB_ISA {

// Kernel, the derived class, says how a tile is transformed:
//   kBlockTiles, kFewTiles          tiles of a block; up to how many in all the weights are read once
//   strip_size(tiles)               elements of the strip buffer for a row of so many tiles
//   transform_input(group, block, strip, input, scratch), multiply(..), transform_output(..)
//   past_caches_                    whether outputs are written past the caches
template <class T, class Cut, class Kernel>
class WinogradBlocks {
 public:
  using A = accumulate_t<T>;
  // Taps and matrices along the axes, and in all.
  static constexpr int Ry = Cut::kTaps[0], Rx = Cut::kTaps[1], kTaps = Ry * Rx;
  static constexpr int Ny = Cut::kMatrices[0], Nx = Cut::kMatrices[1], kPoints = Ny * Nx;

  ConvPlan plan() const {
    const int64_t groups = t_.geometry.groups;
    ConvPlan plan;
    if (few_tiles_ && !apart_) {
      plan.prepare_tasks = groups * images_ * tiles_[0];
      plan.shared_bytes = groups * input_size() * static_cast<int64_t>(sizeof(A));
    }
    if (!few_tiles_) {
      plan.pack_tasks = groups * panels_ * divide_up(depth_, kPackedChannels);
      plan.packed_bytes = groups * panels_ * panel_weights() * static_cast<int64_t>(sizeof(A));
    }
    plan.run_tasks = groups * (few_tiles_ ? panel_ranges_ : blocks_);
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // Many tiles: U of some channels of a panel.
  void pack(int64_t task) const {
    const int64_t blocks = divide_up(depth_, kPackedChannels);
    const int64_t begin = task % blocks * kPackedChannels, end = std::min(depth_, begin + kPackedChannels);
    const int64_t panel = task / blocks % panels_, group = task / blocks / panels_;
    const int width = width_of(panel);
    transform_weights(group, panel, begin, end, point_stride(depth_), packed(group, panel) + begin * width);
  }

  // Few tiles: the input of a row of them.
  void prepare(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t rows = images_ * tiles_[0], row = task % rows, group = task / rows;
    for_each_strip({row * tiles_[1], tiles_[1]}, [&](Strip strip) {
      strip.tile += row * tiles_[1];
      kernel().transform_input(group, {0, all_tiles_}, strip, static_cast<A*>(arguments_.shared) + group * input_size(),
                               s);
    });
  }

  void run(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    if (few_tiles_) return run_panels(task / panel_ranges_, task % panel_ranges_, s);
    const int64_t group = task / blocks_, begin = task % blocks_ * block_tiles_;
    const Block block = {begin, std::min(block_tiles_, all_tiles_ - begin)};
    for_each_strip(block, [&](const Strip& strip) { kernel().transform_input(group, block, strip, s.input, s); });
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int width = width_of(panel);
      for (int64_t c = 0; !shallow_ && c < depth_; c += chunk_)
        kernel().multiply(panel, block, s.input + c, packed(group, panel) + c * width, point_stride(depth_),
                          std::min(chunk_, depth_ - c), c > 0, s);
      write_panel(group, panel, block, s);
    }
  }

 protected:
  // All tiles of a problem with few channels have all points.
  static constexpr bool kMayBeShallow = !Cut::kHalves && !Cut::kSmallerTiles && Ny == Nx;
  // Channels of a panel of U that are in L2 at a time: 36 points x 16 KB.
  static constexpr int64_t kFewTilesChunk = 16384 / static_cast<int64_t>(kPanel<A> * sizeof(A));
  // Of a row of them, so that the strip buffer is in L2.
  static constexpr int64_t kStripTiles = 128;
  // Whose filters are brought into order at a time.
  static constexpr int64_t kPackedChannels = 16;
  // At least, so that threads even out.
  static constexpr int64_t kBlocksPerThread = 3;
  // Written by a thread that transforms all tiles for itself, at least: many times what the transform takes.
  static constexpr int64_t kFewestColumns = 32;

  WinogradBlocks(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        t_(arguments),
        last_(arguments.layout == Layout::channels_last),
        forward_(arguments.pass == Pass::forward),
        cut_(winograd_cut(t_.geometry)),
        runs_(forward_ ? cut_ : cut_.without_parts(), t_.read_channels, arguments.layout) {
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = t_.written_size[axis + 1], padding = t_.geometry.padding[axis + 1];
      const int64_t parts = cut_.axis[axis].parts;
      outputs_[axis] = forward_ || parts == 1 ? divide_up(size, cut_.axis[axis].spread)
                                              : (size - 1 + padding) / parts - padding / parts + 1;
      if (Cut::kHalves && !forward_) outputs_[axis] = divide_up(size, 2);
      tiles_[axis] = divide_up(outputs_[axis], Cut::M[axis]);
    }
    images_ = t_.geometry.batch * t_.written_size[0] * cut_.spread();
    depth_ = t_.geometry.kernel[0] * runs_.count() * runs_.size();
    row_stride_ = round_up(depth_, lanes<A>) + lanes<A>;  // off a power of two: rows would share cache sets
    all_tiles_ = images_ * tiles_[0] * tiles_[1];
    const bool few = all_tiles_ <= Kernel::kFewTiles;
    shallow_ = kMayBeShallow && depth_ <= Shallow<A>::kMostDepth;
    // Threads per group; they are equally busy.
    const int64_t groups = t_.geometry.groups, threads = arguments.threads;
    const int64_t together = groups >= 4 * threads ? 1 : threads / std::gcd(threads, groups);
    const int64_t even = even_panels(together);
    apart_ = !shallow_ && few && threads > 1 && count_panels(even) >= together &&
             count_panels(even) * even >= together * kFewestColumns &&
             threads * TileRows<Cut>::kRows * all_tiles_ * row_stride_ * static_cast<int64_t>(sizeof(A)) <= kApartBytes;
    panel_columns_ = apart_ ? even : kPanel<A>;
    part_panels_ = divide_up(t_.written_channels, panel_columns_);
    panels_ = count_panels(panel_columns_);
    few_tiles_ = !shallow_ && few && groups * panels_ >= threads;
    panel_ranges_ = apart_ ? together : panels_;
    // Threads have like numbers of like blocks, few rather than small ones: every block reads all weights.
    const int64_t most = shallow_ ? Shallow<A>::kBlockTiles : Kernel::kBlockTiles * kTilesOf36Rows<Cut>;
    const int64_t wanted = threads == 1 ? 1 : divide_up(kBlocksPerThread * threads, groups);
    const int64_t blocks = round_up(std::max(wanted, divide_up(all_tiles_, most)), together);
    block_tiles_ = few_tiles_ ? all_tiles_ : std::max<int64_t>(divide_up(all_tiles_, blocks), kTileRows);
    blocks_ = divide_up(all_tiles_, block_tiles_);
    chunk_ = std::min(depth_, few ? kFewTilesChunk : kDepth);  // whatever the number of threads
  }

  struct Scratch {
    A* input;    // V[row][channel], unless it is shared
    A* product;  // M[row][column]
    A* weights;  // a chunk of U[point][channel][column], unless they are shared
    A* strip;    // [y][x][channel or column]
    A* bias;     // of one panel
    const A** rows;
    A** outputs;
  };

  // Consecutive tiles, in the order of images, rows and columns.
  struct Block {
    int64_t begin, tiles;
  };
  // Tiles of a block that lie in one row of tiles of one image.
  struct Strip {
    WinogradImage image;
    int64_t y, x;         // first output
    int64_t tile, tiles;  // first in the block, and how many
  };

  // M of `count` rows (+)= V of as many rows and `depth` channels times one matrix u of a panel's weights.
  void multiply_rows(const A* input, const A* u, int64_t depth, int vectors, int64_t count, bool accumulate, A* output,
                     const Scratch& s) const {
    TileProduct<A> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    product.panels = &u;
    product.depth = depth;
    product.accumulate = accumulate;
    // Rows are too short for the processor to foresee the next ones.
    const bool foretells = 2 * depth > row_stride_;
    if (foretells) product.ahead_step = kTileRows * row_stride_ * static_cast<int64_t>(sizeof(A)) / depth;
    for (int64_t row = 0, height; row < count; row += height) {
      const int64_t left = count - row;  // the last two tiles are of like heights
      height = left <= kTileRows ? left : left < 2 * kTileRows ? (left + 1) / 2 : kTileRows;
      for (int64_t r = 0; r < height; ++r) {
        s.rows[r] = input + (row + r) * row_stride_;
        s.outputs[r] = output + (row + r) * kPanel<A>;
      }
      if (foretells) product.ahead = s.rows[height - 1] + row_stride_;
      tile_kernel<A, 1>(static_cast<int>(height), vectors)(product);
    }
  }

  // Between the points of a panel of weights; off a power of two, as 36 streams are written at once.
  static int64_t point_stride(int64_t channels) { return channels * kPanel<A> + lanes<A>; }

  int64_t panel_weights() const { return kPoints * point_stride(depth_); }
  A* packed(int64_t group, int64_t panel) const {
    return static_cast<A*>(arguments_.packed) + (group * panels_ + panel) * panel_weights();
  }

  // Written channels of a panel, which belong to one part.
  int64_t first_column(int64_t panel) const { return panel % part_panels_ * panel_columns_; }
  int width_of(int64_t panel) const {
    return static_cast<int>(std::min(panel_columns_, round_up(t_.written_channels - first_column(panel), lanes<A>)));
  }
  // Along an axis, 0 or 1, which of the parts a panel writes in backward input.
  int64_t part_of(int64_t panel, int axis) const {
    const int64_t part = panel / part_panels_, across = forward_ ? 1 : cut_.axis[1].parts;
    return axis == 0 ? part / across : part % across;
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_, forward_, few_tiles_, shallow_;
  bool apart_;          // of few tiles, each thread transforms all
  WinogradCut cut_;     // forward reads its parts, backward input writes them
  Runs<T> runs_;        // of what is read
  int64_t images_;      // written slices, or residues of them
  int64_t depth_;       // read channels, of all taps along z and all parts
  int64_t row_stride_;  // of V
  int64_t outputs_[2], tiles_[2];
  int64_t panel_columns_, part_panels_, panels_, panel_ranges_;
  int64_t all_tiles_, block_tiles_, blocks_, chunk_;

 private:
  const Kernel& kernel() const { return static_cast<const Kernel&>(*this); }

  int64_t count_panels(int64_t columns) const {
    return (forward_ ? 1 : cut_.parts()) * divide_up(t_.written_channels, columns);
  }
  // The columns of a panel with which `threads` have like numbers of vectors to compute; wide ones take less loads.
  int64_t even_panels(int64_t threads) const {
    int64_t best = kTileVectors, least = INT64_MAX;
    for (int64_t width = kTileVectors; width >= 2; --width) {
      const int64_t most = divide_up(count_panels(width * lanes<A>), threads) * width;
      if (most < least) best = width, least = most;
    }
    return best * lanes<A>;
  }

  // Few tiles: some of the panels.
  void run_panels(int64_t group, int64_t range, const Scratch& s) const {
    const Block block = {0, all_tiles_};
    const A* input = apart_ ? s.input : static_cast<const A*>(arguments_.shared) + group * input_size();
    if (apart_)
      for_each_strip(block, [&](const Strip& strip) { kernel().transform_input(group, block, strip, s.input, s); });
    for (int64_t panel = panels_ * range / panel_ranges_; panel < panels_ * (range + 1) / panel_ranges_; ++panel) {
      for (int64_t begin = 0; begin < depth_; begin += chunk_) {
        const int64_t end = std::min(depth_, begin + chunk_);
        transform_weights(group, panel, begin, end, point_stride(chunk_), s.weights);
        kernel().multiply(panel, block, input + begin, s.weights, point_stride(chunk_), end - begin, begin > 0, s);
      }
      write_panel(group, panel, block, s);
    }
  }

  Scratch carve(Carver& carver) const {
    return {carver.take<A>(few_tiles_ && !apart_ ? 0 : input_size()),
            carver.take<A>(shallow_ ? 0 : TileRows<Cut>::kRows * block_tiles_ * kPanel<A>),
            carver.take<A>(few_tiles_ ? kPoints * point_stride(chunk_) : 0),
            carver.take<A>(kernel().strip_size(std::min({block_tiles_, tiles_[1], kStripTiles}))),
            carver.take<A>(kPanel<A>),
            carver.take<const A*>(kTileRows),
            carver.take<A*>(kTileRows)};
  }

  // Shallow products read rows of tiles beyond the last.
  int64_t input_size() const {
    return (TileRows<Cut>::kRows * block_tiles_ + (shallow_ ? Shallow<A>::kTiles : 0)) * row_stride_;
  }

  template <class Visit>
  void for_each_strip(Block block, const Visit& visit) const {
    for (int64_t tile = 0; tile < block.tiles;) {
      const int64_t index = block.begin + tile, column = index % tiles_[1], row = index / tiles_[1] % tiles_[0];
      const int64_t length = std::min({tiles_[1] - column, block.tiles - tile, kStripTiles});
      const WinogradImage image = winograd_image(index / tiles_[1] / tiles_[0], t_.written_size[0], cut_);
      visit(Strip{image, row * Cut::M[0], column * Cut::M[1], tile, length});
      tile += length;
    }
  }

  void write_panel(int64_t group, int64_t panel, Block block, const Scratch& s) const {
    t_.load_bias(group, first_column(panel), kPanel<A>, s.bias);
    for_each_strip(block, [&](const Strip& strip) { kernel().transform_output(group, panel, block, strip, s); });
    if (kernel().past_caches_) store_fence();
  }

  // G w G^T of the channels begin..end, of all taps along z and all cells, of one panel, to
  // target + point*point_stride + (channel-begin)*width.
  void transform_weights(int64_t group, int64_t panel, int64_t begin, int64_t end, int64_t point_stride,
                         A* target) const {
    const int width = width_of(panel);
    A filters[kPackedChannels * kTaps * lanes<A>];
    for (int64_t block = begin, channels; block < end; block += channels) {
      const int64_t channel = block % t_.read_channels, cell = block / t_.read_channels % runs_.cells();
      const int64_t slice = block / t_.read_channels / runs_.cells();
      channels = std::min({kPackedChannels, end - block, t_.read_channels - channel});
      int64_t seen[kTaps], place[kTaps];
      find_taps(panel, cell, seen);
      for (int lane = 0; lane < width; lane += lanes<A>) {
        load_filters(group, panel, lane, slice, channel, channels, seen, filters, place);
        for (int64_t c = 0; c < channels; ++c) {
          vec<A> w[kTaps], half[Ny * Rx];
          CONVLAB_UNROLL for (int tap = 0; tap < kTaps; ++tap) w[tap] =
              load(filters + (c * kTaps + place[tap]) * lanes<A>);
          CONVLAB_UNROLL for (int x = 0; x < Rx; ++x) transform<WeightTransform<Cut, 0>, A>(w + x, Rx, half + x, Rx);
          A* out = target + (block - begin + c) * width + lane;
          CONVLAB_UNROLL for (int y = 0; y < Ny; ++y) {
            vec<A> point[Nx];
            transform<WeightTransform<Cut, 1>, A>(half + y * Rx, 1, point, 1);
            CONVLAB_UNROLL for (int x = 0; x < Nx; ++x) store(out + (y * Nx + x) * point_stride, point[x]);
          }
        }
      }
    }
  }

  // The kernel's taps that a panel sees through a cell of what is read, -1 for those beyond the kernel; backward input
  // sees them rotated by 180 degrees.
  void find_taps(int64_t panel, int64_t cell, int64_t* seen) const {
    const int64_t across = runs_.axis[1].cells();
    int64_t first[2] = {cell / across, cell % across}, step[2];
    for (int axis = 0; axis < 2; ++axis) {
      const auto& cells = runs_.axis[axis];
      first[axis] = cells.offset(first[axis]), step[axis] = cells.parts;
      if (forward_) continue;
      const int64_t taps = Cut::kTaps[axis] * cells.segments, parts = cut_.axis[axis].parts;
      first[axis] = (taps - 1 - first[axis]) * parts + part_of(panel, axis), step[axis] = -parts;
    }
    const int64_t* kernel = t_.geometry.kernel + 1;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t y = first[0] + tap / Rx * step[0], x = first[1] + tap % Rx * step[1];
      seen[tap] = y < kernel[0] && x < kernel[1] ? y * kernel[1] + x : -1;
    }
  }

  // The seen taps between `channels` read channels from `channel` on and lanes<A> written channels from `lane` of a
  // panel on, of one tap along z, as [channel][place[tap]][lane].
  void load_filters(int64_t group, int64_t panel, int lane, int64_t slice, int64_t channel, int64_t channels,
                    const int64_t (&seen)[kTaps], A* filters, int64_t (&place)[kTaps]) const {
    const int64_t taps = t_.geometry.kernel[1] * t_.geometry.kernel[2], first = first_column(panel) + lane;
    const int64_t count = std::min<int64_t>(lanes<A>, t_.written_channels - first);
    const int64_t tap_stride = arguments_.weight_stride_tap;
    const T* source =
        arguments_.weight + t_.weight_offset(arguments_, group, channel, first) + slice * taps * tap_stride;
    const int64_t lane_stride = t_.weight_offset(arguments_, 0, 0, 1);
    const int64_t channel_stride = t_.weight_offset(arguments_, 0, 1, 0);
    if (tap_stride == 1 && taps == kTaps && seen[0] + seen[kTaps - 1] == kTaps - 1) {  // all, maybe rotated
      std::copy_n(seen, kTaps, place);
      if (channel_stride == taps)
        return transpose_matrix(source, lane_stride, count, channels * taps, filters, lanes<A>);
      for (int64_t c = 0; c < channels; ++c) {
        const T* from = source + c * channel_stride;
        transpose_matrix(from, lane_stride, count, taps, filters + c * taps * lanes<A>, lanes<A>);
        for (int64_t i = 0; i < lane_stride * lanes<A>; i += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(from + channels * channel_stride + i);  // the next ones
      }
      return;
    }
    for (int tap = 0; tap < kTaps; ++tap) {
      A* to = filters + tap * lanes<A>;
      const T* from = source + seen[tap] * tap_stride;
      place[tap] = tap;
      if (seen[tap] >= 0 && channel_stride == 1) {
        transpose_matrix(from, lane_stride, count, channels, to, kTaps * lanes<A>);
        for (int64_t k = 0; k < count; ++k) __builtin_prefetch(from + k * lane_stride + channels);  // the next ones
        continue;
      }
      for (int64_t c = 0; c < channels; ++c, from += channel_stride, to += kTaps * lanes<A>) {
        if (seen[tap] >= 0 && lane_stride == 1) {
          store(to, count == lanes<A> ? load(from) : load_partial(from, count));
          __builtin_prefetch(from + channels * channel_stride);
          continue;
        }
        store(to, vec<A>{});
        if (seen[tap] >= 0) copy_span<0>(from, lane_stride, count, to);
      }
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
