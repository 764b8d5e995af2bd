// The weight gradient of convolutions with few channels per group, depthwise ones first; any geometry, both layouts.
//
// Idea: a block takes a few taps of one row of the filters and a split of the output's rows. A thread owns kWidth
// filters and kWidth channels of their group, all pairs of them (direct), or kWidth filters of one channel each
// (depthwise); it walks along rows and adds up in registers. The block adds its threads' sums in order, and a second
// kernel those of the splits. Splits depend on the geometry alone, so the result is the same every time.
// Cost: output gradient and input once for each row of taps and, without vectors of channels, each channel of a group;
// blocks that read the same are neighbours in the grid and meet in the L2 cache. Limits: sizes below 2^29. Not yet run
// on a GPU.
#include "conv_direct.h"

namespace convlab::cuda {

namespace {

constexpr int kSegment = 512;  // pixels of a row that one thread group walks along

template <class T>
struct WeightProblem {
  ConvTensors<T> t;
  ConvGeometry g;
  Global<accumulate_t<T>> partial;  // splits x filters x channels x taps
  int lanes, columns;               // threads side by side: in channels, then in pixels of a row
  int tap_groups;                   // of one row of taps
  int segments, lines, lines_per_split;
};

// The first filter and channel of the pairs that one thread owns.
struct Pairs {
  int group, filter, channel;  // the latter two within the group

  CONVLAB_DEVICE Pairs(int64_t number, int filters, int channels, int width) {
    const int across = (channels + width - 1) / width, down = (filters + width - 1) / width;
    channel = static_cast<int>(number % across) * width;
    filter = static_cast<int>(number / across % down) * width;
    group = static_cast<int>(number / across / down);
  }
};

template <class T, int kWidth, int kGroup, bool kDense>
__global__ void __launch_bounds__(kDirectThreads) weight_rows(WeightProblem<T> p) {
  using A = accumulate_t<T>;
  constexpr int kPairs = kDense ? kWidth : 1;  // filters for each channel
  const ConvGeometry& g = p.g;
  const int filters = kDense ? static_cast<int>(g.out_channels_per_group()) : static_cast<int>(g.out_channels);
  const int channels = kDense ? static_cast<int>(g.in_channels_per_group()) : 1;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % p.lanes, worker = thread / p.lanes;
  const int workers = kDirectThreads / p.lanes;
  const int taps_x = static_cast<int>(g.kernel[2]), taps_y = static_cast<int>(g.kernel[1]);
  const int tap_blocks = p.tap_groups * taps_y * static_cast<int>(g.kernel[0]);
  const int tap_block = static_cast<int>(blockIdx.x) % tap_blocks, tap_row = tap_block / p.tap_groups;
  const int first_tap = tap_block % p.tap_groups * kGroup, ty = tap_row % taps_y, tz = tap_row / taps_y;
  const int first_lane = static_cast<int>(blockIdx.x) / tap_blocks * p.lanes;
  const int width = static_cast<int>(g.input[2]), stride = static_cast<int>(g.stride[2]);
  const int dilation = static_cast<int>(g.dilation[2]);
  const int groups = kDense ? static_cast<int>(g.groups) : 1;
  const Pairs own(first_lane + lane, filters, channels, kWidth);
  const int64_t filter = static_cast<int64_t>(own.group) * filters + own.filter;
  const int64_t channel = kDense ? static_cast<int64_t>(own.group) * channels + own.channel : filter;
  A sum[kGroup][kPairs][kWidth] = {};

  const int begin = static_cast<int>(blockIdx.y) * p.lines_per_split;
  const int end = begin + p.lines_per_split < p.lines ? begin + p.lines_per_split : p.lines;
  for (int line = begin + worker / p.columns; line < end && own.group < groups; line += workers / p.columns) {
    int rest = line;
    const auto next = [&](int64_t count) {
      const int quotient = rest / static_cast<int>(count), remainder = rest - quotient * static_cast<int>(count);
      rest = quotient;
      return remainder;
    };
    const int segment = next(p.segments), oy = next(g.output[1]), oz = next(g.output[0]);
    const int64_t z = oz * g.stride[0] - g.padding[0] + tz * g.dilation[0];
    const int64_t y = oy * g.stride[1] - g.padding[1] + ty * g.dilation[1];
    if (z < 0 || z >= g.input[0] || y < 0 || y >= g.input[1]) continue;
    const int64_t from = rest * p.t.in.sample + channel * p.t.in.channel + z * p.t.in.axis[0] + y * p.t.in.axis[1];
    const int64_t to = rest * p.t.out.sample + filter * p.t.out.channel + oz * p.t.out.axis[0] + oy * p.t.out.axis[1];
    const int last = (segment + 1) * kSegment < g.output[2] ? (segment + 1) * kSegment : static_cast<int>(g.output[2]);
    for (int ox = segment * kSegment + worker % p.columns; ox < last; ox += p.columns) {
      const auto grad = load_vector<kWidth>(p.t.output, to + ox * p.t.out.axis[2]);
      const int left = ox * stride - static_cast<int>(g.padding[2]) + first_tap * dilation;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const int x = left + k * dilation;
        if (first_tap + k >= taps_x || x < 0 || x >= width) continue;
        const auto value = load_vector<kWidth>(p.t.input, from + x * p.t.in.axis[2]);
#pragma unroll
        for (int f = 0; f < kPairs; ++f)
#pragma unroll
          for (int c = 0; c < kWidth; ++c)
            sum[k][f][c] += to_accumulate(grad.value[kDense ? f : c]) * to_accumulate(value.value[c]);
      }
    }
  }

  constexpr int kSums = kPairs * kWidth;
  const auto sums = dynamic_shared<A>(0, kSums * kDirectThreads);  // worker x lane x filter x channel
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    __syncthreads();
#pragma unroll
    for (int f = 0; f < kPairs; ++f)
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sums[thread * kSums + f * kWidth + c] = sum[k][f][c];
    __syncthreads();
    for (int i = thread; i < p.lanes * kSums && first_tap + k < taps_x; i += kDirectThreads) {
      const Pairs pairs(first_lane + i / kSums, filters, channels, kWidth);
      if (pairs.group >= groups) continue;
      const int64_t f =
          static_cast<int64_t>(pairs.group) * filters + pairs.filter + (kDense ? i / kWidth % kPairs : i % kWidth);
      const int c = kDense ? pairs.channel + i % kWidth : 0;
      A total = 0;
      for (int w = 0; w < workers; ++w) total += sums[w * p.lanes * kSums + i];
      const int64_t tap = tap_row * taps_x + first_tap + k;
      p.partial[static_cast<int64_t>(blockIdx.y) * g.weight_elements() + (f * channels + c) * g.taps() + tap] = total;
    }
  }
}

// Adds the splits of each weight, in order.
template <class T>
__global__ void __launch_bounds__(kDirectThreads) add_weight_splits(WeightProblem<T> p, int splits) {
  const int64_t i = global_thread(), all = p.g.weight_elements();
  if (i >= all) return;
  accumulate_t<T> total = 0;
  for (int split = 0; split < splits; ++split) total += p.partial[split * all + i];
  const int64_t channels = p.g.in_channels_per_group(), tap = i % p.g.taps(), c = i / p.g.taps() % channels;
  p.t.weight[i / p.g.taps() / channels * p.t.weight_filter + c * p.t.weight_channel + tap * p.t.weight_tap] =
      from_accumulate<T>(total);
}

bool is_dense(const ConvArguments& a) { return a.algorithm != Algorithm::depthwise; }

// How the work is cut: by geometry, layout and dtype alone.
struct WeightPlan {
  int group, width, lanes, columns, tap_groups, segments, lines, lines_per_split, splits;
  int64_t blocks;  // for one split

  template <class T>
  static WeightPlan of(const ConvArguments& a) {
    constexpr int64_t enough_blocks = 1056;  // 8 for each multiprocessor of a large GPU
    const ConvGeometry& g = a.geometry;
    WeightPlan plan;
    plan.group = g.kernel[2] % 5 == 0 || g.kernel[2] > 6 ? 5 : 3;
    const int64_t filters = is_dense(a) ? g.out_channels_per_group() : g.out_channels;
    const int64_t channels = is_dense(a) ? g.in_channels_per_group() : g.in_channels;
    plan.width = direct_vectors_fit<T>(a, filters, channels) ? kDirectWidth<T> : 1;
    const int64_t pairs = ceil_divide<int64_t>(filters, plan.width) *
                          (is_dense(a) ? g.groups * ceil_divide<int64_t>(channels, plan.width) : 1);
    plan.lanes = a.layout == Layout::channels_first ? 1 : direct_lanes(pairs, 1, kDirectThreads);
    plan.columns = kDirectThreads / plan.lanes;
    while (plan.columns > 1 && plan.columns / 2 >= g.output[2]) plan.columns /= 2;
    if (plan.columns > 32) plan.columns = 32;
    plan.tap_groups = static_cast<int>(ceil_divide<int64_t>(g.kernel[2], plan.group));
    plan.segments = static_cast<int>(ceil_divide<int64_t>(g.output[2], kSegment));
    plan.lines = static_cast<int>(g.batch * g.output[0] * g.output[1]) * plan.segments;
    plan.blocks = plan.tap_groups * g.kernel[0] * g.kernel[1] * ceil_divide<int64_t>(pairs, plan.lanes);
    const int64_t at_once = kDirectThreads / plan.lanes / plan.columns;
    const int64_t most = ceil_divide<int64_t>(plan.lines, at_once), wanted = ceil_divide(enough_blocks, plan.blocks);
    const int64_t per_split = ceil_divide<int64_t>(plan.lines, wanted < most ? wanted : most);
    plan.lines_per_split = static_cast<int>(ceil_divide(per_split, at_once) * at_once);
    plan.splits = ceil_divide(plan.lines, plan.lines_per_split);
    return plan;
  }
};

template <class T, int kWidth, int kGroup, bool kDense>
int run(const ConvArguments& a, const WeightPlan& plan, void* stream) {
  using A = accumulate_t<T>;
  const ConvGeometry& g = a.geometry;
  const auto partial = global(static_cast<A*>(a.workspace), plan.splits * g.weight_elements());
  const WeightProblem<T> p{
      ConvTensors<T>(a),   g, partial, plan.lanes, plan.columns, plan.tap_groups, plan.segments, plan.lines,
      plan.lines_per_split};
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
  constexpr int64_t shared = kWidth * (kDense ? kWidth : 1) * kDirectThreads * static_cast<int64_t>(sizeof(A));
  const int error = launch(weight_rows<T, kWidth, kGroup, kDense>, grid, dim3(kDirectThreads), shared, stream, p);
  if (error) return error;
  return launch(add_weight_splits<T>, grid_of(g.weight_elements(), kDirectThreads), dim3(kDirectThreads), 0, stream, p,
                plan.splits);
}

template <class T, int kWidth, bool kDense>
int run_grouped(const ConvArguments& a, const WeightPlan& plan, void* stream) {
  return plan.group == 3 ? run<T, kWidth, 3, kDense>(a, plan, stream) : run<T, kWidth, 5, kDense>(a, plan, stream);
}

template <class T, bool kDense>
int run_planned(const ConvArguments& a, void* stream) {
  const auto plan = WeightPlan::of<T>(a);
  if (plan.width == 1) return run_grouped<T, 1, kDense>(a, plan, stream);
  return run_grouped<T, kDirectWidth<T>, kDense>(a, plan, stream);
}

}  // namespace

int64_t direct_weight_workspace(const ConvArguments& a) {
  int64_t bytes = 0;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    bytes = WeightPlan::of<T>(a).splits * a.geometry.weight_elements() * static_cast<int64_t>(sizeof(accumulate_t<T>));
    return 0;
  });
  return bytes;
}

int direct_weight_convolution(const ConvArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return is_dense(a) ? run_planned<T, true>(a, stream) : run_planned<T, false>(a, stream);
  });
}

}  // namespace convlab::cuda
