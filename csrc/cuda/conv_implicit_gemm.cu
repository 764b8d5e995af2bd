// Convolution as an implicit matrix product on tensor cores: float32, bfloat16 and float16, any geometry, all passes.
//
// Idea: conv_gemm.h says what the matrices are, conv_mainloop.h multiplies them. A block computes one tile of the
// product for one group; bias, residual and clamp are applied before it is stored. Channels last with channels in whole
// chunks of 16 bytes, operands are copied asynchronously; otherwise element by element. Backward weight, whose product
// is small and whose sum is long, is cut into splits that depend on the geometry alone; a second kernel adds them in
// order. Cost: multiply_adds() on tensor cores, three times for float32 with all its digits. Limits: sizes below 2^29,
// no float64; groups of few channels leave most of a tile idle, and are for direct. Not yet run on a GPU.
#include "conv_mainloop.h"

namespace convlab::cuda {

namespace {

constexpr int kReduceThreads = 256;

template <class T, Math kMath, bool kVector, int kTileM, int kTileN, template <class, int> class LeftLoader,
          template <class, int> class RightLoader>
struct Gemm {
  using Left = Filler<T, LeftLoader<T, kTileM>, kVector, kTileM>;
  using Right = Filler<T, RightLoader<T, kTileN>, kVector, kTileN>;
  static constexpr int kMi = kTileM / 2 / 16, kNi = kTileN / 4 / 8;
  using Product = WarpProduct<T, kMath, typename Left::Tile, typename Right::Tile, kMi, kNi>;
  static constexpr int64_t kSharedBytes = kStages * (Left::Tile::kElements + Right::Tile::kElements) * sizeof(T);

  // Runs the mainloop, then store(row, column, two sums) for the pairs of the thread.
  template <class Store>
  static CONVLAB_DEVICE void run(const GemmProblem<T>& p, int group, int begin, int end, const Store& store) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int tile_row = static_cast<int>(blockIdx.x) * kTileM, tile_column = static_cast<int>(blockIdx.y) * kTileN;
    const int row = warp / 4 * (kTileM / 2), column = warp % 4 * (kTileN / 4);
    Left left;
    Right right;
    Product product;
    left.loader.begin(p, tile_row, group, begin);
    right.loader.begin(p, tile_column, group, begin);
    product.clear();
    mainloop(p, left, right, product, (end - begin + kSlice<T> - 1) / kSlice<T>, row, column);
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = tile_row + row + i * 16 + lane / 4 + half * 8;
        if (m >= p.rows) continue;
        const auto place = store.row(m);
#pragma unroll
        for (int j = 0; j < kNi; ++j) {
          const int n = tile_column + column + j * 8 + lane % 4 * 2;
          store(place, n, product.sum[i][j][half * 2], product.sum[i][j][half * 2 + 1]);
        }
      }
  }
};

template <class T, bool kVector>
struct StorePixels {
  const GemmProblem<T>& p;
  int group;

  CONVLAB_DEVICE int64_t row(int m) const { return p.writes(m); }
  CONVLAB_DEVICE void operator()(int64_t pixel, int n, float first, float second) const {
    if (n >= p.columns) return;
    const int64_t channel = static_cast<int64_t>(group) * p.write_channels + n, at = pixel + channel * p.write.channel;
    if constexpr (kVector) {
      const Vector<T, 2> pair = {{p.t.finished(first, channel, at), p.t.finished(second, channel + 1, at + 1)}};
      store_vector(p.written, at, pair);
    } else {
      p.written[at] = p.t.finished(first, channel, at);
      if (n + 1 < p.columns) p.written[at + p.write.channel] = p.t.finished(second, channel + 1, at + p.write.channel);
    }
  }
};

template <class T>
struct StorePartial {
  const GemmProblem<T>& p;
  int64_t first;

  CONVLAB_DEVICE int64_t row(int m) const { return first + static_cast<int64_t>(m) * p.columns; }
  CONVLAB_DEVICE void operator()(int64_t row, int n, float sum, float second) const {
    if (n < p.columns) p.partial[row + n] = sum;
    if (n + 1 < p.columns) p.partial[row + n + 1] = second;
  }
};

template <class G, class T, bool kVector>
__global__ void __launch_bounds__(kGemmThreads) write_pixels(GemmProblem<T> p) {
  const int group = static_cast<int>(blockIdx.z);
  G::run(p, group, 0, p.depth, StorePixels<T, kVector>{p, group});
}

template <class G, class T>
__global__ void __launch_bounds__(kGemmThreads) write_partial(GemmProblem<T> p) {
  const int group = static_cast<int>(blockIdx.z) % p.groups, split = static_cast<int>(blockIdx.z) / p.groups;
  const int begin = split * p.chunk, end = begin + p.chunk < p.depth ? begin + p.chunk : p.depth;
  const int64_t first = static_cast<int64_t>(blockIdx.z) * p.rows * p.columns;
  G::run(p, group, begin, end, StorePartial<T>{p, first});
}

// Adds the splits of each weight, in order.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) add_splits(GemmProblem<T> p, int splits) {
  const int64_t product = static_cast<int64_t>(p.rows) * p.columns, all = product * p.groups;
  const int64_t i = global_thread();
  if (i >= all) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += p.partial[split * all + i];
  const int group = static_cast<int>(i / product);
  const int64_t filter = static_cast<int64_t>(group) * p.rows + i % product / p.columns;
  const int column = static_cast<int>(i % p.columns);
  const int64_t at = filter * p.t.weight_filter + column / p.read_channels * p.t.weight_tap +
                     column % p.read_channels * p.t.weight_channel;
  p.t.weight[at] = p.t.finished(sum, filter, at);
}

unsigned tiles(int64_t size, int tile) { return static_cast<unsigned>((size + tile - 1) / tile); }

template <class T, Math kMath, bool kVector, int kTile>
int run_phase(const ConvArguments& a, const Phase& phase, void* stream) {
  const auto p = gemm_problem<T>(a, phase);
  if (p.rows == 0) return 0;
  const dim3 grid(tiles(p.rows, kTile), tiles(p.columns, kTile), static_cast<unsigned>(p.groups));
  if (a.pass == Pass::forward) {
    using G = Gemm<T, kMath, kVector, kTile, kTile, PixelRows, WeightRows>;
    return launch(write_pixels<G, T, kVector>, grid, dim3(kGemmThreads), G::kSharedBytes, stream, p);
  }
  using G = Gemm<T, kMath, kVector, kTile, kTile, PixelRows, WeightColumns>;
  return launch(write_pixels<G, T, kVector>, grid, dim3(kGemmThreads), G::kSharedBytes, stream, p);
}

template <class T, Math kMath, bool kVector, int kTile>
int run_pixels(const ConvArguments& a, void* stream) {
  return for_each_phase(a, [&](const Phase& phase) { return run_phase<T, kMath, kVector, kTile>(a, phase, stream); });
}

// How many splits backward weight is cut into: enough blocks for a large GPU, and sums of at least 512 pixels.
int64_t splits_of(const ConvGeometry& g, int tile) {
  constexpr int64_t wanted_blocks = 264, smallest = 512, most = 1024;
  const int64_t blocks = ceil_divide<int64_t>(g.out_channels_per_group(), tile) *
                         ceil_divide<int64_t>(g.in_channels_per_group() * g.taps(), tile) * g.groups;
  int64_t splits = ceil_divide<int64_t>(wanted_blocks, blocks);
  const int64_t by_length = ceil_divide<int64_t>(g.batch * g.output_pixels(), smallest);
  if (splits > by_length) splits = by_length;
  return splits > most ? most : splits;
}

// Large tiles where they are enough to fill a GPU. The parts of split float32 would spill in them.
int tile_of(const ConvArguments& a) {
  const ConvGeometry& g = a.geometry;
  if (a.dtype == Dtype::float32 && !a.tf32) return 64;
  if (a.pass == Pass::backward_weight)
    return g.out_channels_per_group() > 64 && g.in_channels_per_group() * g.taps() > 64 ? 128 : 64;
  const bool forward = a.pass == Pass::forward;
  const int64_t pixels = g.batch * (forward ? g.output_pixels() : g.input_pixels());
  const int64_t channels = forward ? g.out_channels_per_group() : g.in_channels_per_group();
  const int64_t blocks = ceil_divide<int64_t>(pixels, 128) * ceil_divide<int64_t>(channels, 128) * g.groups;
  return channels > 64 && blocks >= 132 ? 128 : 64;
}

template <class T, Math kMath, bool kVector, int kTile>
int run_weight(const ConvArguments& a, void* stream) {
  auto p = gemm_problem<T>(a, forward_phase(a.geometry));
  const int64_t splits = splits_of(a.geometry, kTile), slices = ceil_divide<int64_t>(p.depth, kSlice<T>);
  p.chunk = static_cast<int>(ceil_divide<int64_t>(slices, splits)) * kSlice<T>;
  const int used = static_cast<int>(ceil_divide<int64_t>(p.depth, p.chunk));
  const int64_t weights = a.geometry.weight_elements();
  p.partial = global(static_cast<float*>(a.workspace), used * weights);
  using G = Gemm<T, kMath, kVector, kTile, kTile, GradColumns, PatchColumns>;
  const dim3 grid(tiles(p.rows, kTile), tiles(p.columns, kTile), static_cast<unsigned>(p.groups * used));
  const int error = launch(write_partial<G, T>, grid, dim3(kGemmThreads), G::kSharedBytes, stream, p);
  if (error) return error;
  return launch(add_splits<T>, grid_of(weights, kReduceThreads), dim3(kReduceThreads), 0, stream, p, used);
}

template <class T, Math kMath, bool kVector>
int run_tiled(const ConvArguments& a, void* stream) {
  const bool to_weight = a.pass == Pass::backward_weight;
  if constexpr (kMath != Math::split)
    if (tile_of(a) == 128)
      return to_weight ? run_weight<T, kMath, kVector, 128>(a, stream) : run_pixels<T, kMath, kVector, 128>(a, stream);
  return to_weight ? run_weight<T, kMath, kVector, 64>(a, stream) : run_pixels<T, kMath, kVector, 64>(a, stream);
}

// Whether operands can be copied 16 bytes at a time.
template <class T>
bool vectors_fit(const ConvArguments& a) {
  const ConvGeometry& g = a.geometry;
  return a.layout == Layout::channels_last && g.in_channels_per_group() % kChunk<T> == 0 &&
         g.out_channels_per_group() % kChunk<T> == 0 && a.weight_stride_channel == 1 && aligned(a.input, 16) &&
         aligned(a.weight, 16) && aligned(a.output, 16);
}

template <class T, Math kMath>
int run_typed(const ConvArguments& a, void* stream) {
  return vectors_fit<T>(a) ? run_tiled<T, kMath, true>(a, stream) : run_tiled<T, kMath, false>(a, stream);
}

}  // namespace

int64_t implicit_gemm_workspace(const ConvArguments& a) {
  if (a.pass != Pass::backward_weight) return 0;
  return splits_of(a.geometry, tile_of(a)) * a.geometry.weight_elements() * static_cast<int64_t>(sizeof(float));
}

int implicit_gemm_convolution(const ConvArguments& a, void* stream) {
  switch (a.dtype) {
    case Dtype::bfloat16:
      return run_typed<bfloat16, Math::native>(a, stream);
    case Dtype::float16:
      return run_typed<float16, Math::native>(a, stream);
    case Dtype::float32:
      return a.tf32 ? run_typed<float, Math::native>(a, stream) : run_typed<float, Math::split>(a, stream);
    default:
      return kInvalidValue;
  }
}

}  // namespace convlab::cuda
