// implicit_gemm, backward weight, in both layouts.
//
// Idea: a product whose reduction runs over pixels. Channels last, rows are filters and columns are (tap, channel):
// grad_output is packed into stripes of a few filters, what the pixels read is gathered into panels. With one tap a
// panel is packed by the first tile that uses it, and what comes next is fetched from memory while tiles are
// multiplied; the tensor with the fewer channels makes the rows. Channels first, rows are (channel, tap), gathered as
// in the forward pass, and columns are filters: grad_output is transposed into panels, which costs little because every
// column of the gathered matrix uses it. So it is in channels last, too, if there are few channels, where panels would
// be filled element by element. With few filters and stride 1 the tensors exchange roles: the same sums are those of
// patches of grad_output times pixels of the input, and few patches are gathered. Where a step of the reduction takes
// two elements (operand.h), they are neighbouring pixels; an odd block is filled up with zeros. Each chain of additions
// covers one block of pixels. Blocks are added up (in scratch memory, if they would share cache sets) in chunks: one
// sum per chunk of the batch's pixels is kept in the workspace, so that small weights still give work to every thread,
// and `finish` adds them in order. Chunks depend on the geometry alone: the same bits for every number of threads.
// Where columns are patches and parts of the weight are tasks enough, a task adds up its chunks by itself, in the same
// order. Cost: multiply_adds() plus a gather and a packing per block. Memory: chunks x weights, or one weight, at most
// max(weights, kMaxPartialBytes); per thread the two packed blocks and the sums of a part of the weight. Limits: fewer
// than `lanes` columns per group (depthwise) leave lanes idle.
#pragma once
#include "conv_gemm_channels_last.h"
#include "conv_patch_panels.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmWeight {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  explicit GemmWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        exchanged_(exchanges_roles(arguments)),
        geometry_(geometry_of(arguments.geometry, exchanged_)),
        patches_(exchanged_ ? arguments.output : arguments.input, geometry_),
        gradient_(packing_of(arguments, exchanged_)) {
    last_ = arguments.layout == Layout::channels_last;
    channels_ = geometry_.in_channels_per_group();
    filters_ = geometry_.out_channels_per_group();
    const int64_t taps = geometry_.taps(), patch = channels_ * taps;
    // Strided pixels cannot be fetched ahead for the next panel, which a panel of one cache line would need.
    packs_panels_ =
        kUnconverted && patch % lanes<A> == 0 && (kTileVectors > 2 ? patches_.is_unpadded_tap() : patches_.pointwise());
    const bool few = geometry_.groups == 1 && channels_ <= kFewChannels && taps > 1 && patch <= kSplitRows;
    patch_rows_ = !last_ || (few && products<S> == 1);
    rows_ = patch_rows_ ? patch : filters_;
    columns_ = patch_rows_ ? filters_ : patch;
    pitch_ = round_up(columns_, lanes<A>);
    if (!patch_rows_) {
      split_count_ = divide_up(columns_, kSplitPanels * kPanel<A>);
      split_size_ = kSplitPanels * kPanel<A>;
    } else {
      split_size_ = std::min(channels_, std::max<int64_t>(1, kSplitRows / taps));
      split_count_ = divide_up(channels_, split_size_);
    }
    pixels_ = geometry_.batch * geometry_.output_pixels();
    blocks_ = divide_up(pixels_, kBlockPixels);
    const int64_t partial_bytes = geometry_.groups * rows_ * pitch_ * static_cast<int64_t>(sizeof(A));
    // Parts of the weight are better tasks than chunks of pixels, whose sums must be added up afterwards.
    part_size_ = std::min(filters_, kPartFilters);
    part_count_ = divide_up(filters_, part_size_);
    chunks_ = std::min(blocks_, divide_up(kEnoughTasks, geometry_.groups * split_count_ * part_count_));
    chunks_ = std::max<int64_t>(1, std::min(chunks_, kMaxPartialBytes / partial_bytes));
    const int64_t parts = geometry_.groups * split_count_ * part_count_;
    const bool enough_parts = parts >= 2 * arguments.threads || parts % arguments.threads == 0;
    task_chunks_ = !patch_rows_ && enough_parts ? chunks_ : 1;
    partials_ = chunks_ / task_chunks_;
    const bool share_sets = columns_ > split_size_ && pitch_ * static_cast<int64_t>(sizeof(A)) % kCacheSets == 0;
    sums_apart_ = !patch_rows_ && (task_chunks_ > 1 || share_sets);
    transposed_ = patch_rows_ != exchanged_;
    in_place_ = !patch_rows_ && !exchanged_ && partials_ == 1 && std::is_same_v<A, T> && pitch_ == columns_;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = partials_ * geometry_.groups * split_count_ * part_count_;
    if (!in_place_) {
      plan.finish_tasks = geometry_.groups * divide_up(rows_, kFinishRows);
      plan.shared_bytes = partials_ * geometry_.groups * rows_ * pitch_ * static_cast<int64_t>(sizeof(A));
    }
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One chunk of pixels, or all, one part of the filters and one of the gathered matrix.
  void run(void* scratch, int64_t task) const {
    Block block;
    block.filters.first = task % part_count_ * part_size_;
    block.filters.count = std::min(part_size_, filters_ - block.filters.first);
    task /= part_count_;
    block.split = task % split_count_;
    block.group = task / split_count_ % geometry_.groups;
    const int64_t first_chunk = task / split_count_ / geometry_.groups;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const Phase phase = phase_at(geometry_, Pass::forward, 0);
    if (!patch_rows_)
      for (int64_t k = 0; k < block.filters.count; ++k) {
        s.rows[k] = s.gradient + k / kStripe * kStripePitch + k % kStripe * products<S>;
        s.written[k] = partial(first_chunk, block.group, block.filters.first + k);
        s.outputs[k] = sums_apart_ ? s.sums + k * sum_pitch() : s.written[k] + block.split * split_size_;
      }
    for (block.chunk = first_chunk; block.chunk < first_chunk + task_chunks_; ++block.chunk) {
      const int64_t first = blocks_ * block.chunk / chunks_, last = blocks_ * (block.chunk + 1) / chunks_;
      for (int64_t i = first; i < last; ++i) {
        block.begin = i * kBlockPixels;
        block.pixels = std::min(kBlockPixels, pixels_ - block.begin);
        block.accumulate = i > first;
        block.is_last = i + 1 == last;
        if (patch_rows_)
          multiply_patch_rows(phase, block, s);
        else
          multiply_patch_columns(phase, block, s);
      }
    }
  }

  // Adds the chunks of some rows and writes them into the weight.
  void finish(int64_t task) const {
    const int64_t row_blocks = divide_up(rows_, kFinishRows), group = task / row_blocks;
    const int64_t begin = task % row_blocks * kFinishRows, end = std::min(rows_, begin + kFinishRows);
    A sums[kFinishRows][lanes<A>];
    for (int64_t column = 0; column < columns_; column += lanes<A>) {
      const int64_t width = std::min<int64_t>(lanes<A>, columns_ - column);
      for (int64_t row = begin; row < end; ++row) {
        vec<A> sum = load(partial(0, group, row) + column);
        for (int64_t chunk = 1; chunk < partials_; ++chunk) sum += load(partial(chunk, group, row) + column);
        if (transposed_)
          store(sums[row - begin], sum);
        else if (exchanged_)
          store_exchanged(row, column, width, sum);
        else
          store_columns(group, row, column, width, sum);
      }
      if (transposed_) store_transposed(group, begin, end - begin, column, width, sums);
    }
  }

 private:
  // Whether operands are what lies in the tensors.
  static constexpr bool kUnconverted = std::is_same_v<S, T> && products<S> == 1;
  static constexpr int64_t kBlockPixels = GradientPacking<T>::kBlockPixels;  // one chain of additions
  static constexpr int kStripe = GradientPacking<T>::kStripe;
  static constexpr int64_t kRowPitch = GradientPacking<T>::kRowPitch;
  static constexpr int64_t kStripePitch = GradientPacking<T>::kStripePitch;
  static constexpr int64_t kPartFilters = 256;                             // filters of a task
  static constexpr int64_t kSplitPanels = 1024 / (kPanel<A> * sizeof(A));  // columns of a task: of patches
  static constexpr int64_t kSplitRows = 288;                               // rows of a task: of patches
  static constexpr int64_t kCacheSets = 1024;  // parts of rows so many bytes apart share sets of the caches
  static constexpr int64_t kFewChannels = 4;
  static constexpr int64_t kFewRows = 128;  // of a pointwise product: with more, its panels cost little to pack
  static constexpr int64_t kEnoughTasks = 16;
  static constexpr int64_t kMaxPartialBytes = int64_t{32} << 20;
  static constexpr int kFinishRows = lanes<A>;
  // Patches of grad_output would be rows, and there are fewer of them than of the input. Or there is but one tap, and
  // packing costs less with the fewer channels as rows.
  static bool exchanges_roles(const ConvArguments<T>& a) {
    const ConvGeometry& g = a.geometry;
    if (products<S> == 2 || g.groups > 1 || g.stride[0] != 1 || g.stride[1] != 1 || g.stride[2] != 1) return false;
    if (g.taps() == 1)
      return a.layout == Layout::channels_last && kUnconverted && PatchPanels<T>(a.input, g).pointwise() &&
             g.in_channels >= kTileRows && g.in_channels <= kFewRows && g.in_channels < g.out_channels &&
             g.out_channels % lanes<A> == 0;
    return g.out_channels <= kFewChannels && g.in_channels > kFewChannels && g.out_channels * g.taps() <= kSplitRows;
  }
  static GradientPacking<T> packing_of(const ConvArguments<T>& a, bool exchanged) {
    const ConvGeometry& g = a.geometry;
    if (exchanged) return {a.input, g.in_channels, g.in_channels, g.input_pixels()};
    return {a.output, g.out_channels, g.out_channels_per_group(), g.output_pixels()};
  }
  static ConvGeometry geometry_of(const ConvGeometry& geometry, bool exchanged) {
    const ConvGeometry g = without_needless_axes(geometry);
    return exchanged ? with_roles_exchanged(g) : g;
  }
  // Input pixel i meets output pixel i + padding - tap * dilation, so taps are counted from the last.
  static ConvGeometry with_roles_exchanged(ConvGeometry g) {
    std::swap(g.in_channels, g.out_channels);
    std::swap(g.input, g.output);
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      g.padding[axis] = g.dilation[axis] * (g.kernel[axis] - 1) - g.padding[axis];
    return g;
  }

  // What is multiplied at a time: pixels from `begin` on, of a part of the filters and of a split of the patches.
  struct Block {
    int64_t group, chunk, split;
    Filters filters;
    int64_t begin, pixels;
    bool accumulate;  // to the blocks before
    bool is_last;     // of the chunk
  };

  struct Scratch {
    // Columns are patches; rows are.
    S* gathered;  // [panel][step][column][products]; [row][pixel]
    S* gradient;  // [stripe][step][filter][products]; [panel][step][filter][products]
    S* spare;     // zeros; `lanes` rows of grad_output
    A* sums;      // of a chunk's blocks, if they are apart: [filter][column]
    Run* runs;
    // Of a tile or, where columns are patches, of all filters of a part.
    A** outputs;
    A** written;
    const S** rows;
    const S** sources;
  };

  Scratch carve(Carver& carver) const {
    const int64_t taps = geometry_.taps();
    const int64_t gathered = patch_rows_
                                 ? split_size_ * taps * kRowPitch
                                 : std::min(kSplitPanels, divide_up(columns_, kPanel<A>)) * PatchPanels<T>::kPanelPitch;
    const int64_t gradient = patch_rows_ ? round_up(part_size_, lanes<A>) * (kBlockPixels + products<S>)
                                         : divide_up(part_size_, kStripe) * kStripePitch;
    const int64_t spare = products<S> == 1 ? 0 : patch_rows_ ? lanes<A> * kRowPitch : kPanel<A>;
    return {carver.take<S>(gathered),
            carver.take<S>(gradient),
            carver.take<S>(spare),
            carver.take<A>(sums_apart_ ? part_size_ * sum_pitch() : 0),
            carver.take<Run>(kBlockPixels),
            carver.take<A*>(std::max<int64_t>(kTileRows, part_size_)),
            carver.take<A*>(patch_rows_ ? 0 : part_size_),
            carver.take<const S*>(std::max<int64_t>(kTileRows, part_size_)),
            carver.take<const S*>(kBlockPixels + kSourcesAhead)};
  }

  // Off a power of two, as the sums of all rows are used together.
  int64_t sum_pitch() const { return std::min(split_size_, round_up(columns_, lanes<A>)) + lanes<A>; }

  A* partial(int64_t chunk, int64_t group, int64_t row) const {
    if constexpr (std::is_same_v<A, T>)
      if (in_place_) return arguments_.weight + (group * rows_ + row) * pitch_;
    return static_cast<A*>(arguments_.shared) + ((chunk * geometry_.groups + group) * rows_ + row) * pitch_;
  }

  // ---- channels last: rows are filters, columns are (tap, channel)

  void multiply_patch_columns(const Phase& phase, const Block& b, const Scratch& s) const {
    gradient_.pack_stripes(b.group, b.filters, b.begin, b.pixels, s.gradient);
    const PatchColumns columns{b.group, b.split * split_size_, std::min(split_size_, columns_ - b.split * split_size_)};
    const bool packs = packs_panels_ && b.filters.count >= kTileRows;
    if (packs)
      list_sources(phase, b, s.sources);
    else
      patches_.gather(phase, columns, b.begin, b.pixels, s.gathered, s.spare);
    TileProduct<A, S> product;
    product.sources = s.sources;
    product.depth = divide_up(b.pixels, products<S>);
    product.accumulate = b.accumulate;
    // The chunks before are added where they lie: what is written is its own residual.
    const Epilogue<A> epilogue(s.written[0], task_chunks_ > 1 && b.chunk > 0 ? s.written[0] : nullptr, {});
    if (b.is_last && sums_apart_) product.epilogue = &epilogue;
    const TileHeights heights(b.filters.count);
    for (int64_t first = 0; first < columns.count; first += kPanel<A>) {
      const int64_t panel = first / kPanel<A>;
      S* gathered = packs ? s.gathered : s.gathered + panel * PatchPanels<T>::kPanelPitch;
      const S* const panels[] = {gathered};
      product.panels = panels;
      product.packed = gathered;
      product.output_offset = first;
      product.written_offset = columns.first + first;
      const int vectors = panel_width<A>(columns.count, panel) / lanes<A>;
      for (int64_t tile = 0, row = 0; row < b.filters.count; row += heights.at(tile++)) {
        product.rows = s.rows + row;
        product.outputs = s.outputs + row;
        product.written = s.written + row;
        if (packs) look_ahead(b, columns, first, tile, s, product);
        if constexpr (kUnconverted)
          if (packs && tile == 0) {
            product.panel_offset = columns.first + first;
            packing_kernel<A, kStripe>(vectors)(product);
            product.panel_offset = 0;
            continue;
          }
        tile_kernel<A, kStripe, S>(heights.at(tile), vectors)(product);
      }
    }
  }

  void list_sources(const Phase& phase, const Block& b, const S** sources) const {
    if constexpr (kUnconverted) {
      const int64_t listed = b.pixels + kSourcesAhead, known = std::min(listed, pixels_ - b.begin);
      patches_.list_pixels(phase, b.group, b.begin, known, sources);
      std::fill(sources + known, sources + listed, sources[known - 1]);
    }
  }

  // While a tile is multiplied, a cache line per pixel is fetched: first those of the panel that comes next and then,
  // under the last panel, those of the next block's rows.
  void look_ahead(const Block& b, const PatchColumns& columns, int64_t column, int64_t tile, const Scratch& s,
                  TileProduct<A, S>& product) const {
    constexpr int64_t line = 64 / sizeof(S), panel_lines = kPanel<A> / line;
    const int64_t next = column + kPanel<A>, row = (tile - (patches_.pointwise() ? panel_lines : 0)) * line;
    const bool is_last = next >= columns.count, ends = b.begin + 2 * b.pixels > pixels_;  // so no whole block follows
    product.ahead = nullptr;
    if (is_last && ends) return;
    if (row < 0) {
      const int64_t pixel = is_last ? b.pixels * geometry_.in_channels : next;
      product.ahead = s.sources[0] + columns.first + pixel + tile * line;
      product.ahead_step = geometry_.in_channels * static_cast<int64_t>(sizeof(S));
    } else if (is_last && row < b.filters.count) {
      product.ahead = gradient_.at(b.group, b.filters, b.begin + b.pixels) + row;
      product.ahead_step = geometry_.out_channels * static_cast<int64_t>(sizeof(S));
    }
  }

  // How high the tiles of so many rows are: the first a whole one, if there are as many, the others alike; where a
  // stripe is a tile, all but the last whole ones.
  class TileHeights {
   public:
    explicit TileHeights(int64_t rows) : first_(static_cast<int>(std::min<int64_t>(rows, kTileRows))) {
      const int64_t left = rows - first_, others = divide_up(left, kTileRows);
      if (others == 0) return;
      higher_ = kStripe == kTileRows ? kTileRows : static_cast<int>(divide_up(left, others));
      count_ = kStripe == kTileRows ? others - 1 : left - others * (higher_ - 1);
      lower_ = kStripe == kTileRows ? static_cast<int>(left - count_ * higher_) : higher_ - 1;
    }
    int at(int64_t tile) const { return tile == 0 ? first_ : tile <= count_ ? higher_ : lower_; }

   private:
    int first_, higher_ = 0, lower_ = 0;
    int64_t count_ = 0;  // of the higher ones, which come before the lower ones
  };

  void store_columns(int64_t group, int64_t filter, int64_t column, int64_t width, vec<A> sum) const {
    T* target = arguments_.weight + (group * filters_ + filter) * arguments_.weight_stride_filter() + column;
    if (width == lanes<A>)
      store(target, sum);
    else
      store_partial(target, sum, width);
  }

  // ---- channels first, or few channels: columns are filters, rows are what lies in that order in the weight,
  // (channel, tap) or (tap, channel)

  void multiply_patch_rows(const Phase& phase, const Block& b, const Scratch& s) const {
    const int64_t taps = geometry_.taps(), first_channel = b.split * split_size_, pixels = b.pixels;
    const int64_t channels = std::min(split_size_, channels_ - first_channel);
    PixelWalk pixel(phase, b.begin);
    int64_t run_count = 0;
    for (int64_t column = 0; column < pixels;) {
      const int64_t length = std::min(pixel.left_in_row(), pixels - column);
      s.runs[run_count++] = {pixel.n, pixel.z, pixel.y, pixel.x, length, column, column, kRowPitch};
      pixel.advance(length);
      column += length;
    }
    const int64_t image = geometry_.input_pixels(), channel_stride = last_ ? 1 : image;
    const GatherSource<T> source{patches_.data() + (b.group * channels_ + first_channel) * channel_stride,
                                 geometry_.in_channels * image,
                                 channel_stride,
                                 last_ ? channels_ : 1,
                                 geometry_.input,
                                 channels};
    const int64_t rows = channels * taps, steps = divide_up(pixels, products<S>);
    gather<T, S, 1>(source, phase, s.runs, run_count, s.gathered, last_ ? 1 : taps, last_ ? channels : 1);
    for (int64_t pixel = pixels; pixel < steps * products<S>; ++pixel)
      for (int64_t row = 0; row < rows; ++row) s.gathered[row * kRowPitch + pixel] = S{};
    if (!last_)
      gradient_.transpose_panels(b.group, b.filters, b.begin, pixels, s.gradient, s.spare);
    else if constexpr (products<S> == 1)
      gradient_.copy_panels(b.group, b.filters, b.begin, pixels, s.gradient);

    TileProduct<A, S> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    product.depth = steps;
    product.accumulate = b.accumulate;
    const int64_t tiles = divide_up(rows, kTileRows);
    for (int64_t column = 0; column < b.filters.count; column += kPanel<A>) {
      const S* panel = s.gradient + column * kBlockPixels;
      product.panels = &panel;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
        for (int64_t r = 0; r < height; ++r) {
          s.rows[r] = s.gathered + (row + r) * kRowPitch;
          s.outputs[r] = partial(b.chunk, b.group, first_channel * taps + row + r) + b.filters.first + column;
        }
        tile_kernel<A, 1, S>(static_cast<int>(height), panel_width<A>(b.filters.count - column, 0) / lanes<A>)(product);
      }
    }
  }

  void store_transposed(int64_t group, int64_t first, int64_t count, int64_t filter, int64_t width,
                        A (&sums)[kFinishRows][lanes<A>]) const {
    vec<A> block[lanes<A>];
    for (int64_t r = 0; r < lanes<A>; ++r) block[r] = r < count ? load(sums[r]) : vec<A>{};
    transpose<A>(block);
    for (int64_t k = 0; k < width; ++k) {
      T* target = arguments_.weight + (group * filters_ + filter + k) * arguments_.weight_stride_filter() + first;
      if (count == lanes<A>)
        store(target, block[k]);
      else
        store_partial(target, block[k], count);
    }
  }

  // Roles exchanged: sums of a filter and tap, for some channels.
  void store_exchanged(int64_t row, int64_t channel, int64_t count, vec<A> sum) const {
    const int64_t taps = geometry_.taps(), filters = geometry_.in_channels;
    const int64_t filter = last_ ? row % filters : row / taps, tap = taps - 1 - (last_ ? row / filters : row % taps);
    const int64_t step = arguments_.weight_stride_channel;
    T* target = arguments_.weight + filter * arguments_.weight_stride_filter() + tap * arguments_.weight_stride_tap +
                channel * step;
    if (step == 1) {
      store_partial(target, sum, count);
    } else {
      A values[lanes<A>];
      store(values, sum);
      for (int64_t j = 0; j < count; ++j) target[j * step] = from_accumulate<T>(values[j]);
    }
  }

  const ConvArguments<T>& arguments_;
  bool exchanged_;  // patches are of grad_output, which has few channels or is the wider one
  ConvGeometry geometry_;
  PatchPanels<T> patches_;
  GradientPacking<T> gradient_;
  bool last_;
  bool patch_rows_;    // rows of the product are parts of patches, columns are filters; or the other way round
  bool transposed_;    // rows are channels of the weight, columns its filters
  bool in_place_;      // sums are kept in the weight itself
  bool packs_panels_;  // while the first tile is multiplied, instead of before
  bool sums_apart_;    // in scratch memory, until the last block of a chunk
  int64_t channels_, filters_, rows_, columns_, pitch_, split_count_, split_size_, part_count_, part_size_;
  int64_t pixels_, blocks_, chunks_;
  int64_t task_chunks_, partials_;  // chunks that a task adds up, and sums that are left for `finish`
};

}  // namespace convlab::cpu::CONVLAB_ISA
