// Depthwise convolution (groups == in_channels == out_channels), all passes, strides, dilations and dimensions.
//
// One channel meets one filter, so there is no product of matrices, and the work is to move memory once. Channels last,
// lanes are channels: this file. Channels first, lanes are pixels of zero-padded planes: conv_depthwise_planes.h.
// Cost: multiply_adds() at one load each, which for 3x3 is about what reading and writing the tensors costs.
#pragma once
#include "conv_depthwise_planes.h"

namespace convlab::cpu::CONVLAB_ISA {

// Forward and backward input on N(D)HWC: several neighbouring pixels of a line share each tap's weights.
template <class T>
class DepthwiseChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseChannelsLast(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    channels_ = t_.geometry.groups;
    pitch_ = round_up(channels_, lanes<A>);
    const Phase phase = t_.phase(0);
    lines_ = t_.geometry.batch * phase.axis[0].count * phase.axis[1].count;
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.prepare_tasks = t_.geometry.taps() + 1;
    plan.run_tasks = t_.phase_count * lines_;
    plan.shared_bytes = (t_.geometry.taps() + 1) * pitch_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // Weights as [tap][channel], and after them the bias.
  void prepare(void*, int64_t task) const {
    const int64_t taps = t_.geometry.taps();
    A* target = static_cast<A*>(arguments_.shared) + task * pitch_;
    for (int64_t c = 0; c < pitch_; ++c) {
      if (c >= channels_ || (task == taps && !t_.bias))
        target[c] = 0;
      else
        target[c] = to_accumulate(task == taps ? t_.bias[c] : arguments_.weight[c * taps + task]);
    }
  }

  // One line of one phase.
  void run(void* scratch, int64_t task) const {
    const Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    const int64_t line = task / t_.phase_count;
    if (line >= t_.geometry.batch * phase.axis[0].count * phase.axis[1].count) return;
    PixelWalk pixel(phase, line * phase.axis[2].count);
    Carver carver(scratch);
    Scratch s = carve(carver);
    const T* image = t_.read + pixel.n * t_.read_pixels() * channels_;
    for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
      for (int64_t jy = 0; jy < phase.axis[1].taps; ++jy) {
        const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
        const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
        if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) continue;
        s.lines[s.count] = image + (z * t_.read_size[1] + y) * t_.read_size[2] * channels_;
        s.weights[s.count++] = static_cast<const A*>(arguments_.shared) +
                               t_.tap_index(phase.axis[0].tap(jz), phase.axis[1].tap(jy), 0) * pitch_;
      }
    T* target = t_.written + (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * channels_;

    const AxisPhase& axis = phase.axis[2];
    const int64_t size = t_.read_size[2];
    int64_t begin = 0, end = axis.count;  // pixels all of whose taps lie inside the line
    for (int64_t j = 0; j < axis.taps; ++j) {
      const Inside inside(axis.offset(j), axis.read_step, axis.count, size);
      begin = std::max(begin, inside.begin);
      end = std::min(end, inside.end);
    }
    end = std::max(begin, end);
    for (int64_t x = 0; x < begin; ++x) pixels<1, true>(axis, x, s, target);
    int64_t x = begin;
    for (; x + kPixels <= end; x += kPixels) pixels<kPixels, false>(axis, x, s, target);
    if (end - x >= 4) pixels<4, false>(axis, x, s, target), x += 4;
    if (end - x >= 2) pixels<2, false>(axis, x, s, target), x += 2;
    if (end - x >= 1) pixels<1, false>(axis, x, s, target), x += 1;
    for (x = end; x < axis.count; ++x) pixels<1, true>(axis, x, s, target);
  }

 private:
  static constexpr int kPixels = 8;

  struct Scratch {
    const T** lines;    // read by the taps that lie inside the tensor
    const A** weights;  // of their first tap
    int64_t count;
  };
  Scratch carve(Carver& carver) const {
    const int64_t lines = t_.geometry.kernel[0] * t_.geometry.kernel[1];
    return {carver.take<const T*>(lines), carver.take<const A*>(lines), 0};
  }

  // Count neighbouring pixels from x on, all channels.
  template <int Count, bool Border>
  void pixels(const AxisPhase& axis, int64_t x, const Scratch& s, T* target) const {
    for (int64_t c = 0; c < channels_; c += lanes<A>)
      if (c + lanes<A> <= channels_)
        pixels_of_channels<Count, Border, true>(axis, x, c, s, target);
      else
        pixels_of_channels<Count, Border, false>(axis, x, c, s, target);
  }

  template <int Count, bool Border, bool Whole>
  CONVLAB_INLINE void pixels_of_channels(const AxisPhase& axis, int64_t x, int64_t c, const Scratch& s,
                                         T* target) const {
    const vec<A> bias = load(static_cast<const A*>(arguments_.shared) + t_.geometry.taps() * pitch_ + c);
    const int64_t left = channels_ - c, step = axis.read_step * channels_;
    vec<A> sum[Count];
    CONVLAB_UNROLL for (int p = 0; p < Count; ++p) sum[p] = bias;
    for (int64_t i = 0; i < s.count; ++i)
      for (int64_t j = 0; j < axis.taps; ++j) {
        const int64_t at = x * axis.read_step + axis.offset(j);
        if (Border && (at < 0 || at >= t_.read_size[2])) continue;
        const T* source = s.lines[i] + at * channels_ + c;
        const vec<A> weight = load(s.weights[i] + axis.tap(j) * pitch_ + c);
        CONVLAB_UNROLL for (int p = 0; p < Count; ++p) sum[p] =
            fma(Whole ? load(source + p * step) : load_partial(source + p * step, left), weight, sum[p]);
      }
    CONVLAB_UNROLL for (int p = 0; p < Count; ++p) {
      T* to = target + (x + p) * axis.step * channels_ + c;
      if (Whole)
        t_.epilogue.store(to, sum[p]);
      else
        t_.epilogue.store_partial(to, sum[p], left);
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  int64_t channels_, pitch_, lines_;
};

// Backward weight on N(D)HWC. Each task sums one chunk of output lines for some channels; chunks depend on the geometry
// alone and are added in order.
template <class T>
class DepthwiseWeightChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseWeightChannelsLast(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry) {
    channels_ = geometry_.groups;
    pitch_ = round_up(channels_, lanes<A>);
    channel_blocks_ = divide_up(channels_, kChannels);
    lines_ = geometry_.batch * geometry_.output[0] * geometry_.output[1];
    chunks_ = std::min(lines_, kChunks);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_ * channel_blocks_;
    plan.finish_tasks = channel_blocks_;
    plan.shared_bytes = chunks_ * geometry_.taps() * pitch_ * static_cast<int64_t>(sizeof(A));
    return plan;
  }

  void run(void*, int64_t task) const {
    const int64_t chunk = task / channel_blocks_, first = task % channel_blocks_ * kChannels;
    const int64_t end = std::min(channels_, first + kChannels), taps = geometry_.taps();
    for (int64_t tap = 0; tap < taps; ++tap)
      std::fill(partial(chunk, tap) + first, partial(chunk, tap) + std::min(pitch_, first + kChannels), A(0));
    const Phase phase = phase_at(geometry_, Pass::forward, 0);
    for (int64_t line = lines_ * chunk / chunks_; line < lines_ * (chunk + 1) / chunks_; ++line) {
      PixelWalk pixel(phase, line * geometry_.output[2]);
      const T* gradient = arguments_.output + line * geometry_.output[2] * channels_;
      const T* image = arguments_.input + pixel.n * geometry_.input_pixels() * channels_;
      int64_t tap = 0;
      for (int64_t kz = 0; kz < geometry_.kernel[0]; ++kz)
        for (int64_t ky = 0; ky < geometry_.kernel[1]; ++ky) {
          const int64_t z = pixel.z * geometry_.stride[0] + phase.axis[0].offset(kz);
          const int64_t y = pixel.y * geometry_.stride[1] + phase.axis[1].offset(ky);
          const bool outside = z < 0 || z >= geometry_.input[0] || y < 0 || y >= geometry_.input[1];
          const T* row = image + (z * geometry_.input[1] + y) * geometry_.input[2] * channels_;
          for (int64_t kx = 0; kx < geometry_.kernel[2]; ++kx, ++tap)
            if (!outside) add_line(gradient, row, phase.axis[2].offset(kx), first, end, partial(chunk, tap));
        }
    }
  }

  void finish(int64_t task) const {
    const int64_t taps = geometry_.taps(), end = std::min(channels_, (task + 1) * kChannels);
    for (int64_t c = task * kChannels; c < end; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        A sum = 0;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial(chunk, tap)[c];
        arguments_.weight[c * taps + tap] = from_accumulate<T>(sum);
      }
  }

 private:
  static constexpr int64_t kChannels = 4 * lanes<A>;
  static constexpr int64_t kChunks = 16;

  A* partial(int64_t chunk, int64_t tap) const {
    return static_cast<A*>(arguments_.shared) + (chunk * geometry_.taps() + tap) * pitch_;
  }

  // sums[c] += sum over the pixels of one line of gradient[pixel][c] * row[pixel*stride + offset][c]
  void add_line(const T* gradient, const T* row, int64_t offset, int64_t first, int64_t end, A* sums) const {
    const int64_t stride = geometry_.stride[2], step = stride * channels_;
    const Inside inside(offset, stride, geometry_.output[2], geometry_.input[2]);
    const T* from = row + (inside.begin * stride + offset) * channels_;
    const T* g = gradient + inside.begin * channels_;
    const int64_t count = inside.end - inside.begin;
    for (int64_t c = first; c < end; c += lanes<A>) {
      const int64_t left = end - c;
      vec<A> sum[4] = {};
      int64_t i = 0;
      if (left >= lanes<A>) {
        for (; i + 4 <= count; i += 4)
          CONVLAB_UNROLL for (int u = 0; u < 4; ++u) sum[u] =
              fma(load(g + (i + u) * channels_ + c), load(from + (i + u) * step + c), sum[u]);
        for (; i < count; ++i) sum[0] = fma(load(g + i * channels_ + c), load(from + i * step + c), sum[0]);
      } else {
        for (; i < count; ++i)
          sum[0] = fma(load_partial(g + i * channels_ + c, left), load_partial(from + i * step + c, left), sum[0]);
      }
      store(sums + c, load(sums + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  int64_t channels_, pitch_, channel_blocks_, lines_, chunks_;
};

template <class T>
struct Depthwise {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    const bool last = arguments.layout == Layout::channels_last;
    if (!last) return body(DepthwisePlanes<T>(arguments));
    if (arguments.pass == Pass::backward_weight) return body(DepthwiseWeightChannelsLast<T>(arguments));
    return body(DepthwiseChannelsLast<T>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
