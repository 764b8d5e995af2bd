// Depthwise convolution, backward weight, from copies of a few lines (conv_depthwise_weight.h).
//
// Idea: a vector of channels of one pixel lies far from that of the next, in few sets of the cache, lines begin and end
// with borders, and every line of taps reads them anew. So some lines of outputs, and what they read, are copied vector
// by vector to where they lie together, zeros around them; a line of taps keeps its sums in registers through all of
// the lines. Cost: multiply_adds(), those of the zeros beside the lines among them, and a load and a store for each
// element that is copied, which overlapping lines are more than once. Limits: from 25 taps on, for each element that is
// copied meets all of them; lines of at most 64 outputs; strides of 1 and 2 along the line, without dilation there;
// whole vectors of channels.
#pragma once
#include "conv_depthwise_products.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

// Neighbouring vectors; outputs are Step of them apart.
template <class A, int Step>
struct CopiedPixels {
  const A* from;

  CONVLAB_INLINE const A* at(int64_t tap) const { return from + tap * lanes<A>; }
  CONVLAB_INLINE void next_tap() { from += lanes<A>; }
  CONVLAB_INLINE void next_outputs(int64_t count) { from += count * Step * lanes<A>; }
};

template <class T>
class CopiedLines {
 public:
  using A = accumulate_t<T>;

  CopiedLines(const ConvArguments<T>& arguments, const Phase& phase)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase) {
    const AxisPhase &ay = phase.axis[1], &ax = phase.axis[2];
    slots_ = (ax.count - 1) * ax.read_step + ax.taps;
    const int64_t reach = ay.reach(), each = ax.count + ay.read_step * slots_;
    together_ = std::clamp((kVectors - (reach - ay.read_step) * slots_) / std::max<int64_t>(1, each), int64_t{1},
                           std::max<int64_t>(1, ay.count));
    lines_ = (together_ - 1) * ay.read_step + reach;
    suits_ = suits(arguments.geometry);
    in_rows_ = ax.taps == 3 && ay.taps == kRows;
  }

  // Whether so many taps meet an element of the input that copies pay, of neighbouring pixels of a line.
  static bool suits(const ConvGeometry& g) {
    return g.taps() >= kTaps && g.taps() > g.kernel[2] && g.kernel[2] >= 3 && g.dilation[2] == 1 && g.stride[2] <= 2 &&
           g.output_elements() > 0 && g.output[2] <= kColumns;
  }

  struct Scratch {
    A *gradient, *input;  // [vector of channels][line][pixel][lane]
  };
  Scratch carve(Carver& carver) const {
    if (!suits_) return {};
    return {carver.take<A>(kCopied * gradient_size()), carver.take<A>(kCopied * input_size())};
  }

  // sums[tap][channel] += what the lines of outputs begin..end make of the channels first..last, whole vectors of them.
  void add(int64_t begin, int64_t end, int64_t first, int64_t last, A* sums, int64_t pitch, const Scratch& s) const {
    const AxisPhase &az = phase_.axis[0], &ay = phase_.axis[1], &ax = phase_.axis[2];
    for (int64_t line = begin; line < end;) {
      const PixelWalk pixel(phase_, line * ax.count);
      const int64_t count = std::min({together_, end - line, ay.count - pixel.y});
      for (int64_t c = first; c < last; c += kCopied * lanes<A>) {
        const int64_t vectors = std::min<int64_t>(kCopied, (last - c) / lanes<A>);
        copy_gradient(line, count, c, vectors, s.gradient);
        for (int64_t jz = 0; jz < az.taps; ++jz) {
          const int64_t z = pixel.z * az.read_step + az.offset(jz);
          if (z < 0 || z >= geometry_.input[0]) continue;
          copy_input(pixel, z, count, c, vectors, s.input);
          for (int64_t v = 0; v < vectors; ++v)
            add_plane({s.gradient + v * gradient_size(), s.input + v * input_size(), pixel.y, count, pitch},
                      sums + jz * ay.taps * ax.taps * pitch + c + v * lanes<A>);
        }
      }
      line += count;
    }
  }

 private:
  static constexpr int64_t kTaps = 25, kColumns = 64;  // of wider lines too few fit
  static constexpr int64_t kVectors = 1024;            // of a vector of channels' pixels: 64 KB
  static constexpr int kCopied = 4;                    // vectors of channels that are copied together
  static constexpr int kRows = 3;  // of taps whose sums are in registers together, if each has three

  int64_t gradient_size() const { return together_ * phase_.axis[2].count * lanes<A>; }
  int64_t input_size() const { return lines_ * slots_ * lanes<A>; }

  // Neighbouring pixels from `from` on become neighbouring vectors, for each vector of channels.
  void copy_pixels(const T* from, int64_t pixels, int64_t vectors, A* target, int64_t size) const {
    for (int64_t p = 0; p < pixels; ++p, from += geometry_.groups, target += lanes<A>)
      for (int64_t v = 0; v < vectors; ++v) store(target + v * size, load(from + v * lanes<A>));
  }

  void copy_gradient(int64_t line, int64_t count, int64_t channel, int64_t vectors, A* target) const {
    const int64_t columns = phase_.axis[2].count;
    copy_pixels(arguments_.output + line * columns * geometry_.groups + channel, count * columns, vectors, target,
                gradient_size());
  }

  void copy_input(const PixelWalk& pixel, int64_t z, int64_t count, int64_t channel, int64_t vectors, A* target) const {
    const AxisPhase &ay = phase_.axis[1], &ax = phase_.axis[2];
    const int64_t* size = geometry_.input;
    const int64_t left = -ax.offset(0), first = pixel.y * ay.read_step + ay.offset(0);
    const int64_t begin = std::clamp<int64_t>(left, 0, slots_), end = std::clamp(size[2] + left, begin, slots_);
    for (int64_t i = 0; i < (count - 1) * ay.read_step + ay.reach(); ++i) {
      const int64_t y = first + i;
      const bool outside = y < 0 || y >= size[1];
      A* line = target + i * slots_ * lanes<A>;
      const int64_t zeros = outside ? slots_ : begin, rest = outside ? slots_ : end;
      for (int64_t v = 0; v < vectors; ++v) {
        std::fill(line + v * input_size(), line + v * input_size() + zeros * lanes<A>, A(0));
        std::fill(line + v * input_size() + rest * lanes<A>, line + v * input_size() + slots_ * lanes<A>, A(0));
      }
      if (outside) continue;
      const T* from = arguments_.input +
                      (((pixel.n * size[0] + z) * size[1] + y) * size[2] + begin - left) * geometry_.groups + channel;
      copy_pixels(from, end - begin, vectors, line + begin * lanes<A>, input_size());
    }
  }

  struct Plane {
    const A *gradient, *input;
    int64_t y, count;  // lines of outputs
    int64_t pitch;     // of the sums
  };

  // All taps of a plane of the kernel; sums[tap][lane].
  void add_plane(const Plane& plane, A* sums) const {
    const AxisPhase &ay = phase_.axis[1], &ax = phase_.axis[2];
    if (in_rows_)
      return ax.read_step == 1 ? add_line<1, kRows, 3>(plane, 0, sums) : add_line<2, kRows, 3>(plane, 0, sums);
    for (int64_t jy = 0; jy < ay.taps; ++jy, sums += ax.taps * plane.pitch)
      if (ax.read_step == 2)
        ax.taps >= 5 ? add_line<2, 1, 5>(plane, jy, sums) : add_line<2, 1, 3>(plane, jy, sums);
      else if (ax.taps % 5 == 0)
        add_line<1, 1, 5>(plane, jy, sums);
      else if (ax.taps >= 6)
        add_line<1, 1, 7>(plane, jy, sums);
      else
        ax.taps == 4 ? add_line<1, 1, 4>(plane, jy, sums) : add_line<1, 1, 3>(plane, jy, sums);
  }

  // Lines of taps from number jy on.
  template <int Step, int Rows, int Taps>
  void add_line(const Plane& plane, int64_t jy, A* sums) const {
    const int64_t taps = phase_.axis[2].taps;
    int64_t j = 0;
    for (; j + Taps <= taps; j += Taps) add_taps<Step, Rows, Taps>(plane, jy, j, sums);
    if constexpr (Taps > 4)
      for (; j + 3 <= taps; j += 3) add_taps<Step, Rows, 3>(plane, jy, j, sums);
    if constexpr (Rows == 1)
      for (; j < taps; ++j) add_taps<Step, Rows, 1>(plane, jy, j, sums);
  }

  // Their taps from number j on.
  template <int Step, int Rows, int Taps>
  CONVLAB_INLINE void add_taps(const Plane& plane, int64_t jy, int64_t j, A* sums) const {
    const AxisPhase &ay = phase_.axis[1], &ax = phase_.axis[2];
    // Lines of outputs that read a line inside.
    const Inside inside(plane.y * ay.read_step + ay.offset(jy), ay.read_step, plane.count, geometry_.input[1]);
    const int64_t begin = Rows == 1 ? inside.begin : 0, end = Rows == 1 ? inside.end : plane.count;
    vec<A> sum[Rows][Taps];
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) sum[r][t] = vec<A>{};
    for (int64_t i = begin; i < end; ++i) {
      ProductRun<A, CopiedPixels<A, Step>, Rows> run{plane.gradient + i * ax.count * lanes<A>, lanes<A>, lanes<A>, {}};
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r)
          run.input[r] = {plane.input + ((i * ay.read_step + (jy + r) * ay.offset_step) * slots_ + j) * lanes<A>};
      add_products<Step, true>(run, ax.count, sum);
    }
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
      A* at = sums + (r * ax.taps + j + t) * plane.pitch;
      store(at, load(at) + sum[r][t]);
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  bool suits_, in_rows_;
  int64_t slots_, together_, lines_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
