// implicit_gemm on N(D)HWC tensors: forward and backward input.
//
// Idea: rows of the product are pixels, columns are the channels that are written. A pixel's channels are contiguous,
// so a tap of a patch is one segment of a row, reached through a pointer; padding points to zeros. Weights are packed
// once per call into panels [group][panel][tap][read channel][column].
// Where taps have few channels, a kernel line is one segment. Where elements must be converted to float, or kernel
// lines are no spans of the input, the patches of one block of pixels are copied first and then are one segment. Cost:
// multiply_adds() plus packing the weights once. Memory: packed weights; per thread a block of pixels. Limits: fewer
// than `lanes` written channels per group leave lanes idle (depthwise: all but one).
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int64_t kDepth = 512;  // longest chain of additions, and rows of a panel that stay in L2 together

template <class T>
class GemmChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit GemmChannelsLast(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    copies_patches_ = is_reduced<T> || (t_.read_channels < kShortSegment && g.taps() > 1);
    // With one group and neighbouring taps next to each other, a kernel line is one span of the input's line: only
    // spans that cross the border are copied.
    lines_ = !is_reduced<T> && copies_patches_ && g.groups == 1 && t_.phase_count == 1 &&
             t_.phase(0).axis[2].offset_step == 1 && g.kernel[2] > 1;
    merged_ = !lines_ && copies_patches_ && t_.phase_count == 1 && t_.phase(0).taps() == g.taps();
    // Pixels that follow each other in memory and are read once: the next tile's are fetched during this one.
    const AxisPhase& line = t_.phase(0).axis[2];
    streams_ = g.taps() == 1 && g.groups == 1 && line.read_step == 1 && line.step == 1 && t_.read_size[1] == 1 &&
               t_.read_channels >= kStreamed;
    const int64_t rows = t_.rows();
    row_blocks_ = std::max<int64_t>(1, divide_up(rows, kBlockRows));
    block_rows_ = divide_up(rows, row_blocks_);
    panels_ = divide_up(t_.written_channels, kPanel<A>);
    const int64_t blocks = t_.phase_count * g.groups * row_blocks_;
    column_blocks_ = std::min(panels_, divide_up(enough_tasks(arguments.threads), blocks));
    block_panels_ = divide_up(panels_, column_blocks_);
    column_blocks_ = divide_up(panels_, block_panels_);
    group_weights_ = round_up(t_.written_channels, lanes<A>) * g.taps() * t_.read_channels;
    patch_stride_ = round_up(g.taps() * t_.read_channels, lanes<A>) + lanes<A>;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.prepare_tasks = t_.geometry.groups * panels_ * t_.geometry.taps();
    plan.run_tasks = t_.phase_count * t_.geometry.groups * row_blocks_ * column_blocks_;
    plan.packs_weight = true;
    plan.shared_bytes = t_.geometry.groups * group_weights_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One tap of one panel of weights.
  void prepare(void*, int64_t task) const {
    const int64_t taps = t_.geometry.taps();
    const int64_t tap = task % taps, panel = task / taps % panels_, group = task / taps / panels_;
    const int width = panel_width<A>(t_.written_channels, panel);
    A* target = packed(group, panel) + tap * t_.read_channels * width;
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(width, t_.written_channels - first);
    const T* source =
        arguments_.weight + t_.weight_offset(arguments_, group, 0, first) + tap * arguments_.weight_stride_tap;
    const int64_t read_stride = t_.weight_offset(arguments_, 0, 1, 0);
    const int64_t written_stride = t_.weight_offset(arguments_, 0, 0, 1);
    if (read_stride == 1) {
      for (int64_t lane = 0; lane < width; lane += lanes<A>)
        transpose_matrix(source + lane * written_stride, written_stride, std::min<int64_t>(lanes<A>, columns - lane),
                         t_.read_channels, target + lane, width);
      return;
    }
    for (int64_t channel = 0; channel < t_.read_channels; ++channel) {
      A* row = target + channel * width;
      const T* from = source + channel * read_stride;
      int64_t j = 0;
      if (written_stride == 1)
        for (; j + lanes<A> <= columns; j += lanes<A>) store(row + j, load(from + j));
      for (; j < columns; ++j) row[j] = to_accumulate(from[j * written_stride]);
      for (; j < width; ++j) row[j] = 0;
    }
  }

  // One block of pixels of one phase and group, times some panels.
  void run(void* scratch, int64_t task) const {
    // Phases differ in work, so neighbouring tasks, which one thread computes, are of different ones.
    const Phase phase = t_.phase(task % t_.phase_count);
    task /= t_.phase_count;
    const int64_t column_block = task % column_blocks_;
    const int64_t row_block = task / column_blocks_ % row_blocks_;
    const int64_t group = task / column_blocks_ / row_blocks_;
    const int64_t total = t_.geometry.batch * phase.pixels(), begin = row_block * block_rows_;
    const int64_t rows = std::min(block_rows_, total - begin);
    if (rows <= 0) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    std::fill(s.zeros, s.zeros + segment_depth(), A(0));
    point_at_rows(phase, group, begin, rows, s);

    const int64_t last_panel = std::min(panels_, (column_block + 1) * block_panels_);
    for (int64_t panel = column_block * block_panels_; panel < last_panel; ++panel)
      multiply_panel(phase, group, panel, rows, s);
  }

 private:
  static constexpr int64_t kBlockRows = 60;     // pixels of a task: a panel is used 10 times once it is in L2
  static constexpr int64_t kStreamed = 64;      // channels from which the hardware loses track of a tile's rows
  static constexpr int64_t kShortSegment = 16;  // channels below which patches are copied
  static constexpr int64_t kMaxTiles = divide_up(kBlockRows, kTileRows);

  struct Scratch {
    const A** rows;    // [tile][segment][row of the tile]
    const A** panels;  // [segment]
    T** outputs;       // [row]
    A** tile_outputs;  // [row of a tile]
    A* zeros;
    A* staged;   // [row][column], where results cannot be written in place
    A* bias;     // one panel of it
    A* patches;  // [row][tap, channel]
  };

  Scratch carve(Carver& carver) const {
    const int64_t taps = t_.geometry.taps();
    return {carver.take<const A*>(block_rows_ * taps),
            carver.take<const A*>(taps),
            carver.take<T*>(block_rows_),
            carver.take<A*>(kTileRows),
            carver.take<A>(segment_depth()),
            carver.take<A>(block_rows_ * kPanel<A>),
            carver.take<A>(kPanel<A>),
            carver.take<A>(copies_patches_ ? block_rows_ * patch_stride_ : 0)};
  }

  A* packed(int64_t group, int64_t panel) const {
    return static_cast<A*>(arguments_.shared) + group * group_weights_ +
           panel * kPanel<A> * t_.geometry.taps() * t_.read_channels;
  }

  int64_t segments(const Phase& phase) const {
    return merged_ ? 1 : lines_ ? phase.axis[0].taps * phase.axis[1].taps : phase.taps();
  }
  int64_t segment_depth() const {
    return t_.read_channels * (merged_ ? t_.geometry.taps() : lines_ ? t_.geometry.kernel[2] : 1);
  }

  // Rows of a block are cut into tiles that differ by at most one row.
  static int64_t tile_begin(int64_t rows, int64_t tiles, int64_t tile) { return rows * tile / tiles; }

  void point_at_rows(const Phase& phase, int64_t group, int64_t begin, int64_t rows, const Scratch& s) const {
    const int64_t read_stride = t_.read_channels * t_.geometry.groups;
    const int64_t written_stride = t_.written_channels * t_.geometry.groups;
    const int64_t count = segments(phase), tiles = divide_up(rows, kTileRows);
    PixelWalk pixel(phase, begin);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile_begin(rows, tiles, tile), height = tile_begin(rows, tiles, tile + 1) - first;
      for (int64_t r = 0; r < height; ++r, pixel.advance(1)) {
        const T* image = t_.read + pixel.n * t_.read_pixels() * read_stride + group * t_.read_channels;
        s.outputs[first + r] = t_.written + group * t_.written_channels +
                               (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * written_stride;
        const A** pointers = s.rows + first * count + r;
        if constexpr (!is_reduced<T>) {
          if (lines_) {
            point_at_lines(phase, pixel, image, s, s.patches + (first + r) * patch_stride_, pointers, height);
            continue;
          }
        }
        if (copies_patches_) {
          A* patch = s.patches + (first + r) * patch_stride_;
          copy_patch(phase, pixel, image, read_stride, patch);
          for (int64_t j = 0; j < count; ++j) pointers[j * height] = patch + j * t_.read_channels;
        } else if constexpr (!is_reduced<T>) {
          for_each_tap(phase, pixel, [&](int64_t j, int64_t at) {
            pointers[j * height] = at < 0 ? s.zeros : image + at * read_stride;
          });
        }
      }
    }
  }

  void point_at_lines(const Phase& phase, const PixelWalk& pixel, const T* image, const Scratch& s, A* patch,
                      const A** pointers, int64_t height) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t channels = t_.read_channels, taps = ax->taps, x = pixel.x * ax->read_step + ax->offset_first;
    const int64_t begin = std::clamp<int64_t>(-x, 0, taps), end = std::clamp<int64_t>(t_.read_size[2] - x, begin, taps);
    for (int64_t jz = 0; jz < az->taps; ++jz) {
      const int64_t z = pixel.z * az->read_step + az->offset(jz);
      for (int64_t jy = 0; jy < ay->taps; ++jy, pointers += height, patch += taps * channels) {
        const int64_t y = pixel.y * ay->read_step + ay->offset(jy);
        const T* line = image + ((z * t_.read_size[1] + y) * t_.read_size[2] + x) * channels;
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) {
          *pointers = s.zeros;
        } else if (begin == 0 && end == taps) {
          *pointers = line;
        } else {
          std::fill(patch, patch + taps * channels, A(0));
          copy_span<1>(line + begin * channels, 1, (end - begin) * channels, patch + begin * channels);
          *pointers = patch;
        }
      }
    }
  }

  // Calls visit(tap of the phase, pixel it reads or -1).
  template <class Visit>
  CONVLAB_INLINE void for_each_tap(const Phase& phase, const PixelWalk& pixel, const Visit& visit) const {
    int64_t j = 0;
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz) {
      const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy) {
        const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
        const bool row_inside = z >= 0 && z < t_.read_size[0] && y >= 0 && y < t_.read_size[1];
        const int64_t row = (z * t_.read_size[1] + y) * t_.read_size[2];
        for (int64_t jx = 0; jx < phase.axis[2].taps; ++jx, ++j) {
          const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset(jx);
          visit(j, row_inside && x >= 0 && x < t_.read_size[2] ? row + x : -1);
        }
      }
    }
  }

  void copy_patch(const Phase& phase, const PixelWalk& pixel, const T* image, int64_t read_stride, A* patch) const {
    if (read_stride == t_.read_channels && phase.axis[2].offset_step == 1) {
      copy_lines(phase, pixel, image, patch);
      return;
    }
    for_each_tap(phase, pixel, [&](int64_t j, int64_t at) {
      A* target = patch + j * t_.read_channels;
      int64_t c = 0;
      if (at < 0) {
        for (; c < t_.read_channels; ++c) target[c] = 0;
        return;
      }
      const T* source = image + at * read_stride;
      for (; c + lanes<A> <= t_.read_channels; c += lanes<A>) store(target + c, load(source + c));
      for (; c < t_.read_channels; ++c) target[c] = to_accumulate(source[c]);
    });
  }

  // Neighbouring taps read neighbouring pixels: a line of the patch is one span of memory.
  void copy_lines(const Phase& phase, const PixelWalk& pixel, const T* image, A* patch) const {
    const int64_t taps = phase.axis[2].taps, channels = t_.read_channels;
    const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset_first;
    const int64_t inside = std::clamp<int64_t>(-x, 0, taps);
    const int64_t outside = std::clamp<int64_t>(t_.read_size[2] - x, inside, taps);
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz) {
      const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy, patch += taps * channels) {
        const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) {
          std::fill(patch, patch + taps * channels, A(0));
          continue;
        }
        std::fill(patch, patch + inside * channels, A(0));
        const T* line = image + ((z * t_.read_size[1] + y) * t_.read_size[2] + x) * channels;
        copy_span<1>(line + inside * channels, 1, (outside - inside) * channels, patch + inside * channels);
        std::fill(patch + outside * channels, patch + taps * channels, A(0));
      }
    }
  }

  void multiply_panel(const Phase& phase, int64_t group, int64_t panel, int64_t rows, const Scratch& s) const {
    const int width = panel_width<A>(t_.written_channels, panel), vectors = width / lanes<A>;
    const int64_t first_column = panel * kPanel<A>;
    const int64_t columns = std::min<int64_t>(width, t_.written_channels - first_column);
    const bool in_place = !is_reduced<T> && columns == width;

    const A* weights = packed(group, panel);
    if (merged_) {
      s.panels[0] = weights;
    } else {
      int64_t j = 0;
      for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
        for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy)
          for (int64_t jx = 0; jx < (lines_ ? 1 : phase.axis[2].taps); ++jx)
            s.panels[j++] =
                weights + t_.tap_index(phase.axis[0].tap(jz), phase.axis[1].tap(jy), phase.axis[2].tap(jx)) *
                              t_.read_channels * width;
    }
    if (t_.bias)
      for (int64_t j = 0; j < width; ++j)
        s.bias[j] = j < columns ? to_accumulate(t_.bias[group * t_.written_channels + first_column + j]) : A(0);

    const int64_t count = segments(phase), depth = segment_depth();
    const int64_t chunk = std::min(depth, kDepth),
                  together = std::max<int64_t>(1, kDepth / std::max<int64_t>(1, chunk));
    const int64_t tiles = divide_up(rows, kTileRows);
    TileProduct<A> product;
    product.panels = s.panels;
    product.outputs = s.tile_outputs;
    bool first_chain = true;
    for (int64_t segment = 0; first_chain || segment < count; segment += together)
      for (int64_t begin = 0; first_chain || begin < depth; begin += chunk) {
        product.segments = std::min(together, count - segment);
        product.depth = std::min(chunk, depth - begin);
        product.row_offset = begin;
        product.panel_offset = begin * width;
        product.panels = s.panels + segment;
        product.accumulate = !first_chain;
        product.column_start = first_chain && t_.bias ? s.bias : nullptr;
        first_chain = false;
        if constexpr (!is_reduced<T>) {
          const bool last_chain = segment + together >= count && begin + chunk >= depth;
          product.epilogue = last_chain && in_place && t_.epilogue.needed() ? &t_.epilogue : nullptr;
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t first = tile_begin(rows, tiles, tile), height = tile_begin(rows, tiles, tile + 1) - first;
          product.rows = s.rows + first * count + segment * height;
          if constexpr (!is_reduced<T>)
            product.ahead = streams_ && panel % block_panels_ == 0 ? product.rows[height - 1] + begin + depth : nullptr;
          for (int64_t r = 0; r < height; ++r) {
            s.tile_outputs[r] = s.staged + (first + r) * kPanel<A>;
            if constexpr (!is_reduced<T>)
              if (in_place) s.tile_outputs[r] = s.outputs[first + r] + first_column;
          }
          tile_kernel<A, 1>(static_cast<int>(height), vectors)(product);
        }
      }
    if (!in_place)
      for (int64_t r = 0; r < rows; ++r)
        t_.epilogue.store_row(s.outputs[r] + first_column, s.staged + r * kPanel<A>, columns);
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool copies_patches_, lines_, merged_, streams_;
  int64_t row_blocks_, block_rows_, panels_, column_blocks_, block_panels_, group_weights_, patch_stride_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
