#include "common.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
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

bool multiplies_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool found = [] {
    unsigned unused = 0, features = 0;
    if (!multiplies_bfloat16() || !__get_cpuid_count(7, 0, &unused, &unused, &unused, &features)) return false;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (!(features & amx_bf16) || !(features & amx_tile)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, of the registers' contents
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return found;
#else
  return false;
#endif
}

bool halves_avx512() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned highest = 0, signature = 0, version = 0, unused = 0;
    __cpuid(0, highest, signature, unused, unused);
    if (highest < 1 || signature != signature_AMD_ebx) return false;
    __cpuid(1, version, unused, unused, unused);
    const unsigned family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    return capability() == Capability::avx512 && family == 0x19;
  }();
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
  if (count <= 0) return;
  const int64_t threads =
      at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain);
  if (threads == 1) return body(0, count);
  constexpr int64_t kPiecesPerThread = 16;
  const int64_t pieces = std::min(count, threads * kPiecesPerThread);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const auto shares = std::make_unique<Share[]>(threads);
  for (int64_t thread = 0; thread < threads; ++thread) {
    shares[thread].next.store(pieces * thread / threads, std::memory_order_relaxed);
    shares[thread].end = pieces * (thread + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(thread + i) % threads];
      for (int64_t piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        body(count * piece / pieces, count * (piece + 1) / pieces);
    }
  });
}

}  // namespace convlab
