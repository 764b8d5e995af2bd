// Convolution without tensor cores, forward and backward input: few channels per group, or float64.
//
// Idea: a thread owns kPixels pixels of up to kWritten neighbouring channels of one group and walks through taps and
// read channels. Products of weights and pixels stay in registers; inputs come through the L1 cache, several channels
// at once where they are neighbours in memory; the weights of the block's channels come in slices through shared
// memory, turned so that a thread reads those of its channels at once. Groups as small as four channels fill their
// threads, where a tile for tensor cores, 64 channels wide, would stay empty. Cost: multiply_adds() as scalars; every
// tensor about once through memory. Limits: sizes below 2^29; many channels per group are for implicit_gemm. Not yet
// run on a GPU.
#include "conv_direct.h"
#include "conv_gemm.h"

namespace convlab::cuda {

namespace {

constexpr int kPixels = 4;
constexpr int64_t kStagedBytes = 32 << 10;

template <class T>
struct DirectProblem {
  GemmProblem<T> gemm;
  int lanes;          // threads side by side in channels
  int blocks;         // of kWritten channels in a group
  int staged;         // steps of the sum whose weights are in shared memory at once
  bool store_vector;  // channels written lie side by side, whole and aligned
};

// kRead channels are read at once.
template <class T, int kRead, int kWritten>
__global__ void __launch_bounds__(kDirectThreads) direct_pixels(DirectProblem<T> d) {
  using A = accumulate_t<T>;
  const GemmProblem<T>& p = d.gemm;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % d.lanes, workers = kDirectThreads / d.lanes;
  const int slab = d.lanes * kWritten, first_block = static_cast<int>(blockIdx.y) * d.lanes;
  const int group = (first_block + lane) / d.blocks, n = (first_block + lane) % d.blocks * kWritten;
  const auto staged = dynamic_shared<A>(0, static_cast<int64_t>(d.staged) * slab);

  Pixel pixel[kPixels];
  int64_t m[kPixels];
  A sum[kPixels][kWritten] = {};
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    m[i] = (static_cast<int64_t>(blockIdx.x) * kPixels + i) * workers + thread / d.lanes;
    const bool mine = m[i] < p.rows && group < p.groups;
    pixel[i] = p.reader(mine ? static_cast<int>(m[i]) : 0);
    if (!mine) pixel[i].at[0] = -(1 << 30);  // reads padding, whatever the tap
  }
  const int64_t first_read = static_cast<int64_t>(group) * p.read_channels * p.read.channel;

  Walk walk;
  walk.begin(0, p.read_channels, p.phase);
  for (int begin = 0; begin < p.depth; begin += d.staged) {
    const int steps = begin + d.staged < p.depth ? d.staged : p.depth - begin;
    __syncthreads();
    for (int i = thread; i < steps * slab; i += kDirectThreads) {
      const int block = first_block + i % slab / kWritten, g = block / d.blocks;
      const int written = block % d.blocks * kWritten + i % kWritten;
      Walk at;
      at.begin(begin + i / slab, p.read_channels, p.phase);
      const int64_t from =
          g * p.weight_group + written * p.weight_write + at.channel * p.weight_read + p.weight_tap(at);
      staged[i] = g < p.groups && written < p.write_channels ? to_accumulate(p.right[from]) : A(0);
    }
    __syncthreads();
    for (int step = 0; step < steps;) {
      int channels = p.read_channels - walk.channel;  // that are left of this tap
      if (channels > steps - step) channels = steps - step;
      int64_t offset[kPixels];
      bool inside[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        inside[i] = p.reads(pixel[i], walk, offset[i]);
        offset[i] += first_read + walk.channel * p.read.channel;
      }
      for (int c = 0; c < channels; c += kRead) {
        Vector<A, kWritten> weight[kRead];
#pragma unroll
        for (int r = 0; r < kRead; ++r)
          weight[r] = load_vector<kWritten>(staged, (step + c + r) * slab + lane * kWritten);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          if (!inside[i]) continue;
          const auto values = load_vector<kRead>(p.left, offset[i] + c * p.read.channel);
#pragma unroll
          for (int r = 0; r < kRead; ++r)
#pragma unroll
            for (int w = 0; w < kWritten; ++w) sum[i][w] += to_accumulate(values.value[r]) * weight[r].value[w];
        }
      }
      step += channels;
      walk.advance(channels, p.read_channels, p.phase);
    }
  }

  if (group >= p.groups) return;
  const int64_t channel = static_cast<int64_t>(group) * p.write_channels + n;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    if (m[i] >= p.rows) continue;
    const int64_t at = p.writes(static_cast<int>(m[i])) + channel * p.write.channel;
    if (d.store_vector) {
      store_vector(p.written, at, p.t.finished(sum[i], channel, at));
      continue;
    }
#pragma unroll
    for (int w = 0; w < kWritten; ++w)
      if (n + w < p.write_channels)
        p.written[at + w * p.write.channel] = p.t.finished(sum[i][w], channel + w, at + w * p.write.channel);
  }
}

template <class T, int kRead, int kWritten>
int launch_pixels(const ConvArguments& a, const GemmProblem<T>& gemm, bool store_vector, void* stream) {
  DirectProblem<T> d{gemm};
  d.blocks = ceil_divide(gemm.write_channels, kWritten);
  const int64_t bytes = kWritten * static_cast<int64_t>(sizeof(accumulate_t<T>));
  const int64_t blocks = static_cast<int64_t>(d.blocks) * gemm.groups;
  d.lanes = a.layout == Layout::channels_first ? 1 : direct_lanes(blocks, bytes, kStagedBytes);
  const int64_t staged = kStagedBytes / (d.lanes * bytes) / kRead * kRead;
  d.staged = static_cast<int>(staged < gemm.depth ? staged : gemm.depth);
  d.store_vector = store_vector;
  const dim3 grid(static_cast<unsigned>(ceil_divide<int64_t>(gemm.rows, kDirectThreads / d.lanes * kPixels)),
                  static_cast<unsigned>(ceil_divide<int64_t>(blocks, d.lanes)));
  return launch(direct_pixels<T, kRead, kWritten>, grid, dim3(kDirectThreads), d.staged * d.lanes * bytes, stream, d);
}

template <class T>
int run_phase(const ConvArguments& a, const Phase& phase, void* stream) {
  constexpr int width = kDirectWidth<T>;
  const auto gemm = gemm_problem<T>(a, phase);
  if (gemm.rows == 0) return 0;
  const bool read = direct_vectors_fit<T>(a, width, gemm.read_channels);
  const bool written = direct_vectors_fit<T>(a, width, gemm.write_channels);
  if (gemm.write_channels == 1)
    return read ? launch_pixels<T, width, 1>(a, gemm, false, stream) : launch_pixels<T, 1, 1>(a, gemm, false, stream);
  return read ? launch_pixels<T, width, width>(a, gemm, written, stream)
              : launch_pixels<T, 1, width>(a, gemm, written, stream);
}

}  // namespace

int direct_pixels_convolution(const ConvArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return for_each_phase(a, [&](const Phase& phase) { return run_phase<T>(a, phase, stream); });
  });
}

}  // namespace convlab::cuda
