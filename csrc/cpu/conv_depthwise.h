// Depthwise convolution (groups == in_channels == out_channels), forward and backward input, all strides, dilations and
// dimensions.
//
// One channel meets one filter, so there is no product of matrices, and the work is to move memory once. Channels last,
// lanes are channels: this file. Channels first, lines are transposed to that order first (conv_direct.h). With very
// few channels, lanes are pixels of zero-padded planes (conv_gemm_planes.h, conv_planes_weight.h). Cost:
// multiply_adds(), and each input loaded once per kernel line and vector; 3x3 is bound by moving the tensors. Channels
// are taken in blocks where L1 would else lose what a window reads before the next reads most of it again. Where L2
// would lose lines before the next line of outputs reads them again, blocks are copied to where they lie together
// (pixels a power of two apart also share few sets of a cache).
#pragma once
#include "conv_gemm_planes.h"
#include "conv_planes_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int kWindowPixels = CONVLAB_VECTOR_BYTES == 64 ? 8 : 7;  // of 32 or 16 registers; 7 divides the usual maps

// What a window reads inside a line: pixels `pitch` apart; of the vectors, all lanes or `left`.
template <class T, bool Whole = true>
struct PitchedPixels {
  const T* from;
  int64_t pitch, left = 0;

  CONVLAB_INLINE vec<accumulate_t<T>> value() const { return Whole ? load(from) : load_partial(from, left); }
  CONVLAB_INLINE void advance(int64_t pixels) {
    from += pixels * pitch;
    pin_pointer(from);  // counted up: ten multiples of the pitch would not fit into registers
  }
};

// What a window reads at a border: a list of pixels, zeros for those outside, from channel `offset` on.
template <class T, bool Whole>
struct ListedPixels {
  const T* const* list;
  int64_t offset, left;

  CONVLAB_INLINE vec<accumulate_t<T>> value() const {
    return Whole ? load(*list + offset) : load_partial(*list + offset, left);
  }
  CONVLAB_INLINE void advance(int64_t pixels) { list += pixels; }
};

// kWindowPixels neighbouring outputs of a line += Taps neighbouring taps of one vector of channels: every input is
// loaded once and meets all the taps it belongs to. Outputs read pixels Step apart (0: `step`, for a single tap).
template <int Step, int Taps, class Pixels, class A>
CONVLAB_INLINE void add_window(Pixels pixels, int64_t step, const A* weights, int64_t weight_step,
                               vec<A> (&sum)[kWindowPixels]) {
  constexpr int distance = Step ? Step : 1;
  static_assert(Step || Taps == 1);
  vec<A> weight[Taps];
  CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) weight[j] = load(weights + j * weight_step);
  CONVLAB_UNROLL for (int q = 0; q < (kWindowPixels - 1) * distance + Taps; ++q, pixels.advance(Step ? 1 : step)) {
    if (q % distance >= Taps) continue;
    vec<A> value = pixels.value();
    if constexpr (Taps > 1) pin(value);
    CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
      const int p = (q - j) / distance;
      if (q >= j && (q - j) % distance == 0 && p < kWindowPixels) sum[p] = fma(value, weight[j], sum[p]);
    }
  }
}

// Forward and backward input on N(D)HWC: windows of neighbouring pixels of a line. A task is a strip of lines, of all
// channels or of a block of them; copied first, for one phase, or read where they are, for one phase after the other,
// as all of them read the same lines.
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
    const int64_t pixel_bytes = channels_ * static_cast<int64_t>(sizeof(T));
    const int64_t kept = pixel_bytes % kSharedSets == 0 ? kKeptBytes : kKeptApartBytes;
    copies_ = lines > 1 && lines * t_.read_size[2] * pixel_bytes > kept;
    block_ = copies_ ? copied_channels(phase) : kept_channels(phase);
    blocks_ = divide_up(channels_, block_);
    fetches_ = !copies_ && block_ == channels_ && elements * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
    for (int64_t index = 0; index < t_.phase_count; ++index) {
      const Phase each = t_.phase(index);
      window_reads_ = std::max(window_reads_, window_reads(each.axis[2]));
      slots_ = std::max(slots_, slots(each.axis[2]));
      reach_ = std::max(reach_, each.axis[1].reach());
      planes_ = std::max(planes_, each.axis[0].taps);
    }
    read_step_ = phase.axis[1].read_step;
    strip_ = std::clamp<int64_t>(rows, 1, copies_ ? kCopiedStrip : kStrip);
    while (strip_ > 1 && ((copies_ && copied_size() * static_cast<int64_t>(sizeof(T)) > kCopiedBytes) ||
                          images_ * blocks_ * divide_up(rows, strip_) < enough_tasks(arguments.threads)))
      strip_ = divide_up(strip_, 2);
    strips_ = divide_up(rows, strip_);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = divide_up(channels_, lanes<A>);
    plan.run_tasks = (copies_ ? t_.phase_count : 1) * images_ * strips_ * blocks_;
    plan.packed_bytes = plan.pack_tasks * lanes<A> * t_.geometry.taps() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // The weights of a vector of channels as [tap][lane].
  void pack(int64_t task) const {
    const int64_t taps = t_.geometry.taps(), first = task * lanes<A>;
    const int64_t count = std::min<int64_t>(lanes<A>, channels_ - first);
    A* target = static_cast<A*>(arguments_.packed) + first * taps;
    transpose_matrix(arguments_.weight + first * taps, taps, count, taps, target, lanes<A>);
  }

  // A strip of lines, for a block of channels.
  void run(void* scratch, int64_t task) const {
    int64_t begin = 0, end = t_.phase_count;  // phases
    if (copies_) {                            // fastest: phases differ in work
      begin = task % t_.phase_count, end = begin + 1;
      task /= t_.phase_count;
    }
    const int64_t strip = task / blocks_ % strips_, image = task / blocks_ / strips_, first = task % blocks_ * block_;
    const Channels channels = {first, std::min(channels_, first + block_)};
    Carver carver(scratch);
    Scratch s = carve(carver);
    std::fill(s.zeros, s.zeros + zeros(), T{});
    for (int64_t index = begin; index < end; ++index) convolve_strip(t_.phase(index), image, strip, channels, s);
  }

 private:
  static constexpr int64_t kCachedBytes = int64_t{16} << 20;  // of both tensors: likely still in a cache
  static constexpr int64_t kLineChannels = 64 / sizeof(T);    // of a cache line
  // Of lines that stay in L2 beside what is written: where pixels share few sets of it, and where they do not. It has a
  // megabyte where there is AVX-512.
  static constexpr int64_t kSharedSets = 2048, kKeptBytes = 192 * 1024;
  static constexpr int64_t kKeptApartBytes = CONVLAB_VECTOR_BYTES == 64 ? 3 * kKeptBytes : kKeptBytes;
  static constexpr int64_t kWindowBytes = 32 * 1024;  // of what a window reads, for L1
  static constexpr int64_t kStrip = 8, kCopiedStrip = 32, kCopiedBytes = int64_t{1} << 18;

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
    const T** listed;   // by line, the pixels of a window at a border
    T* zeros;           // as many as the channels of a window
    T* copies;
    int64_t first_line = 0;  // of the copied ones
    int64_t count = 0;
    int64_t step = 0;  // windows and vectors of this line that are done
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
  // Blocks of which a window and its weights fit into L1, if neighbouring windows read much in common.
  int64_t kept_channels(const Phase& phase) const {
    const int64_t reads = phase.axis[0].taps * phase.axis[1].taps * window_reads(phase.axis[2]) + phase.taps();
    const int64_t fit = kWindowBytes / (std::max<int64_t>(1, reads) * static_cast<int64_t>(sizeof(T)));
    if (channels_ <= fit || fit < 2 * kLineChannels || phase.axis[2].count <= 2 * kWindowPixels) return channels_;
    return round_up(divide_up(channels_, divide_up(channels_, fit)), kLineChannels);
  }
  // Pixels that a window reads.
  static int64_t window_reads(const AxisPhase& axis) {
    return (kWindowPixels - 1) * axis.read_step + std::max<int64_t>(1, axis.reach());
  }
  // Pixels that the windows of a line read.
  static int64_t slots(const AxisPhase& axis) {
    return (round_up(axis.count, kWindowPixels) - 1) * axis.read_step + std::max<int64_t>(1, axis.reach());
  }
  int64_t zeros() const { return (copies_ ? block_ : channels_) + lanes<A>; }
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

  void convolve_strip(const Phase& phase, int64_t image, int64_t strip, Channels channels, Scratch& s) const {
    const int64_t planes = t_.phase(0).axis[0].count;
    if (image % planes >= phase.axis[0].count) return;
    PixelWalk pixel(phase, 0);
    pixel.n = image / planes, pixel.z = image % planes, pixel.y = strip * strip_;
    const int64_t rows = std::min(strip_, phase.axis[1].count - pixel.y);
    s.first_line = pixel.y * phase.axis[1].read_step + phase.axis[1].ascending().offset_first;
    if (copies_ && rows > 0) copy_lines(phase, pixel, rows, channels, s);
    for (int64_t row = 0; row < rows; ++row, ++pixel.y) convolve_line(phase, pixel, channels, s);
  }

  // One line of one phase.
  void convolve_line(const Phase& phase, const PixelWalk& pixel, Channels channels, Scratch& s) const {
    const AxisPhase axis = phase.axis[2].ascending();
    T* target = t_.written + (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * channels_;
    find_lines(phase, pixel, channels, s);
    if (fetches_) look_ahead(phase, pixel, target, s);
    // Pixels whose windows lie inside.
    const int64_t first = copies_ ? 0 : axis.offset_first;
    int64_t begin = 0, end = axis.count;
    if (!copies_) {
      begin = std::min(round_up(divide_up(std::max<int64_t>(0, -first), axis.read_step), kWindowPixels), axis.count);
      const int64_t last = t_.read_size[2] - window_reads(axis) - first;  // window's first pixel reads this at most
      end = std::clamp(last < 0 ? 0 : (last / axis.read_step / kWindowPixels + 1) * kWindowPixels, begin, axis.count);
    }
    const Kernels inside = {kernel<true, true>(axis), kernel<true, false>(axis)};
    const Kernels border = {kernel<false, true>(axis), kernel<false, false>(axis)};
    for (int64_t x = 0; x < axis.count;)
      if (x == begin && begin < end) {
        convolve(inside, axis, target, begin, end, channels, s);
        x = end;
      } else {
        list_pixels(axis, first + x * axis.read_step, s);
        convolve(border, axis, target, x, std::min(x + kWindowPixels, axis.count), channels, s);
        x += kWindowPixels;
      }
  }

  // The lines that a line of outputs reads, and the weights of their taps.
  void find_lines(const Phase& phase, const PixelWalk& pixel, Channels channels, Scratch& s) const {
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
        s.weights[s.count++] = static_cast<const A*>(arguments_.packed) +
                               t_.tap_index(phase.axis[0].tap(jz), phase.axis[1].tap(jy), 0) * lanes<A>;
      }
  }

  // What the next line will read and write is fetched during this one, in even shares.
  void look_ahead(const Phase& phase, const PixelWalk& pixel, const T* target, Scratch& s) const {
    const AxisPhase &axis = phase.axis[2], rows = phase.axis[1].ascending();
    const T* image = t_.read + pixel.n * t_.read_pixels() * channels_;
    const int64_t below = pixel.y * rows.read_step + rows.offset(rows.taps - 1) + 1;
    const bool more_read = below >= 0 && below < t_.read_size[1], more_written = pixel.y + 1 < rows.count;
    const int64_t steps = divide_up(axis.count, kWindowPixels) * std::max<int64_t>(1, channels_ / lanes<A>);
    s.step = 0;
    s.next_read = {image + (more_read ? below : 0) * t_.read_size[2] * channels_,
                   more_read ? rows.read_step * t_.read_size[2] * channels_ : 0, steps};
    // Each of a line's phases fetches a part of it.
    const int64_t part = axis.first * (axis.count - 1) * channels_;
    s.next_written = {target + (more_written ? rows.step * t_.written_size[2] * channels_ + part : 0),
                      more_written ? axis.count * channels_ : 0, steps};
  }

  Scratch carve(Carver& carver) const {
    const int64_t lines = t_.geometry.kernel[0] * t_.geometry.kernel[1];
    Scratch s;
    s.lines = carver.take<const T*>(lines);
    s.weights = carver.take<const A*>(lines);
    s.listed = carver.take<const T*>(lines * window_reads_);
    s.zeros = carver.take<T>(zeros());
    s.copies = carver.take<T>(copies_ ? copied_size() : 0);
    return s;
  }

  // Pixels `begin` (the first of a window) to `end` of a line for a range of channels.
  struct Span {
    const AxisPhase& axis;
    T* target;  // the line's first pixel
    int64_t begin, end, first_channel, end_channel;
  };
  using Kernel = void (DepthwiseChannelsLast::*)(const Span& span, Scratch& s) const;

  struct Kernels {
    Kernel whole, partial;  // for vectors of channels all of which are there, and not
  };
  void convolve(const Kernels& kernels, const AxisPhase& axis, T* target, int64_t begin, int64_t end, Channels channels,
                Scratch& s) const {
    const int64_t whole = channels.begin + (channels.end - channels.begin) / lanes<A> * lanes<A>;
    if (channels.begin < whole) (this->*kernels.whole)({axis, target, begin, end, channels.begin, whole}, s);
    if (whole < channels.end) (this->*kernels.partial)({axis, target, begin, end, whole, channels.end}, s);
  }

  // The usual kernels have their taps unrolled.
  template <bool Inside, bool Whole>
  static Kernel kernel(const AxisPhase& axis) {
    const int64_t taps = axis.offset_step == 1 || axis.taps == 1 ? axis.taps : 1;
    if (axis.read_step == 2) {
      if (taps == 3) return &DepthwiseChannelsLast::convolve_windows<2, 3, false, Inside, Whole>;
      if (taps == 5) return &DepthwiseChannelsLast::convolve_windows<2, 5, false, Inside, Whole>;
      return &DepthwiseChannelsLast::convolve_windows<2, 1, true, Inside, Whole>;
    }
    if (axis.read_step == 1) {
      if (axis.taps == 1) return &DepthwiseChannelsLast::convolve_windows<1, 1, false, Inside, Whole>;
      if (taps == 2) return &DepthwiseChannelsLast::convolve_windows<1, 2, false, Inside, Whole>;
      if (taps == 3) return &DepthwiseChannelsLast::convolve_windows<1, 3, false, Inside, Whole>;
      if (taps == 4) return &DepthwiseChannelsLast::convolve_windows<1, 4, false, Inside, Whole>;
      if (taps == 5) return &DepthwiseChannelsLast::convolve_windows<1, 5, false, Inside, Whole>;
      if (taps == 7) return &DepthwiseChannelsLast::convolve_windows<1, 7, false, Inside, Whole>;
      if (taps > 0 && taps % 5 == 0) return &DepthwiseChannelsLast::convolve_windows<1, 5, true, Inside, Whole>;
      if (taps == 6) return &DepthwiseChannelsLast::convolve_windows<1, 3, true, Inside, Whole>;
      if (taps > 7) return &DepthwiseChannelsLast::convolve_windows<1, 7, true, Inside, Whole>;
    }
    return &DepthwiseChannelsLast::convolve_windows<0, 1, true, Inside, Whole>;
  }

  // Taps at a time, of which there are so many; if there are more (More), what remains of them singly.
  template <int Step, int Taps, bool More, bool Inside, bool Whole>
  void convolve_windows(const Span& span, Scratch& s) const {
    const AxisPhase axis = span.axis;
    const Epilogue<T> epilogue = t_.epilogue;
    const bool plain = !epilogue.needed();
    const int64_t weight_step = axis.tap_step * lanes<A>, first_weight = axis.tap_first * lanes<A>;
    const int64_t taps = t_.geometry.taps(), count = axis.taps ? s.count : 0;
    const T* bias = t_.bias;
    const int64_t step = axis.step * channels_, pitch = copies_ ? block_ : channels_;
    const T* const* lines = s.lines;
    const A* const* line_weights = s.weights;
    for (int64_t x = span.begin; x < span.end; x += kWindowPixels) {
      const int64_t pixels = std::min<int64_t>(kWindowPixels, span.end - x);
      const int64_t first = x * axis.read_step + (copies_ ? 0 : axis.offset_first);
      for (int64_t c = span.first_channel; c < span.end_channel; c += lanes<A>) {
        if (fetches_) {
          s.next_read.template fetch<0>(s.step);
          s.next_written.template fetch<1>(s.step++);
        }
        vec<A> sum[kWindowPixels];
        const int64_t own = c * taps;
        const vec<A> start = !bias ? vec<A>{} : Whole ? load(bias + c) : load_partial(bias + c, span.end_channel - c);
        CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) sum[p] = start;
        for (int64_t i = 0; i < count; ++i) {
          auto source = [&] {
            if constexpr (Inside)
              return PitchedPixels<T, Whole>{lines[i] + first * pitch + c, pitch, span.end_channel - c};
            else
              return ListedPixels<T, Whole>{s.listed + i * window_reads_, c, span.end_channel - c};
          }();
          const A* weights = line_weights[i] + first_weight + own;
          add_window<Step, Taps>(source, axis.read_step, weights, weight_step, sum);
          if constexpr (More) {
            const auto next = [&](int64_t taps) {
              source.advance(taps * axis.offset_step);
              weights += taps * weight_step;
            };
            int64_t j = Taps;
            next(Taps);
            for (; j + Taps <= axis.taps; j += Taps, next(Taps))
              add_window<Step, Taps>(source, axis.read_step, weights, weight_step, sum);
            if constexpr (Taps > 4)
              for (; j + 3 <= axis.taps; j += 3, next(3))
                add_window<Step, 3>(source, axis.read_step, weights, weight_step, sum);
            if constexpr (Taps > 1)
              for (; j < axis.taps; ++j, next(1))
                add_window<Step, 1>(source, axis.read_step, weights, weight_step, sum);
          }
        }
        T* to = span.target + x * step + c;
        if (Whole && plain && pixels == kWindowPixels) {
          CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) store(to + p * step, sum[p]);
          continue;
        }
        CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) {
          if (p >= pixels) break;
          if (Whole)
            epilogue.store(to + p * step, sum[p]);
          else
            epilogue.store_partial(to + p * step, sum[p], span.end_channel - c);
        }
        if (epilogue.gated()) [[unlikely]]
          for (int p = 0; p < pixels; ++p) epilogue.open_gate(to + p * step, Whole ? lanes<A> : span.end_channel - c);
      }
    }
  }

  // What a window reads whose first pixel meets pixel `first` through its first tap, for each of the lines.
  void list_pixels(const AxisPhase& axis, int64_t first, const Scratch& s) const {
    const int64_t size = copies_ ? slots_ : t_.read_size[2], pitch = copies_ ? block_ : channels_;
    const int64_t reads = window_reads(axis);
    const int64_t begin = std::clamp<int64_t>(-first, 0, reads), end = std::clamp(size - first, begin, reads);
    for (int64_t i = 0; i < s.count; ++i) {
      const T** list = s.listed + i * window_reads_;
      std::fill(list, list + begin, s.zeros);
      for (int64_t q = begin; q < end; ++q) list[q] = s.lines[i] + (first + q) * pitch;
      std::fill(list + end, list + reads, s.zeros);
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool copies_, fetches_;
  int64_t channels_, images_, block_, blocks_, strip_, strips_;
  int64_t window_reads_ = 1;
  int64_t slots_ = 1, reach_ = 1, planes_ = 1, read_step_ = 1;  // copied: the most that any phase needs
};

}  // namespace convlab::cpu::CONVLAB_ISA
