// One description for the forward and the backward-input pass: both write a tensor pixel by pixel, each pixel a sum
// over taps of what it reads from the other tensor.
//
// Forward, output pixel i reads input stride*i + (t*dilation - padding) for every tap t. Backward, input pixel
// i = stride*q + residue reads output q + (residue + padding - t*dilation)/stride, for the taps where that division
// is exact. Those taps depend on the residue alone, so the written pixels fall into prod(stride) phases, each a
// convolution of its own with step 1 and a subset of the taps; every tap belongs to exactly one phase.
#pragma once
#include "conv_kernels.h"
#include "epilogue.h"
#include "streaming.h"

namespace convlab::cpu::CONVLAB_ISA {

// Tasks below which a problem is cut finer: enough for threads to even out, none if there is one thread.
constexpr int64_t enough_tasks(int threads) { return threads == 1 ? 1 : 6 * threads; }

// The first `known` of `count` values, and zeros; without any, `source` may be null. Not one loop with a condition: of
// that the compiler makes masked loads, and one from a null pointer, though nothing of it is wanted, takes some hundred
// cycles.
template <class T>
void load_then_zeros(const T* source, int64_t known, int64_t count, accumulate_t<T>* target) {
  for (int64_t i = 0; i < known; ++i) target[i] = to_accumulate(source[i]);
  std::fill(target + known, target + count, accumulate_t<T>(0));
}

struct AxisPhase {
  int64_t first, step, count;  // written pixels first + step*i, i < count
  int64_t read_step;           // pixel i reads read_step*i + offset of the tap
  int64_t taps;                // of this phase: tap_first + tap_step*j, j < taps
  int64_t tap_first, tap_step;
  int64_t offset_first, offset_step;

  int64_t tap(int64_t j) const { return tap_first + tap_step * j; }
  int64_t offset(int64_t j) const { return offset_first + offset_step * j; }
  // Positions from the first to the last that a pixel reads; 0 without taps.
  int64_t reach() const { return taps ? (taps - 1) * std::abs(offset_step) + 1 : 0; }
  // The same taps in the order of what they read.
  AxisPhase ascending() const {
    AxisPhase axis = *this;
    if (offset_step >= 0) return axis;
    axis.offset_first = offset(taps - 1);
    axis.tap_first = tap(taps - 1);
    axis.offset_step = -offset_step;
    axis.tap_step = -tap_step;
    return axis;
  }
};

struct Phase {
  AxisPhase axis[kMaxSpatial];

  int64_t pixels() const { return axis[0].count * axis[1].count * axis[2].count; }
  int64_t taps() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
};

inline AxisPhase axis_phase(const ConvGeometry& g, Pass pass, int axis, int64_t residue) {
  if (pass == Pass::forward)
    return {0, 1, g.output[axis], g.stride[axis], g.kernel[axis], 0, 1, -g.padding[axis], g.dilation[axis]};
  const int64_t stride = g.stride[axis], dilation = g.dilation[axis];
  AxisPhase phase{residue, stride, residue < g.input[axis] ? (g.input[axis] - residue - 1) / stride + 1 : 0, 1, 0, 0, 1,
                  0,       0};
  // Taps with t*dilation == residue + padding (mod stride): the first by search, the others periodically.
  int64_t period = 1;
  while (period * dilation % stride != 0) ++period;
  for (int64_t t = 0; t < std::min(period, g.kernel[axis]); ++t) {
    const int64_t distance = residue + g.padding[axis] - t * dilation;
    if (distance % stride != 0) continue;
    phase.taps = (g.kernel[axis] - t - 1) / period + 1;
    phase.tap_first = t;
    phase.tap_step = period;
    phase.offset_first = distance / stride;
    phase.offset_step = -period * dilation / stride;
  }
  return phase;
}

// Number of phases along an axis; those beyond the tensor's end would write nothing.
inline int64_t axis_phases(const ConvGeometry& g, Pass pass, int axis) {
  return pass == Pass::forward ? 1 : std::min(g.stride[axis], g.input[axis]);
}
inline int64_t phases(const ConvGeometry& g, Pass pass) {
  return axis_phases(g, pass, 0) * axis_phases(g, pass, 1) * axis_phases(g, pass, 2);
}
inline Phase phase_at(const ConvGeometry& g, Pass pass, int64_t index) {
  Phase phase;
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    const int64_t count = axis_phases(g, pass, axis);
    phase.axis[axis] = axis_phase(g, pass, axis, index % count);
    index /= count;
  }
  return phase;
}

// A pointwise convolution does not know where its pixels lie: one long row of them has no borders to look at.
inline ConvGeometry without_needless_axes(ConvGeometry g) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.kernel[axis] != 1 || g.stride[axis] != 1 || g.padding[axis] != 0) return g;
  g.input[2] = g.output[2] = g.input_pixels();
  for (int axis = 0; axis < 2; ++axis) g.input[axis] = g.output[axis] = 1;
  return g;
}

// Where an axis has one output, no stride leads to another. With one as long as the kernel, each pixel of the input's
// gradient is a phase of its own, which reads one tap, in place of zeros for the others.
inline ConvGeometry with_patches_apart(ConvGeometry g) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.output[axis] == 1) g.stride[axis] = std::max(g.stride[axis], g.dilation[axis] * (g.kernel[axis] - 1) + 1);
  return g;
}

// The pass in terms of the tensor it reads and the one it writes.
template <class T>
struct Transfer {
  ConvGeometry geometry;  // without needless axes
  Pass pass;
  const T* read;
  T* written;
  const T* bias;
  Epilogue<T> epilogue;
  int64_t read_channels, written_channels;  // per group
  const int64_t *read_size, *written_size;
  int64_t phase_count;

  explicit Transfer(const ConvArguments<T>& a)
      : geometry(without_needless_axes(a.geometry)),
        pass(a.pass),
        read(a.pass == Pass::forward ? a.input : a.output),
        written(a.pass == Pass::forward ? a.output : a.input),
        bias(a.bias),
        epilogue{written, a.residual, a.activation},
        phase_count(phases(geometry, a.pass)) {
    const bool forward = pass == Pass::forward;
    read_channels = a.read_channels();
    written_channels = a.written_channels();
    read_size = forward ? geometry.input : geometry.output;
    written_size = forward ? geometry.output : geometry.input;
  }
  Transfer(const Transfer&) = delete;  // the size pointers look into this object

  int64_t read_pixels() const { return read_size[0] * read_size[1] * read_size[2]; }
  int64_t written_pixels() const { return written_size[0] * written_size[1] * written_size[2]; }
  // Whether threads had better share out the written channels than the pixels: what each of them packs of the weight,
  // and reads of it again and again, is its own then.
  bool weight_is_larger() const {
    return geometry.weight_elements() >
           (pass == Pass::forward ? geometry.input_elements() : geometry.output_elements());
  }
  // Whether the channels of whole pixels, channels last, are written past the caches.
  bool past_caches() const {
    if (epilogue.gated()) return false;  // which is opened in the caches
    const bool forward = pass == Pass::forward;
    const int64_t input = geometry.input_elements(), output = geometry.output_elements();
    const int64_t writes = forward ? output : input, reads = forward ? input : output;
    return streams(written, writes, written_channels, reads + (epilogue.residual ? writes : 0));
  }
  Phase phase(int64_t index) const { return phase_at(geometry, pass, index); }
  // No phase has more pixels than the first.
  int64_t rows() const { return geometry.batch * phase(0).pixels(); }
  int64_t tap_index(int64_t z, int64_t y, int64_t x) const {
    return (z * geometry.kernel[1] + y) * geometry.kernel[2] + x;
  }
  // The bias of the written channels first, first + 1, .. of a group; zeros beyond them and without a bias.
  void load_bias(int64_t group, int64_t first, int64_t count, accumulate_t<T>* target) const {
    const int64_t known = bias ? std::clamp<int64_t>(written_channels - first, 0, count) : 0;
    load_then_zeros(known > 0 ? bias + group * written_channels + first : nullptr, known, count, target);
  }
  // Where the weight between a read and a written channel of a group lies, without its tap.
  int64_t weight_offset(const ConvArguments<T>& a, int64_t group, int64_t read, int64_t written) const {
    const int64_t filter = pass == Pass::forward ? written : read, channel = pass == Pass::forward ? read : written;
    return (group * geometry.out_channels_per_group() + filter) * a.weight_stride_filter() +
           channel * a.weight_stride_channel;
  }
};

// Walks the pixels of a phase in order, keeping their coordinates without divisions.
struct PixelWalk {
  const Phase& phase;
  int64_t n, z, y, x;

  PixelWalk(const Phase& phase, int64_t index) : phase(phase) {
    x = index % phase.axis[2].count;
    index /= phase.axis[2].count;
    y = index % phase.axis[1].count;
    index /= phase.axis[1].count;
    z = index % phase.axis[0].count;
    n = index / phase.axis[0].count;
  }
  void advance(int64_t distance) {  // distance <= pixels left in this row
    x += distance;
    if (x < phase.axis[2].count) return;
    x = 0;
    if (++y < phase.axis[1].count) return;
    y = 0;
    if (++z < phase.axis[0].count) return;
    z = 0;
    ++n;
  }
  int64_t left_in_row() const { return phase.axis[2].count - x; }
  // Offset of the pixel in the written tensor's image of one channel.
  int64_t written_pixel(const int64_t* size) const {
    return ((phase.axis[0].first + z * phase.axis[0].step) * size[1] + phase.axis[1].first + y * phase.axis[1].step) *
               size[2] +
           phase.axis[2].first + x * phase.axis[2].step;
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
