#include "common.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string>

#include "../cpu/dispatch.h"

namespace convlab {

namespace cpu {

Capability capability() {
  static const Capability chosen = [] {
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") return Capability::avx512;
    if (name == "AVX2") return Capability::avx2;
    return Capability::baseline;
  }();
  return chosen;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool found = capability() == Capability::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace cpu

void parallel(int64_t count, int64_t grain, const c10::function_ref<void(int64_t, int64_t)>& body) {
  if (count > 0) at::parallel_for(0, count, grain, body);
}

}  // namespace convlab
