// implicit_gemm, backward input where the stride is the kernel: patch embeddings and upsampling.
//
// Idea: patches do not overlap, so every input element belongs to one tap of one output pixel and there is nothing to
// add up: one product [pixels x filters] x [filters x (channel, tap)], whose rows are scattered to their patches. By
// phases (conv_phase.h) each tap would be a product of its own, with as many columns as there are channels: three.
// Columns are ordered as a patch lies in memory, so that what is scattered are spans: a kernel line of pixels in
// N(D)HWC, of one channel in NC(D)HW. Cost: multiply_adds(), plus storing short spans. Memory: packed weights; per
// thread a block of pixels. Limits: no padding, no dilation.
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmPatches {
 public:
  using A = accumulate_t<T>;

  // Whether patches do not overlap and a tap alone would leave lanes idle or its stores apart.
  static bool suits(const ConvArguments<T>& arguments) {
    const ConvGeometry& g = arguments.geometry;
    if (arguments.pass != Pass::backward_input || g.taps() == 1) return false;
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      if (g.stride[axis] != g.kernel[axis] || g.padding[axis] != 0 || (g.dilation[axis] != 1 && g.kernel[axis] > 1))
        return false;
    return arguments.layout == Layout::channels_first || g.in_channels_per_group() % kPanel<A> != 0;
  }

  explicit GemmPatches(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        geometry_(arguments.geometry),
        epilogue_{arguments.input, arguments.residual, arguments.activation} {
    const ConvGeometry& g = geometry_;
    last_ = arguments.layout == Layout::channels_last;
    filters_ = g.out_channels_per_group();
    channels_ = g.in_channels_per_group();
    columns_ = channels_ * g.taps();
    span_ = last_ ? (g.groups == 1 ? g.kernel[2] * channels_ : channels_) : g.kernel[2];
    panels_ = divide_up(columns_, kPanel<A>);
    pixels_ = g.batch * g.output_pixels();
    row_blocks_ = std::max<int64_t>(1, divide_up(pixels_, kBlockRows));
    block_rows_ = divide_up(pixels_, row_blocks_);
    column_blocks_ = std::min(panels_, divide_up(enough_tasks(arguments.threads), g.groups * row_blocks_));
    block_panels_ = divide_up(panels_, column_blocks_);
    column_blocks_ = divide_up(panels_, block_panels_);
    products_ = g.groups * row_blocks_ * column_blocks_;
    bool rest = false;
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      covered_[axis] = g.output[axis] * g.kernel[axis];
      rest |= covered_[axis] < g.input[axis];
    }
    rest_lines_ = rest ? g.batch * g.input[0] * g.input[1] : 0;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = geometry_.groups * panels_;
    plan.run_tasks = products_ + rest_lines_;
    plan.packed_bytes = geometry_.groups * group_weights() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One panel of weights, [filter][column].
  void pack(int64_t task) const {
    const int64_t panel = task % panels_, group = task / panels_, first = panel * kPanel<A>;
    const int width = panel_width<A>(columns_, panel);
    A* target = packed(group, panel);
    const T* source = arguments_.weight + group * filters_ * arguments_.weight_stride_filter();
    int64_t offset[kPanel<A>];
    for (int64_t j = 0; j < width; ++j) offset[j] = first + j < columns_ ? weight_offset(first + j) : -1;
    const int64_t columns = std::min<int64_t>(width, columns_ - first);
    const bool contiguous = arguments_.weight_stride_channel == 1 ? last_ : !last_;
    for (int64_t k = 0; k < filters_; ++k, source += arguments_.weight_stride_filter(), target += width) {
      if (contiguous) {
        copy_span<1>(source + first, 1, columns, target);
        std::fill(target + columns, target + width, A(0));
      } else {
        for (int64_t j = 0; j < width; ++j) target[j] = offset[j] < 0 ? A(0) : to_accumulate(source[offset[j]]);
      }
    }
  }

  // One block of pixels of one group times some panels; or a line of the input that is behind the last patch.
  void run(void* scratch, int64_t task) const {
    if (task >= products_) return fill_line(task - products_);
    const int64_t column_block = task % column_blocks_, row_block = task / column_blocks_ % row_blocks_;
    const int64_t group = task / column_blocks_ / row_blocks_, begin = row_block * block_rows_;
    const int64_t rows = std::min(block_rows_, pixels_ - begin);
    if (rows <= 0) return;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    point_at_rows(group, begin, rows, s);
    const int64_t end = std::min(panels_, (column_block + 1) * block_panels_);
    for (int64_t panel = column_block * block_panels_; panel < end; ++panel) {
      multiply_panel(group, panel, rows, s);
      scatter_panel(panel, rows, s);
    }
  }

 private:
  static constexpr int64_t kBlockRows = 60;
  static constexpr int64_t kChain = 512;  // terms of a chain of additions

  struct Scratch {
    const A** rows;  // what a pixel reads
    T** patches;     // where its patch begins
    A** outputs;     // of a tile
    A* copied;       // [row][filter], if the rows must be converted or transposed
    A* staged;       // [row][column] of a panel
    A* bias;         // of a panel's columns
  };
  Scratch carve(Carver& carver) const {
    return {carver.take<const A*>(block_rows_),
            carver.take<T*>(block_rows_),
            carver.take<A*>(kTileRows),
            carver.take<A>(copies() ? round_up(block_rows_, lanes<A>) * row_pitch() : 0),
            carver.take<A>(block_rows_ * kPanel<A>),
            carver.take<A>(kPanel<A>)};
  }
  bool copies() const { return is_reduced<T> || !last_; }
  int64_t row_pitch() const { return round_up(filters_, lanes<A>) + lanes<A>; }
  int64_t group_weights() const { return round_up(columns_, lanes<A>) * filters_; }
  A* packed(int64_t group, int64_t panel) const {
    return static_cast<A*>(arguments_.packed) + group * group_weights() + panel * kPanel<A> * filters_;
  }

  // Channel and tap of a column.
  struct Column {
    int64_t channel, tap;
  };
  Column column(int64_t index) const {
    const int64_t taps = geometry_.taps();
    return last_ ? Column{index % channels_, index / channels_} : Column{index / taps, index % taps};
  }
  int64_t weight_offset(int64_t index) const {
    const Column at = column(index);
    return at.channel * arguments_.weight_stride_channel + at.tap * arguments_.weight_stride_tap;
  }
  // Of a column in the input, from its patch's first element.
  int64_t patch_offset(int64_t index) const {
    const Column at = column(index);
    const int64_t* kernel = geometry_.kernel;
    const int64_t jx = at.tap % kernel[2], jy = at.tap / kernel[2] % kernel[1], jz = at.tap / kernel[2] / kernel[1];
    const int64_t pixel = (jz * geometry_.input[1] + jy) * geometry_.input[2] + jx;
    return last_ ? pixel * geometry_.in_channels + at.channel : at.channel * geometry_.input_pixels() + pixel;
  }

  void point_at_rows(int64_t group, int64_t begin, int64_t rows, const Scratch& s) const {
    const ConvGeometry& g = geometry_;
    const int64_t image = g.output_pixels();
    const Phase phase = phase_at(g, Pass::forward, 0);
    PixelWalk pixel(phase, begin);
    for (int64_t r = 0; r < rows; ++r, pixel.advance(1)) {
      const int64_t first =
          (pixel.z * g.kernel[0] * g.input[1] + pixel.y * g.kernel[1]) * g.input[2] + pixel.x * g.kernel[2];
      const int64_t channel = group * channels_;
      s.patches[r] = arguments_.input + pixel.n * g.in_channels * g.input_pixels() +
                     (last_ ? first * g.in_channels + channel : channel * g.input_pixels() + first);
      s.rows[r] = s.copied + r * row_pitch();
      if (last_) {
        const T* from = arguments_.output + (begin + r) * g.out_channels + group * filters_;
        if constexpr (is_reduced<T>)
          copy_span<1>(from, 1, filters_, s.copied + r * row_pitch());
        else
          s.rows[r] = from;
      }
    }
    if (last_) return;
    for (int64_t done = 0; done < rows;) {
      const int64_t n = (begin + done) / image, at = (begin + done) % image;
      const int64_t length = std::min(rows - done, image - at);
      transpose_matrix(arguments_.output + (n * g.out_channels + group * filters_) * image + at, image, filters_,
                       length, s.copied + done * row_pitch(), row_pitch());
      done += length;
    }
  }

  void multiply_panel(int64_t group, int64_t panel, int64_t rows, const Scratch& s) const {
    const int width = panel_width<A>(columns_, panel);
    for (int64_t j = 0; arguments_.bias && j < width; ++j) {
      const int64_t index = panel * kPanel<A> + j;
      s.bias[j] = index < columns_ ? to_accumulate(arguments_.bias[group * channels_ + column(index).channel]) : A(0);
    }
    const A* weights = packed(group, panel);
    const int64_t tiles = divide_up(rows, kTileRows);
    TileProduct<A> product;
    product.panels = &weights;
    product.outputs = s.outputs;
    for (int64_t filter = 0; filter < filters_; filter += kChain) {
      product.depth = std::min(kChain, filters_ - filter);
      product.row_offset = filter;
      product.panel_offset = filter * width;
      product.accumulate = filter > 0;
      product.column_start = filter == 0 && arguments_.bias ? s.bias : nullptr;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, height = rows * (tile + 1) / tiles - first;
        product.rows = s.rows + first;
        for (int64_t r = 0; r < height; ++r) s.outputs[r] = s.staged + (first + r) * kPanel<A>;
        tile_kernel<A, 1>(static_cast<int>(height), width / lanes<A>)(product);
      }
    }
  }

  void scatter_panel(int64_t panel, int64_t rows, const Scratch& s) const {
    const int64_t first = panel * kPanel<A>, end = std::min(columns_, first + kPanel<A>);
    for (int64_t index = first; index < end;) {
      const int64_t length = std::min(span_ - index % span_, end - index), offset = patch_offset(index);
      const A* from = s.staged + index - first;
      if (length == 2)
        scatter<2>(rows, from, offset, length, s);
      else if (length == 4)
        scatter<4>(rows, from, offset, length, s);
      else
        scatter<0>(rows, from, offset, length, s);
      index += length;
    }
  }
  template <int Length>
  void scatter(int64_t rows, const A* from, int64_t offset, int64_t length, const Scratch& s) const {
    for (int64_t r = 0; r < rows; ++r, from += kPanel<A>) {
      if constexpr (Length > 0) {
        if (!epilogue_.needed()) {
          T* target = s.patches[r] + offset;
          CONVLAB_UNROLL for (int i = 0; i < Length; ++i) target[i] = from_accumulate<T>(from[i]);
          continue;
        }
      }
      epilogue_.store_row(s.patches[r] + offset, from, length);
    }
  }

  // What no patch covers of a line of the input.
  void fill_line(int64_t line) const {
    const ConvGeometry& g = geometry_;
    const int64_t y = line % g.input[1], z = line / g.input[1] % g.input[0], n = line / g.input[1] / g.input[0];
    const int64_t begin = z < covered_[0] && y < covered_[1] ? covered_[2] : 0;
    for (int64_t c = 0; c < g.in_channels; ++c) {
      const A value = arguments_.bias ? to_accumulate(arguments_.bias[c]) : A(0);
      for (int64_t x = begin; x < g.input[2]; ++x) {
        const int64_t pixel = (z * g.input[1] + y) * g.input[2] + x;
        const int64_t at = last_ ? (n * g.input_pixels() + pixel) * g.in_channels + c
                                 : (n * g.in_channels + c) * g.input_pixels() + pixel;
        epilogue_.store_one(arguments_.input + at, value);
      }
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Epilogue<T> epilogue_;
  bool last_;
  int64_t filters_, channels_, columns_, span_, panels_, pixels_, row_blocks_, block_rows_, column_blocks_;
  int64_t block_panels_, products_, rest_lines_;
  int64_t covered_[kMaxSpatial];  // by patches
};

}  // namespace convlab::cpu::CONVLAB_ISA
