// implicit_gemm on N(D)HWC tensors with few written and many read channels: forward and backward input.
//
// Idea: as columns of a product, few written channels would leave most lanes idle, so lanes are read channels: each
// (pixel, written channel) of a tile keeps a vector of partial sums over taps and read channels, and the lanes are
// added up once, at the end. A loaded vector of the input meets every written channel, a vector of weights every pixel
// of the tile. Last layers of decoders are such convolutions, and so are the input gradients of first layers.
// Cost: multiply_adds(), with the read channels rounded up to whole vectors, plus about two shuffles per sum. Memory:
// packed weights. Limits: at most kMost written channels per group, fewer without AVX-512.
#pragma once
#include "conv_phase.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmDots {
 public:
  using A = accumulate_t<T>;
  static constexpr int kMost = 8;

  // Whether it beats written channels as lanes.
  static bool suits(const ConvArguments<T>& arguments) {
    const int64_t read = arguments.read_channels(), written = arguments.written_channels();
    // Measured: with short vectors, lanes of a product's columns are filled sooner.
    const int64_t most = kTileVectors == 4 ? kMost : read >= 4 * lanes<A> ? 6 : 4;
    return arguments.layout == Layout::channels_last && written <= most && 4 * read >= 3 * lanes<A> &&
           (arguments.geometry.groups == 1 || written < read);
  }

  explicit GemmDots(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    vectors_ = divide_up(t_.read_channels, lanes<A>);
    group_weights_ = t_.geometry.taps() * vectors_ * t_.written_channels * lanes<A>;
    const Phase phase = t_.phase(0);
    lines_ = t_.geometry.batch * phase.axis[0].count * phase.axis[1].count;
    // Pixels of a task: a line, or part of one that is long.
    segment_ = std::clamp<int64_t>(phase.axis[2].count, 1, kSegment);
    segments_ = std::max<int64_t>(1, divide_up(phase.axis[2].count, segment_));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = t_.geometry.groups * t_.geometry.taps();
    plan.run_tasks = t_.phase_count * t_.geometry.groups * lines_ * segments_;
    plan.packed_bytes = t_.geometry.groups * group_weights_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One tap of a group, as [vector of read channels][written channel][lane].
  void pack(int64_t task) const {
    const int64_t taps = t_.geometry.taps(), tap = task % taps, group = task / taps;
    A* target = packed(group, tap);
    for (int64_t first = 0; first < vectors_ * lanes<A>; first += lanes<A>)
      for (int64_t w = 0; w < t_.written_channels; ++w)
        for (int64_t lane = 0; lane < lanes<A>; ++lane, ++target) {
          const int64_t read = first + lane;
          *target = read >= t_.read_channels
                        ? A(0)
                        : to_accumulate(arguments_.weight[t_.weight_offset(arguments_, group, read, w) +
                                                          tap * arguments_.weight_stride_tap]);
        }
  }

  // A segment of a line of one phase and group.
  void run(void* scratch, int64_t task) const {
    Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    for (AxisPhase& axis : phase.axis) axis = axis.ascending();
    task /= t_.phase_count;
    const int64_t x = task % segments_ * segment_, line = task / segments_ % lines_, group = task / segments_ / lines_;
    if (x >= phase.axis[2].count || line >= t_.geometry.batch * phase.axis[0].count * phase.axis[1].count) return;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const PixelWalk pixel(phase, line * phase.axis[2].count);
    switch (t_.written_channels) {
      case 1:
        return add_line<1>(phase, pixel, group, x, s);
      case 2:
        return add_line<2>(phase, pixel, group, x, s);
      case 3:
        return add_line<3>(phase, pixel, group, x, s);
      case 4:
        return add_line<4>(phase, pixel, group, x, s);
      case 5:
        return add_line<5>(phase, pixel, group, x, s);
      case 6:
        return add_line<6>(phase, pixel, group, x, s);
      case 7:
        return add_line<7>(phase, pixel, group, x, s);
      default:
        return add_line<8>(phase, pixel, group, x, s);
    }
  }

 private:
  static constexpr int64_t kSegment = 256;
  static constexpr int64_t kAhead = 32;                              // pixels
  static constexpr int kSums = CONVLAB_VECTOR_BYTES == 64 ? 24 : 8;  // registers of a tile, of 32 or 16
  template <int Written>
  static constexpr int kPixels = std::clamp(kSums / Written, 1, 8);

  // A line of the kernel inside the tensor.
  struct KernelLine {
    const T* line;     // of the tensor that is read, the group's first channel
    const A* weights;  // of its first tap
  };
  // A tap of a tile of pixels.
  struct Tap {
    const A* weights;
    const T* pixels[8];
  };
  struct Scratch {
    KernelLine* lines;
    Tap* taps;
    T* zeros;  // a pixel of them
  };
  Scratch carve(Carver& carver) const {
    const ConvGeometry& g = t_.geometry;
    return {carver.take<KernelLine>(g.kernel[0] * g.kernel[1]), carver.take<Tap>(g.taps()),
            carver.take<T>(vectors_ * lanes<A>)};
  }
  A* packed(int64_t group, int64_t tap) const {
    return static_cast<A*>(arguments_.packed) + group * group_weights_ +
           tap * vectors_ * t_.written_channels * lanes<A>;
  }

  template <int Written>
  void add_line(const Phase& phase, PixelWalk pixel, int64_t group, int64_t first, const Scratch& s) const {
    constexpr int pixels = kPixels<Written>;
    constexpr int64_t sums = round_up(pixels * Written, lanes<A>);
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t read_channels = t_.read_channels * t_.geometry.groups, end = std::min(ax->count, first + segment_);
    const int64_t written_channels = Written * t_.geometry.groups;
    std::fill(s.zeros, s.zeros + vectors_ * lanes<A>, T{});
    int64_t count = 0;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy) {
        const int64_t z = pixel.z * az->read_step + az->offset(jz), y = pixel.y * ay->read_step + ay->offset(jy);
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) continue;
        s.lines[count++] = {
            t_.read + ((pixel.n * t_.read_size[0] + z) * t_.read_size[1] + y) * t_.read_size[2] * read_channels +
                group * t_.read_channels,
            packed(group, t_.tap_index(az->tap(jz), ay->tap(jy), 0))};
      }
    A start[sums] = {};
    if (t_.bias)
      for (int64_t i = 0; i < pixels * Written; ++i) start[i] = to_accumulate(t_.bias[group * Written + i % Written]);

    for (pixel.x = first; pixel.x < end; pixel.x += pixels) {
      const int64_t wanted = std::min<int64_t>(pixels, end - pixel.x);
      for (int64_t i = 0; i < count; ++i)
        point_at_pixels<pixels>(*ax, s.lines[i], pixel.x, wanted, read_channels, s.zeros, s.taps + i * ax->taps);
      if (count > 0) fetch_ahead(*ay, *ax, s.lines[count - 1].line, pixel.x, pixels, read_channels);
      vec<A> sum[sums] = {};
      add_taps<Written>(s.taps, count * ax->taps, sum);
      A results[sums];
      CONVLAB_UNROLL for (int64_t i = 0; i < sums; i += lanes<A>) {
        vec<A> block[lanes<A>];
        CONVLAB_UNROLL for (int lane = 0; lane < lanes<A>; ++lane) block[lane] = sum[i + lane];
        store(results + i, sum_lanes_of_each<A, lanes<A>>(block) + load(start + i));
      }
      T* target = t_.written +
                  (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * written_channels +
                  group * Written;
      if (ax->step == 1 && t_.geometry.groups == 1)
        t_.epilogue.store_row(target, results, wanted * Written);
      else
        for (int64_t p = 0; p < wanted; ++p)
          t_.epilogue.store_row(target + p * ax->step * written_channels, results + p * Written, Written);
    }
  }

  // What the next line will read first, below this tile, or, in a single line, what comes a few tiles later.
  CONVLAB_INLINE void fetch_ahead(const AxisPhase& rows, const AxisPhase& axis, const T* line, int64_t x,
                                  int64_t pixels, int64_t channels) const {
    const int64_t below = (rows.count > 1 ? rows.read_step * t_.read_size[2] : kAhead) * channels;
    const T* from = line + x * axis.read_step * channels + below;
    constexpr int64_t step = 64 / sizeof(T);
    for (const T* end = from + pixels * axis.read_step * channels; from < end; from += step)
      __builtin_prefetch(from, 0, 2);
  }

  // What the taps of a kernel line read for neighbouring pixels; zeros where they stand outside, and for pixels that
  // are not wanted.
  template <int Pixels>
  void point_at_pixels(const AxisPhase& axis, const KernelLine& line, int64_t x, int64_t wanted, int64_t channels,
                       const T* zeros, Tap* taps) const {
    const int64_t step = axis.read_step * channels, tap_weights = vectors_ * t_.written_channels * lanes<A>;
    for (int64_t jx = 0; jx < axis.taps; ++jx, ++taps) {
      const int64_t at = x * axis.read_step + axis.offset(jx);
      const T* from = line.line + at * channels;
      taps->weights = line.weights + axis.tap(jx) * tap_weights;
      if (wanted == Pixels && at >= 0 && at + (Pixels - 1) * axis.read_step < t_.read_size[2]) {
        CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) taps->pixels[p] = from + p * step;
        continue;
      }
      for (int64_t p = 0; p < Pixels; ++p) {
        const int64_t column = at + p * axis.read_step;
        taps->pixels[p] = p < wanted && column >= 0 && column < t_.read_size[2] ? from + p * step : zeros;
      }
    }
  }

  // Adds all taps of a tile to its sums, [pixel][written channel].
  template <int Written>
  void add_taps(const Tap* taps, int64_t count, vec<A>* sums) const {
    constexpr int pixels = kPixels<Written>;
    const int64_t whole = t_.read_channels / lanes<A> * lanes<A>, left = t_.read_channels - whole;
    vec<A> sum[pixels][Written] = {};
    for (const Tap* tap = taps; tap < taps + count; ++tap) {
      const A* weights = tap->weights;
      const T* row[pixels];
      CONVLAB_UNROLL for (int p = 0; p < pixels; ++p) row[p] = tap->pixels[p];
      for (int64_t c = 0; c < whole; c += lanes<A>, weights += Written * lanes<A>) {
        vec<A> weight[Written];
        CONVLAB_UNROLL for (int w = 0; w < Written; ++w) {
          weight[w] = load(weights + w * lanes<A>);
          pin(weight[w]);
        }
        CONVLAB_UNROLL for (int p = 0; p < pixels; ++p) {
          vec<A> value = load(row[p] + c);
          pin(value);
          CONVLAB_UNROLL for (int w = 0; w < Written; ++w) sum[p][w] = fma(value, weight[w], sum[p][w]);
        }
      }
      if (left > 0) CONVLAB_UNROLL for (int p = 0; p < pixels; ++p) {
          const vec<A> value = load_partial(row[p] + whole, left);
          CONVLAB_UNROLL for (int w = 0; w < Written; ++w) sum[p][w] =
              fma(value, load(weights + w * lanes<A>), sum[p][w]);
        }
    }
    CONVLAB_UNROLL for (int p = 0; p < pixels; ++p) CONVLAB_UNROLL for (int w = 0; w < Written; ++w)
        sums[p * Written + w] = sum[p][w];
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  int64_t vectors_, group_weights_, lines_, segment_, segments_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
