// Small kernels that tests/test_emulator.py runs: correct ones, each of which has a bug that its last argument plants.
// Each primitive of csrc/cuda/simt.h occurs here; the same functions run on a GPU in `make gpu`, where the outputs of
// the correct ones are compared with the emulator's.
#include "../../csrc/cuda/simt.h"

namespace convlab::cuda {
namespace {

constexpr int kThreads = 128;

// y[b * 128 + i] = sum of the 128 values of block b.
__global__ void sum_blocks(Global<const float> x, Global<float> y, int bug) {
  CONVLAB_SHARED(float, part, [kThreads]);
  const int i = static_cast<int>(threadIdx.x);
  part[i] = x[global_thread() + (bug == 3 ? 1 : 0)];  // 3: one past the end
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (bug != 1) __syncthreads();                                    // 1: missing barrier
    if (i < half) part[i] += part[i + (bug == 2 ? kThreads : half)];  // 2: outside of the shared array
  }
  __syncthreads();
  const float sums[2] = {part[0], -part[0]};
  // 4: wrong index; 5: outside of an array of the thread's own, which only a sanitizer sees
  y[global_thread()] = bug == 4 ? part[kThreads - 1 - i] : sums[bug == 5 ? 2 + i % 4 : 0];
}

// y = x, through shared memory by asynchronous copies, two groups in flight; each thread reads its neighbour's.
__global__ void copy_asynchronously(Global<const float> x, Global<float> y, int bug) {
  const auto stage = dynamic_shared<float>(0, 2 * kThreads * 4);
  const int i = static_cast<int>(threadIdx.x), neighbour = (i + 1) % kThreads;
  for (int s = 0; s < 2; ++s) {
    copy_async(stage + (s * kThreads + i) * 4, x + (s * kThreads + i) * 4 + (bug == 3 ? 1 : 0), true);  // 3: misaligned
    copy_async_commit();
  }
  for (int s = 0; s < 2; ++s) {
    if (s == 0)
      copy_async_wait<1>();
    else if (bug != 1)
      copy_async_wait<0>();         // 1: short wait
    if (bug != 2) __syncthreads();  // 2: missing barrier
    for (int j = 0; j < 4; ++j) y[(s * kThreads + neighbour) * 4 + j] = stage[(s * kThreads + neighbour) * 4 + j];
  }
}

// One warp: y (16x8) = a (16x16) * b (8x16, transposed), row by row.
template <class T>
__global__ void multiply(Global<const T> a, Global<const T> b, Global<float> y, int bug) {
  const auto left = dynamic_shared<T>(0, 256), right = dynamic_shared<T>(256 * sizeof(T), 256);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) {
    right[i] = b[i];
    right[i + 128] = b[i];
  }
  if (bug != 1) __syncwarp();  // 1: missing barrier
  uint32_t fa[4], fb[4];
  load_matrices(fa, left + (lane % 16 * 16 + lane / 16 * 8));
  load_matrices(fb, right + (lane % 8 * 16 + lane / 8 % 2 * 8));
  if (bug == 2 && lane == 5) return;  // 2: a lane leaves a collective
  float d[4] = {0, 0, 0, 0};
  mma(T{}, d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// The same with a and b kept the other way round (16x16 and 16x8), read transposed.
template <class T>
__global__ void multiply_transposed(Global<const T> a, Global<const T> b, Global<float> y) {
  const auto left = dynamic_shared<T>(0, 256), right = dynamic_shared<T>(256 * sizeof(T), 256);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i / 8 * 16 + i % 8] = right[i / 8 * 16 + i % 8 + 8] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrices_transposed(fa, left + ((lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
  load_matrices_transposed(fb, right + ((lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8));
  float d[4] = {0, 0, 0, 0};
  mma(T{}, d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// One warp, tf32: y (16x8) = a (16x8) * b (8x8), row by row.
__global__ void multiply_tf32(Global<const float> a, Global<const float> b, Global<float> y) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, k = lane % 4;
  const uint32_t fa[4] = {to_tf32(a[row * 8 + k]), to_tf32(a[(row + 8) * 8 + k]), to_tf32(a[row * 8 + k + 4]),
                          to_tf32(a[(row + 8) * 8 + k + 4])};
  float d[4] = {0, 0, 0, 0};
  mma(float{}, d, fa, to_tf32(b[k * 8 + row]), to_tf32(b[(k + 4) * 8 + row]));
  for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
}

// y[i] = sum of the 32 values of i's warp; barriers that not everybody reaches if asked for.
__global__ void shuffle(Global<const float> x, Global<float> y, int bug) {
  const int lane = static_cast<int>(threadIdx.x);
  float sum = x[lane];
  if (bug == 1 && lane % 2 == 0) __syncthreads();  // 1: divergent barrier, a deadlock
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kEveryLane, sum, other);
  y[lane] = __shfl_sync(kEveryLane, sum, 7);
}

}  // namespace
}  // namespace convlab::cuda

using namespace convlab;
using namespace convlab::cuda;

extern "C" {
CONVLAB_EXPORT int probe_sum_blocks(const float* x, float* y, int blocks, int bug, void* stream) {
  return launch(sum_blocks, dim3(blocks), dim3(kThreads), 0, stream, global(x, blocks * kThreads),
                global(y, blocks * kThreads), bug);
}
CONVLAB_EXPORT int probe_copy(const float* x, float* y, int bug, void* stream) {
  constexpr int count = 2 * kThreads * 4;
  return launch(copy_asynchronously, dim3(1), dim3(kThreads), count * 4, stream, global(x, count), global(y, count),
                bug);
}
CONVLAB_EXPORT int probe_multiply_bfloat16(const bfloat16* a, const bfloat16* b, float* y, int bug, void* stream) {
  return launch(multiply<bfloat16>, dim3(1), dim3(32), 1024, stream, global(a, 256), global(b, 128), global(y, 128),
                bug);
}
CONVLAB_EXPORT int probe_multiply_float16(const float16* a, const float16* b, float* y, int bug, void* stream) {
  return launch(multiply<float16>, dim3(1), dim3(32), 1024, stream, global(a, 256), global(b, 128), global(y, 128),
                bug);
}
CONVLAB_EXPORT int probe_multiply_transposed(const bfloat16* a, const bfloat16* b, float* y, int, void* stream) {
  return launch(multiply_transposed<bfloat16>, dim3(1), dim3(32), 1024, stream, global(a, 256), global(b, 128),
                global(y, 128));
}
CONVLAB_EXPORT int probe_multiply_tf32(const float* a, const float* b, float* y, int, void* stream) {
  return launch(multiply_tf32, dim3(1), dim3(32), 0, stream, global(a, 128), global(b, 64), global(y, 128));
}
CONVLAB_EXPORT int probe_shuffle(const float* x, float* y, int bug, void* stream) {
  return launch(shuffle, dim3(1), dim3(32), 0, stream, global(x, 32), global(y, 32), bug);
}
CONVLAB_EXPORT int probe_too_many_threads(const float* x, float* y, int, void* stream) {
  return launch(shuffle, dim3(1), dim3(2048), 0, stream, global(x, 32), global(y, 32), 0);
}
#if !defined(__CUDACC__)
CONVLAB_EXPORT const char* probe_error(int code) { return emulator::error_text(code); }
#else
const char* probe_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif
}
