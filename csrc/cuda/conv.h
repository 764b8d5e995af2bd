// What the convolution kernels share: operands with strides, and the end of an output's computation.
#pragma once
#include "dispatch.h"
#include "launchers.h"
#include "simt.h"

namespace convlab::cuda {

// Offsets of a dense tensor N x C x spatial in either layout.
struct DenseStrides {
  int64_t sample, channel, axis[kMaxSpatial];

  DenseStrides() = default;
  DenseStrides(Layout layout, int64_t channels, const int64_t (&size)[kMaxSpatial]) {
    const int64_t pixels = size[0] * size[1] * size[2];
    sample = channels * pixels;
    channel = layout == Layout::channels_last ? 1 : pixels;
    axis[2] = layout == Layout::channels_last ? channels : 1;
    axis[1] = axis[2] * size[2];
    axis[0] = axis[1] * size[1];
  }
};

// The tensors of one convolution, as a kernel gets them.
template <class T>
struct ConvTensors {
  Global<T> input, weight, output;
  Global<const T> bias, residual;
  DenseStrides in, out;
  int64_t weight_filter, weight_channel, weight_tap;
  Bounds<accumulate_t<T>> bounds;

  explicit ConvTensors(const ConvArguments& a) {
    const ConvGeometry& g = a.geometry;
    const bool to_input = a.pass == Pass::backward_input;
    input = global(static_cast<T*>(a.input), g.input_elements());
    weight = global(static_cast<T*>(a.weight), g.weight_elements());
    output = global(static_cast<T*>(a.output), g.output_elements());
    bias = global(static_cast<const T*>(a.bias), to_input ? g.in_channels : g.out_channels);
    residual = global(static_cast<const T*>(a.residual), a.pass == Pass::forward ? g.output_elements()
                                                         : to_input              ? g.input_elements()
                                                                                 : g.weight_elements());
    in = DenseStrides(a.layout, g.in_channels, g.input);
    out = DenseStrides(a.layout, g.out_channels, g.output);
    weight_filter = a.weight_stride_filter();
    weight_channel = a.weight_stride_channel;
    weight_tap = a.weight_stride_tap;
    bounds = a.clamp;
  }

  // What is stored at `at`, in channel `channel` of the tensor written, for a sum of products.
  template <class A>
  CONVLAB_DEVICE T finished(A sum, int64_t channel, int64_t at) const {
    const A sums[1] = {sum};
    return finished(sums, channel, at).value[0];
  }
  // The same for N neighbouring channels that are neighbours in memory, aligned to all of them.
  template <class A, int N>
  CONVLAB_DEVICE Vector<T, N> finished(const A (&sum)[N], int64_t channel, int64_t at) const {
    Vector<T, N> result, added;
    if (residual) added = load_vector<N>(residual, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A value = sum[i];
      if (bias) value += to_accumulate(bias[channel + i]);
      if (residual) value += to_accumulate(added.value[i]);
      if (bounds.cut) value = bounds.clamped(value);
      result.value[i] = from_accumulate<T>(value);
    }
    return result;
  }
};

int naive_convolution(const ConvArguments& a, void* stream);

// Of the algorithms direct and depthwise: forward and backward input, and backward weight.
int direct_pixels_convolution(const ConvArguments& a, void* stream);
int depthwise_pixels_convolution(const ConvArguments& a, void* stream);
int64_t direct_weight_workspace(const ConvArguments& a);
int direct_weight_convolution(const ConvArguments& a, void* stream);

int64_t implicit_gemm_workspace(const ConvArguments& a);
int implicit_gemm_convolution(const ConvArguments& a, void* stream);

int64_t inner_product_workspace(const ConvArguments& a);
int inner_product_convolution(const ConvArguments& a, void* stream);

int64_t winograd_workspace(const ConvArguments& a);
int winograd_convolution(const ConvArguments& a, void* stream);

}  // namespace convlab::cuda
