// Winograd F(4x4, 3x3) on tensor cores: float32, 3x3 kernels with stride and dilation 1, all passes, both layouts.
//
// Idea: a tile of 4x4 outputs reads a patch of 6x6 inputs; transformed, both are 36 points, and at each point there is
// a product over the channels: 36 multiplications instead of 144 (winograd_matrices.h has the matrices and references).
// The 36 products are one pointwise convolution with 36 times the groups, which implicit_gemm computes as it is, always
// with 16-byte copies, since tiles are kept with their channels last and filled up. Around it are kernels that only
// move data: weights to points, patches to points, points to tiles with bias, residual and ReLU. Tiles go through the
// workspace in chunks that stay in the L2 cache. Backward input is the same with rotated weights; backward weight, the
// adjoint, transforms both tensors, adds up the products chunk by chunk in order, and transforms those back.
// Cost: a quarter of multiply_adds(), as pairs of tf32, three products each; 36 floats written and read again for
// every 16 pixels and channel of both tensors, in L2. At the rates of a data sheet that is 1.2 times as fast as
// implicit_gemm with 128 channels and 1.9 times with 256, on maps of 28x28. The steps could be fused only with smaller
// tiles: 36 sums for each tile and filter do not fit into registers. tf32 without the split is not for this algorithm:
// the transforms multiply its rounding errors, and implicit_gemm in tf32 is as fast. Nor are 16 bits, where products
// cost less than the transforms that would save them. Memory: 4 times the weights, and 32 MiB of tiles, in backward
// weight 4 times the former if that is more; at least 64 tiles. Limits: error 1.2e-6 to 5e-6 of max|reference|. NaN and
// Inf spread over their tile. Not yet run on a GPU.
#include "conv_winograd.h"

namespace convlab::cuda {

namespace {

constexpr int kLanes = 32, kBlockTiles = 8, kThreads = kLanes * kBlockTiles;
constexpr int kTaps = 9;

// y = matrix x matrix^T. The matrices are constants: only multiply-adds are left.
template <int kRows, int kColumns>
CONVLAB_DEVICE void transform(const double (&matrix)[kRows][kColumns], const float (&x)[kColumns * kColumns],
                              float (&y)[kRows * kRows]) {
  float half[kRows * kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        if (matrix[i][k] != 0) sum += static_cast<float>(matrix[i][k]) * x[k * kColumns + j];
      half[i * kColumns + j] = sum;
    }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        if (matrix[j][k] != 0) sum += static_cast<float>(matrix[j][k]) * half[i * kColumns + k];
      y[i * kRows + j] = sum;
    }
}

// 3x3 weights to points; rotated by half a turn for backward input.
__global__ void __launch_bounds__(kThreads) transform_weights(TiledWeight p, bool rotated) {
  constexpr WinogradMatrices<kTile, 3> winograd;
  const int64_t i = global_thread();
  if (i >= p.count) return;
  float weight[kTaps], point[kPoints];
  const int64_t at = p.at(i);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
    weight[tap] = at < 0 ? 0.0f : p.t.weight[at + (rotated ? kTaps - 1 - tap : tap) * p.t.weight_tap];
  transform(winograd.weight, weight, point);
#pragma unroll
  for (int k = 0; k < kPoints; ++k) p.points[k * p.count + i] = point[k];
}

// The sums at all points to gradients of 3x3 weights.
__global__ void __launch_bounds__(kThreads) write_weights(TiledWeight p) {
  constexpr WinogradAdjoint<kTile, 3> winograd;
  const int64_t i = global_thread();
  if (i >= p.count || p.at(i) < 0) return;
  float point[kPoints], weight[kTaps];
#pragma unroll
  for (int k = 0; k < kPoints; ++k) point[k] = p.points[k * p.count + i];
  transform(winograd.weight, point, weight);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) p.t.weight[p.at(i) + tap * p.t.weight_tap] = weight[tap];
}

// Patches of kSize x kSize pixels to points: inputs by B^T, gradients of outputs by the transpose of A^T. Channels
// first, neighbouring threads read neighbouring tiles, and exchange the pixels to write neighbouring channels.
template <int kSize, bool kLast>
__global__ void __launch_bounds__(kThreads) transform_tiles(TiledTensor p) {
  constexpr int kPixels = kSize * kSize, kPitch = kLanes + 4;  // without bank conflicts
  const int thread = static_cast<int>(threadIdx.x);
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles, first_slot = static_cast<int>(blockIdx.y) * kLanes;
  const int lane = thread % kLanes, row = thread / kLanes;
  const int read_lane = kLast ? lane : thread / kBlockTiles, read_row = kLast ? row : thread % kBlockTiles;
  float pixel[kPixels], point[kPoints];
  const auto corner = p.corner(first_tile + read_row);
  const int channel = first_tile + read_row < p.tile_count ? p.channel(first_slot + read_lane) : -1;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int y = corner.y + i / kSize, x = corner.x + i % kSize;
    pixel[i] = channel >= 0 && p.inside(y, x) ? p.pixels[p.pixel(corner, y, x, channel)] : 0.0f;
  }
  if constexpr (!kLast) {
    CONVLAB_SHARED(float, exchanged, [kPixels * kBlockTiles * kPitch]);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) exchanged[(i * kBlockTiles + read_row) * kPitch + read_lane] = pixel[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPixels; ++i) pixel[i] = exchanged[(i * kBlockTiles + row) * kPitch + lane];
  }
  if (first_tile + row >= p.tile_count || first_slot + lane >= p.slots) return;
  if constexpr (kSize == kPatch) {
    constexpr WinogradMatrices<kTile, 3> winograd;
    transform(winograd.input, pixel, point);
  } else {
    constexpr WinogradAdjoint<kTile, 3> winograd;
    transform(winograd.output, pixel, point);
  }
#pragma unroll
  for (int k = 0; k < kPoints; ++k) p.tiles[p.point(first_tile + row, k, first_slot + lane)] = point[k];
}

// Points to the pixels of tiles, and what a convolution ends with. Channels first, neighbouring threads write
// neighbouring pixels of a row.
template <bool kLast>
__global__ void __launch_bounds__(kThreads) write_tiles(ConvTensors<float> t, TiledTensor p) {
  constexpr WinogradMatrices<kTile, 3> winograd;
  constexpr int kPixels = kTile * kTile, kPitch = kLanes + 1;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, row = thread / kLanes;
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles, first_slot = static_cast<int>(blockIdx.y) * kLanes;
  float point[kPoints], pixel[kPixels];
  const bool exists = first_tile + row < p.tile_count && first_slot + lane < p.slots;
#pragma unroll
  for (int k = 0; k < kPoints; ++k) point[k] = exists ? p.tiles[p.point(first_tile + row, k, first_slot + lane)] : 0.0f;
  transform(winograd.output, point, pixel);
  const auto write = [&](const TiledTensor::Corner& corner, int y, int x, int channel, float sum) {
    if (channel < 0 || !p.inside(corner.y + y, corner.x + x)) return;
    const int64_t at = p.pixel(corner, corner.y + y, corner.x + x, channel);
    p.pixels[at] = t.finished(sum, channel, at);
  };
  if constexpr (kLast) {
    const auto corner = p.corner(first_tile + row);
    const int channel = exists ? p.channel(first_slot + lane) : -1;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) write(corner, i / kTile, i % kTile, channel, pixel[i]);
  } else {
    CONVLAB_SHARED(float, exchanged, [kPixels * kBlockTiles * kPitch]);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) exchanged[(i * kBlockTiles + row) * kPitch + lane] = pixel[i];
    __syncthreads();
    const int tile = lane / kTile, x = lane % kTile;
    const auto corner = p.corner(first_tile + tile);
    if (first_tile + tile >= p.tile_count) return;
    for (int from = row; from < kLanes; from += kBlockTiles) {
      const int channel = p.channel(first_slot + from);
#pragma unroll
      for (int y = 0; y < kTile; ++y)
        write(corner, y, x, channel, exchanged[((y * kTile + x) * kBlockTiles + tile) * kPitch + from]);
    }
  }
}

dim3 tile_grid(const TiledTensor& p) {
  return dim3(static_cast<unsigned>(ceil_divide(p.tile_count, kBlockTiles)),
              static_cast<unsigned>(ceil_divide(p.slots, kLanes)));
}

template <int kSize>
int run_transform(Layout layout, const TiledTensor& p, void* stream) {
  const auto kernel = layout == Layout::channels_last ? transform_tiles<kSize, true> : transform_tiles<kSize, false>;
  return launch(kernel, tile_grid(p), dim3(kThreads), 0, stream, p);
}

int run_write(const ConvArguments& a, const TiledTensor& p, void* stream) {
  const auto kernel = a.layout == Layout::channels_last ? write_tiles<true> : write_tiles<false>;
  return launch(kernel, tile_grid(p), dim3(kThreads), 0, stream, ConvTensors<float>(a), p);
}

}  // namespace

int64_t winograd_workspace(const ConvArguments& a) { return WinogradPlan(a).bytes; }

int winograd_convolution(const ConvArguments& a, void* stream) {
  const WinogradPlan plan(a);
  const TiledWeight weight = plan.weight(a);
  TiledTensor input = plan.tensor(a, false), output = plan.tensor(a, true);
  const dim3 weight_grid = grid_of(weight.count, kThreads), block(kThreads);
  const bool to_input = a.pass == Pass::backward_input, to_weight = a.pass == Pass::backward_weight;
  int error = to_weight ? 0 : launch(transform_weights, weight_grid, block, 0, stream, weight, to_input);
  const int64_t tiles = a.geometry.batch * plan.tiles_y * plan.tiles_x;
  for (int64_t first = 0; first < tiles && !error; first += plan.chunk) {
    const int64_t count = first + plan.chunk < tiles ? plan.chunk : tiles - first;
    input.first_tile = output.first_tile = static_cast<int>(first);
    input.tile_count = output.tile_count = static_cast<int>(count);
    ConvArguments products = plan.products(a, count);
    if (to_weight && first > 0) products.residual = products.weight;  // adds to what the chunks before left
    if (!to_input) error = run_transform<kPatch>(a.layout, input, stream);
    if (!error && to_input) error = run_transform<kPatch>(a.layout, output, stream);
    if (!error && to_weight) error = run_transform<kTile>(a.layout, output, stream);
    if (!error) error = implicit_gemm_convolution(products, stream);
    if (!error && !to_weight) error = run_write(a, to_input ? input : output, stream);
  }
  if (!error && to_weight) error = launch(write_weights, weight_grid, block, 0, stream, weight);
  return error;
}

}  // namespace convlab::cuda
