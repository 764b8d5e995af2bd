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
  bool relu;

  explicit ConvTensors(const ConvArguments& a) {
    const ConvGeometry& g = a.geometry;
    const bool to_input = a.pass == Pass::backward_input;
    input = global(static_cast<T*>(a.input), g.input_elements());
    weight = global(static_cast<T*>(a.weight), g.weight_elements());
    output = global(static_cast<T*>(a.output), g.output_elements());
    bias = global(static_cast<const T*>(a.bias), to_input ? g.in_channels : g.out_channels);
    residual = global(static_cast<const T*>(a.residual), to_input ? g.input_elements() : g.output_elements());
    in = DenseStrides(a.layout, g.in_channels, g.input);
    out = DenseStrides(a.layout, g.out_channels, g.output);
    weight_filter = a.weight_stride_filter();
    weight_channel = a.weight_stride_channel;
    weight_tap = a.weight_stride_tap;
    relu = a.relu;
  }

  // What is stored at `at`, in channel `channel` of the tensor written, for a sum of products.
  template <class A>
  CONVLAB_DEVICE T finished(A sum, int64_t channel, int64_t at) const {
    if (bias) sum += to_accumulate(bias[channel]);
    if (residual) sum += to_accumulate(residual[at]);
    if (relu) sum = sum < A(0) ? A(0) : sum;  // NaN stays
    return from_accumulate<T>(sum);
  }
};

int naive_convolution(const ConvArguments& a, void* stream);

bool implicit_gemm_fits(const ConvArguments& a);
int64_t implicit_gemm_workspace(const ConvArguments& a);
int implicit_gemm_convolution(const ConvArguments& a, void* stream);

}  // namespace convlab::cuda
