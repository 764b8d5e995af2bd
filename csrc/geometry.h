// Sizes of convolution and pooling: the one place where they are computed.
//
// Plain structs, no torch. 1-D and 2-D problems are 3-D ones with unit dimensions (depth, height, width), so
// kernels are written once. Used by the kernels of every device, the operators' checks, the fake (meta)
// kernels, which pass symbolic integers to the same templates, and, through bindings.cpp, by the lab and the
// benchmark.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace convlab {

// Rounds toward minus infinity, unlike `/`, so that windows larger than a padded input give sizes <= 0.
template <class Int>
CONVLAB_HD Int floor_divide(const Int& numerator, const Int& denominator) {
  Int quotient = numerator / denominator;
  if (numerator < 0 && quotient * denominator != numerator) quotient = quotient - 1;
  return quotient;
}

// Output size of a convolution or pooling window along one axis (lecture item L1).
// ceil((W - K' + 1 + 2P) / S) with the dilated extent K' = D*(K-1)+1; both spellings are the same integer.
template <class Int>
Int output_size(const Int& input, const Int& kernel, const Int& stride, const Int& padding, const Int& dilation) {
  return floor_divide<Int>(input + padding * 2 - dilation * (kernel - 1) - 1, stride) + 1;
}

// The same for pooling with ceil_mode: rounds up, but drops a last window that starts in the right padding.
template <class Int>
Int pooled_size(const Int& input, const Int& kernel, const Int& stride, const Int& padding, const Int& dilation,
                bool ceil_mode) {
  if (!ceil_mode) return output_size<Int>(input, kernel, stride, padding, dilation);
  Int size = floor_divide<Int>(input + padding * 2 - dilation * (kernel - 1) - 1 + stride - 1, stride) + 1;
  if ((size - 1) * stride >= input + padding) size = size - 1;
  return size;
}

// Output size of a transposed convolution: the input size of the convolution it is the adjoint of.
template <class Int>
Int transposed_size(const Int& input, const Int& kernel, const Int& stride, const Int& padding, const Int& dilation,
                    const Int& output_padding) {
  return (input - 1) * stride - padding * 2 + dilation * (kernel - 1) + output_padding + 1;
}

constexpr int kMaxSpatial = 3;

enum class Layout : int { channels_first, channels_last };  // NC(D)HW, N(D)HWC
enum class Pass : int { forward, backward_input, backward_weight };

// One convolution. `input` is what the forward pass reads and `output` what it writes, in every pass.
struct ConvGeometry {
  int64_t batch = 0, in_channels = 0, out_channels = 0, groups = 1;
  int64_t input[kMaxSpatial] = {1, 1, 1};
  int64_t kernel[kMaxSpatial] = {1, 1, 1};
  int64_t stride[kMaxSpatial] = {1, 1, 1};
  int64_t padding[kMaxSpatial] = {0, 0, 0};
  int64_t dilation[kMaxSpatial] = {1, 1, 1};
  int64_t output[kMaxSpatial] = {1, 1, 1};

  void set_output_size() {
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      output[axis] = output_size<int64_t>(input[axis], kernel[axis], stride[axis], padding[axis], dilation[axis]);
  }

  CONVLAB_HD int64_t in_channels_per_group() const { return in_channels / groups; }
  CONVLAB_HD int64_t out_channels_per_group() const { return out_channels / groups; }
  CONVLAB_HD int64_t input_pixels() const { return input[0] * input[1] * input[2]; }
  CONVLAB_HD int64_t output_pixels() const { return output[0] * output[1] * output[2]; }
  CONVLAB_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  CONVLAB_HD bool strided() const { return stride[0] > 1 || stride[1] > 1 || stride[2] > 1; }
  CONVLAB_HD int64_t input_elements() const { return batch * in_channels * input_pixels(); }
  CONVLAB_HD int64_t output_elements() const { return batch * out_channels * output_pixels(); }
  CONVLAB_HD int64_t weight_elements() const { return out_channels * in_channels_per_group() * taps(); }

  // Lecture item L2: one multiply-add per weight of a filter and output element; bias additions are not counted.
  int64_t multiply_adds() const { return output_elements() * in_channels_per_group() * taps(); }
  int64_t parameters(bool bias) const { return weight_elements() + (bias ? out_channels : 0); }
  int64_t bytes(int64_t element_size) const {
    return (input_elements() + output_elements() + weight_elements()) * element_size;
  }
};

// What one layer does to the receptive field (lecture item L3): along each axis the field grows by
// (extent - 1) * jump, and the jump, the distance of neighbouring outputs measured in inputs, by the stride.
struct ReceptiveField {
  int64_t size = 1, jump = 1;
  double center = 0;  // of output 0, in input pixels

  void step(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t extent = dilation * (kernel - 1) + 1;
    center += ((extent - 1) / 2.0 - static_cast<double>(padding)) * static_cast<double>(jump);
    size += (extent - 1) * jump;
    jump *= stride;
  }
};

template <class Int>
CONVLAB_HD Int ceil_divide(const Int& numerator, const Int& denominator) {
  return floor_divide<Int>(numerator + denominator - 1, denominator);
}

template <class Int>
struct RangeOf {
  Int begin = 0, end = 0;
  CONVLAB_HD Int size() const { return end - begin; }
};
using Range = RangeOf<int64_t>;

// One pooling layer. `adaptive` windows split the input evenly: window o covers [floor(o*I/O), ceil((o+1)*I/O)).
// GPUs, where 64-bit divisions are slow, count in 32 bits where that is enough.
// A tap is a position inside a window; taps are numbered in row-major order over `kernel`.
template <class Int>
struct PoolGeometryOf {
  Int batch = 0, channels = 0;
  Int input[kMaxSpatial] = {1, 1, 1};
  Int kernel[kMaxSpatial] = {1, 1, 1};  // of adaptive windows: an upper bound of their sizes
  Int stride[kMaxSpatial] = {1, 1, 1};
  Int padding[kMaxSpatial] = {0, 0, 0};
  Int dilation[kMaxSpatial] = {1, 1, 1};
  Int output[kMaxSpatial] = {1, 1, 1};
  bool adaptive = false;
  bool count_include_pad = true;  // of averages
  Int divisor_override = 0;       // of averages; 0: none

  CONVLAB_HD Int planes() const { return batch * channels; }
  CONVLAB_HD Int input_pixels() const { return input[0] * input[1] * input[2]; }
  CONVLAB_HD Int output_pixels() const { return output[0] * output[1] * output[2]; }
  CONVLAB_HD Int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  CONVLAB_HD Int span(int axis) const { return dilation[axis] * (kernel[axis] - 1) + 1; }

  // Input coordinate of tap 0 of window `o`; negative in the padding.
  CONVLAB_HD Int start(int axis, Int o) const {
    return adaptive ? floor_divide<Int>(o * input[axis], output[axis]) : o * stride[axis] - padding[axis];
  }
  // Taps of window `o` that lie inside the input; may be empty if padded and dilated.
  CONVLAB_HD RangeOf<Int> taps_inside(int axis, Int o) const {
    const Int first = start(axis, o);
    if (adaptive) return {0, ceil_divide<Int>((o + 1) * input[axis], output[axis]) - first};
    RangeOf<Int> range = {0, kernel[axis]};
    if (first < 0) range.begin = ceil_divide<Int>(-first, dilation[axis]);
    if (first + span(axis) > input[axis]) range.end = ceil_divide<Int>(input[axis] - first, dilation[axis]);
    if (range.end < range.begin) range.end = range.begin;
    return range;
  }
  // Windows that may hold input coordinate `i`; with dilation, those whose tap_at() is not -1 do.
  CONVLAB_HD RangeOf<Int> windows_over(int axis, Int i) const {
    if (adaptive)
      return {floor_divide<Int>(i * output[axis], input[axis]), ceil_divide<Int>((i + 1) * output[axis], input[axis])};
    const Int last = i + padding[axis], first = last - span(axis) + 1;
    RangeOf<Int> range = {first <= 0 ? 0 : ceil_divide<Int>(first, stride[axis]), last / stride[axis] + 1};
    if (range.end > output[axis]) range.end = output[axis];
    return range;
  }
  // The same, given that of i - 1, without dividing.
  CONVLAB_HD RangeOf<Int> next_windows(int axis, Int i, RangeOf<Int> range) const {
    if (adaptive) return windows_over(axis, i);
    while (range.end < output[axis] && start(axis, range.end) <= i) ++range.end;
    while (range.begin < range.end && start(axis, range.begin) + span(axis) <= i) ++range.begin;
    return range;
  }
  CONVLAB_HD Int tap_at(int axis, Int o, Int i) const {
    const Int distance = i - start(axis, o);
    if (dilation[axis] == 1) return distance;
    return distance % dilation[axis] == 0 ? distance / dilation[axis] : -1;
  }
  // How many windows can hold one input coordinate.
  CONVLAB_HD Int overlap(int axis) const {
    return adaptive ? ceil_divide<Int>(output[axis], input[axis]) + 1 : ceil_divide<Int>(span(axis), stride[axis]);
  }
  // An average divides by the product of these over the axes.
  CONVLAB_HD Int divisor(int axis, Int o) const {
    if (divisor_override != 0) return axis == 0 ? divisor_override : 1;
    if (adaptive || !count_include_pad) return taps_inside(axis, o).size();
    const Int end = input[axis] + padding[axis] - start(axis, o);
    return end < kernel[axis] ? end : kernel[axis];
  }
};
using PoolGeometry = PoolGeometryOf<int64_t>;

}  // namespace convlab
