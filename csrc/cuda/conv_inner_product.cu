// Pointwise convolutions of few pixels, and fully connected layers of few rows. All passes.
//
// Idea: with few pixels nothing but the weights takes time, and a tile for tensor cores, 64 pixels high, would idle.
// Here each weight is read (or written) where it lies, 16 bytes at a time, and meets up to 8 pixels in registers.
// Forward, the threads of a team share four filters: each multiplies its part of their channels, then partial sums meet
// in shuffles and shared memory. Backward input, a thread owns neighbouring channels, walks down the filters, and
// splits of the filters that depend on the geometry alone are added in order by a second kernel. Backward weight is a
// sum of outer products. Cost: the weights once through memory; beyond 4 or 8 pixels again, from the L2 cache, where
// blocks that read the same, neighbours in the grid, meet. Limits: no kernel but 1x1, pixels and channels below 2^29;
// from some 16 pixels on, tensor cores should be faster. Not yet run on a GPU.
#include "conv.h"

namespace convlab::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFilters = 4;       // that a thread has at once
constexpr int64_t kWanted = 264;  // blocks: two for each multiprocessor of a large GPU
constexpr int kChain = 512;       // longest sum over pixels before it is added to the others

template <class T>
struct InnerProblem {
  ConvTensors<T> t;
  Global<accumulate_t<T>> partial;  // of backward input: splits x pixels x channels of all groups
  int pixels, pixels_per_image, pixel_blocks;
  int channels, filters;  // per group
  int groups;
  int blocks;         // of filters in a group; of channels in backward input
  int team;           // threads that share filters, forward
  int split, splits;  // filters of one, backward input

  // What precedes the channels of a pixel in a tensor; of the last pixel for those beyond it, whose sums nobody stores.
  CONVLAB_DEVICE int64_t offset(const DenseStrides& strides, int pixel) const {
    if (pixel >= pixels) pixel = pixels - 1;
    return pixel / pixels_per_image * strides.sample + pixel % pixels_per_image * strides.axis[2];
  }
};

// N neighbouring channels, wherever they lie.
template <int N, class T>
CONVLAB_DEVICE Vector<T, N> load_channels(const Global<T>& from, int64_t at, int64_t stride) {
  if (stride == 1) return load_vector<N>(from, at);
  Vector<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.value[i] = from[at + i * stride];
  return values;
}

// The sums over the lanes of a warp of kCount values each, a power of two up to 32: lane l returns that of value
// l / (32 / kCount). Half of the values change lanes in every step: kCount - 1 shuffles and a few more, not five each.
template <int kCount, int kOther = 16, int N, class A>
CONVLAB_DEVICE A sum_of_lanes(A (&value)[N]) {
  if constexpr (kCount > 1) {
    constexpr int half = kCount / 2;
    const bool upper = threadIdx.x & kOther;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A kept = upper ? value[i + half] : value[i], given = upper ? value[i] : value[i + half];
      value[i] = kept + __shfl_xor_sync(kEveryLane, given, kOther);
    }
    return sum_of_lanes<half, kOther / 2>(value);
  } else {
#pragma unroll
    for (int other = kOther; other > 0; other /= 2) value[0] += __shfl_xor_sync(kEveryLane, value[0], other);
    return value[0];
  }
}

template <class T, int kWidth, int kPixels>
__global__ void __launch_bounds__(kThreads, 2) inner_products(InnerProblem<T> p) {
  using A = accumulate_t<T>;
  constexpr int kSums = kFilters * kPixels;
  const int thread = static_cast<int>(threadIdx.x), place = thread % p.team, teams = kThreads / p.team;
  const int first_pixel = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.pixel_blocks)) * kPixels;
  const int block = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.pixel_blocks)) * teams + thread / p.team;
  const int group = block / p.blocks, first = block % p.blocks * kFilters;
  int64_t filter[kFilters], row[kPixels];
#pragma unroll
  for (int f = 0; f < kFilters; ++f) {
    const int used = first + f < p.filters ? first + f : p.filters - 1;
    filter[f] = (static_cast<int64_t>(group) * p.filters + used) * p.t.weight_filter;
  }
#pragma unroll
  for (int i = 0; i < kPixels; ++i)
    row[i] = p.offset(p.t.in, first_pixel + i) + static_cast<int64_t>(group) * p.channels * p.t.in.channel;

  A sum[kSums] = {};
  const int channels = group < p.groups ? p.channels : 0;
#pragma unroll(kPixels > 2 ? 1 : 2)
  for (int c = place * kWidth; c < channels; c += p.team * kWidth) {
    Vector<T, kWidth> weight[kFilters];
#pragma unroll
    for (int f = 0; f < kFilters; ++f) weight[f] = load_vector<kWidth>(p.t.weight, filter[f] + c);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const auto x = load_channels<kWidth>(p.t.input, row[i] + c * p.t.in.channel, p.t.in.channel);
#pragma unroll
      for (int f = 0; f < kFilters; ++f)
#pragma unroll
        for (int w = 0; w < kWidth; ++w)
          sum[f * kPixels + i] += to_accumulate(weight[f].value[w]) * to_accumulate(x.value[w]);
    }
  }

  CONVLAB_SHARED(A, totals, [kWarps][kSums]);
  const A of_warp = sum_of_lanes<kSums>(sum);
  if (thread % (32 / kSums) == 0) totals[thread / 32][thread % 32 / (32 / kSums)] = of_warp;
  __syncthreads();
  const int pixel = first_pixel + place % kPixels, used = first + place / kPixels;
  if (place >= kSums || group >= p.groups || pixel >= p.pixels || used >= p.filters) return;
  A total = 0;
  for (int warp = 0; warp < p.team / 32; ++warp) total += totals[thread / p.team * (p.team / 32) + warp][place];
  const int64_t channel = static_cast<int64_t>(group) * p.filters + used;
  const int64_t at = p.offset(p.t.out, pixel) + channel * p.t.out.channel;
  p.t.output[at] = p.t.finished(total, channel, at);
}

// A warp has 32 vectors of channels; the warps of a block take the filters of a split in turn.
template <class T, int kWidth, int kPixels>
__global__ void __launch_bounds__(kThreads, 2) sums_of_filters(InnerProblem<T> p) {
  using A = accumulate_t<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_pixel = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.pixel_blocks)) * kPixels;
  const unsigned block = blockIdx.x / static_cast<unsigned>(p.pixel_blocks);
  const int group = static_cast<int>(block / static_cast<unsigned>(p.blocks));
  const int first = static_cast<int>(block % static_cast<unsigned>(p.blocks)) * 32 * kWidth;
  const int c = first + lane * kWidth, begin = static_cast<int>(blockIdx.y) * p.split;
  const int end = begin + p.split < p.filters ? begin + p.split : p.filters;
  const int64_t first_filter = static_cast<int64_t>(group) * p.filters;
  int64_t row[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) row[i] = p.offset(p.t.out, first_pixel + i);

  A sum[kPixels][kWidth] = {};
  if (c < p.channels) {
#pragma unroll 4
    for (int f = begin + warp; f < end; f += kWarps) {
      const auto weight = load_vector<kWidth>(p.t.weight, (first_filter + f) * p.t.weight_filter + c);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const A grad = to_accumulate(p.t.output[row[i] + (first_filter + f) * p.t.out.channel]);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) sum[i][w] += grad * to_accumulate(weight.value[w]);
      }
    }
  }

  CONVLAB_SHARED(A, sums, [kWarps][32 * kWidth]);
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    if (first_pixel + i >= p.pixels) break;  // so do all threads
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sums[warp][lane * kWidth + w] = sum[i][w];
    __syncthreads();
    const int own = static_cast<int>(threadIdx.x);
    if (own >= 32 * kWidth || first + own >= p.channels) continue;
    A total = 0;
    for (int other = 0; other < kWarps; ++other) total += sums[other][own];
    const int64_t channel = static_cast<int64_t>(group) * p.channels + first + own;
    if (p.splits == 1) {
      const int64_t at = p.offset(p.t.in, first_pixel + i) + channel * p.t.in.channel;
      p.t.input[at] = p.t.finished(total, channel, at);
    } else {
      const int64_t line = static_cast<int64_t>(blockIdx.y) * p.pixels + first_pixel + i;
      p.partial[line * p.groups * p.channels + channel] = total;
    }
  }
}

// Adds the splits of each element of the input's gradient, in order.
template <class T>
__global__ void __launch_bounds__(kThreads) add_filter_splits(InnerProblem<T> p) {
  const int64_t channels = static_cast<int64_t>(p.groups) * p.channels, all = channels * p.pixels;
  const int64_t i = global_thread();
  if (i >= all) return;
  accumulate_t<T> total = 0;
  for (int split = 0; split < p.splits; ++split) total += p.partial[split * all + i];
  const int64_t channel = i % channels, pixel = i / channels;
  const int64_t at = p.offset(p.t.in, static_cast<int>(pixel)) + channel * p.t.in.channel;
  p.t.input[at] = p.t.finished(total, channel, at);
}

// A warp has 32 vectors of channels, a thread of it kFilters filters.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) outer_products(InnerProblem<T> p) {
  using A = accumulate_t<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int across = (p.channels + 32 * kWidth - 1) / (32 * kWidth);
  const int c = (static_cast<int>(blockIdx.x % static_cast<unsigned>(across)) * 32 + lane) * kWidth;
  const int block = static_cast<int>(blockIdx.x / static_cast<unsigned>(across)) * kWarps + warp;
  const int group = block / p.blocks, first = block % p.blocks * kFilters;
  if (group >= p.groups || c >= p.channels) return;
  const int64_t channel = static_cast<int64_t>(group) * p.channels + c;
  const int64_t filter = static_cast<int64_t>(group) * p.filters + first;
  int step[kFilters];  // to the filters that there are
#pragma unroll
  for (int f = 0; f < kFilters; ++f) step[f] = first + f < p.filters ? f : 0;

  A total[kFilters][kWidth] = {};
  for (int begin = 0; begin < p.pixels; begin += kChain) {
    A sum[kFilters][kWidth] = {};
    const int end = begin + kChain < p.pixels ? begin + kChain : p.pixels;
    for (int pixel = begin; pixel < end; ++pixel) {
      const auto x =
          load_channels<kWidth>(p.t.input, p.offset(p.t.in, pixel) + channel * p.t.in.channel, p.t.in.channel);
      const int64_t from = p.offset(p.t.out, pixel);
#pragma unroll
      for (int f = 0; f < kFilters; ++f) {
        const A grad = to_accumulate(p.t.output[from + (filter + step[f]) * p.t.out.channel]);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) sum[f][w] += grad * to_accumulate(x.value[w]);
      }
    }
#pragma unroll
    for (int f = 0; f < kFilters; ++f)
#pragma unroll
      for (int w = 0; w < kWidth; ++w) total[f][w] += sum[f][w];
  }
#pragma unroll
  for (int f = 0; f < kFilters; ++f) {
    if (first + f >= p.filters) return;
    Vector<T, kWidth> weight;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) weight.value[w] = from_accumulate<T>(total[f][w]);
    store_vector(p.t.weight, (filter + f) * p.t.weight_filter + c, weight);
  }
}

int blocks_of(int64_t size, int64_t block) { return static_cast<int>(ceil_divide(size, block)); }

// How many pixels a thread has at once: as many as there are registers for their sums, or 2.
template <class T>
constexpr int kForwardPixels = sizeof(T) == 8 ? 4 : 8;
constexpr int kBackwardPixels = 4;

bool is_one_or_two(const ConvGeometry& g) { return g.batch * g.input_pixels() <= 2; }

// Splits of the filters in backward input: enough blocks for a large GPU, and at least four filters for each warp.
int splits_of(const ConvGeometry& g, int64_t width) {
  const int64_t blocks = ceil_divide<int64_t>(g.in_channels_per_group(), 32 * width) * g.groups *
                         ceil_divide<int64_t>(g.batch * g.input_pixels(), is_one_or_two(g) ? 2 : kBackwardPixels);
  const int64_t wanted = ceil_divide<int64_t>(kWanted, blocks), most = g.out_channels_per_group() / (4 * kWarps);
  return static_cast<int>(wanted < most ? wanted : most > 1 ? most : 1);
}

// Channels that a thread reads at once: as many as 16 bytes hold, or one.
template <class T>
int64_t width_of(const ConvArguments& a) {
  constexpr int64_t wide = 16 / sizeof(T);
  const bool fits = a.geometry.in_channels_per_group() % wide == 0 && aligned(a.weight, 16) && aligned(a.input, 16);
  return fits ? wide : 1;
}

template <class T>
InnerProblem<T> inner_problem(const ConvArguments& a) {
  const ConvGeometry& g = a.geometry;
  InnerProblem<T> p{ConvTensors<T>(a)};
  p.pixels_per_image = static_cast<int>(g.input_pixels());
  p.pixels = static_cast<int>(g.batch) * p.pixels_per_image;
  p.channels = static_cast<int>(g.in_channels_per_group());
  p.filters = static_cast<int>(g.out_channels_per_group());
  p.groups = static_cast<int>(g.groups);
  p.blocks = blocks_of(p.filters, kFilters);
  p.split = p.filters;
  p.splits = 1;
  return p;
}

unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(blocks); }

template <class T, int kWidth, int kPixels>
int run_forward(InnerProblem<T> p, void* stream) {
  p.pixel_blocks = blocks_of(p.pixels, kPixels);
  p.team = 32;
  while (p.team < kThreads && p.channels >= p.team * 4 * kWidth) p.team *= 2;  // two vectors for each thread
  const int64_t blocks = ceil_divide<int64_t>(static_cast<int64_t>(p.blocks) * p.groups, kThreads / p.team);
  return launch(inner_products<T, kWidth, kPixels>, dim3(grid_size(blocks * p.pixel_blocks)), dim3(kThreads), 0, stream,
                p);
}

template <class T, int kWidth, int kPixels>
int run_backward_input(const ConvArguments& a, InnerProblem<T> p, void* stream) {
  p.pixel_blocks = blocks_of(p.pixels, kPixels);
  p.blocks = blocks_of(p.channels, 32 * kWidth);
  p.split = blocks_of(p.filters, splits_of(a.geometry, kWidth));
  p.splits = blocks_of(p.filters, p.split);
  const int64_t elements = a.geometry.input_elements();
  if (p.splits > 1) p.partial = global(static_cast<accumulate_t<T>*>(a.workspace), p.splits * elements);
  const dim3 grid(grid_size(static_cast<int64_t>(p.blocks) * p.groups * p.pixel_blocks), grid_size(p.splits));
  const int error = launch(sums_of_filters<T, kWidth, kPixels>, grid, dim3(kThreads), 0, stream, p);
  if (error || p.splits == 1) return error;
  return launch(add_filter_splits<T>, grid_of(elements, kThreads), dim3(kThreads), 0, stream, p);
}

template <class T, int kWidth>
int run_width(const ConvArguments& a, void* stream) {
  const auto p = inner_problem<T>(a);
  if (a.pass == Pass::backward_weight) {
    const int64_t blocks = ceil_divide<int64_t>(static_cast<int64_t>(p.blocks) * p.groups, kWarps);
    return launch(outer_products<T, kWidth>, dim3(grid_size(blocks * blocks_of(p.channels, 32 * kWidth))),
                  dim3(kThreads), 0, stream, p);
  }
  const bool few = is_one_or_two(a.geometry);
  if (a.pass == Pass::forward)
    return few ? run_forward<T, kWidth, 2>(p, stream) : run_forward<T, kWidth, kForwardPixels<T>>(p, stream);
  return few ? run_backward_input<T, kWidth, 2>(a, p, stream)
             : run_backward_input<T, kWidth, kBackwardPixels>(a, p, stream);
}

}  // namespace

int64_t inner_product_workspace(const ConvArguments& a) {
  if (a.pass != Pass::backward_input) return 0;
  int64_t bytes = 0;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int splits = splits_of(a.geometry, width_of<T>(a));
    if (splits > 1) bytes = splits * a.geometry.input_elements() * static_cast<int64_t>(sizeof(accumulate_t<T>));
    return 0;
  });
  return bytes;
}

int inner_product_convolution(const ConvArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return width_of<T>(a) > 1 ? run_width<T, 16 / sizeof(T)>(a, stream) : run_width<T, 1>(a, stream);
  });
}

}  // namespace convlab::cuda
