// implicit_gemm, backward weight, in both layouts.
//
// Idea: a product whose reduction runs over pixels. Channels last, rows are filters and columns are (tap, channel):
// grad_output is packed into stripes of a few filters, what the pixels read is gathered into panels. Channels first,
// rows are (channel, tap), gathered as in the forward pass, and columns are filters: grad_output is transposed into
// panels, which costs little because every column of the gathered matrix uses it. So it is in channels last, too, if
// there are few channels, where panels would be filled element by element. With few filters and stride 1 the tensors
// exchange roles: the same sums are those of patches of grad_output times pixels of the input, and few patches are
// gathered. Where a step of the reduction takes
// two elements (operand.h), they are neighbouring pixels; an odd block is filled up with zeros. Each chain of additions
// covers one block of pixels; blocks are added up in the workspace, which holds one sum per chunk of the batch's pixels
// so that small weights still give work to every thread. Chunks depend on the geometry alone, and `finish` adds them in
// order: the same bits for every number of threads. Cost: multiply_adds() plus a gather and a packing per block.
// Memory: chunks x weights, at most max(weights, kMaxPartialBytes); per thread the two packed blocks. Limits: fewer
// than `lanes` columns per group (depthwise) leave lanes idle.
#pragma once
#include "conv_gemm_channels_last.h"
#include "conv_gemm_gradient.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmWeight {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  explicit GemmWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        geometry_(without_needless_axes(arguments.geometry)),
        exchanged_(exchanges_roles(geometry_)),
        patched_(exchanged_ ? arguments.output : arguments.input),
        gradient_(packing_of(arguments, exchanged_)) {
    if (exchanged_) geometry_ = with_roles_exchanged(geometry_);
    last_ = arguments.layout == Layout::channels_last;
    channels_ = geometry_.in_channels_per_group();
    filters_ = geometry_.out_channels_per_group();
    const int64_t taps = geometry_.taps(), patch = channels_ * taps;
    pointwise_ = taps == 1 && geometry_.input[2] == geometry_.output[2] && geometry_.input[1] == 1 &&
                 geometry_.input[0] == 1;  // what without_needless_axes makes of a 1x1 kernel
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
    in_place_ = !patch_rows_ && chunks_ == 1 && std::is_same_v<A, T> && pitch_ == columns_;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_ * geometry_.groups * split_count_ * part_count_;
    if (!in_place_) {
      plan.finish_tasks = geometry_.groups * divide_up(rows_, kFinishRows);
      plan.shared_bytes = chunks_ * geometry_.groups * rows_ * pitch_ * static_cast<int64_t>(sizeof(A));
    }
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One chunk of pixels, one part of the filters and one of the gathered matrix.
  void run(void* scratch, int64_t task) const {
    const int64_t first = task % part_count_ * part_size_;
    const Filters filters{first, std::min(part_size_, filters_ - first)};
    task /= part_count_;
    const int64_t split = task % split_count_, group = task / split_count_ % geometry_.groups;
    const int64_t chunk = task / split_count_ / geometry_.groups;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const Phase phase = phase_at(geometry_, Pass::forward, 0);
    const int64_t first_block = blocks_ * chunk / chunks_, last_block = blocks_ * (chunk + 1) / chunks_;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * kBlockPixels, pixels = std::min(kBlockPixels, pixels_ - begin);
      if (patch_rows_)
        multiply_patch_rows(phase, group, filters, chunk, split, begin, pixels, block > first_block, s);
      else
        multiply_patch_columns(phase, group, filters, chunk, split, begin, pixels, block > first_block, s);
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
        for (int64_t chunk = 1; chunk < chunks_; ++chunk) sum += load(partial(chunk, group, row) + column);
        if (exchanged_)
          store_exchanged(row, column, width, sum);
        else if (patch_rows_)
          store(sums[row - begin], sum);
        else
          store_columns(group, row, column, width, sum);
      }
      if (patch_rows_ && !exchanged_) store_transposed(group, begin, end - begin, column, width, sums);
    }
  }

 private:
  static constexpr int64_t kBlockPixels = GradientPacking<T>::kBlockPixels;  // one chain of additions
  static constexpr int kStripe = GradientPacking<T>::kStripe;
  static constexpr int64_t kRowPitch = GradientPacking<T>::kRowPitch;
  static constexpr int64_t kStripePitch = GradientPacking<T>::kStripePitch;
  static constexpr int64_t kPartFilters = 256;                             // filters of a task
  static constexpr int64_t kSplitPanels = 1024 / (kPanel<A> * sizeof(A));  // columns of a task: of patches
  static constexpr int64_t kSplitRows = 288;                               // rows of a task: of patches
  static constexpr int64_t kFewChannels = 4;
  static constexpr int64_t kEnoughTasks = 16;
  static constexpr int64_t kMaxPartialBytes = int64_t{32} << 20;
  static constexpr int kFinishRows = lanes<A>;
  // Off a power of two.
  static constexpr int64_t kPanelPitch = kBlockPixels * kPanel<A> + 64 / static_cast<int64_t>(sizeof(S));

  // Patches of grad_output would be rows, and there are fewer of them than of the input.
  static bool exchanges_roles(const ConvGeometry& g) {
    const bool unit_stride = g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1;
    return products<S> == 1 && g.groups == 1 && unit_stride && g.taps() > 1 && g.out_channels <= kFewChannels &&
           g.in_channels > kFewChannels && g.out_channels * g.taps() <= kSplitRows;
  }
  static GradientPacking<T> packing_of(const ConvArguments<T>& a, bool exchanged) {
    const ConvGeometry& g = a.geometry;
    if (exchanged) return {a.input, g.in_channels, g.in_channels, g.input_pixels()};
    return {a.output, g.out_channels, g.out_channels_per_group(), g.output_pixels()};
  }
  // Input pixel i meets output pixel i + padding - tap * dilation, so taps are counted from the last.
  static ConvGeometry with_roles_exchanged(ConvGeometry g) {
    std::swap(g.in_channels, g.out_channels);
    std::swap(g.input, g.output);
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      g.padding[axis] = g.dilation[axis] * (g.kernel[axis] - 1) - g.padding[axis];
    return g;
  }

  struct Scratch {
    // Columns are patches; rows are.
    S* gathered;  // [panel][step][column][products]; [row][pixel]
    S* gradient;  // [stripe][step][filter][products]; [panel][step][filter][products]
    S* spare;     // zeros; `lanes` rows of grad_output
    Run* runs;
    A** outputs;
    const S** rows;
  };

  Scratch carve(Carver& carver) const {
    const int64_t taps = geometry_.taps();
    const int64_t gathered = patch_rows_ ? split_size_ * taps * kRowPitch
                                         : std::min(kSplitPanels, divide_up(columns_, kPanel<A>)) * kPanelPitch;
    const int64_t gradient = patch_rows_ ? round_up(part_size_, lanes<A>) * (kBlockPixels + products<S>)
                                         : divide_up(part_size_, kStripe) * kStripePitch;
    const int64_t spare = products<S> == 1 ? 0 : patch_rows_ ? lanes<A> * kRowPitch : kPanel<A>;
    return {carver.take<S>(gathered),       carver.take<S>(gradient),   carver.take<S>(spare),
            carver.take<Run>(kBlockPixels), carver.take<A*>(kTileRows), carver.take<const S*>(kTileRows)};
  }

  A* partial(int64_t chunk, int64_t group, int64_t row) const {
    if constexpr (std::is_same_v<A, T>)
      if (in_place_) return arguments_.weight + (group * rows_ + row) * pitch_;
    return static_cast<A*>(arguments_.shared) + ((chunk * geometry_.groups + group) * rows_ + row) * pitch_;
  }

  // ---- channels last: rows are filters, columns are (tap, channel)

  void multiply_patch_columns(const Phase& phase, int64_t group, const Filters& filters, int64_t chunk, int64_t split,
                              int64_t begin, int64_t pixels, bool accumulate, const Scratch& s) const {
    gradient_.pack_stripes(group, filters, begin, pixels, s.gradient);
    const int64_t first_column = split * split_size_, columns = std::min(split_size_, columns_ - first_column);
    if constexpr (products<S> == 2) std::fill(s.spare, s.spare + kPanel<A>, S{});
    gather_columns(phase, group, begin, pixels, first_column, columns, s);
    TileProduct<A, S> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    product.depth = divide_up(pixels, products<S>);
    product.accumulate = accumulate;
    const int64_t tiles = divide_up(filters.count, kTileRows);
    for (int64_t panel = 0; panel < divide_up(columns, kPanel<A>); ++panel) {
      const S* gathered = s.gathered + panel * kPanelPitch;
      product.panels = &gathered;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = first_row_of_tile(filters.count, tile, tiles);
        const int64_t height = first_row_of_tile(filters.count, tile + 1, tiles) - row;
        for (int64_t r = 0; r < height; ++r) {
          s.rows[r] = s.gradient + (row + r) / kStripe * kStripePitch + (row + r) % kStripe * products<S>;
          s.outputs[r] = partial(chunk, group, filters.first + row + r) + first_column + panel * kPanel<A>;
        }
        tile_kernel<A, kStripe, S>(static_cast<int>(height), panel_width<A>(columns, panel) / lanes<A>)(product);
      }
    }
  }

  static int64_t first_row_of_tile(int64_t rows, int64_t tile, int64_t tiles) {
    return kStripe == kTileRows ? std::min(rows, tile * kTileRows) : rows * tile / tiles;
  }

  // Panels of the `columns` from first_column on: each pixel's row is made of spans of channels, one per tap touched.
  void gather_columns(const Phase& phase, int64_t group, int64_t begin, int64_t pixels, int64_t first_column,
                      int64_t columns, const Scratch& s) const {
    const int64_t* size = geometry_.input;
    const int64_t stride = geometry_.in_channels;
    const int64_t first_tap = first_column / channels_, first_channel = first_column % channels_;
    const int64_t first_x = first_tap % geometry_.kernel[2], first_line = first_tap / geometry_.kernel[2];
    const int64_t first_y = first_line % geometry_.kernel[1], first_z = first_line / geometry_.kernel[1];
    const int64_t last_panel = columns / kPanel<A>, rest = columns % kPanel<A>;
    if (pointwise_) {
      const T* from = patched_ + begin * stride + group * channels_ + first_channel;
      for (int64_t p = 0; p < pixels; p += products<S>, from += products<S> * stride) {
        for (int64_t i = 0; i < products<S>; ++i) prefetch_row(from + i * stride, stride, columns);
        copy_to_panels(from, p + 1 < pixels ? from + stride : nullptr, p, 0, columns, columns, s);
      }
    } else {
      PixelWalk pixel(phase, begin);
      for (int64_t p = 0; p < pixels; p += products<S>) {
        const PixelWalk first = pixel;
        pixel.advance(1);
        const PixelWalk second = pixel;
        if constexpr (products<S> == 2) pixel.advance(1);
        int64_t channel = first_channel, jx = first_x, jy = first_y, jz = first_z;
        // With one group, taps of a kernel line that lie inside the input's line are one span.
        const bool both_inside = is_inside(phase, first) && (products<S> == 1 || is_inside(phase, second));
        for (int64_t column = 0; column < columns;) {
          const int64_t together = both_inside ? geometry_.kernel[2] - jx : 1;
          const int64_t count = std::min(together * channels_ - channel, columns - column);
          const auto source = [&](const PixelWalk& pixel) -> const T* {
            const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
            const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
            const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset(jx);
            if (z < 0 || z >= size[0] || y < 0 || y >= size[1] || x < 0 || x >= size[2]) return nullptr;
            return patched_ + (((pixel.n * size[0] + z) * size[1] + y) * size[2] + x) * stride + group * channels_ +
                   channel;
          };
          const T* next = products<S> == 2 && p + 1 < pixels ? source(second) : nullptr;
          copy_to_panels(source(first), next, p, column, count, columns, s);
          column += count;
          channel = 0;
          jx += together;
          if (jx == geometry_.kernel[2]) {
            jx = 0;
            if (++jy == geometry_.kernel[1]) jy = 0, ++jz;
          }
        }
      }
    }
    const int64_t width = round_up(rest, lanes<A>) * products<S>, used = rest * products<S>;
    S* panel = s.gathered + last_panel * kPanelPitch;
    if (used < width)
      for (int64_t step = 0; step < divide_up(pixels, products<S>); ++step)
        std::fill(panel + step * width + used, panel + (step + 1) * width, S{});
  }

  // `count` elements of pixel p, and of the next one where they make pairs, go to the columns from `column` on; null
  // stands for zeros.
  CONVLAB_INLINE void copy_to_panels(const T* from, [[maybe_unused]] const T* next, int64_t p, int64_t column,
                                     int64_t count, int64_t columns, const Scratch& s) const {
    for (const int64_t end = column + count; column < end;) {
      const int64_t panel = column / kPanel<A>, within = column % kPanel<A>;
      const int64_t length = std::min(kPanel<A> - within, end - column);
      S* to = s.gathered + panel * kPanelPitch + p * panel_width<A>(columns, panel) + within * products<S>;
      if constexpr (products<S> == 2) {
        interleave<1>(from ? from : s.spare, next, 1, length, to);
      } else if (!from) {
        std::fill(to, to + length, S{});
      } else if (length == kPanel<A>) {
        CONVLAB_UNROLL for (int j = 0; j < kPanel<A>; j += lanes<A>) store(to + j, load(from + j));
      } else {
        copy_span<1>(from, 1, length, to);
      }
      if (from) from += length;
      if (next) next += length;
      column += length;
    }
  }

  // Whether a kernel line of all taps and channels is one span of the input's line.
  bool is_inside(const Phase& phase, const PixelWalk& pixel) const {
    const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset(0);
    return geometry_.groups == 1 && geometry_.dilation[2] == 1 && x >= 0 &&
           x + geometry_.kernel[2] <= geometry_.input[2];
  }

  void store_columns(int64_t group, int64_t filter, int64_t column, int64_t width, vec<A> sum) const {
    T* target = arguments_.weight + (group * filters_ + filter) * arguments_.weight_stride_filter() + column;
    if (width == lanes<A>)
      store(target, sum);
    else
      store_partial(target, sum, width);
  }

  // ---- channels first, or few channels: columns are filters, rows are what lies in that order in the weight,
  // (channel, tap) or (tap, channel)

  void multiply_patch_rows(const Phase& phase, int64_t group, const Filters& filters, int64_t chunk, int64_t split,
                           int64_t begin, int64_t pixels, bool accumulate, const Scratch& s) const {
    const int64_t taps = geometry_.taps(), first_channel = split * split_size_;
    const int64_t channels = std::min(split_size_, channels_ - first_channel);
    PixelWalk pixel(phase, begin);
    int64_t run_count = 0;
    for (int64_t column = 0; column < pixels;) {
      const int64_t length = std::min(pixel.left_in_row(), pixels - column);
      s.runs[run_count++] = {pixel.n, pixel.z, pixel.y, pixel.x, length, column, column, kRowPitch};
      pixel.advance(length);
      column += length;
    }
    const int64_t image = geometry_.input_pixels(), channel_stride = last_ ? 1 : image;
    const GatherSource<T> source{patched_ + (group * channels_ + first_channel) * channel_stride,
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
      gradient_.transpose_panels(group, filters, begin, pixels, s.gradient, s.spare);
    else if constexpr (products<S> == 1)
      gradient_.copy_panels(group, filters, begin, pixels, s.gradient);

    TileProduct<A, S> product;
    product.rows = s.rows;
    product.outputs = s.outputs;
    product.depth = steps;
    product.accumulate = accumulate;
    const int64_t tiles = divide_up(rows, kTileRows);
    for (int64_t column = 0; column < filters.count; column += kPanel<A>) {
      const S* panel = s.gradient + column * kBlockPixels;
      product.panels = &panel;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
        for (int64_t r = 0; r < height; ++r) {
          s.rows[r] = s.gathered + (row + r) * kRowPitch;
          s.outputs[r] = partial(chunk, group, first_channel * taps + row + r) + filters.first + column;
        }
        tile_kernel<A, 1, S>(static_cast<int>(height), panel_width<A>(filters.count - column, 0) / lanes<A>)(product);
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
  ConvGeometry geometry_;
  bool exchanged_;  // patches are of grad_output, which has few channels
  const T* patched_;
  GradientPacking<T> gradient_;
  bool last_, pointwise_;
  bool patch_rows_;  // rows of the product are parts of patches, columns are filters; or the other way round
  bool in_place_;    // sums are kept in the weight itself
  int64_t channels_, filters_, rows_, columns_, pitch_, split_count_, split_size_, part_count_, part_size_;
  int64_t pixels_, blocks_, chunks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
