// Chooses, at run time, the table of kernels compiled for the widest instruction set that both the CPU has and
// ATEN_CPU_CAPABILITY allows.
#pragma once

namespace convlab::cpu {

enum class Capability : int { baseline, avx2, avx512 };

// What torch itself uses (at::get_cpu_capability), so that one environment variable caps both.
Capability capability();
const char* capability_name(Capability capability);
// Whether the CPU multiplies pairs of bfloat16 (avx512_bf16) and the cap allows AVX-512.
bool multiplies_bfloat16();
// Whether the CPU multiplies tiles of bfloat16 (AMX), the system lets us, and the cap allows AVX-512.
bool multiplies_tiles();
// Whether the CPU computes a vector of AVX-512 as two halves, no faster than AVX2 (AMD's Zen 4).
bool halves_avx512();

}  // namespace convlab::cpu

// Declares `function<T>()` for every instruction set and defines the one that picks among them.
#if defined(__x86_64__)
#define CONVLAB_KERNEL_TABLE(Table, function) \
  namespace convlab::cpu {                    \
  namespace baseline {                        \
  template <class T>                          \
  Table<T> function();                        \
  }                                           \
  namespace avx2 {                            \
  template <class T>                          \
  Table<T> function();                        \
  }                                           \
  namespace avx512 {                          \
  template <class T>                          \
  Table<T> function();                        \
  }                                           \
  template <class T>                          \
  Table<T> function() {                       \
    switch (capability()) {                   \
      case Capability::avx512:                \
        return avx512::function<T>();         \
      case Capability::avx2:                  \
        return avx2::function<T>();           \
      default:                                \
        return baseline::function<T>();       \
    }                                         \
  }                                           \
  }
#else
#define CONVLAB_KERNEL_TABLE(Table, function) \
  namespace convlab::cpu {                    \
  namespace baseline {                        \
  template <class T>                          \
  Table<T> function();                        \
  }                                           \
  template <class T>                          \
  Table<T> function() {                       \
    return baseline::function<T>();           \
  }                                           \
  }
#endif
