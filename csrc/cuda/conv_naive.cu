// The definition of convolution, for all passes, dtypes, layouts and geometries.
//
// Idea: a thread owns one element of what the pass writes and sums its products one by one; see csrc/cpu/conv_naive.h,
// whose loops these are. Neighbouring threads write neighbouring elements.
// Cost: multiply_adds() multiply-adds, operands from the caches. Limits: none; it is what the others are judged by.
// Not yet run on a GPU.
#include "conv.h"

namespace convlab::cuda {

namespace {

constexpr int kThreads = 256;

// Sample, channel and coordinates of an element of a dense tensor, in memory order.
CONVLAB_DEVICE void decode(Layout layout, int64_t element, int64_t channels, const int64_t (&size)[kMaxSpatial],
                           int64_t& n, int64_t& c, int64_t (&at)[kMaxSpatial]) {
  if (layout == Layout::channels_last) {
    c = element % channels;
    element /= channels;
  }
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    at[axis] = element % size[axis];
    element /= size[axis];
  }
  if (layout == Layout::channels_first) {
    c = element % channels;
    element /= channels;
  }
  n = element;
}

template <class T>
__global__ void __launch_bounds__(kThreads) naive_forward(ConvTensors<T> t, ConvGeometry g, Layout layout) {
  const int64_t element = global_thread();
  if (element >= g.output_elements()) return;
  int64_t n, k, at[kMaxSpatial];
  decode(layout, element, g.out_channels, g.output, n, k, at);
  const int64_t channels = g.in_channels_per_group(), first = k / g.out_channels_per_group() * channels;
  accumulate_t<T> sum = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t kz = 0, tap = 0; kz < g.kernel[0]; ++kz)
      for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
        for (int64_t kx = 0; kx < g.kernel[2]; ++kx, ++tap) {
          const int64_t z = at[0] * g.stride[0] - g.padding[0] + kz * g.dilation[0];
          const int64_t y = at[1] * g.stride[1] - g.padding[1] + ky * g.dilation[1];
          const int64_t x = at[2] * g.stride[2] - g.padding[2] + kx * g.dilation[2];
          if (z < 0 || z >= g.input[0] || y < 0 || y >= g.input[1] || x < 0 || x >= g.input[2]) continue;
          sum += to_accumulate(t.input[n * t.in.sample + (first + c) * t.in.channel + z * t.in.axis[0] +
                                       y * t.in.axis[1] + x * t.in.axis[2]]) *
                 to_accumulate(t.weight[k * t.weight_filter + c * t.weight_channel + tap * t.weight_tap]);
        }
  t.output[element] = t.finished(sum, k, element);
}

// The output position along `axis` that reads input position `i` through tap `k`; -1 if there is none.
CONVLAB_DEVICE int64_t reader(const ConvGeometry& g, int axis, int64_t i, int64_t k) {
  const int64_t distance = i + g.padding[axis] - k * g.dilation[axis];
  if (distance < 0 || distance % g.stride[axis] != 0) return -1;
  return distance / g.stride[axis] < g.output[axis] ? distance / g.stride[axis] : -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) naive_backward_input(ConvTensors<T> t, ConvGeometry g, Layout layout) {
  const int64_t element = global_thread();
  if (element >= g.input_elements()) return;
  int64_t n, channel, at[kMaxSpatial];
  decode(layout, element, g.in_channels, g.input, n, channel, at);
  const int64_t filters = g.out_channels_per_group(), c = channel % g.in_channels_per_group();
  const int64_t first = channel / g.in_channels_per_group() * filters;
  accumulate_t<T> sum = 0;
  for (int64_t kz = 0, tap = 0; kz < g.kernel[0]; ++kz)
    for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < g.kernel[2]; ++kx, ++tap) {
        const int64_t z = reader(g, 0, at[0], kz), y = reader(g, 1, at[1], ky), x = reader(g, 2, at[2], kx);
        if (z < 0 || y < 0 || x < 0) continue;
        for (int64_t f = first; f < first + filters; ++f)
          sum += to_accumulate(t.output[n * t.out.sample + f * t.out.channel + z * t.out.axis[0] + y * t.out.axis[1] +
                                        x * t.out.axis[2]]) *
                 to_accumulate(t.weight[f * t.weight_filter + c * t.weight_channel + tap * t.weight_tap]);
      }
  t.input[element] = t.finished(sum, channel, element);
}

template <class T>
__global__ void __launch_bounds__(kThreads) naive_backward_weight(ConvTensors<T> t, ConvGeometry g) {
  const int64_t element = global_thread();
  if (element >= g.weight_elements()) return;
  const int64_t tap = element % g.taps(), c = element / g.taps() % g.in_channels_per_group();
  const int64_t k = element / g.taps() / g.in_channels_per_group();
  const int64_t kx = tap % g.kernel[2], ky = tap / g.kernel[2] % g.kernel[1], kz = tap / g.kernel[2] / g.kernel[1];
  const int64_t channel = k / g.out_channels_per_group() * g.in_channels_per_group() + c;
  accumulate_t<T> total = 0;
  for (int64_t n = 0; n < g.batch; ++n) {
    accumulate_t<T> sum = 0;  // per sample first: one long chain of float32 additions would lose digits
    for (int64_t oz = 0; oz < g.output[0]; ++oz)
      for (int64_t oy = 0; oy < g.output[1]; ++oy)
        for (int64_t ox = 0; ox < g.output[2]; ++ox) {
          const int64_t z = oz * g.stride[0] - g.padding[0] + kz * g.dilation[0];
          const int64_t y = oy * g.stride[1] - g.padding[1] + ky * g.dilation[1];
          const int64_t x = ox * g.stride[2] - g.padding[2] + kx * g.dilation[2];
          if (z < 0 || z >= g.input[0] || y < 0 || y >= g.input[1] || x < 0 || x >= g.input[2]) continue;
          sum += to_accumulate(t.input[n * t.in.sample + channel * t.in.channel + z * t.in.axis[0] + y * t.in.axis[1] +
                                       x * t.in.axis[2]]) *
                 to_accumulate(t.output[n * t.out.sample + k * t.out.channel + oz * t.out.axis[0] + oy * t.out.axis[1] +
                                        ox * t.out.axis[2]]);
        }
    total += sum;
  }
  t.weight[k * t.weight_filter + c * t.weight_channel + tap * t.weight_tap] = from_accumulate<T>(total);
}

}  // namespace

int naive_convolution(const ConvArguments& a, void* stream) {
  const ConvGeometry& g = a.geometry;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const ConvTensors<T> tensors(a);
    if (a.pass == Pass::forward)
      return launch(naive_forward<T>, grid_of(g.output_elements(), kThreads), dim3(kThreads), 0, stream, tensors, g,
                    a.layout);
    if (a.pass == Pass::backward_input)
      return launch(naive_backward_input<T>, grid_of(g.input_elements(), kThreads), dim3(kThreads), 0, stream, tensors,
                    g, a.layout);
    return launch(naive_backward_weight<T>, grid_of(g.weight_elements(), kThreads), dim3(kThreads), 0, stream, tensors,
                  g);
  });
}

}  // namespace convlab::cuda
