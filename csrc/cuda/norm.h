// What the normalization kernels share: the shape, one channel's constants, and a walk through memory.
//
// The input is samples x repeats x (groups x channels_per_group) x pixels in channels_first order, and
// samples x repeats x pixels x (groups x channels_per_group) in channels_last order; see csrc/cpu/norm_kernels.h.
#pragma once
#include "dispatch.h"
#include "launchers.h"
#include "simt.h"

namespace convlab::cuda {

constexpr int kNormThreads = 256;

template <class Int>
struct NormShape {
  Int samples, repeats, groups, channels_per_group, pixels, channels, elements;
  bool channels_last;

  explicit NormShape(const NormArguments& a)
      : samples(static_cast<Int>(a.samples)),
        repeats(static_cast<Int>(a.repeats)),
        groups(static_cast<Int>(a.groups)),
        channels_per_group(static_cast<Int>(a.channels_per_group)),
        pixels(static_cast<Int>(a.pixels)),
        channels(static_cast<Int>(a.channels())),
        elements(static_cast<Int>(a.elements())),
        channels_last(a.layout == Layout::channels_last) {}

  CONVLAB_DEVICE Int group(Int sample, Int channel) const { return sample * groups + channel / channels_per_group; }
};

// normalized = fma(input - mean, scale, bias). Forward and backward compute it alike, to the last bit, so that backward
// finds the clamp's mask without having kept the output.
template <class A>
struct NormConstants {
  A mean, deviation, scale, bias;  // deviation: its inverse
};

template <class T>
struct NormTensors {
  using A = accumulate_t<T>;
  Global<const T> input, residual, grad_output;
  Global<T> output, grad_residual;
  Global<uint8_t> bits;  // of where the clamp stops gradients
  Global<A> mean, variance, grad_weight, grad_bias;
  Global<const A> weight, bias;
  A eps;
  Bounds<A> bounds;

  explicit NormTensors(const NormArguments& a) {
    const int64_t n = a.elements(), groups = a.samples * a.groups, channels = a.channels();
    input = global(static_cast<const T*>(a.input), n);
    residual = global(static_cast<const T*>(a.residual), n);
    grad_output = global(static_cast<const T*>(a.grad_output), n);
    output = global(static_cast<T*>(a.output), n);
    grad_residual = global(static_cast<T*>(a.grad_residual), n);
    bits = global(static_cast<uint8_t*>(a.stopped), (n + 7) / 8);
    mean = global(static_cast<A*>(a.mean), groups);
    variance = global(static_cast<A*>(a.variance), groups);
    weight = global(static_cast<const A*>(a.weight), channels);
    bias = global(static_cast<const A*>(a.bias), channels);
    grad_weight = global(static_cast<A*>(a.grad_weight), channels);
    grad_bias = global(static_cast<A*>(a.grad_bias), channels);
    eps = static_cast<A>(a.eps);
    bounds = a.clamp;
  }

  template <class Int>
  CONVLAB_DEVICE NormConstants<A> constants(Int group, Int channel) const {
    NormConstants<A> k;
    k.mean = mean_of(group);
    k.deviation = A(1) / std::sqrt(variance[group] + eps);
    k.scale = weight ? k.deviation * weight[channel] : k.deviation;
    k.bias = bias ? bias[channel] : A(0);
    return k;
  }

  // RMS norm has no mean: it does not center.
  template <class Int>
  CONVLAB_DEVICE A mean_of(Int group) const {
    return mean ? mean[group] : A(0);
  }

  // What tells where the clamp stops the gradients of N neighbours.
  template <int N>
  struct Stops {
    Vector<T, N> residual;
    unsigned bits;
  };
  template <int N, class Int>
  CONVLAB_DEVICE Stops<N> load_stops(Int at) const {
    Stops<N> stops;
    if (bits)
      stops.bits = static_cast<unsigned>(bits[at / 8]) >> (at % 8);
    else if (bounds.cut && residual)
      stops.residual = load_vector<N>(residual, at);
    return stops;
  }
  // Whether it stops that of the i-th, whose input is x.
  template <int N>
  CONVLAB_DEVICE bool stopped(const Stops<N>& stops, int i, A x, const NormConstants<A>& k) const {
    if (!bounds.cut) return false;
    if (bits) return (stops.bits >> i) & 1;
    const A shortcut = residual ? to_accumulate(stops.residual.value[i]) : A(0);
    return bounds.stops(std::fma(x - k.mean, k.scale, k.bias) + shortcut);
  }
};

// Sample and channel of an element, and of those that follow it in memory, without dividing again.
template <class Int>
struct NormCursor {
  Int sample, channel, pixel, rest;  // channels last: rest counts the rows of a sample; else its repeats

  CONVLAB_DEVICE NormCursor(const NormShape<Int>& shape, Int element) {
    pixel = 0;
    if (!shape.channels_last) {
      pixel = element % shape.pixels;
      element /= shape.pixels;
    }
    channel = element % shape.channels;
    element /= shape.channels;
    const Int rests = shape.channels_last ? shape.repeats * shape.pixels : shape.repeats;
    rest = element % rests;
    sample = element / rests;
  }
  // Returns whether the channel or the sample is another one now.
  CONVLAB_DEVICE bool advance(const NormShape<Int>& shape) {
    if (!shape.channels_last && ++pixel < shape.pixels) return false;
    pixel = 0;
    if (++channel < shape.channels) return true;
    channel = 0;
    if (++rest == (shape.channels_last ? shape.repeats * shape.pixels : shape.repeats)) {
      rest = 0;
      ++sample;
    }
    return true;
  }
};

// body(width): 16 bytes per access if every tensor allows it and `run` elements are a whole number of them, else one
// element.
template <class T, class Body>
int with_norm_width(const NormArguments& a, int64_t run, const Body& body) {
  constexpr int wide = 16 / sizeof(T);
  const bool fits = run % wide == 0 && aligned(a.input, 16) && aligned(a.residual, 16) && aligned(a.grad_output, 16) &&
                    aligned(a.output, 16) && aligned(a.grad_residual, 16) && aligned(a.v, 16) &&
                    aligned(a.v_residual, 16) && aligned(a.grad_grad_output, 16);
  if (fits) return body(Width<wide>{});
  return body(Width<1>{});
}

int norm_forward(const NormArguments& a, void* stream);
int norm_backward(const NormArguments& a, void* stream);
int norm_double_backward(const NormArguments& a, void* stream);
int64_t norm_forward_workspace(const NormArguments& a);
int64_t norm_backward_workspace(const NormArguments& a);
int64_t norm_double_backward_workspace(const NormArguments& a);

}  // namespace convlab::cuda
