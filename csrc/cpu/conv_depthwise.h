// Depthwise convolution (groups == in_channels == out_channels), forward and backward input, all strides, dilations and
// dimensions.
//
// One channel meets one filter, so there is no product of matrices, and the work is to move memory once. Channels last,
// lanes are channels: this file. Channels first, lines are transposed to that order first (conv_direct.h). With very
// few channels, lanes are pixels of zero-padded planes (conv_gemm_planes.h, conv_planes_weight.h). Cost:
// multiply_adds(), and each input loaded once per kernel line and vector; 3x3 is bound by moving the tensors. Lines of
// so many channels that a cache would lose them before the next line of outputs reads them again are handled some
// channels at a time, copied to where they lie together (pixels a power of two apart also share few sets of a cache).
#pragma once
#include "conv_gemm_planes.h"
#include "conv_planes_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int kWindowPixels = CONVLAB_VECTOR_BYTES == 64 ? 8 : 7;  // of 32 or 16 registers; 7 divides the usual maps
constexpr int kWindowTaps = 7;

// Which of a window's inputs exist.
enum class Window { inside, border, partial };  // all; not every pixel; not every pixel nor every lane

// Where a window reads: lines of pixels of `channels`, `left` of which are wanted.
template <class T>
struct WindowSource {
  const T* line;
  int64_t x;  // read by the window's first pixel through its first tap
  int64_t size, channels, left;
  const T* zeros;

  template <Window Kind>
  CONVLAB_INLINE vec<accumulate_t<T>> pixel(const T* from, int64_t distance) const {
    const int64_t at = x + distance;
    if (Kind != Window::inside) from = at >= 0 && at < size ? from : zeros;
    return Kind == Window::partial ? load_partial(from, left) : load(from);
  }
};

// kWindowPixels neighbouring outputs of a line += Taps neighbouring taps of one vector of channels: every input is
// loaded once and meets all the taps it belongs to. Pixels are Step apart (0: `step`, for a single tap).
template <int Step, int Taps, Window Kind, class T>
CONVLAB_INLINE void add_window(const WindowSource<T>& s, int64_t step, const accumulate_t<T>* weights,
                               int64_t weight_step, vec<accumulate_t<T>> (&sum)[kWindowPixels]) {
  using A = accumulate_t<T>;
  constexpr int distance = Step ? Step : 1;
  static_assert(Step || Taps == 1);
  vec<A> weight[Taps];
  CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) weight[j] = load(weights + j * weight_step);
  const T* from = s.line + s.x * s.channels;
  const int64_t pixel = (Step ? 1 : step) * s.channels;
  CONVLAB_UNROLL for (int q = 0; q < (kWindowPixels - 1) * distance + Taps; ++q) {
    const T* at = from;
    from += pixel;
    pin_pointer(from);  // counted up: ten multiples of the distance would not fit into registers
    if (q % distance >= Taps) continue;
    vec<A> value = s.template pixel<Kind>(at, Step ? q : q * step);
    if constexpr (Taps > 1) pin(value);
    CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
      const int p = (q - j) / distance;
      if (q >= j && (q - j) % distance == 0 && p < kWindowPixels) sum[p] = fma(value, weight[j], sum[p]);
    }
  }
}

// Forward and backward input on N(D)HWC: windows of neighbouring pixels of a line. A task is a strip of lines of some
// channels, copied first; or one line of all channels, read where it is.
template <class T>
class DepthwiseChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseChannelsLast(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    channels_ = t_.geometry.groups;
    const Phase phase = t_.phase(0);  // no other has more pixels
    const int64_t elements = t_.geometry.input_elements() + t_.geometry.output_elements();
    const int64_t rows = phase.axis[1].count;
    images_ = t_.geometry.batch * phase.axis[0].count;
    const int64_t lines = phase.axis[0].taps * phase.axis[1].taps;
    copies_ = lines > 1 && lines * t_.read_size[2] * channels_ * static_cast<int64_t>(sizeof(T)) > kKeptBytes;
    fetches_ = !copies_ && elements * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
    block_ = copies_ ? copied_channels(phase) : channels_;
    blocks_ = divide_up(channels_, block_);
    strip_ = 1;
    if (copies_) {
      for (int64_t index = 0; index < t_.phase_count; ++index) {
        const Phase each = t_.phase(index);
        slots_ = std::max(slots_, slots(each.axis[2]));
        reach_ = std::max(reach_, each.axis[1].reach());
        planes_ = std::max(planes_, each.axis[0].taps);
      }
      read_step_ = phase.axis[1].read_step;
      strip_ = std::clamp<int64_t>(rows, 1, kStrip);
      while (strip_ > 1 && (copied_size() * static_cast<int64_t>(sizeof(T)) > kCopiedBytes ||
                            images_ * blocks_ * divide_up(rows, strip_) < enough_tasks(arguments.threads)))
        strip_ = divide_up(strip_, 2);
    }
    strips_ = divide_up(rows, strip_);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.prepare_tasks = divide_up(channels_, lanes<A>);
    plan.run_tasks = t_.phase_count * images_ * strips_ * blocks_;
    plan.shared_bytes = plan.prepare_tasks * lanes<A> * channel_weights() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // The weights of a vector of channels as [tap][lane], and after them the bias.
  void prepare(void*, int64_t task) const {
    const int64_t taps = t_.geometry.taps(), first = task * lanes<A>;
    const int64_t count = std::min<int64_t>(lanes<A>, channels_ - first);
    A* target = static_cast<A*>(arguments_.shared) + first * channel_weights();
    transpose_matrix(arguments_.weight + first * taps, taps, count, taps, target, lanes<A>);
    load_then_zeros(t_.bias ? t_.bias + first : nullptr, t_.bias ? count : 0, lanes<A>, target + taps * lanes<A>);
  }

  // A strip of lines of one phase, for a block of channels.
  void run(void* scratch, int64_t task) const {
    const Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    task /= t_.phase_count;
    const int64_t first = task % blocks_ * block_, strip = task / blocks_ % strips_;
    const int64_t image = task / blocks_ / strips_, planes = t_.phase(0).axis[0].count;
    if (image % planes >= phase.axis[0].count) return;
    PixelWalk pixel(phase, 0);
    pixel.n = image / planes, pixel.z = image % planes, pixel.y = strip * strip_;
    const int64_t rows = std::min(strip_, phase.axis[1].count - pixel.y);
    Carver carver(scratch);
    Scratch s = carve(carver);
    std::fill(s.zeros, s.zeros + lanes<A>, T{});
    const Channels channels = {first, std::min(channels_, first + block_)};
    s.first_line = pixel.y * phase.axis[1].read_step + phase.axis[1].ascending().offset_first;
    if (copies_ && rows > 0) copy_lines(phase, pixel, rows, channels, s);
    for (int64_t row = 0; row < rows; ++row, ++pixel.y) convolve_line(phase, pixel, channels, s);
  }

 private:
  static constexpr int64_t kCachedBytes = int64_t{16} << 20;  // of both tensors: likely still in a cache
  static constexpr int64_t kLineChannels = 64 / sizeof(T);    // of a cache line
  static constexpr int64_t kKeptBytes = 192 * 1024;           // of lines that stay in L2 beside what is written
  static constexpr int64_t kWindowBytes = 24 * 1024;          // of what a window reads, for L1
  static constexpr int64_t kStrip = 32, kCopiedBytes = int64_t{1} << 18;

  // Memory to fetch in equal shares.
  struct Ahead {
    const char* from = nullptr;
    int64_t share = 0;
    Ahead() = default;
    Ahead(const T* from, int64_t elements, int64_t shares)
        : from(reinterpret_cast<const char*>(from)),
          share(round_up(divide_up(elements * static_cast<int64_t>(sizeof(T)), shares), 64)) {}
    template <int Write>
    CONVLAB_INLINE void fetch(int64_t index) const {
      for (const char* p = from + index * share; p < from + (index + 1) * share; p += 64)
        __builtin_prefetch(p, Write, 3);
    }
  };

  struct Scratch {
    const T** lines;    // read by the taps that lie inside the tensor
    const A** weights;  // of their first tap
    T* zeros;
    T* copies;
    int64_t first_line = 0;  // of the copied ones
    int64_t count = 0;
    int64_t steps = 0, step = 0;  // blocks of a line, and the current one
    Ahead next_read, next_written;
  };

  struct Channels {
    int64_t begin, end;
  };

  // As many cache lines of channels, up to 4, as let what a window reads stay in L1.
  static int64_t copied_channels(const Phase& phase) {
    const AxisPhase& axis = phase.axis[2];
    const int64_t lines = phase.axis[0].taps * phase.axis[1].taps;
    const int64_t pixels = lines * ((kWindowPixels - 1) * axis.read_step + axis.reach());
    int64_t channels = kLineChannels;
    while (channels < 4 * kLineChannels && 2 * channels * pixels * static_cast<int64_t>(sizeof(T)) <= kWindowBytes)
      channels *= 2;
    return channels;
  }
  // Pixels that the windows of a line read.
  static int64_t slots(const AxisPhase& axis) {
    return (round_up(axis.count, kWindowPixels) - 1) * axis.read_step + std::max<int64_t>(1, axis.reach());
  }
  int64_t channel_weights() const { return t_.geometry.taps() + 1; }  // and the bias
  int64_t copied_lines(int64_t rows) const { return (rows - 1) * read_step_ + reach_; }
  int64_t copied_size() const { return planes_ * copied_lines(strip_) * slots_ * block_; }

  // The lines that a strip reads, as [tap along z][line][slot][channel], zeros outside the tensor.
  void copy_lines(const Phase& phase, const PixelWalk& pixel, int64_t rows, Channels channels, const Scratch& s) const {
    const AxisPhase axis = phase.axis[2].ascending();
    const int64_t lines = copied_lines(rows), count = channels.end - channels.begin, width = slots(axis);
    const int64_t begin = std::clamp<int64_t>(-axis.offset_first, 0, width);
    const int64_t end = std::clamp<int64_t>(t_.read_size[2] - axis.offset_first, begin, width);
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
      for (int64_t line = 0; line < lines; ++line) {
        const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz), y = s.first_line + line;
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) continue;  // nor are they read
        T* to = s.copies + (jz * copied_lines(strip_) + line) * slots_ * block_;
        const T* from = t_.read +
                        ((pixel.n * t_.read_size[0] + z) * t_.read_size[1] + y) * t_.read_size[2] * channels_ +
                        (begin + axis.offset_first) * channels_ + channels.begin;
        std::fill(to, to + begin * block_, T{});
        T* target = to + begin * block_;
        for (int64_t x = begin; x < end; ++x, from += channels_, target += block_)
          if (count == block_)
            std::memcpy(target, from, block_ * sizeof(T));
          else
            std::copy_n(from, count, target);
        std::fill(target, to + width * block_, T{});
      }
  }

  // One line of one phase.
  void convolve_line(const Phase& phase, const PixelWalk& pixel, Channels channels, Scratch& s) const {
    const AxisPhase axis = phase.axis[2].ascending();
    const T* image = t_.read + pixel.n * t_.read_pixels() * channels_;
    s.count = 0;
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy) {
        const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
        const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) continue;
        s.lines[s.count] =
            copies_ ? s.copies + (jz * copied_lines(strip_) + y - s.first_line) * slots_ * block_ - channels.begin
                    : image + (z * t_.read_size[1] + y) * t_.read_size[2] * channels_;
        s.weights[s.count++] = static_cast<const A*>(arguments_.shared) +
                               t_.tap_index(phase.axis[0].tap(jz), phase.axis[1].tap(jy), 0) * lanes<A>;
      }
    T* target = t_.written + (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * channels_;
    const Kernel inside = kernel<Window::inside>(axis), border = kernel<Window::border>(axis);
    const Kernel partial = kernel<Window::partial>(axis);
    const int64_t whole = channels.begin + (channels.end - channels.begin) / lanes<A> * lanes<A>;
    // What the next line will read and write is fetched during this one, in even shares, unless it is in cache.
    const AxisPhase rows = phase.axis[1].ascending();
    const int64_t below = pixel.y * rows.read_step + rows.offset(rows.taps - 1) + 1;
    const bool more_read = below >= 0 && below < t_.read_size[1], more_written = pixel.y + 1 < rows.count;
    s.steps = divide_up(axis.count, kWindowPixels) * std::max<int64_t>(1, channels_ / lanes<A>);
    if (fetches_) {
      s.next_read = {image + (more_read ? below : 0) * t_.read_size[2] * channels_,
                     more_read ? rows.read_step * t_.read_size[2] * channels_ : 0, s.steps};
      // Each of a line's phases fetches a part of it.
      const int64_t part = axis.first * (axis.count - 1) * channels_;
      s.next_written = {target + (more_written ? rows.step * t_.written_size[2] * channels_ + part : 0),
                        more_written ? axis.count * channels_ : 0, s.steps};
    }
    s.step = 0;
    for (int64_t x = 0; x < axis.count; x += kWindowPixels) {
      const int64_t first = x * axis.read_step + (copies_ ? 0 : axis.offset_first);
      const int64_t last = first + (kWindowPixels - 1) * axis.read_step + (axis.taps - 1) * axis.offset_step;
      const Kernel most = copies_ || (first >= 0 && last < t_.read_size[2]) ? inside : border;
      const int64_t pixels = std::min<int64_t>(kWindowPixels, axis.count - x);
      T* to = target + x * axis.step * channels_;
      (this->*most)({axis, first, pixels, channels.begin, whole}, s, to);
      if (whole < channels.end) (this->*partial)({axis, first, pixels, whole, channels.end}, s, to);
    }
  }

  Scratch carve(Carver& carver) const {
    const int64_t lines = t_.geometry.kernel[0] * t_.geometry.kernel[1];
    Scratch s;
    s.lines = carver.take<const T*>(lines);
    s.weights = carver.take<const A*>(lines);
    s.zeros = carver.take<T>(lanes<A>);
    s.copies = carver.take<T>(copies_ ? copied_size() : 0);
    return s;
  }

  // `pixels` neighbouring pixels, of which the first reads `x` through the first tap, for a range of channels.
  struct Block {
    const AxisPhase& axis;
    int64_t x, pixels, begin, end;
  };
  using Kernel = void (DepthwiseChannelsLast::*)(const Block& block, Scratch& s, T* to) const;

  // The usual kernels have their taps unrolled.
  template <Window Kind>
  static Kernel kernel(const AxisPhase& axis) {
    const int64_t taps = axis.offset_step == 1 || axis.taps == 1 ? axis.taps : 1;
    if (axis.read_step == 2) {
      if (taps == 5) return &DepthwiseChannelsLast::convolve<2, 5, Kind>;
      return &DepthwiseChannelsLast::convolve<2, 1, Kind>;
    }
    if (axis.read_step == 1) {
      if (taps == 1) return &DepthwiseChannelsLast::convolve<1, 1, Kind>;
      if (taps == 2) return &DepthwiseChannelsLast::convolve<1, 2, Kind>;
      if (taps == 3) return &DepthwiseChannelsLast::convolve<1, 3, Kind>;
      if (taps == 4) return &DepthwiseChannelsLast::convolve<1, 4, Kind>;
      if (taps % 5 == 0) return &DepthwiseChannelsLast::convolve<1, 5, Kind>;
      if (taps >= 6) return &DepthwiseChannelsLast::convolve<1, kWindowTaps, Kind>;
    }
    return &DepthwiseChannelsLast::convolve<0, 1, Kind>;
  }

  // Taps at a time, the remaining ones singly.
  template <int Step, int Taps, Window Kind>
  void convolve(const Block& b, Scratch& s, T* to) const {
    const AxisPhase axis = b.axis;
    const Epilogue<T> epilogue = t_.epilogue;
    const int64_t weight_step = axis.tap_step * lanes<A>, first_weight = axis.tap_first * lanes<A>;
    const int64_t channel_weights = this->channel_weights(), count = s.count;
    const A* bias = static_cast<const A*>(arguments_.shared) + t_.geometry.taps() * lanes<A>;
    const int64_t step = axis.step * channels_;
    WindowSource<T> source{nullptr, 0, copies_ ? slots_ : t_.read_size[2], copies_ ? block_ : channels_, 0, s.zeros};
    for (int64_t c = b.begin; c < b.end; c += lanes<A>, ++s.step) {
      s.next_read.template fetch<0>(s.step);
      s.next_written.template fetch<1>(s.step);
      vec<A> sum[kWindowPixels];
      const int64_t own = c * channel_weights;
      const vec<A> start = load(bias + own);
      CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) sum[p] = start;
      source.left = b.end - c;
      for (int64_t i = 0; i < count; ++i) {
        source.line = s.lines[i] + c;
        source.x = b.x;
        const A* weights = s.weights[i] + first_weight + own;
        int64_t j = 0;
        for (; j + Taps <= axis.taps; j += Taps, source.x += Taps * axis.offset_step, weights += Taps * weight_step)
          add_window<Step, Taps, Kind>(source, axis.read_step, weights, weight_step, sum);
        if constexpr (Taps > 4)
          for (; j + 3 <= axis.taps; j += 3, source.x += 3 * axis.offset_step, weights += 3 * weight_step)
            add_window<Step, 3, Kind>(source, axis.read_step, weights, weight_step, sum);
        if constexpr (Taps > 1)
          for (; j < axis.taps; ++j, source.x += axis.offset_step, weights += weight_step)
            add_window<Step, 1, Kind>(source, axis.read_step, weights, weight_step, sum);
      }
      T* target = to + c;
      if (Kind != Window::partial && b.pixels == kWindowPixels) {
        CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) epilogue.store(target + p * step, sum[p]);
        continue;
      }
      CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) {
        if (p >= b.pixels) break;
        if (Kind == Window::partial)
          epilogue.store_partial(target + p * step, sum[p], source.left);
        else
          epilogue.store(target + p * step, sum[p]);
      }
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool copies_, fetches_;
  int64_t channels_, images_, block_, blocks_, strip_, strips_;
  int64_t slots_ = 1, reach_ = 1, planes_ = 1, read_step_ = 1;  // copied: the most that any phase needs
};

}  // namespace convlab::cpu::CONVLAB_ISA
