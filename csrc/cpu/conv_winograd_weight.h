// Winograd's backward-weight pass: the adjoint of the forward pass in its weights.
//
// With y = A^T [(G w G^T) * (B^T x B)] A, the gradient of w is G^T [ sum over tiles of (B^T x B) * (A dy A^T) ] G. So
// both tensors are transformed tile by tile into rows (conv_winograd_rows.h), each of which belongs to one of 36
// matrices of sums; rows of channels times rows of filters are added up there, and the sums are transformed back once.
// Tiles come in rounds of at most kRoundTiles, or more with few channels: the round's tiles of both tensors are
// transformed, then every block of sums (some input channels x a panel of filters, all 36 matrices) adds the round's
// products to itself. Many tiles are cut into chunks besides, whose sums are kept apart and added up at the end, in
// order. The geometry alone decides what is a chunk and a round: same bits for every number of threads. Where chunks
// and panels are many enough, a task is a range of panels of a chunk, all of its rounds: a core reads no row that
// another wrote, which across the parts of a processor takes several times as long as from its own cache, and no thread
// waits for another; the input is transformed once per range. Otherwise the threads share each round's rows. In 3-D the
// slices of grad_output are images, and each tap along z has sums of its own, over the slices that it reads. Cost: the
// forward pass's, and, per round, reading and writing the sums. Memory: 4 x the weights per chunk for the sums, in all
// at most kSumsBytes where there are several; a round's rows x (input channels + filters), once or per thread. Limits:
// as forward; each chain of additions covers at most kDepth rows.
#pragma once
#include <numeric>

#include "conv_winograd_blocks.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T, class Cut>
class WinogradWeight {
 public:
  using A = accumulate_t<T>;

  explicit WinogradWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        g_(arguments.geometry),
        cut_(winograd_cut(g_)),
        tile_rows_(divide_up(g_.output[1], cut_.axis[0].spread), divide_up(g_.output[2], cut_.axis[1].spread)),
        runs_(cut_, g_.in_channels_per_group(), arguments.layout),
        filter_runs_(pixels_of(cut_), g_.out_channels_per_group(), arguments.layout) {
    last_ = arguments.layout == Layout::channels_last;
    run_channels_ = round_up(runs_.size(), lanes<A>);
    channels_ = runs_.cells() == 1 ? runs_.size() : runs_.count() * run_channels_;
    filters_ = g_.out_channels_per_group();
    for (int axis = 0; axis < 2; ++axis)
      tiles_[axis] = divide_up(divide_up(g_.output[axis + 1], cut_.axis[axis].spread), Cut::M[axis]);
    slices_ = g_.kernel[0];
    pieces_ = divide_up(tiles_[1], kLineTiles);
    line_tiles_ = divide_up(tiles_[1], pieces_);
    lines_ = g_.batch * g_.output[0] * cut_.spread() * tiles_[0] * pieces_;
    channel_blocks_ = divide_up(channels_, lanes<A>);
    panels_ = divide_up(filters_, kPanel<A>);
    const int64_t sums = g_.groups * slices_ * Ny * Nx * channel_blocks_ * lanes<A> * panels_ * kPanel<A>;
    const auto fewest_lines = [&](int64_t chunks) {
      return divide_up(chunks <= 4 ? kRoundTiles / 2 : kRoundTiles, line_tiles_);
    };
    while (chunks_ < kMostChunks && lines_ >= 2 * chunks_ * fewest_lines(2 * chunks_) &&
           2 * chunks_ * sums * static_cast<int64_t>(sizeof(A)) <= kSumsBytes)
      chunks_ *= 2;
    // A round is whole lines of tiles, or pieces of long ones; with few channels, more of them fit into the cache.
    const int64_t chunk_lines = divide_up(lines_, chunks_);
    const int64_t round_tiles = std::max(kRoundTiles, kRoundTiles * kRoundChannels / (channels_ + filters_));
    chunk_rounds_ = divide_up(chunk_lines, std::max<int64_t>(1, round_tiles / line_tiles_));
    round_lines_ = divide_up(chunk_lines, chunk_rounds_);
    rounds_ = chunks_ * chunk_rounds_;
    room_ = round_lines_ * line_tiles_ | 1;
    const int64_t threads = arguments.threads, chunks = g_.groups * chunks_;
    const int64_t ranges = chunks >= 4 * threads ? 1 : threads / std::gcd(threads, chunks);
    Carver rows(nullptr);
    carve_rows(rows, threads);
    apart_ = threads > 1 && rows.used() <= kApartBytes &&
             (ranges == 1 || (panels_ % ranges == 0 && ranges * kFewestFilters <= filters_));
    panel_ranges_ = apart_ ? ranges : 1;
    // Large blocks read the transformed tensors less often; how they are cut does not change a sum.
    int64_t vectors = kBlockVectors;
    while (!apart_ && vectors > 1 &&
           g_.groups * slices_ * divide_up(channel_blocks_, vectors) * panels_ < enough_tasks(arguments.threads))
      vectors /= 2;
    block_channels_ = vectors * lanes<A>;
    blocks_ = divide_up(channel_blocks_, vectors);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.rounds = apart_ ? 1 : rounds_;
    plan.prepare_tasks = g_.groups * (apart_ ? chunks_ * panel_ranges_ : round_lines_ * (slices_ + 1));
    plan.prepare_multiplies = apart_;
    plan.run_tasks = apart_ && chunks_ == 1 ? 0 : blocks_in_all();
    Carver count(nullptr);
    carve_shared(count);
    plan.shared_bytes = count.used();
    Carver scratch(nullptr);
    carve(scratch);
    plan.scratch_bytes = scratch.used();
    return plan;
  }

  // One line of tiles, of the input through a tap along z or of grad_output; or all that one chunk adds to the sums.
  void prepare(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    if (apart_)
      return add_chunk(task / panel_ranges_ / chunks_, task / panel_ranges_ % chunks_, task % panel_ranges_, s);
    const Round round = round_at(arguments_.round);
    const int64_t part = task % (slices_ + 1), index = task / (slices_ + 1), group = index / round_lines_;
    const int64_t line = round.begin + index % round_lines_;
    if (line < round.end) transform_line(group, part, round, line, {0, panels_}, rows_of(carve_shared(), group), s);
  }

  // All matrices of one block of sums; after the last round, the block's weights.
  void run(void* scratch, int64_t task) const {
    const Shared shared = carve_shared();
    const Block block = block_at(task);
    Carver carver(scratch);
    const Scratch s = carve(carver);
    A* sums = rounds_ == 1 ? s.sums : shared.sums + task * sums_size();
    if (!apart_) {
      const Round round = round_at(arguments_.round);
      add_products(block, round, rows_of(shared, block.group), rounds_ == 1 ? sums : chunk_sums(round.chunk, task));
      if (arguments_.round < rounds_ - 1) return;
    }
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const A* more = chunk_sums(chunk, task);
      for (int64_t i = 0; i < sums_size(); i += lanes<A>) store(sums + i, load(sums + i) + load(more + i));
    }
    store_weights(block, sums, s.weights);
  }

 private:
  using Rows = TileRows<Cut>;
  static constexpr int My = Cut::M[0], Mx = Cut::M[1], Ny = Cut::kMatrices[0], Nx = Cut::kMatrices[1];
  static constexpr int Ry = Cut::kTaps[0], Rx = Cut::kTaps[1], kTaps = Ry * Rx;
  static constexpr int kStep = Cut::kHalves ? 2 : 1;  // pixels of a run read per output, along an axis
  static constexpr int64_t kRoundTiles = (Cut::kHalves ? 64 : 128) * kTilesOf36Rows<Cut>, kRoundChannels = 128;
  static constexpr int64_t kFewestFilters = 32;  // of a range of panels: many times what the input's transform takes
  static constexpr int64_t kMostChunks = 32, kSumsBytes = int64_t{16} << 20;
  static constexpr int64_t kLineTiles = 128;   // transformed at a time: their strip buffer is in L2
  static constexpr int64_t kBlockVectors = 2;  // of channels in a block: its sums stay in L2
  static constexpr int64_t kFilterPitch = round_up(lanes<A> * kTaps, lanes<A>);

  // Of grad_output each pixel is read for itself.
  static WinogradCut pixels_of(const WinogradCut& cut) {
    WinogradCut pixels;
    for (int axis = 0; axis < 2; ++axis) pixels.axis[axis].spread = cut.axis[axis].spread;
    return pixels;
  }

  // The transformed tensors of a round.
  struct GroupRows {
    A* input;     // [tap along z][channel/lanes][row][lane]
    A* gradient;  // [panel][row][filter of the panel]
  };
  GroupRows carve_rows(Carver& carver, int64_t groups) const {
    A* input = carver.take<A>(groups * slices_ * channel_blocks_ * pitch(lanes<A>));
    return {input, carver.take<A>(groups * panels_ * pitch(kPanel<A>))};
  }
  struct Shared {
    GroupRows rows;  // of all groups, unless tasks have their own
    A* sums;         // [chunk][block][matrix][channel of the block][filter of the panel]; unused with one round
  };
  Shared carve_shared(Carver& carver) const {
    const GroupRows rows = carve_rows(carver, apart_ ? 0 : g_.groups);
    return {rows, carver.take<A>(rounds_ == 1 ? 0 : chunks_ * blocks_in_all() * sums_size())};
  }
  Shared carve_shared() const {
    Carver carver(arguments_.shared);
    return carve_shared(carver);
  }
  GroupRows rows_of(const Shared& shared, int64_t group) const {
    return {shared.rows.input + group * slices_ * channel_blocks_ * pitch(lanes<A>),
            shared.rows.gradient + group * panels_ * pitch(kPanel<A>)};
  }
  A* chunk_sums(int64_t chunk, int64_t task) const {
    return carve_shared().sums + (chunk * blocks_in_all() + task) * sums_size();
  }
  struct Scratch {
    GroupRows rows;  // of one group, unless they are shared
    A* strip;        // conv_winograd_source.h
    A* sums;         // of one block, if there is one round
    A* weights;      // [weight of a filter][filter of the panel] of some channels, then transposed
  };
  Scratch carve(Carver& carver) const {
    const int64_t input = runs_.strip_size(reads(0, 1), reads(1, line_tiles_));
    const int64_t gradient = filter_runs_.strip_size(My, line_tiles_ * Mx);
    return {carve_rows(carver, apart_ ? 1 : 0), carver.take<A>(std::max(input, gradient)),
            carver.take<A>(rounds_ == 1 ? sums_size() : 0), carver.take<A>(2 * lanes<A> * kFilterPitch)};
  }
  // Positions of the input along an axis that so many tiles read.
  int64_t reads(int axis, int64_t tiles) const { return runs_.axis[axis].positions(kStep * Cut::M[axis] * tiles); }
  int64_t sums_size() const { return Ny * Nx * block_channels_ * kPanel<A>; }
  int64_t first_tile(int64_t line) const { return line / pieces_ * tiles_[1] + first_column(line); }
  int64_t first_column(int64_t line) const { return line % pieces_ * line_tiles_; }
  int64_t tiles_of(int64_t line) const { return std::min(line_tiles_, tiles_[1] - first_column(line)); }
  int64_t blocks_in_all() const { return g_.groups * slices_ * blocks_ * panels_; }
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

  // Lines of tiles of one chunk.
  struct Round {
    int64_t chunk, begin, end;
    bool first;  // of its chunk
  };
  Round round_at(int64_t index) const {
    const int64_t chunk = index / chunk_rounds_, number = index % chunk_rounds_;
    const int64_t last = lines_ * (chunk + 1) / chunks_;
    const int64_t begin = std::min(last, lines_ * chunk / chunks_ + number * round_lines_);
    return {chunk, begin, std::min(last, begin + round_lines_), number == 0};
  }

  struct Panels {
    int64_t begin, end;
  };

  void add_chunk(int64_t group, int64_t chunk, int64_t range, const Scratch& s) const {
    const Panels panels{panels_ * range / panel_ranges_, panels_ * (range + 1) / panel_ranges_};
    for (int64_t number = 0; number < chunk_rounds_; ++number) {
      const Round round = round_at(chunk * chunk_rounds_ + number);
      for (int64_t part = 0; part <= slices_; ++part)
        for (int64_t line = round.begin; line < round.end; ++line)
          transform_line(group, part, round, line, panels, s.rows, s);
      for (int64_t block = group * slices_ * blocks_; block < (group + 1) * slices_ * blocks_; ++block)
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          const int64_t task = block * panels_ + panel;
          A* sums = rounds_ == 1 ? s.sums : chunk_sums(chunk, task);
          add_products(block_at(task), round, s.rows, sums);
          if (number == rounds_ - 1) store_weights(block_at(task), sums, s.weights);  // there is one chunk
        }
    }
  }

  void add_products(const Block& block, const Round& round, const GroupRows& rows, A* sums) const {
    const int width = panel_width<A>(filters_, block.panel);
    const int64_t tiles = divide_up(block.channels, kTileRows);
    const A* input = rows.input + block.slice * channel_blocks_ * pitch(lanes<A>);
    const A* gradient = rows.gradient + block.panel * pitch(kPanel<A>);
    const auto begin = tile_rows_.position(first_tile(round.begin)), end = tile_rows_.position(first_tile(round.end));
    const A* row[kTileRows];
    A* output[kTileRows];
    TileProduct<A> product;
    product.rows = row;
    product.outputs = output;
    for (int y = 0; y < Ny; ++y)
      for (int x = 0; x < Nx; ++x) {
        const int64_t depth = tile_rows_.rows_before(y, x, end) - tile_rows_.rows_before(y, x, begin);
        for (int64_t done = 0; done == 0 || done < depth; done += kDepth) {  // sums of no rows are zeros
          const int64_t first = Rows::first_row(y, x, room_) + done;
          const A* panel = gradient + first * width;
          product.panels = &panel;
          product.depth = std::min(kDepth, depth - done);
          product.accumulate = !round.first || done > 0;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t top = block.channels * tile / tiles, height = block.channels * (tile + 1) / tiles - top;
            for (int64_t r = 0; r < height; ++r) {
              const int64_t channel = block.first_channel + top + r;
              row[r] = input + channel / lanes<A> * pitch(lanes<A>) + first * lanes<A> + channel % lanes<A>;
              output[r] = sums + ((y * Nx + x) * block_channels_ + top + r) * kPanel<A>;
            }
            tile_kernel<A, lanes<A>>(static_cast<int>(height), width / lanes<A>)(product);
          }
        }
      }
  }

  // ---- transforms of a line of tiles

  // Of the input through tap `part` along z, or, for the last part, of grad_output, of which some panels are wanted.
  void transform_line(int64_t group, int64_t part, const Round& round, int64_t line, Panels panels,
                      const GroupRows& rows, const Scratch& s) const {
    if (part < slices_)
      transform_input(group, part, round, line, rows.input + part * channel_blocks_ * pitch(lanes<A>), s);
    else
      transform_gradient(group, round, line, panels, rows.gradient, s);
  }

  void transform_input(int64_t group, int64_t tap, const Round& round, int64_t line, A* target,
                       const Scratch& s) const {
    constexpr int64_t middle[2] = {1, 1};
    const WinogradImage image = image_of(line);
    const int64_t slice = read_slice(g_, Pass::backward_weight, image.slice, tap);
    if (slice < 0) return clear_rows(target, round, line);
    const auto &along_y = runs_.axis[0], &along_x = runs_.axis[1];
    const int64_t y = line / pieces_ % tiles_[0] * kStep * My * along_y.parts * along_y.spread - g_.padding[1];
    const int64_t x = first_column(line) * kStep * Mx * along_x.parts * along_x.spread - g_.padding[2];
    const auto row = tile_row(arguments_.input, runs_, g_.groups, group, g_.input, image, slice, y, x, reads(0, 1),
                              reads(1, tiles_of(line)));
    visit_tiles(row, runs_, round, line, kStep * Mx, s,
                [&](const Tile& tile, int64_t run, const TileSource<A>& source) {
                  A* to = target + run * run_channels_ / lanes<A> * pitch(lanes<A>);
                  transform_input_tile<A, Cut, kStep>(
                      tile, source, middle, RowBlocks<A>{to, lanes<A>, pitch(lanes<A>), lanes<A>, channels_, 0});
                });
  }

  void clear_rows(A* target, const Round& round, int64_t line) const {
    const auto strip = tile_rows_.strip_at(first_tile(round.begin), first_tile(line), room_);
    tile_rows_.for_each_tile(strip, tiles_of(line), [&](const Tile& tile, int64_t) {
      for (int64_t block = 0; block < channel_blocks_; ++block)
        for (int i = 0; i < tile.lines(0); ++i)
          for (int j = 0; j < tile.lines(1); ++j)
            store(target + block * pitch(lanes<A>) + tile.row[i][j] * lanes<A>, vec<A>{});
    });
  }

  void transform_gradient(int64_t group, const Round& round, int64_t line, Panels panels, A* target,
                          const Scratch& s) const {
    const WinogradImage image = image_of(line);
    const auto row = tile_row(arguments_.output, filter_runs_, g_.groups, group, g_.output, image, image.slice,
                              line / pieces_ % tiles_[0] * My * cut_.axis[0].spread,
                              first_column(line) * Mx * cut_.axis[1].spread, My, tiles_of(line) * Mx);
    const int64_t last = (panels_ - 1) * kPanel<A>;
    const RowBlocks<A> place{target,
                             kPanel<A>,
                             pitch(kPanel<A>),
                             kPanel<A>,
                             last,
                             panel_width<A>(filters_, panels_ - 1),
                             panels.begin * kPanel<A>,
                             panels.end * kPanel<A>};
    visit_tiles(row, filter_runs_, round, line, Mx, s, [&](const Tile& tile, int64_t, const TileSource<A>& source) {
      transform_gradient_tile<A, Cut>(tile, source, place);
    });
  }

  WinogradImage image_of(int64_t line) const { return winograd_image(line / pieces_ / tiles_[0], g_.output[0], cut_); }

  // Calls visit(tile, run, source) for each tile of a line; tiles are `step` pixels of a run apart.
  template <class Visit>
  void visit_tiles(const TileRow<T>& row, const Runs<T>& runs, const Round& round, int64_t line, int64_t step,
                   const Scratch& s, const Visit& visit) const {
    const auto strip = tile_rows_.strip_at(first_tile(round.begin), first_tile(line), room_);
    for_each_run(row, runs, s.strip, [&](int64_t run, auto source) {
      tile_rows_.for_each_tile(strip, tiles_of(line), [&](const Tile& tile, int64_t) {
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
    const bool apart = runs_.cells() > 1 || g_.kernel[1] * g_.kernel[2] != kTaps;
    const bool taps_together = arguments_.weight_stride_tap == 1 || apart;
    A* transposed = weights + lanes<A> * kFilterPitch;
    for (int lane = 0; lane < width; lane += lanes<A>)
      for (int64_t begin = 0; begin < block.channels; begin += lanes<A>) {
        const int64_t channels = std::min<int64_t>(lanes<A>, block.channels - begin);
        for (int64_t c = 0; c < channels; ++c) {
          vec<A> half[Ry * Nx], w[kTaps];
          for (int x = 0; x < Nx; ++x) {
            vec<A> u[Ny];
            CONVLAB_UNROLL for (int y = 0; y < Ny; ++y) u[y] =
                load(sums + ((y * Nx + x) * block_channels_ + begin + c) * kPanel<A> + lane);
            transform<WeightAdjoint<Cut, 0>, A>(u, 1, half + x, Nx);
          }
          CONVLAB_UNROLL for (int y = 0; y < Ry; ++y)
              transform<WeightAdjoint<Cut, 1>, A>(half + y * Nx, 1, w + y * Rx, 1);
          for (int tap = 0; tap < kTaps; ++tap)
            store(weights + (taps_together ? c * kTaps + tap : tap * channels + c) * lanes<A>, w[tap]);
        }
        transpose_matrix(weights, lanes<A>, channels * kTaps, lanes<A>, transposed, kFilterPitch);
        if (apart) {
          store_cells(block, begin, lane, transposed);
          continue;
        }
        const int64_t first = block.panel * kPanel<A> + lane, count = std::min<int64_t>(lanes<A>, filters_ - first);
        T* target = arguments_.weight + (block.group * filters_ + first) * arguments_.weight_stride_filter() +
                    (block.first_channel + begin) * arguments_.weight_stride_channel +
                    block.slice * kTaps * arguments_.weight_stride_tap;
        const Epilogue<T> plain;
        for (int64_t k = 0; k < count; ++k, target += arguments_.weight_stride_filter())
          if (taps_together && slices_ == 1)
            plain.store_row(target, transposed + k * kFilterPitch, channels * kTaps);
          else if (taps_together)
            for (int64_t c = 0; c < channels; ++c)
              plain.store_row(target + c * arguments_.weight_stride_channel, transposed + k * kFilterPitch + c * kTaps,
                              kTaps);
          else
            for (int tap = 0; tap < kTaps; ++tap)
              plain.store_row(target + tap * arguments_.weight_stride_tap,
                              transposed + k * kFilterPitch + tap * channels, channels);
      }
  }

  // The taps of a vector of channels, [filter][channel][tap of the cell], lie apart in the kernel.
  void store_cells(const Block& block, int64_t begin, int lane, const A* transposed) const {
    const int64_t first = block.panel * kPanel<A> + lane, count = std::min<int64_t>(lanes<A>, filters_ - first);
    const int64_t run = (block.first_channel + begin) / run_channels_;
    const int64_t in_run = (block.first_channel + begin) % run_channels_;
    const auto &along_y = runs_.axis[0], &along_x = runs_.axis[1];
    const int64_t across = runs_.joined ? 1 : along_x.cells();
    for (int64_t c = 0; c < std::min<int64_t>(lanes<A>, runs_.size() - in_run); ++c) {
      const int64_t channel = in_run + c, first_y = along_y.offset(run / across);
      const int64_t first_x = along_x.offset(runs_.joined ? channel / runs_.channels : run % across);
      T* target = arguments_.weight + (block.group * filters_ + first) * arguments_.weight_stride_filter() +
                  channel % runs_.channels * arguments_.weight_stride_channel +
                  block.slice * g_.kernel[1] * g_.kernel[2] * arguments_.weight_stride_tap;
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t y = first_y + tap / Rx * along_y.parts, x = first_x + tap % Rx * along_x.parts;
        if (y >= g_.kernel[1] || x >= g_.kernel[2]) continue;
        T* to = target + (y * g_.kernel[2] + x) * arguments_.weight_stride_tap;
        for (int64_t k = 0; k < count; ++k)
          Epilogue<T>{}.store_one(to + k * arguments_.weight_stride_filter(),
                                  transposed[k * kFilterPitch + c * kTaps + tap]);
      }
    }
  }

  using Tile = typename Rows::Tile;
  const ConvArguments<T>& arguments_;
  const ConvGeometry& g_;
  WinogradCut cut_;
  Rows tile_rows_;
  Runs<T> runs_, filter_runs_;  // of the input and of grad_output
  bool last_;
  int64_t slices_;                   // of the kernel: taps along z
  int64_t run_channels_, channels_;  // of several cells, runs are filled up to whole vectors
  int64_t filters_, tiles_[2], pieces_, line_tiles_, lines_, channel_blocks_, panels_;
  int64_t chunks_ = 1, chunk_rounds_, round_lines_, rounds_;
  bool apart_;            // tasks are ranges of panels of chunks
  int64_t panel_ranges_;  // of a chunk
  int64_t room_;          // for tiles of a round; odd, or the rows of a tile would share cache sets
  int64_t block_channels_, blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
