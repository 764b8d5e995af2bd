// Convolution as a walk: which elements a written pixel reads. Forward and backward input are one thing.
//
// Both write a tensor, each pixel a sum over taps of what it reads. With a stride, the pixels that backward input
// writes fall into classes of equal residue, phases, each with a subset of the taps; within a phase the pixel with
// number i reads, through tap number t, at start + step * i + tap_step * t. (csrc/cpu/conv_phase.h does the same.)
#pragma once
#include "conv.h"

namespace convlab::cuda {

struct Phase {
  int count[kMaxSpatial];                                 // pixels written
  int start[kMaxSpatial], step[kMaxSpatial];              // where they read
  int taps[kMaxSpatial], tap_step[kMaxSpatial];           // the taps used, and what one moves the place read by
  int first_tap[kMaxSpatial], tap_stride[kMaxSpatial];    // their numbers in the kernel
  int write_start[kMaxSpatial], write_step[kMaxSpatial];  // where the pixels lie

  CONVLAB_HD int tap_count() const { return taps[0] * taps[1] * taps[2]; }
  CONVLAB_HD int pixels() const { return count[0] * count[1] * count[2]; }
};

inline Phase forward_phase(const ConvGeometry& g) {
  Phase phase;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    phase.count[axis] = static_cast<int>(g.output[axis]);
    phase.start[axis] = static_cast<int>(-g.padding[axis]);
    phase.step[axis] = static_cast<int>(g.stride[axis]);
    phase.taps[axis] = static_cast<int>(g.kernel[axis]);
    phase.tap_step[axis] = static_cast<int>(g.dilation[axis]);
    phase.first_tap[axis] = phase.write_start[axis] = 0;
    phase.tap_stride[axis] = phase.write_step[axis] = 1;
  }
  return phase;
}

// The phase whose pixels have these residues modulo the strides.
inline Phase backward_phase(const ConvGeometry& g, const int64_t (&residue)[kMaxSpatial]) {
  Phase phase;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    const int64_t stride = g.stride[axis], dilation = g.dilation[axis], r = residue[axis];
    int64_t first = 0, every = 1;
    while (first < g.kernel[axis] && (r + g.padding[axis] - first * dilation) % stride != 0) ++first;
    while (every * dilation % stride != 0) ++every;
    const int64_t distance = r + g.padding[axis] - first * dilation;
    phase.count[axis] = static_cast<int>(r < g.input[axis] ? ceil_divide(g.input[axis] - r, stride) : 0);
    phase.taps[axis] = static_cast<int>(first < g.kernel[axis] ? ceil_divide(g.kernel[axis] - first, every) : 0);
    phase.start[axis] = static_cast<int>(first < g.kernel[axis] ? distance / stride : 0);
    phase.step[axis] = 1;
    phase.tap_step[axis] = static_cast<int>(-every * dilation / stride);
    phase.first_tap[axis] = static_cast<int>(first);
    phase.tap_stride[axis] = static_cast<int>(every);
    phase.write_start[axis] = static_cast<int>(r);
    phase.write_step[axis] = static_cast<int>(stride);
  }
  return phase;
}

// Calls run(phase), which returns an error code, for each phase of the pass, which writes pixels.
template <class Run>
int for_each_phase(const ConvArguments& a, const Run& run) {
  const ConvGeometry& g = a.geometry;
  if (a.pass == Pass::forward) return run(forward_phase(g));
  int64_t residue[kMaxSpatial];
  for (residue[0] = 0; residue[0] < g.stride[0] && residue[0] < g.input[0]; ++residue[0])
    for (residue[1] = 0; residue[1] < g.stride[1] && residue[1] < g.input[1]; ++residue[1])
      for (residue[2] = 0; residue[2] < g.stride[2] && residue[2] < g.input[2]; ++residue[2])
        if (const int error = run(backward_phase(g, residue))) return error;
  return 0;
}

// Sample and coordinates of written pixel `m`.
struct Pixel {
  int sample, at[kMaxSpatial];
};
CONVLAB_DEVICE Pixel pixel_of(const int (&count)[kMaxSpatial], int m) {
  Pixel pixel;
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    pixel.at[axis] = m % count[axis];
    m /= count[axis];
  }
  pixel.sample = m;
  return pixel;
}

// A position in a sum over taps and channels, the channels running fastest.
struct Walk {
  int channel, tap[kMaxSpatial];

  CONVLAB_DEVICE void begin(int k, int channels, const Phase& phase) {
    channel = k % channels;
    int rest = k / channels;
    for (int axis = kMaxSpatial - 1; axis > 0; --axis) {
      tap[axis] = phase.taps[axis] > 0 ? rest % phase.taps[axis] : 0;
      rest = phase.taps[axis] > 0 ? rest / phase.taps[axis] : 0;
    }
    tap[0] = phase.tap_count() > 0 ? rest : phase.taps[0];
  }
  CONVLAB_DEVICE void advance(int count, int channels, const Phase& phase) {
    channel += count;
    while (channel >= channels && tap[0] < phase.taps[0]) {
      channel -= channels;
      if (++tap[2] < phase.taps[2]) continue;
      tap[2] = 0;
      if (++tap[1] < phase.taps[1]) continue;
      tap[1] = 0;
      ++tap[0];
    }
  }
  CONVLAB_DEVICE bool ended(const Phase& phase) const { return tap[0] >= phase.taps[0]; }
};

}  // namespace convlab::cuda
