// Depthwise convolution, one channel and one filter at a time: forward and backward input, any geometry, both layouts.
//
// Idea: there is nothing to multiply as matrices, so bandwidth is the limit. A thread writes kPixels pixels in a row,
// of several channels where they are neighbours in memory (channels last). Along the row it holds a group of taps and
// reads each input once for all pixels that it counts for; overlapping rows meet in the L1 cache, which is the tile.
// Channels first, neighbouring threads have neighbouring columns, the row of a thread runs down the image, and the few
// weights of a plane come by broadcast; channels last, the weights of the block's channels are transposed into shared
// memory first. Cost: every tensor once through memory. Limits: 2^31 elements, filters of 3072 taps. Not yet run on a
// GPU.
#include "conv_direct.h"

namespace convlab::cuda {

namespace {

constexpr int kPixels = 8;
constexpr int64_t kMostShared = 96 << 10;

// The last axis is the one along which a thread's pixels lie; steps of taps are not negative.
template <class T>
struct DepthwiseProblem {
  ConvTensors<T> t;
  Phase phase;
  Global<const T> read;
  Global<T> written;
  DenseStrides from, to;
  int read_size[kMaxSpatial];
  int first_tap, tap_stride[kMaxSpatial];  // numbers of taps in the filter
  int samples, channels, filter_taps, lanes, groups;
  int64_t units;  // of one thread and kPixels pixels; channels last, for each vector of channels
};

// sum[p] += weight[g] * input at first + p * step + g, where that is inside.
template <int kGroup, int kStep, int kWidth, class T, class A>
CONVLAB_DEVICE void add_window(A (&sum)[kPixels][kWidth], const A (&weight)[kGroup][kWidth],
                               const Global<const T>& read, int64_t base, int64_t stride, int first, int size,
                               int step) {
  constexpr int loads = kStep ? (kPixels - 1) * kStep + kGroup : kPixels;
#pragma unroll
  for (int j = 0; j < loads; ++j) {
    const int at = first + (kStep ? j : j * step);
    A value[kWidth] = {};
    if (at >= 0 && at < size) {
      const auto loaded = load_vector<kWidth>(read, base + at * stride);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] = to_accumulate(loaded.value[i]);
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int g = kStep ? j - p * kStep : j == p ? 0 : -1;
      if (g < 0 || g >= kGroup) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[p][i] += value[i] * weight[g][i];
    }
  }
}

// kGroup taps divide the phase's, and pixels are kStep apart; kGroup 1 and kStep 0 are for any.
template <class T, int kWidth, bool kLast, int kGroup, int kStep>
__global__ void __launch_bounds__(kDirectThreads) depthwise_pixels(DepthwiseProblem<T> p) {
  using A = accumulate_t<T>;
  const int thread = static_cast<int>(threadIdx.x), slab = p.lanes * kWidth;
  const int first_channel = static_cast<int>(blockIdx.y) * slab;
  const auto staged = dynamic_shared<A>(0, kLast ? p.filter_taps * slab : 0);
  if constexpr (kLast) {
    for (int i = thread; i < p.filter_taps * slab; i += kDirectThreads) {
      const int channel = first_channel + i % slab;
      staged[i] = channel < p.channels
                      ? to_accumulate(p.t.weight[channel * p.t.weight_filter + i / slab * p.t.weight_tap])
                      : A(0);
    }
    __syncthreads();
  }
  const Phase& phase = p.phase;
  const int per_block = kDirectThreads / p.lanes;
  int channel = first_channel + thread % p.lanes * kWidth;
  if (channel >= p.channels) return;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * per_block + thread / p.lanes; unit < p.units;
       unit += static_cast<int64_t>(gridDim.x) * per_block) {
    unsigned rest = static_cast<unsigned>(unit);
    int written[kMaxSpatial];
    const auto next = [&](int count) {
      const unsigned quotient = rest / static_cast<unsigned>(count), remainder = rest - quotient * count;
      rest = quotient;
      return static_cast<int>(remainder);
    };
    if constexpr (!kLast) written[1] = next(phase.count[1]);
    written[2] = next(p.groups) * kPixels;
    if constexpr (kLast) written[1] = next(phase.count[1]);
    written[0] = next(phase.count[0]);
    if constexpr (!kLast) channel = next(p.channels);
    const int64_t sample = rest;

    A sum[kPixels][kWidth] = {};
    const int64_t plane = sample * p.from.sample + channel * p.from.channel;
    const int begin = phase.start[2] + written[2] * phase.step[2];
    for (int tz = 0; tz < phase.taps[0]; ++tz) {
      const int z = phase.start[0] + written[0] * phase.step[0] + tz * phase.tap_step[0];
      if (z < 0 || z >= p.read_size[0]) continue;
      for (int ty = 0; ty < phase.taps[1]; ++ty) {
        const int y = phase.start[1] + written[1] * phase.step[1] + ty * phase.tap_step[1];
        if (y < 0 || y >= p.read_size[1]) continue;
        const int64_t row = plane + z * p.from.axis[0] + y * p.from.axis[1];
        for (int tx = 0; tx < phase.taps[2]; tx += kGroup) {
          A weight[kGroup][kWidth];
#pragma unroll
          for (int g = 0; g < kGroup; ++g) {
            const int tap = p.first_tap + tz * p.tap_stride[0] + ty * p.tap_stride[1] + (tx + g) * p.tap_stride[2];
            if constexpr (kLast) {
              const auto loaded = load_vector<kWidth>(staged, tap * slab + channel - first_channel);
#pragma unroll
              for (int i = 0; i < kWidth; ++i) weight[g][i] = loaded.value[i];
            } else {
              weight[g][0] = to_accumulate(p.t.weight[channel * p.t.weight_filter + tap * p.t.weight_tap]);
            }
          }
          add_window<kGroup, kStep, kWidth, T>(sum, weight, p.read, row, p.from.axis[2], begin + tx * phase.tap_step[2],
                                               p.read_size[2], phase.step[2]);
        }
      }
    }
    int64_t at = sample * p.to.sample + channel * p.to.channel;
#pragma unroll
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      at += (phase.write_start[axis] + written[axis] * phase.write_step[axis]) * p.to.axis[axis];
#pragma unroll
    for (int i = 0; i < kPixels; ++i, at += phase.write_step[2] * p.to.axis[2])
      if (written[2] + i < phase.count[2]) store_vector(p.written, at, p.t.finished(sum[i], channel, at));
  }
}

template <class T, int kWidth, bool kLast, int kGroup, int kStep>
int launch_pixels(const DepthwiseProblem<T>& p, void* stream) {
  constexpr int64_t enough_blocks = 2112, most_rounds = 8;  // 16 blocks for each multiprocessor of a large GPU
  const int64_t slabs = kLast ? ceil_divide<int64_t>(p.channels, p.lanes * kWidth) : 1;
  const int64_t blocks = ceil_divide<int64_t>(p.units, kDirectThreads / p.lanes);
  int64_t rounds = ceil_divide<int64_t>(blocks * slabs, enough_blocks);  // over which the staged weights serve
  if (rounds > most_rounds || !kLast) rounds = kLast ? most_rounds : 1;
  const dim3 grid(static_cast<unsigned>(ceil_divide(blocks, rounds)), static_cast<unsigned>(slabs));
  const int64_t shared = kLast ? p.filter_taps * p.lanes * kWidth * static_cast<int64_t>(sizeof(accumulate_t<T>)) : 0;
  return launch(depthwise_pixels<T, kWidth, kLast, kGroup, kStep>, grid, dim3(kDirectThreads), shared, stream, p);
}

template <class T, int kWidth, bool kLast>
int launch_grouped(const DepthwiseProblem<T>& p, void* stream) {
  if constexpr (sizeof(T) < 8 && (kWidth > 1 || !kLast)) {
    const int taps = p.phase.taps[2], step = p.phase.tap_step[2] == 1 ? p.phase.step[2] : 0;
    if (step == 1 && taps % 3 == 0) return launch_pixels<T, kWidth, kLast, 3, 1>(p, stream);
    if (step == 1 && taps % 5 == 0) return launch_pixels<T, kWidth, kLast, 5, 1>(p, stream);
    if (step == 1 && taps % 7 == 0) return launch_pixels<T, kWidth, kLast, 7, 1>(p, stream);
    if (step == 2 && taps % 3 == 0) return launch_pixels<T, kWidth, kLast, 3, 2>(p, stream);
    if (step == 2 && taps % 5 == 0) return launch_pixels<T, kWidth, kLast, 5, 2>(p, stream);
  }
  return launch_pixels<T, kWidth, kLast, 1, 0>(p, stream);
}

// Exchanges two axes.
template <class T>
void exchange_axes(DepthwiseProblem<T>& p, int first, int second) {
  const auto exchange = [&](auto& values) {
    const auto value = values[first];
    values[first] = values[second];
    values[second] = value;
  };
  Phase& phase = p.phase;
  exchange(phase.count), exchange(phase.start), exchange(phase.step), exchange(phase.taps), exchange(phase.tap_step);
  exchange(phase.write_start), exchange(phase.write_step);
  exchange(p.from.axis), exchange(p.to.axis), exchange(p.read_size), exchange(p.tap_stride);
}

template <class T>
DepthwiseProblem<T> depthwise_problem(const ConvArguments& a, const Phase& phase) {
  constexpr int short_row = 4;
  const ConvGeometry& g = a.geometry;
  const bool to_input = a.pass == Pass::backward_input;
  const ConvTensors<T> t(a);
  DepthwiseProblem<T> p{t};
  p.phase = phase;
  p.read = to_input ? t.output : t.input;
  p.written = to_input ? t.input : t.output;
  p.from = to_input ? t.out : t.in;
  p.to = to_input ? t.in : t.out;
  p.samples = static_cast<int>(g.batch);
  p.channels = static_cast<int>(g.in_channels);
  p.filter_taps = static_cast<int>(g.taps());
  p.lanes = 1;
  int stride = 1;
  p.first_tap = 0;
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    p.read_size[axis] = static_cast<int>(to_input ? g.output[axis] : g.input[axis]);
    p.tap_stride[axis] = phase.tap_stride[axis] * stride;
    p.first_tap += phase.first_tap[axis] * stride;
    stride *= static_cast<int>(g.kernel[axis]);
    if (phase.tap_step[axis] < 0) {  // count the taps from the other end
      const int last = phase.taps[axis] > 0 ? phase.taps[axis] - 1 : 0;
      p.phase.start[axis] += last * phase.tap_step[axis];
      p.phase.tap_step[axis] = -phase.tap_step[axis];
      p.first_tap += last * p.tap_stride[axis];
      p.tap_stride[axis] = -p.tap_stride[axis];
    }
  }
  const bool down = a.layout == Layout::channels_first ? phase.count[1] >= short_row : phase.count[2] < short_row;
  if (down) exchange_axes(p, 1, 2);
  p.groups = ceil_divide(p.phase.count[2], kPixels);
  p.units = static_cast<int64_t>(p.samples) * p.phase.count[0] * p.phase.count[1] * p.groups;
  return p;
}

template <class T, int kWidth>
int lanes_of(const ConvGeometry& g) {
  return direct_lanes(ceil_divide<int64_t>(g.in_channels, kWidth),
                      g.taps() * kWidth * static_cast<int64_t>(sizeof(accumulate_t<T>)), kMostShared);
}

template <class T>
int run_phase(const ConvArguments& a, const Phase& phase, void* stream) {
  auto p = depthwise_problem<T>(a, phase);
  if (p.units == 0) return 0;
  if (a.layout == Layout::channels_first) {
    p.units *= p.channels;
    return launch_grouped<T, 1, false>(p, stream);
  }
  constexpr int width = kDirectWidth<T>;
  p.lanes = lanes_of<T, width>(a.geometry);
  if (direct_vectors_fit<T>(a, a.geometry.out_channels, a.geometry.in_channels))
    return launch_grouped<T, width, true>(p, stream);
  p.lanes = lanes_of<T, 1>(a.geometry);
  return launch_grouped<T, 1, true>(p, stream);
}

}  // namespace

int depthwise_pixels_convolution(const ConvArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return for_each_phase(a, [&](const Phase& phase) { return run_phase<T>(a, phase, stream); });
  });
}

}  // namespace convlab::cuda
