// implicit_gemm on NC(D)HW tensors: forward and backward input of 1x1 kernels and few written channels, and where
// operands are pairs (operand.h). The others: conv_gemm_strips.h.
//
// Idea: rows of the product are the channels that are written, columns are pixels, which are contiguous. What a block
// of pixels reads is gathered into panels [channel, tap][pixel] for some channels at a time, so that panels stay in
// L2, and multiplied with all rows. In the forward pass the weight tensor is the row matrix as it is.
// Cost: multiply_adds() plus one gather per block of pixels; backward input packs the transposed weights per call.
// Memory: packed weights (not in float forward); per thread panels of 256 pixels.
// Limits: maps of few pixels leave lanes idle unless the batch fills them.
#pragma once
#include "conv_gather.h"
#include "conv_gemm_channels_last.h"
#include "pack.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmChannelsFirst {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  explicit GemmChannelsFirst(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    const int64_t taps = g.taps();
    weights_in_place_ = !kConverts && t_.pass == Pass::forward &&
                        (products<S> == 1 ? arguments.weight_stride_tap == 1 : taps == 1 && t_.read_channels % 2 == 0);
    depth_ = round_up(t_.read_channels, products<S>);
    block_channels_ = std::min(depth_, std::max<int64_t>(1, kDepth / taps) * products<S>);
    const int64_t pixels = t_.rows(), parts = t_.phase_count * g.groups;
    const int64_t enough = enough_tasks(arguments.threads);
    // Smaller blocks of pixels first: splitting rows instead would gather the same pixels again.
    int64_t panels = kBlockPanels;
    while (panels > 1 && parts * divide_up(pixels, panels * kPanel<A>) < enough) panels /= 2;
    block_pixels_ = std::min(panels * kPanel<A>, round_up(pixels, lanes<A>));
    pixel_blocks_ = std::max<int64_t>(1, divide_up(pixels, block_pixels_));
    const int64_t tiles = divide_up(t_.written_channels, kTileRows);
    row_blocks_ = std::min(tiles, divide_up(enough, parts * pixel_blocks_));
    // A bound on the rows of a task bounds the staging buffer.
    block_rows_ = std::min(divide_up(tiles, row_blocks_) * kTileRows, kMaxBlockRows);
    row_blocks_ = divide_up(t_.written_channels, block_rows_);
  }

  ConvPlan plan() const {
    const ConvGeometry& g = t_.geometry;
    ConvPlan plan;
    if (!weights_in_place_) {
      plan.pack_tasks = g.groups * g.taps();
      plan.packed_bytes = g.groups * g.taps() * t_.written_channels * depth_ * static_cast<int64_t>(sizeof(S));
    }
    plan.run_tasks = t_.phase_count * g.groups * pixel_blocks_ * row_blocks_;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One tap of one group: [written channel][read channel], the latter filled up to whole steps.
  void pack(int64_t task) const {
    const int64_t taps = t_.geometry.taps(), tap = task % taps, group = task / taps;
    S* target = packed(group, tap);
    const T* source =
        arguments_.weight + t_.weight_offset(arguments_, group, 0, 0) + tap * arguments_.weight_stride_tap;
    const int64_t read_stride = t_.weight_offset(arguments_, 0, 1, 0);
    const int64_t written_stride = t_.weight_offset(arguments_, 0, 0, 1);
    if constexpr (products<S> == 1) {
      if (written_stride == 1 && t_.read_channels % lanes<A> == 0) {
        for (int64_t r = 0; r < t_.read_channels; r += lanes<A>)
          transpose_matrix(source + r * read_stride, read_stride, lanes<A>, t_.written_channels, target + r, depth_);
        return;
      }
    }
    for (int64_t w = 0; w < t_.written_channels; ++w, target += depth_) {
      for (int64_t r = 0; r < t_.read_channels; ++r)
        target[r] = to_operand<S>(source[w * written_stride + r * read_stride]);
      std::fill(target + t_.read_channels, target + depth_, S{});
    }
  }

  // One block of pixels of one phase and group, times some written channels.
  void run(void* scratch, int64_t task) const {
    const Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    task /= t_.phase_count;
    const int64_t row_block = task % row_blocks_;
    const int64_t pixel_block = task / row_blocks_ % pixel_blocks_;
    const int64_t group = task / row_blocks_ / pixel_blocks_;
    const int64_t total = t_.geometry.batch * phase.pixels(), begin = pixel_block * block_pixels_;
    const int64_t pixels = std::min(block_pixels_, total - begin);
    if (pixels <= 0) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t gathered_rows = block_channels_ / products<S> * phase.taps();
    const int64_t run_count = cut_into_runs(phase, begin, pixels, gathered_rows, s.runs);
    const int64_t first_row = row_block * block_rows_;
    const int64_t rows = std::min(block_rows_, t_.written_channels - first_row);

    for (int64_t channel = 0; channel == 0 || channel < t_.read_channels; channel += block_channels_) {
      const int64_t channels = std::min(block_channels_, t_.read_channels - channel);
      const int64_t steps = divide_up(channels, products<S>);
      const int64_t stride = t_.read_pixels();
      const GatherSource<T> source{t_.read + (group * t_.read_channels + channel) * stride,
                                   t_.read_channels * t_.geometry.groups * stride,
                                   stride,
                                   1,
                                   t_.read_size,
                                   channels};
      if (weights_in_place_)
        gather(source, phase, s.runs, run_count, s.panels, phase.taps(), 1);
      else
        gather(source, phase, s.runs, run_count, s.panels, 1, steps);
      multiply(phase, group, channel, steps, begin, pixels, first_row, rows, gathered_rows, s);
    }
    if (!finishes_in_tiles()) store_staged(group, phase, first_row, rows, run_count, s);
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<S, T>;    // operands are not read from the tensors themselves
  static constexpr bool kStagesSums = !std::is_same_v<A, T>;  // sums so far cannot be kept in the tensor
  static constexpr int64_t kBlockPanels = 4;
  static constexpr int64_t kMaxBlockRows = 170 * kTileRows;

  struct Scratch {
    S* panels;       // [panel][gathered row][pixel][products]
    A* staged;       // [row][pixel]
    const S** rows;  // [tap][row of a tile]
    const S** panel_segments;
    A** outputs;
    T** written;
    Run* runs;
  };

  Scratch carve(Carver& carver) const {
    const int64_t taps = t_.geometry.taps();
    return {carver.take<S>(block_channels_ * taps * block_pixels_),
            carver.take<A>(block_rows_ * block_pixels_),
            carver.take<const S*>(taps * kTileRows),
            carver.take<const S*>(taps),
            carver.take<A*>(kTileRows),
            carver.take<T*>(kTileRows),
            carver.take<Run>(block_pixels_)};
  }

  S* packed(int64_t group, int64_t tap) const {
    return static_cast<S*>(arguments_.packed) + (group * t_.geometry.taps() + tap) * t_.written_channels * depth_;
  }

  // Rows whose pixels follow each other in memory are written by the tiles themselves, except for panels that straddle
  // two images or end the tensor; those go through the staging buffer of their panel.
  bool finishes_in_tiles() const { return t_.phase_count == 1; }

  int64_t cut_into_runs(const Phase& phase, int64_t begin, int64_t pixels, int64_t gathered_rows, Run* runs) const {
    PixelWalk pixel(phase, begin);
    int64_t count = 0;
    for (int64_t column = 0; column < pixels;) {
      const int64_t panel = column / kPanel<A>, in_panel = column % kPanel<A>;
      const int64_t pitch = panel_width<A>(pixels, panel);
      const int64_t length = std::min({pixel.left_in_row(), pixels - column, kPanel<A> - in_panel});
      runs[count++] = {pixel.n, pixel.z, pixel.y, pixel.x, length, column, panel * kPanel<A> * gathered_rows + in_panel,
                       pitch};
      pixel.advance(length);
      column += length;
    }
    return count;
  }

  // `steps` of the reduction, from a channel.
  void multiply(const Phase& phase, int64_t group, int64_t channel, int64_t steps, int64_t begin, int64_t pixels,
                int64_t first_row, int64_t rows, int64_t gathered_rows, const Scratch& s) const {
    const int64_t taps = phase.taps(), tiles = divide_up(rows, kTileRows);
    const int64_t segments = weights_in_place_ ? 1 : taps;
    const int64_t image_pixels = t_.written_pixels(), all_channels = t_.written_channels * t_.geometry.groups;
    const bool last_chain = channel + steps * products<S> >= t_.read_channels;
    TileProduct<A, S, T> product;
    product.panels = s.panel_segments;
    product.outputs = s.outputs;
    product.written = s.written;
    product.rows = s.rows;
    product.segments = segments;
    product.depth = weights_in_place_ ? steps * taps : steps;
    product.row_offset = weights_in_place_ ? channel * taps : channel;
    product.accumulate = channel > 0;
    A bias[kTileRows];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles, height = rows * (tile + 1) / tiles - row;
      point_at_weights(phase, group, first_row + row, height, s.rows);
      product.row_pitch = height;
      product.row_start = channel == 0 && t_.bias ? bias : nullptr;
      if (t_.bias)
        for (int64_t r = 0; r < height; ++r)
          bias[r] = to_accumulate(t_.bias[group * t_.written_channels + first_row + row + r]);
      for (int64_t first = 0; first < pixels; first += kPanel<A>) {
        const int64_t panel = first / kPanel<A>, columns = std::min<int64_t>(kPanel<A>, pixels - first);
        const int width = panel_width<A>(pixels, panel);
        for (int64_t segment = 0; segment < segments; ++segment)
          s.panel_segments[segment] =
              s.panels + (panel * kPanel<A> * gathered_rows + segment * steps * width) * products<S>;
        const int64_t n = (begin + first) / image_pixels, pixel = (begin + first) % image_pixels;
        const bool in_place = finishes_in_tiles() && columns == width && pixel + columns <= image_pixels;
        T* written = t_.written + (n * all_channels + group * t_.written_channels + first_row + row) * image_pixels;
        for (int64_t r = 0; r < height; ++r) {
          s.outputs[r] = s.staged + (row + r) * block_pixels_ + first;
          s.written[r] = written + r * image_pixels + pixel;
          if constexpr (!kStagesSums)
            if (in_place) s.outputs[r] = s.written[r];
        }
        const bool finishes = in_place && last_chain && (kStagesSums || t_.epilogue.needed());
        product.epilogue = finishes ? &t_.epilogue : nullptr;
        tile_kernel<A, 1, S, T>(static_cast<int>(height), width / lanes<A>)(product);
        if (finishes_in_tiles() && !in_place && last_chain) scatter(written, pixel, columns, height, s.outputs);
      }
    }
  }

  void point_at_weights(const Phase& phase, int64_t group, int64_t first, int64_t height, const S** rows) const {
    if constexpr (!kConverts) {
      if (weights_in_place_) {
        const T* filter = arguments_.weight + t_.weight_offset(arguments_, group, 0, first);
        for (int64_t r = 0; r < height; ++r) rows[r] = filter + r * arguments_.weight_stride_filter();
        return;
      }
    }
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy)
        for (int64_t jx = 0; jx < phase.axis[2].taps; ++jx) {
          const S* tap =
              packed(group, t_.tap_index(phase.axis[0].tap(jz), phase.axis[1].tap(jy), phase.axis[2].tap(jx)));
          for (int64_t r = 0; r < height; ++r) *rows++ = tap + (first + r) * depth_;
        }
  }

  // Copies a tile's staged rows to where they belong, image after image. `written` is row 0 of the first image.
  void scatter(T* written, int64_t pixel, int64_t columns, int64_t height, A* const* staged) const {
    const int64_t image_pixels = t_.written_pixels();
    const int64_t image_stride = t_.written_channels * t_.geometry.groups * image_pixels;
    for (int64_t done = 0; done < columns; written += image_stride, pixel = 0) {
      const int64_t length = std::min(columns - done, image_pixels - pixel);
      for (int64_t r = 0; r < height; ++r)
        t_.epilogue.store_row(written + r * image_pixels + pixel, staged[r] + done, length);
      done += length;
    }
  }

  void store_staged(int64_t group, const Phase& phase, int64_t first_row, int64_t rows, int64_t run_count,
                    const Scratch& s) const {
    const int64_t image_pixels = t_.written_pixels(), all_channels = t_.written_channels * t_.geometry.groups;
    const int64_t step = phase.axis[2].step;
    for (int64_t index = 0; index < run_count; ++index) {
      const Run& run = s.runs[index];
      PixelWalk pixel(phase, 0);
      pixel.z = run.z, pixel.y = run.y, pixel.x = run.x;
      T* target = t_.written + (run.n * all_channels + group * t_.written_channels + first_row) * image_pixels +
                  pixel.written_pixel(t_.written_size);
      const A* source = s.staged + run.column;
      for (int64_t r = 0; r < rows; ++r, source += block_pixels_, target += image_pixels) {
        if (step == 1)
          t_.epilogue.store_row(target, source, run.length);
        else
          for (int64_t i = 0; i < run.length; ++i) t_.epilogue.store_one(target + i * step, source[i]);
      }
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool weights_in_place_;
  int64_t depth_;  // read channels, filled up to whole steps
  int64_t block_channels_, block_pixels_, pixel_blocks_, block_rows_, row_blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
