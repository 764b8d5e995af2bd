// The one header that kernels include: CUDA's vocabulary, plus what the kernels need above it.
//
// nvcc compiles it to thin wrappers over CUDA and inline PTX. Any other compiler gets csrc/emulator/emulator.h, which
// has the same names: the same .cu files then run on the CPU, one fiber per CUDA thread, under the project's tests.
// Not yet run on a GPU.
//
//   Global<T>, Shared<T>       pointers; in the emulator they know their ends
//   CONVLAB_SHARED             declares an array in shared memory; dynamic_shared() carves one out of the launch's
//   load_vector, store_vector  one access of up to 16 bytes, which must be aligned to its own size
//   copy_async, mma            cp.async and mma.sync
//   launch                     kernel<<<...>>>, returning an error code; 0 is success
#pragma once
#include <cmath>
#include <cstdint>

#include "../dtypes.h"
#include "../geometry.h"

namespace convlab::cuda {

// N values that are loaded or stored at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

}  // namespace convlab::cuda

#if !defined(__CUDACC__)
#include "../emulator/emulator.h"
#else
#include <cuda_runtime.h>

#define CONVLAB_DEVICE __device__ __forceinline__
#define CONVLAB_EXPORT
#define CONVLAB_SHARED(T, name, ...) __shared__ T name __VA_ARGS__

namespace convlab::cuda {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

// `count` is for the emulator, which reports accesses outside of [0, count).
template <class T>
Global<T> global(T* pointer, int64_t) {
  return pointer;
}

// `count` values at byte `offset` of the launch's dynamic shared memory.
template <class T>
CONVLAB_DEVICE Shared<T> dynamic_shared(int64_t offset, int64_t) {
  extern __shared__ __align__(128) unsigned char convlab_dynamic_shared[];
  return reinterpret_cast<T*>(convlab_dynamic_shared + offset);
}

// p[at], ..., p[at + N - 1].
template <int N, class T>
CONVLAB_DEVICE Vector<T, N> load_vector(const T* p, int64_t at) {
  return *reinterpret_cast<const Vector<T, N>*>(p + at);
}
template <int N, class T>
CONVLAB_DEVICE void store_vector(T* p, int64_t at, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(p + at) = vector;
}

CONVLAB_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory, or of zeros if not `valid`; it lands by copy_async_wait.
template <class T>
CONVLAB_DEVICE void copy_async(T* to, const T* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
CONVLAB_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the groups committed by this thread are still on their way.
template <int N>
CONVLAB_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8 and receives, of each
// matrix, elements 2 * (l % 4) and the next of row l / 4; of its transpose, in the second form.
template <class T>
CONVLAB_DEVICE void load_matrices(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
CONVLAB_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, float) += a (16x16) * b (16x8) for 16-bit types, a (16x8) * b (8x8) for tf32; fragments as in the PTX
// manual.
CONVLAB_DEVICE void mma(bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
CONVLAB_DEVICE void mma(float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
CONVLAB_DEVICE void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The bits of `value` rounded to tf32's 10 bits of mantissa.
CONVLAB_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  // clang-format off: it takes <<< apart in a header
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
}

}  // namespace convlab::cuda
#endif

namespace convlab::cuda {

constexpr uint32_t kEveryLane = 0xffffffffu;

CONVLAB_DEVICE int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// A one-dimensional grid with at least `count` threads.
inline dim3 grid_of(int64_t count, int threads) { return dim3(static_cast<unsigned>((count + threads - 1) / threads)); }

}  // namespace convlab::cuda
