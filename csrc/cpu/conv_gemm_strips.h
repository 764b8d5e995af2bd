// implicit_gemm on NC(D)HW tensors with a kernel of several taps: forward and backward input.
//
// Idea: the product is that of conv_gemm_channels_last.h, rows are pixels and columns are written channels, on a strip
// of lines that is transposed first to [line][pixel][channel], with the zeros of the padding. A tap then is a shift of
// the strip, a kernel line of few channels one segment, and no pixel has a border to look at; each pixel is copied once
// and not once per tap. Sums are transposed back as they are stored.
// Cost: multiply_adds() plus a transposition of what is read (the strips' borders twice) and of what is written.
// Memory: packed weights; per thread a strip of at most kStripBytes, or of what one line of a segment reads, and one
// panel of its sums.
// Limits: operands are single elements, not pairs (operand.h); few written channels leave lanes idle; a 1x1 kernel
// needs no strip.
#pragma once
#include "conv_gemm_channels_last.h"
#include "conv_lines.h"
#include "conv_strips.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmStrips {
 public:
  using A = accumulate_t<T>;

  static bool suits(const ConvArguments<T>& arguments) {
    const bool one_pixel = arguments.pass == Pass::forward && arguments.geometry.output_pixels() == 1;
    return arguments.pass != Pass::backward_weight && arguments.layout == Layout::channels_first &&
           arguments.patches_overlap() &&  // others are gathered once as well
           !(one_pixel && arguments.read_channels() >= kFewChannels) && arguments.written_channels() >= kFewest;
  }

  explicit GemmStrips(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    const Phase phase = t_.phase(0);  // no other has more pixels
    channels_ = t_.read_channels;
    const bool few = channels_ < kFewChannels;
    lines_ = few && t_.phase_count == 1 && phase.axis[2].ascending().offset_step == 1 &&
             phase.axis[2].taps == t_.geometry.kernel[2];
    pixel_ = few ? channels_ : round_up(channels_, lanes<A>) + lanes<A>;  // off a power of two
    const int64_t columns = std::max<int64_t>(1, phase.axis[2].count), rows = std::max<int64_t>(1, phase.axis[1].count);
    segments_ = divide_up(columns, kPixels);
    segment_ = divide_up(columns, segments_);
    reach_ = StripReach(t_, segment_);
    images_ = g.batch * std::max<int64_t>(1, phase.axis[0].count);
    const int64_t others = t_.phase_count * g.groups * images_ * segments_, enough = enough_tasks(arguments.threads);
    strip_ = strip_rows(std::clamp<int64_t>(kPixels / segment_, 1, rows), [&](int64_t strip) {
      return strip_size(strip) * static_cast<int64_t>(sizeof(A)) > kStripBytes ||
             (strip * segment_ > kFewestPixels && others * divide_up(rows, strip) < enough);
    });
    strips_ = divide_up(rows, strip_);
    strip_ = divide_up(rows, strips_);
    weights_ = WeightPanels<T>(arguments_, t_, channels_, lines_);
    by_columns_ = t_.weight_is_larger();
    column_blocks_ = weights_.blocks(others * strips_);
    block_panels_ = divide_up(weights_.count(), column_blocks_);
    column_blocks_ = divide_up(weights_.count(), block_panels_);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = weights_.tasks();
    plan.packed_bytes = weights_.bytes();
    plan.packs_in_place = by_columns_ && t_.geometry.groups * column_blocks_ >= arguments_.threads;
    plan.run_tasks = t_.phase_count * t_.geometry.groups * images_ * strips_ * segments_ * column_blocks_;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void pack(int64_t task) const { weights_.pack(task); }

  // A strip of lines of one phase, image and group, times some panels.
  void run(void* scratch, int64_t task) const {
    Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    for (AxisPhase& axis : phase.axis) axis = axis.ascending();
    task /= t_.phase_count;
    const int64_t blocks = segments_ * strips_ * images_, group = task / blocks / column_blocks_;
    const int64_t column_block = by_columns_ ? task / blocks % column_blocks_ : task % column_blocks_;
    const int64_t block = by_columns_ ? task % blocks : task / column_blocks_ % blocks;
    const int64_t x = block % segments_ * segment_, y = block / segments_ % strips_ * strip_;
    const int64_t image = block / segments_ / strips_, planes = images_ / t_.geometry.batch;
    const Strip strip{image / planes,
                      image % planes,
                      y,
                      x,
                      std::min(strip_, phase.axis[1].count - y),
                      std::min(segment_, phase.axis[2].count - x)};
    if (strip.z >= phase.axis[0].count || strip.rows <= 0 || strip.columns <= 0) return;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    copy_lines(phase, group, strip, s.lines);
    point_at_pixels(phase, strip, s);
    const int64_t last_panel = std::min(weights_.count(), (column_block + 1) * block_panels_);
    for (int64_t panel = column_block * block_panels_; panel < last_panel; ++panel) {
      multiply_panel(phase, group, panel, strip, s);
      store_panel(phase, group, panel, strip, s.sums);
    }
  }

 private:
  static constexpr int64_t kFewest = 12;                      // written channels per group, for which it is worth it
  static constexpr int64_t kFewChannels = 32;                 // read ones, up to which kernel lines are segments
  static constexpr int64_t kPixels = 96, kFewestPixels = 24;  // of a strip: a panel is used 16 times once it is in L2
  static constexpr int64_t kStripBytes = 192 * 1024;

  // Written pixels, in the phase's coordinates.
  struct Strip {
    int64_t n, z, y, x, rows, columns;
    int64_t pixels() const { return rows * columns; }
  };
  struct Scratch {
    A* lines;        // [tap along z][line][slot][channel]
    A* sums;         // [pixel][column] of one panel
    A* bias;         // of one panel
    const A** rows;  // [segment][pixel]
    const A** taps;  // [segment]: the panel's rows of it
    A** outputs;     // [pixel]
  };
  Scratch carve(Carver& carver) const {
    const int64_t taps = t_.geometry.taps(), pixels = strip_ * segment_;
    return {
        carver.take<A>(strip_size(strip_) + lanes<A>), carver.take<A>(pixels * kPanel<A>), carver.take<A>(kPanel<A>),
        carver.take<const A*>(taps * pixels),          carver.take<const A*>(taps),        carver.take<A*>(pixels)};
  }

  int64_t strip_size(int64_t rows) const { return reach_.planes * reach_.lines_of(rows) * reach_.slots * pixel_; }
  int64_t segment_depth() const { return channels_ * (lines_ ? t_.geometry.kernel[2] : 1); }
  int64_t segment_count(const Phase& phase) const {
    return phase.axis[0].taps * phase.axis[1].taps * (lines_ ? 1 : phase.axis[2].taps);
  }

  void copy_lines(const Phase& phase, int64_t group, const Strip& strip, A* lines) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t plane = t_.read_pixels(), height = t_.read_size[1], width = t_.read_size[2];
    const int64_t first_y = strip.y * ay->read_step + ay->offset_first;
    const int64_t first_x = strip.x * ax->read_step + ax->offset_first;
    const int64_t slots = slots_of(*ax, strip.columns);
    const int64_t begin = std::clamp<int64_t>(-first_x, 0, slots), end = std::clamp(width - first_x, begin, slots);
    const T* image = t_.read + (strip.n * t_.geometry.groups + group) * channels_ * plane;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t line = 0; line < reach_.lines_of(strip.rows); ++line) {
        const int64_t z = strip.z * az->read_step + az->offset(jz), y = first_y + line;
        A* to = lines + (jz * reach_.lines_of(strip_) + line) * reach_.slots * pixel_;
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= height || begin == end) {
          std::fill(to, to + slots * pixel_, A(0));
          continue;
        }
        std::fill(to, to + begin * pixel_, A(0));
        // The last channels first: whole vectors are written, and what is too much belongs to the next pixel.
        const T* from = image + (z * height + y) * width + first_x + begin;
        for (int64_t c = round_up(channels_, lanes<A>) - lanes<A>; c >= 0; c -= lanes<A>)
          transpose_matrix(from + c * plane, plane, std::min<int64_t>(lanes<A>, channels_ - c), end - begin,
                           to + begin * pixel_ + c, pixel_);
        std::fill(to + end * pixel_, to + slots * pixel_, A(0));
      }
  }

  void point_at_pixels(const Phase& phase, const Strip& strip, const Scratch& s) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t pixels = strip.pixels(), line = reach_.slots * pixel_, step = ax->read_step * pixel_;
    for (int64_t p = 0; p < pixels; ++p) s.outputs[p] = s.sums + p * kPanel<A>;
    const A** row = s.rows;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy)
        for (int64_t jx = 0; jx < (lines_ ? 1 : ax->taps); ++jx)
          for (int64_t y = 0; y < strip.rows; ++y) {
            const A* first = s.lines +
                             (jz * reach_.lines_of(strip_) + y * reach_.row_step + jy * ay->offset_step) * line +
                             jx * ax->offset_step * pixel_;
            for (int64_t x = 0; x < strip.columns; ++x, first += step) *row++ = first;
          }
  }

  void multiply_panel(const Phase& phase, int64_t group, int64_t panel, const Strip& strip, const Scratch& s) const {
    const int width = panel_width<A>(t_.written_channels, panel);
    weights_.point_at_segments(phase, group, panel, s.taps);
    if (t_.bias) t_.load_bias(group, panel * kPanel<A>, width, s.bias);

    const int64_t count = segment_count(phase), depth = segment_depth(), pixels = strip.pixels();
    const int64_t chunk = std::min(depth, kDepth),
                  together = std::max<int64_t>(1, kDepth / std::max<int64_t>(1, chunk));
    TileProduct<A> product;
    product.row_pitch = pixels;
    const int64_t tiles = divide_up(pixels, kTileRows);
    bool first_chain = true;
    for (int64_t segment = 0; first_chain || segment < count; segment += together)
      for (int64_t begin = 0; first_chain || begin < depth; begin += chunk) {
        product.segments = std::min(together, count - segment);
        product.panels = s.taps + segment;
        product.depth = std::min(chunk, depth - begin);
        product.row_offset = begin;
        product.panel_offset = begin * width;
        product.accumulate = !first_chain;
        product.column_start = first_chain && t_.bias ? s.bias : nullptr;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t first = pixels * tile / tiles, height = pixels * (tile + 1) / tiles - first;
          product.rows = s.rows + segment * pixels + first;
          product.outputs = s.outputs + first;
          tile_kernel<A, 1>(static_cast<int>(height), width / lanes<A>)(product);
        }
        first_chain = false;
      }
  }

  // [pixel][column] -> lines of each column's plane.
  void store_panel(const Phase& phase, int64_t group, int64_t panel, const Strip& strip, const A* sums) const {
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t plane = t_.written_pixels(), step = phase.axis[2].step;
    PixelWalk pixel(phase, 0);
    pixel.z = strip.z, pixel.x = strip.x;
    for (int64_t row = 0; row < strip.rows; ++row, sums += strip.columns * kPanel<A>) {
      pixel.y = strip.y + row;
      T* line = t_.written + ((strip.n * t_.geometry.groups + group) * t_.written_channels + first) * plane +
                pixel.written_pixel(t_.written_size);
      store_lines(t_.epilogue, sums, strip.columns, columns, line, plane, step);
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool lines_;
  bool by_columns_;  // threads share out the weight: see Transfer::weight_is_larger
  int64_t channels_, pixel_, images_, segment_, segments_, strip_ = 1, strips_;
  StripReach reach_;
  WeightPanels<T> weights_;
  int64_t column_blocks_, block_panels_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
