// The definition of convolution, for all passes, dtypes and geometries (lecture items L5, L7, L8).
//
// Idea: for every output, take the patch of the input under the filter and sum input times weight. The gradients
// are the same sum read from the other two sides: the input gradient sums over the filters that touched an input
// element, the weight gradient over the patches that a weight touched.
// Cost: multiply_adds() multiply-adds, one at a time. Limits: none; it is the reference, and it stays this plain.
#pragma once
#include "conv_kernels.h"
#include "epilogue.h"

namespace convlab::cpu::CONVLAB_ISA {

// Element offsets of a dense tensor N x C x spatial in either layout.
struct Dense {
  int64_t batch, channel, axis[kMaxSpatial];

  Dense(Layout layout, int64_t channels, const int64_t (&size)[kMaxSpatial]) {
    const int64_t pixels = size[0] * size[1] * size[2];
    const int64_t pixel = layout == Layout::channels_last ? channels : 1;
    batch = channels * pixels;
    channel = layout == Layout::channels_last ? 1 : pixels;
    axis[2] = pixel;
    axis[1] = pixel * size[2];
    axis[0] = pixel * size[2] * size[1];
  }
  int64_t operator()(int64_t n, int64_t c, int64_t z, int64_t y, int64_t x) const {
    return n * batch + c * channel + z * axis[0] + y * axis[1] + x * axis[2];
  }
};

template <class T>
struct Naive {
  using A = accumulate_t<T>;
  const ConvArguments<T>& arguments;

  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    return body(Naive{arguments});
  }

  ConvPlan plan() const {
    const ConvGeometry& g = arguments.geometry;
    ConvPlan plan;
    plan.run_tasks = arguments.pass == Pass::forward          ? g.batch * g.out_channels
                     : arguments.pass == Pass::backward_input ? g.batch * g.in_channels
                                                              : g.out_channels * g.in_channels_per_group();
    return plan;
  }

  void run(void*, int64_t task) const {
    if (arguments.pass == Pass::forward) forward(arguments, task);
    if (arguments.pass == Pass::backward_input) backward_input(arguments, task);
    if (arguments.pass == Pass::backward_weight) backward_weight(arguments, task);
  }

  // One output channel of one sample.
  static void forward(const ConvArguments<T>& a, int64_t task) {
    const ConvGeometry& g = a.geometry;
    const Dense in(a.layout, g.in_channels, g.input), out(a.layout, g.out_channels, g.output);
    const Epilogue<T> epilogue{a.output, a.residual, a.activation};
    const int64_t n = task / g.out_channels, k = task % g.out_channels;
    const int64_t first_channel = k / g.out_channels_per_group() * g.in_channels_per_group();
    for (int64_t oz = 0; oz < g.output[0]; ++oz)
      for (int64_t oy = 0; oy < g.output[1]; ++oy)
        for (int64_t ox = 0; ox < g.output[2]; ++ox) {
          A sum = 0;
          for (int64_t c = 0; c < g.in_channels_per_group(); ++c)
            for (int64_t kz = 0; kz < g.kernel[0]; ++kz)
              for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
                for (int64_t kx = 0; kx < g.kernel[2]; ++kx) {
                  const int64_t z = oz * g.stride[0] - g.padding[0] + kz * g.dilation[0];
                  const int64_t y = oy * g.stride[1] - g.padding[1] + ky * g.dilation[1];
                  const int64_t x = ox * g.stride[2] - g.padding[2] + kx * g.dilation[2];
                  if (inside(g, z, y, x))
                    sum += to_accumulate(a.input[in(n, first_channel + c, z, y, x)]) * weight(a, k, c, kz, ky, kx);
                }
          if (a.bias) sum += to_accumulate(a.bias[k]);
          epilogue.store_one(&a.output[out(n, k, oz, oy, ox)], sum);
        }
  }

  // One input channel of one sample: sum over the filters and outputs that read each element.
  static void backward_input(const ConvArguments<T>& a, int64_t task) {
    const ConvGeometry& g = a.geometry;
    const Dense in(a.layout, g.in_channels, g.input), out(a.layout, g.out_channels, g.output);
    const Epilogue<T> epilogue{a.input, a.residual, a.activation};
    const int64_t n = task / g.in_channels, channel = task % g.in_channels;
    const int64_t c = channel % g.in_channels_per_group();
    const int64_t first_filter = channel / g.in_channels_per_group() * g.out_channels_per_group();
    for (int64_t z = 0; z < g.input[0]; ++z)
      for (int64_t y = 0; y < g.input[1]; ++y)
        for (int64_t x = 0; x < g.input[2]; ++x) {
          A sum = 0;
          for (int64_t kz = 0; kz < g.kernel[0]; ++kz)
            for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
              for (int64_t kx = 0; kx < g.kernel[2]; ++kx) {
                int64_t oz, oy, ox;
                if (!reader(g, 0, z, kz, oz) || !reader(g, 1, y, ky, oy) || !reader(g, 2, x, kx, ox)) continue;
                for (int64_t f = 0; f < g.out_channels_per_group(); ++f)
                  sum += to_accumulate(a.output[out(n, first_filter + f, oz, oy, ox)]) *
                         weight(a, first_filter + f, c, kz, ky, kx);
              }
          if (a.bias) sum += to_accumulate(a.bias[channel]);
          epilogue.store_one(&a.input[in(n, channel, z, y, x)], sum);
        }
  }

  // One plane of the weight: sum over the samples and patches that each weight met.
  static void backward_weight(const ConvArguments<T>& a, int64_t task) {
    const ConvGeometry& g = a.geometry;
    const Dense in(a.layout, g.in_channels, g.input), out(a.layout, g.out_channels, g.output);
    const int64_t k = task / g.in_channels_per_group(), c = task % g.in_channels_per_group();
    const int64_t channel = k / g.out_channels_per_group() * g.in_channels_per_group() + c;
    for (int64_t kz = 0; kz < g.kernel[0]; ++kz)
      for (int64_t ky = 0; ky < g.kernel[1]; ++ky)
        for (int64_t kx = 0; kx < g.kernel[2]; ++kx) {
          A total = 0;
          for (int64_t n = 0; n < g.batch; ++n) {
            A sum = 0;  // per sample first: one long chain of float32 additions would lose digits
            for (int64_t oz = 0; oz < g.output[0]; ++oz)
              for (int64_t oy = 0; oy < g.output[1]; ++oy)
                for (int64_t ox = 0; ox < g.output[2]; ++ox) {
                  const int64_t z = oz * g.stride[0] - g.padding[0] + kz * g.dilation[0];
                  const int64_t y = oy * g.stride[1] - g.padding[1] + ky * g.dilation[1];
                  const int64_t x = ox * g.stride[2] - g.padding[2] + kx * g.dilation[2];
                  if (inside(g, z, y, x))
                    sum += to_accumulate(a.input[in(n, channel, z, y, x)]) *
                           to_accumulate(a.output[out(n, k, oz, oy, ox)]);
                }
            total += sum;
          }
          a.weight[weight_offset(a, k, c, kz, ky, kx)] = from_accumulate<T>(total);
        }
  }

  static bool inside(const ConvGeometry& g, int64_t z, int64_t y, int64_t x) {
    return z >= 0 && z < g.input[0] && y >= 0 && y < g.input[1] && x >= 0 && x < g.input[2];
  }
  // The output position along `axis` that reads input position `i` through tap `k`, if there is one.
  static bool reader(const ConvGeometry& g, int axis, int64_t i, int64_t k, int64_t& o) {
    const int64_t distance = i + g.padding[axis] - k * g.dilation[axis];
    o = distance / g.stride[axis];
    return distance >= 0 && distance % g.stride[axis] == 0 && o < g.output[axis];
  }
  static int64_t weight_offset(const ConvArguments<T>& a, int64_t k, int64_t c, int64_t kz, int64_t ky, int64_t kx) {
    const ConvGeometry& g = a.geometry;
    const int64_t tap = (kz * g.kernel[1] + ky) * g.kernel[2] + kx;
    return k * a.weight_stride_filter() + c * a.weight_stride_channel + tap * a.weight_stride_tap;
  }
  static A weight(const ConvArguments<T>& a, int64_t k, int64_t c, int64_t kz, int64_t ky, int64_t kx) {
    return to_accumulate(a.weight[weight_offset(a, k, c, kz, ky, kx)]);
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
