// Opens a translation unit that is compiled for one instruction set. The stubs in baseline/, avx2/, avx512/,
// avx512_bf16/ and amx/ define CONVLAB_AVX2 or CONVLAB_AVX512 (or neither), the last two CONVLAB_BF16 too, and the last
// CONVLAB_AMX (whose instructions tiles.h writes out), include this header and then the kernels.
//
// Everything that is not a kernel is included *before* the target pragma, so that inline functions and templates
// of the standard library and of the shared headers are compiled for the baseline: the linker keeps one copy of
// those for the whole library. Kernels live in a namespace of their own per instruction set (CONVLAB_ISA), so that
// none of their symbols can be merged with those of another.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../activation.h"
#include "../dtypes.h"
#include "../geometry.h"
#include "../winograd_matrices.h"
#include "dispatch.h"

// The pragmas take literals only, so the list of features stands twice, for gcc and for clang.
#if defined(CONVLAB_AVX512) && defined(CONVLAB_BF16)
#if defined(CONVLAB_AMX)
#define CONVLAB_ISA amx
#else
#define CONVLAB_ISA avx512_bf16
#endif
#define CONVLAB_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#elif defined(CONVLAB_AVX512)
#define CONVLAB_ISA avx512
#define CONVLAB_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#elif defined(CONVLAB_AVX2)
#define CONVLAB_ISA avx2
#define CONVLAB_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#else
#define CONVLAB_ISA baseline
#define CONVLAB_VECTOR_BYTES 16
// x86 CPUs without AVX2 are rare: what they run need not take as long to compile as the rest.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O1")
#endif
#endif

#define CONVLAB_INLINE inline __attribute__((always_inline))
#define CONVLAB_UNROLL _Pragma("GCC unroll 32")
// No pass of the loop writes what another one reads, which the compiler cannot always see.
#define CONVLAB_IVDEP _Pragma("GCC ivdep")

// Ends every stub: `template Table<T> function<T>()` for every dtype.
#define CONVLAB_INSTANTIATE(Table, function)     \
  namespace convlab::cpu::CONVLAB_ISA {          \
  template Table<float> function<float>();       \
  template Table<double> function<double>();     \
  template Table<bfloat16> function<bfloat16>(); \
  template Table<float16> function<float16>();   \
  }
