// A block of written pixels as one sequence of positions in which every kernel tap is a shift by a constant.
//
// What the pixels read is copied line after line, with as many zeros between the lines as the kernel reaches beyond the
// border; then position p reads, for each tap, position p + shift(tap) of the copy, whatever line p is in. Neighbouring
// lines share these zeros, images do too. The price is positions between the lines, whose results nobody wants. With a
// stride, what is read falls into classes of equal residue, of which each is copied side by side, and each tap along z
// has a copy of its own.
#pragma once
#include "conv_phase.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

// What the pixels of a phase read along an axis: pixel i reads (i + shift) * step + residue for every tap.
struct AxisReads {
  int64_t step, size, taps;
  int64_t offset_first, offset_step;
  int64_t classes;    // different residues
  int64_t low, high;  // least and greatest shift

  AxisReads(const AxisPhase& phase, int64_t read_size) : step(phase.read_step), size(read_size), taps(phase.taps) {
    const AxisPhase axis = phase.ascending();
    offset_first = axis.offset_first, offset_step = axis.offset_step;
    int64_t period = 1;
    while (period * offset_step % step != 0) ++period;
    classes = std::min(period, taps);
    low = shift(0), high = shift(std::max<int64_t>(taps - 1, 0));
  }
  int64_t shift(int64_t tap) const { return floor_divide(offset_first + tap * offset_step, step); }
  int64_t class_of(int64_t tap) const { return tap % classes; }
  int64_t residue(int64_t index) const {
    const int64_t offset = offset_first + index * offset_step;
    return offset - floor_divide(offset, step) * step;
  }
  // How many read positions there are of a class.
  int64_t positions(int64_t index) const { return std::max<int64_t>(0, ceil_divide(size - residue(index), step)); }
  // From one line (or image) to the next, for pixels first..first + count: zeros past the end of one are those before
  // the next, if that has any.
  int64_t pitch(int64_t first, int64_t count) const {
    const int64_t begin = first + low, last = first + count - 1 + high;
    int64_t most = 0;
    for (int64_t index = 0; index < classes; ++index) most = std::max(most, positions(index));
    return std::min(last - begin + 1, std::max({count, last + 1, std::min(most, last + 1) - begin}));
  }
};

// Slabs (planes of images, counted through the batch), lines and columns of written pixels.
struct PixelBlock {
  int64_t slab, slabs, line, lines, column, columns;

  bool empty() const { return slabs <= 0 || lines <= 0 || columns <= 0; }
};

// How a phase's pixels are cut into blocks: a part of a line, some lines, or all lines of some slabs.
class BlockCut {
 public:
  BlockCut() = default;
  // As many pixels as fits(slabs, lines, columns) allows.
  template <class Fits>
  BlockCut(const Phase& phase, int64_t batch, int64_t edge, const Fits& fits)
      : all_slabs_(batch * std::max<int64_t>(1, phase.axis[0].count)),
        all_lines_(std::max<int64_t>(1, phase.axis[1].count)),
        all_columns_(std::max<int64_t>(1, phase.axis[2].count)),
        columns_(all_columns_) {
    const auto even = [](int64_t all, int64_t part) { return divide_up(all, divide_up(all, part)); };
    while (columns_ > edge && !fits(1, 1, columns_)) columns_ = round_up(divide_up(columns_, 2), edge);
    if (columns_ < all_columns_) {
      while (fits(1, 1, columns_ + edge)) columns_ += edge;
      columns_ = round_up(even(all_columns_, columns_), edge);
      return;
    }
    while (lines_ < all_lines_ && fits(1, lines_ + 1, columns_)) ++lines_;
    lines_ = even(all_lines_, lines_);
    if (lines_ < all_lines_) return;
    while (slabs_ < all_slabs_ && fits(slabs_ + 1, lines_, columns_)) ++slabs_;
    slabs_ = even(all_slabs_, slabs_);
  }

  int64_t slabs() const { return slabs_; }
  int64_t lines() const { return lines_; }
  int64_t columns() const { return columns_; }
  int64_t pixels() const { return slabs_ * lines_ * columns_; }  // of a block
  int64_t count() const {
    return divide_up(all_slabs_, slabs_) * divide_up(all_lines_, lines_) * divide_up(all_columns_, columns_);
  }
  // Clipped to another phase, of fewer pixels, a block may be empty.
  PixelBlock at(int64_t index, const Phase& phase, int64_t batch) const {
    const int64_t across = divide_up(all_columns_, columns_), down = divide_up(all_lines_, lines_);
    PixelBlock b;
    b.column = index % across * columns_;
    b.line = index / across % down * lines_;
    b.slab = index / across / down * slabs_;
    b.columns = std::min(columns_, phase.axis[2].count - b.column);
    b.lines = std::min(lines_, phase.axis[1].count - b.line);
    b.slabs = std::min(slabs_, batch * phase.axis[0].count - b.slab);
    return b;
  }

 private:
  int64_t all_slabs_ = 1, all_lines_ = 1, all_columns_ = 1;
  int64_t slabs_ = 1, lines_ = 1, columns_ = 1;
};

class PositionMap {
 public:
  // More than one slab: all lines of each.
  PositionMap(const Phase& phase, const int64_t* read_size, const PixelBlock& block)
      : z_(phase.axis[0], read_size[0]),
        y_(phase.axis[1], read_size[1]),
        x_(phase.axis[2], read_size[2]),
        planes_(phase.axis[0].count),
        block_(block) {
    pitch_ = x_.pitch(block.column, block.columns);
    slab_lines_ = block.slabs > 1 ? y_.pitch(block.line, block.lines) : block.lines + y_.high - y_.low;
    count_ = ((block.slabs - 1) * slab_lines_ + block.lines - 1) * pitch_ + block.columns;
    copied_ = block.slabs * slab_lines_ * pitch_;
    region_ = std::max(copied_, round_up(count_, kWhole) + (y_.high - y_.low) * pitch_ + x_.high - x_.low);
  }

  static constexpr int64_t kWhole = 32;  // positions are computed so many at a time

  // Positions for a block of at most so many pixels of any phase, at most.
  static int64_t most(const ConvGeometry& g, Pass pass, int64_t slabs, int64_t lines, int64_t columns) {
    const auto reach = [&](int axis) {
      const int64_t span = (g.kernel[axis] - 1) * g.dilation[axis];
      return pass == Pass::forward ? ceil_divide(span, g.stride[axis]) : span / g.stride[axis];
    };
    const auto classes = [&](int axis) {
      return pass == Pass::forward ? std::min(g.stride[axis], g.kernel[axis]) : int64_t{1};
    };
    const int64_t pitch = columns + reach(2), slab_lines = lines + reach(1);
    return g.kernel[0] * classes(1) * classes(2) *
           (round_up(slabs * slab_lines * pitch, kWhole) + reach(1) * pitch + reach(2));
  }

  int64_t count() const { return count_; }  // of written pixels, from the first to the last
  int64_t total() const { return region_ * regions(); }
  int64_t regions() const { return z_.taps * y_.classes * x_.classes; }

  // Of a tap of the phase in ascending order.
  int64_t shift(int64_t z, int64_t y, int64_t x) const {
    return ((z * y_.classes + y_.class_of(y)) * x_.classes + x_.class_of(x)) * region_ +
           (y_.shift(y) - y_.low) * pitch_ + x_.shift(x) - x_.low;
  }

  // Calls visit(first position, how many, pixel within the read image or -1, of which image) for runs that cover
  // every position once: neighbouring positions read pixels `x_step()` apart, or are zeros.
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    int64_t region = 0;
    for (int64_t jz = 0; jz < z_.taps; ++jz)
      for (int64_t cy = 0; cy < y_.classes; ++cy)
        for (int64_t cx = 0; cx < x_.classes; ++cx, region += region_) {
          int64_t at = region;
          for (int64_t slab = block_.slab; slab < block_.slab + block_.slabs; ++slab)
            for (int64_t line = 0; line < slab_lines_; ++line, at += pitch_)
              visit_line(slab / planes_, z_.offset_first + jz * z_.offset_step + slab % planes_ * z_.step,
                         (block_.line + y_.low + line) * y_.step + y_.residue(cy), cx, at, visit);
          if (at < region + region_) visit(at, region + region_ - at, -1, 0);
        }
  }
  int64_t x_step() const { return x_.step; }

  // Calls visit(first position, number of its image, its plane, line and first column) for the written lines.
  template <class Visit>
  void for_each_written_line(const Visit& visit) const {
    for (int64_t slab = 0; slab < block_.slabs; ++slab)
      for (int64_t line = 0; line < block_.lines; ++line) {
        const int64_t number = block_.slab + slab;
        visit((slab * slab_lines_ + line) * pitch_, number / planes_, number % planes_, block_.line + line,
              block_.column);
      }
  }
  const PixelBlock& block() const { return block_; }

 private:
  template <class Visit>
  void visit_line(int64_t image, int64_t z, int64_t y, int64_t cx, int64_t at, const Visit& visit) const {
    const int64_t first = block_.column + x_.low;
    int64_t begin = std::clamp<int64_t>(-first, 0, pitch_),
            end = std::clamp<int64_t>(x_.positions(cx) - first, begin, pitch_);
    if (z < 0 || z >= z_.size || y < 0 || y >= y_.size) begin = end = pitch_;
    if (begin > 0) visit(at, begin, -1, image);
    if (begin < end) {
      const int64_t x = (first + begin) * x_.step + x_.residue(cx);
      visit(at + begin, end - begin, (z * y_.size + y) * x_.size + x, image);
    }
    if (end < pitch_) visit(at + end, pitch_ - end, -1, image);
  }

  AxisReads z_, y_, x_;
  int64_t planes_;
  PixelBlock block_;
  int64_t pitch_, slab_lines_, count_, copied_, region_;
};

// With one tap that reads every pixel, images of a channels_last tensor lie one after the other.
inline ConvGeometry with_images_joined(ConvGeometry g, Layout layout) {
  if (layout != Layout::channels_last) return g;
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.kernel[axis] != 1 || g.stride[axis] != 1 || g.padding[axis] != 0) return g;
  g.input[2] = g.output[2] = g.batch * g.input_pixels();
  g.batch = g.input[0] = g.input[1] = g.output[0] = g.output[1] = 1;
  return g;
}

}  // namespace convlab::cpu::CONVLAB_ISA
