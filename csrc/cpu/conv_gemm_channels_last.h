// implicit_gemm on N(D)HWC tensors: forward and backward input.
//
// Idea: rows of the product are pixels, columns are the channels that are written. A pixel's channels are contiguous,
// so a tap of a patch is one segment of a row, reached through a pointer; padding points to zeros, and a tap that is in
// it with all rows of a tile is left out. Weights are packed once per call into panels [group][panel][tap][read
// channel][column]. Where taps have few channels, a kernel line is one segment. Where elements must be converted to
// float, channels do not come in whole steps (operand.h), or kernel lines are no spans of the input, the patches of one
// block of pixels are copied first and then are one segment. Cost: multiply_adds() plus packing the weights once.
// Memory: packed weights; per thread a block of pixels. Limits: fewer than `lanes` written channels per group leave
// lanes idle (depthwise: all but one).
#pragma once
#include "conv_gather.h"
#include "conv_panels.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int64_t kDepth = 512;  // longest chain of additions, and rows of a panel that stay in L2 together

template <class T>
class GemmChannelsLast {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  explicit GemmChannelsLast(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    // With one group and neighbouring taps next to each other, a kernel line is one span of the input's line: only
    // spans that cross the border are copied.
    lines_ = !kConverts && t_.read_channels % products<S> == 0 && t_.read_channels < kShortSegment && g.groups == 1 &&
             t_.phase_count == 1 && t_.phase(0).axis[2].ascending().offset_step == 1 && g.kernel[2] > 1 &&
             t_.phase(0).axis[2].taps == g.kernel[2];  // a strided image of one pixel has one phase of some of the taps
    copies_patches_ = kConverts || lines_ || t_.read_channels % products<S> != 0 ||
                      (t_.read_channels < kShortSegment && g.taps() > 1);
    merged_ = !lines_ && copies_patches_ && t_.phase_count == 1 && t_.phase(0).taps() == g.taps();
    tap_depth_ = merged_ ? t_.read_channels : round_up(t_.read_channels, products<S>);
    weights_ = WeightPanels<T>(arguments_, t_, tap_depth_, lines_);
    // Pixels that follow each other in memory and are read once: the next tile's are fetched during this one.
    const AxisPhase& line = t_.phase(0).axis[2];
    pointwise_ = g.taps() == 1 && g.padding[2] == 0 && line.read_step == 1 && line.step == 1 && t_.read_size[1] == 1 &&
                 t_.read_size[0] == 1 && g.padding[1] == 0 && g.padding[0] == 0;
    streams_ = pointwise_ && g.groups == 1 && t_.read_channels >= kStreamed;
    // Sums of one chain are final when they are stored.
    past_caches_ = !kConverts && weights_.depth() <= kDepth && t_.past_caches();
    const int64_t rows = t_.rows();
    row_blocks_ = std::max<int64_t>(1, divide_up(rows, rows_of_block()));
    block_rows_ = divide_up(rows, row_blocks_);
    by_columns_ = t_.weight_is_larger();
    column_blocks_ = weights_.blocks(t_.phase_count * g.groups * row_blocks_);
    block_panels_ = divide_up(weights_.count(), column_blocks_);
    column_blocks_ = divide_up(weights_.count(), block_panels_);
    patch_stride_ = round_up(weights_.depth(), lanes<S>) + lanes<S>;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = weights_.tasks();
    plan.run_tasks = t_.phase_count * t_.geometry.groups * row_blocks_ * column_blocks_;
    plan.packed_bytes = weights_.bytes();
    plan.packs_in_place = by_columns_ && t_.geometry.groups * column_blocks_ >= arguments_.threads;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void pack(int64_t task) const { weights_.pack(task); }

  // One block of pixels of one phase and group, times some panels.
  void run(void* scratch, int64_t task) const {
    // Phases differ in work, so neighbouring tasks, which one thread computes, are of different ones.
    const Phase phase = t_.phase(task % t_.phase_count);
    task /= t_.phase_count;
    const int64_t group = task / column_blocks_ / row_blocks_;
    const int64_t column_block = by_columns_ ? task / row_blocks_ % column_blocks_ : task % column_blocks_;
    const int64_t row_block = by_columns_ ? task % row_blocks_ : task / column_blocks_ % row_blocks_;
    const int64_t total = t_.geometry.batch * phase.pixels(), begin = row_block * block_rows_;
    const int64_t rows = std::min(block_rows_, total - begin);
    if (rows <= 0) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    std::fill(s.zeros, s.zeros + segment_depth(), S{});
    for (int64_t r = 0; r < rows; ++r) s.staged_rows[r] = s.staged + r * kPanel<A>;
    point_at_rows(phase, group, begin, rows, s);
    leave_out_zeros(segments(phase), rows, s);

    const int64_t last_panel = std::min(weights_.count(), (column_block + 1) * block_panels_);
    for (int64_t panel = column_block * block_panels_; panel < last_panel; ++panel)
      multiply_panel(phase, group, panel, rows, s);
    if (past_caches_) store_fence();
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<S, T>;    // operands are not read from the tensor itself
  static constexpr bool kStagesSums = !std::is_same_v<A, T>;  // sums so far cannot be kept in the tensor
  static constexpr int64_t kStreamed = 64;      // channels from which the hardware loses track of a tile's rows
  static constexpr int64_t kShortSegment = 16;  // channels below which patches are copied

  // Pixels of a task: a panel is used 10 times once it is in L2. Of shallow rows more are in L1 together, beside which
  // it takes long to begin a task; but not if few tasks were left.
  int64_t rows_of_block() const {
    constexpr int64_t least = 60, most = 240, bytes = 16384, many_tasks = 32;
    const int64_t fit = bytes / (weights_.depth() * static_cast<int64_t>(sizeof(S))) / kTileRows * kTileRows;
    const int64_t all = t_.rows() * t_.phase_count * t_.geometry.groups;
    return std::clamp(std::min(fit, all / many_tasks), least, most);
  }

  // What the kernel's lines read for a line of pixels, from the input's first column on; for those outside, zeros that
  // are not counted along.
  struct Line {
    const T* first;
    int64_t step;  // per column
  };
  struct Scratch {
    const S** rows;    // [segment][row]
    const S** panels;  // [segment]
    T** outputs;       // [row]
    A** staged_rows;   // [row]
    S* zeros;
    A* staged;    // [row][column], where results cannot be written in place
    A* bias;      // one panel of it
    S* patches;   // [row][tap, channel]
    Line* lines;  // [kernel line]
    // Per tile, the segments that it multiplies: those that are not zeros in all of its rows.
    int64_t* counts;        // [tile]
    int64_t* kept;          // [tile][segment]
    const S** kept_panels;  // [segment], of one tile
  };

  Scratch carve(Carver& carver) const {
    const int64_t taps = t_.geometry.taps(), tiles = divide_up(block_rows_, kTileRows);
    return {carver.take<const S*>(block_rows_ * taps),
            carver.take<const S*>(taps),
            carver.take<T*>(block_rows_),
            carver.take<A*>(block_rows_),
            carver.take<S>(segment_depth()),
            carver.take<A>(block_rows_ * kPanel<A>),
            carver.take<A>(kPanel<A>),
            carver.take<S>(copies_patches_ ? block_rows_ * patch_stride_ : 0),
            carver.take<Line>(taps),
            carver.take<int64_t>(tiles),
            carver.take<int64_t>(tiles * taps),
            carver.take<const S*>(taps)};
  }

  int64_t segments(const Phase& phase) const {
    return merged_ ? 1 : lines_ ? phase.axis[0].taps * phase.axis[1].taps : phase.taps();
  }
  int64_t segment_depth() const {
    return merged_ ? weights_.depth() : tap_depth_ * (lines_ ? t_.geometry.kernel[2] : 1);
  }

  // Rows of a block are cut into tiles that differ by at most one row: visit(first row, rows of the tile).
  template <class Visit>
  static CONVLAB_INLINE void for_each_tile(int64_t rows, const Visit& visit) {
    const int64_t tiles = divide_up(rows, kTileRows), height = rows / tiles, higher = rows % tiles;
    for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
      visit(first, height + (tile < higher));
      first += height + (tile < higher);
    }
  }

  void point_at_rows(const Phase& phase, int64_t group, int64_t begin, int64_t rows, const Scratch& s) const {
    const int64_t read_stride = t_.read_channels * t_.geometry.groups;
    const int64_t written_stride = t_.written_channels * t_.geometry.groups;
    if constexpr (!kConverts) {
      if (pointwise_ && !copies_patches_) {
        const T* image = t_.read + begin * read_stride + group * t_.read_channels;
        T* written = t_.written + begin * written_stride + group * t_.written_channels;
        for (int64_t r = 0; r < rows; ++r, image += read_stride, written += written_stride)
          s.rows[r] = image, s.outputs[r] = written;
        return;
      }
    }
    const int64_t count = segments(phase), written_step = phase.axis[2].step * written_stride;
    PixelWalk pixel(phase, begin);
    for (int64_t row = 0; row < rows;) {
      const int64_t run = std::min(rows - row, pixel.left_in_row());
      const T* image = t_.read + pixel.n * t_.read_pixels() * read_stride + group * t_.read_channels;
      T* written = t_.written + group * t_.written_channels +
                   (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * written_stride;
      for (int64_t r = 0; r < run; ++r) s.outputs[row + r] = written + r * written_step;
      if (copies_patches_ && !lines_) {
        PixelWalk each = pixel;
        for (int64_t r = row; r < row + run; ++r, ++each.x) {
          S* patch = s.patches + r * patch_stride_;
          copy_patch(phase, each, image, read_stride, patch);
          for (int64_t j = 0; j < count; ++j) s.rows[j * block_rows_ + r] = patch + j * tap_depth_;
        }
      } else if constexpr (!kConverts) {
        find_lines(phase, pixel, image, read_stride, s);
        point_at_run(phase, pixel.x, run, row, s);
      }
      row += run;
      pixel.advance(run);
    }
  }

  void find_lines(const Phase& phase, const PixelWalk& pixel, const T* image, int64_t read_stride,
                  const Scratch& s) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1];
    Line* line = s.lines;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy, ++line) {
        const int64_t z = pixel.z * az->read_step + az->offset(jz), y = pixel.y * ay->read_step + ay->offset(jy);
        const bool outside = z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1];
        line->first = outside ? s.zeros : image + (z * t_.read_size[1] + y) * t_.read_size[2] * read_stride;
        line->step = outside ? 0 : read_stride;
      }
  }

  // Rows of `run` neighbouring pixels, the first of which is number x of its line and `row` of the block.
  void point_at_run(const Phase& phase, int64_t x, int64_t run, int64_t row, const Scratch& s) const {
    const AxisPhase axis = phase.axis[2].ascending(), &own = lines_ ? axis : phase.axis[2];
    const int64_t lines = phase.axis[0].taps * phase.axis[1].taps, taps = lines_ ? 1 : axis.taps;
    const Inside first(x * axis.read_step + axis.offset(0), axis.read_step, run, t_.read_size[2]);
    const Inside last(x * axis.read_step + axis.offset(axis.taps - 1), axis.read_step, run, t_.read_size[2]);
    const int64_t begin = std::max(first.begin, last.begin), end = std::max(begin, std::min(first.end, last.end));
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Line& from = s.lines[line];
        const S** to = s.rows + (line * taps + tap) * block_rows_ + row;
        const S* p = from.first + ((x + begin) * own.read_step + own.offset(tap)) * from.step;
        for (int64_t r = begin; r < end; ++r, p += own.read_step * from.step) to[r] = p;
      }
    const auto point_at_borders = [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r)
        for (int64_t line = 0; line < lines; ++line)
          point_at_border(own, x + r, s.lines[line], s.rows + line * taps * block_rows_ + row + r,
                          s.patches + (row + r) * patch_stride_ + line * segment_depth(), s);
    };
    point_at_borders(0, begin);
    point_at_borders(end, run);
  }

  // What the taps of one kernel line read for a pixel near the border.
  void point_at_border(const AxisPhase& axis, int64_t pixel, const Line& line, const S** pointers, S* patch,
                       const Scratch& s) const {
    const int64_t x = pixel * axis.read_step + axis.offset_first, size = t_.read_size[2];
    if (!lines_) {
      for (int64_t tap = 0; tap < axis.taps; ++tap) {
        const int64_t at = x + tap * axis.offset_step;
        pointers[tap * block_rows_] = at >= 0 && at < size ? line.first + at * line.step : s.zeros;
      }
      return;
    }
    const int64_t begin = std::clamp<int64_t>(-x, 0, axis.taps), end = std::clamp<int64_t>(size - x, begin, axis.taps);
    std::fill(patch, patch + segment_depth(), S{});
    copy_span<1>(line.first + (x + begin) * line.step, 1, (end - begin) * line.step, patch + begin * line.step);
    *pointers = patch;
  }

  // Each tile's segments move up to the places of those that lie outside the tensor with all of its rows.
  void leave_out_zeros(int64_t count, int64_t rows, const Scratch& s) const {
    int64_t tile = 0;
    for_each_tile(rows, [&](int64_t first, int64_t height) {
      int64_t* kept = s.kept + tile * t_.geometry.taps();
      int64_t& kept_count = s.counts[tile++] = count;
      if (pointwise_ || (copies_patches_ && !lines_)) return;
      kept_count = 0;
      for (int64_t segment = 0; segment < count; ++segment) {
        const S** row = s.rows + segment * block_rows_ + first;
        if (std::all_of(row, row + height, [&](const S* pointer) { return pointer == s.zeros; })) continue;
        if (kept_count < segment) std::copy_n(row, height, s.rows + kept_count * block_rows_ + first);
        kept[kept_count++] = segment;
      }
    });
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

  void copy_patch(const Phase& phase, const PixelWalk& pixel, const T* image, int64_t read_stride, S* patch) const {
    if (read_stride == tap_depth_ && phase.axis[2].offset_step == 1) {
      copy_lines(phase, pixel, image, patch);
    } else {
      for_each_tap(phase, pixel, [&](int64_t j, int64_t at) {
        S* target = patch + j * tap_depth_;
        if (at >= 0) copy_span<1>(image + at * read_stride, 1, t_.read_channels, target);
        std::fill(target + (at < 0 ? 0 : t_.read_channels), target + tap_depth_, S{});
      });
    }
    const int64_t depth = phase.taps() * tap_depth_;
    std::fill(patch + depth, patch + round_up(depth, products<S>), S{});
  }

  // Neighbouring taps read neighbouring pixels: a line of the patch is one span of memory.
  void copy_lines(const Phase& phase, const PixelWalk& pixel, const T* image, S* patch) const {
    const int64_t taps = phase.axis[2].taps, channels = t_.read_channels;
    const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset_first;
    const int64_t inside = std::clamp<int64_t>(-x, 0, taps);
    const int64_t outside = std::clamp<int64_t>(t_.read_size[2] - x, inside, taps);
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz) {
      const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy, patch += taps * channels) {
        const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) {
          std::fill(patch, patch + taps * channels, S{});
          continue;
        }
        const T* line = image + ((z * t_.read_size[1] + y) * t_.read_size[2] + x) * channels;
        if (inside == 0 && outside == taps) {
          copy_span<1>(line, 1, taps * channels, patch);
          continue;
        }
        std::fill(patch, patch + inside * channels, S{});
        copy_span<1>(line + inside * channels, 1, (outside - inside) * channels, patch + inside * channels);
        std::fill(patch + outside * channels, patch + taps * channels, S{});
      }
    }
  }

  void multiply_panel(const Phase& phase, int64_t group, int64_t panel, int64_t rows, const Scratch& s) const {
    const int width = panel_width<A>(t_.written_channels, panel), vectors = width / lanes<A>;
    const int64_t first_column = panel * kPanel<A>;
    const int64_t columns = std::min<int64_t>(width, t_.written_channels - first_column);
    const bool in_place = columns == width;

    if (merged_)
      s.panels[0] = weights_.at(group, panel);
    else
      weights_.point_at_segments(phase, group, panel, s.panels);
    if (t_.bias) t_.load_bias(group, first_column, width, s.bias);

    const int64_t count = segments(phase), depth = segment_depth();
    const int64_t chunk = std::min(depth, kDepth * products<S>),
                  together = std::max<int64_t>(1, kDepth * products<S> / std::max<int64_t>(1, chunk));
    TileProduct<A, S, T> product;
    product.panels = s.panels;
    product.row_pitch = block_rows_;
    product.output_offset = in_place && !kStagesSums ? first_column : 0;
    product.written_offset = first_column;
    bool first_chain = true;
    // Tiles too short to ask for the lines that they write ask for those of the next block.
    const bool short_tiles = count * depth < kWorthPrefetching * products<S>;
    const int64_t row_step = phase.axis[2].step * t_.written_channels * t_.geometry.groups;
    product.ahead_step = short_tiles ? row_step * static_cast<int64_t>(sizeof(T)) : 64;
    for (int64_t segment = 0; first_chain || segment < count; segment += together)
      for (int64_t begin = 0; first_chain || begin < depth; begin += chunk) {
        const int64_t length = std::min(chunk, depth - begin);
        product.depth = length / products<S>;
        product.row_offset = begin;
        product.panel_offset = begin * width;
        product.accumulate = !first_chain;
        product.past_caches = past_caches_ && in_place;
        product.column_start = first_chain && t_.bias ? s.bias : nullptr;
        int64_t tile = 0;
        for_each_tile(rows, [&](int64_t first, int64_t height) {
          const int64_t kept_count = s.counts[tile];
          const int64_t* kept = s.kept + tile++ * t_.geometry.taps() + segment;
          if (segment >= kept_count && !first_chain) return;
          product.segments = std::min(together, kept_count - segment);
          product.panels = s.panels + segment;
          if (kept_count > 0 && kept_count < count) {
            for (int64_t j = 0; j < product.segments; ++j) s.kept_panels[j] = s.panels[kept[j]];
            product.panels = s.kept_panels;
          }
          const bool last_chain = segment + together >= kept_count && (begin + chunk >= depth || kept_count == 0);
          const bool finishes = in_place && last_chain && (kStagesSums || t_.epilogue.needed());
          product.epilogue = finishes ? &t_.epilogue : nullptr;
          product.rows = s.rows + segment * block_rows_ + first;
          product.written = s.outputs + first;
          if (short_tiles && !past_caches_)
            product.ahead = product.written[0] + rows * row_step + first_column;
          else if constexpr (!kConverts)
            product.ahead = streams_ && panel % block_panels_ == 0 ? product.rows[height - 1] + begin + depth : nullptr;
          product.outputs = s.staged_rows + first;
          if constexpr (!kStagesSums)
            if (in_place) product.outputs = s.outputs + first;
          tile_kernel<A, 1, S, T>(static_cast<int>(height), vectors)(product);
        });
        first_chain = false;
      }
    if (!in_place)
      for (int64_t r = 0; r < rows; ++r)
        t_.epilogue.store_row(s.outputs[r] + first_column, s.staged + r * kPanel<A>, columns);
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool copies_patches_, lines_, merged_, pointwise_, streams_, past_caches_;
  bool by_columns_;  // threads share out the weight: see Transfer::weight_is_larger
  WeightPanels<T> weights_;
  int64_t tap_depth_;  // rows of a tap in a panel
  int64_t row_blocks_, block_rows_, column_blocks_, block_panels_, patch_stride_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
