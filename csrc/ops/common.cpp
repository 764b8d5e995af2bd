#include "common.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
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

namespace {
struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
struct ScratchBuffer {
  std::unique_ptr<void, FreeAligned> memory;
  int64_t bytes = 0;
};
constexpr int kScratchSlots = 4;
constexpr int64_t kScratchAlignment = 4096;

constexpr int64_t kAdvisedBytes = int64_t{1} << 20;  // the smallest memory for which huge pages are asked

void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole huge pages around it: what lies beside it on the heap is mostly tensors too. A hint, which changes no
  // content; where the system does not take it, small pages are as right as before.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory) / kHugePage * kHugePage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(first), (last - first + kHugePage - 1) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}
}  // namespace

at::Tensor on_huge_pages(at::Tensor tensor) {
  if (tensor.key_set().has(c10::DispatchKey::CPU)) {  // not those that only pretend to be, while tracing
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    if (bytes >= kAdvisedBytes) ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

void* thread_scratch(int slot, int64_t bytes) {
  static thread_local ScratchBuffer buffers[kScratchSlots];
  TORCH_INTERNAL_ASSERT(slot >= 0 && slot < kScratchSlots);
  ScratchBuffer& buffer = buffers[slot];
  if (bytes == 0) return nullptr;
  const bool oversized = buffer.bytes > kKeptScratchBytes && bytes <= kKeptScratchBytes;
  if (buffer.bytes < bytes || oversized) {
    const int64_t rounded = (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
    buffer.memory.reset();
    buffer.bytes = 0;
    buffer.memory.reset(std::aligned_alloc(kScratchAlignment, static_cast<size_t>(rounded)));
    TORCH_CHECK_WITH(OutOfMemoryError, buffer.memory != nullptr, "torch_convlab: could not allocate ", rounded,
                     " bytes of scratch memory");
    buffer.bytes = rounded;
    if (rounded >= kAdvisedBytes) ask_for_huge_pages(buffer.memory.get(), rounded);
  }
  return buffer.memory.get();
}

void parallel(int64_t count, int64_t grain, const c10::function_ref<void(int64_t, int64_t)>& body) {
  if (count > 0) at::parallel_for(0, count, grain, body);
}

}  // namespace convlab
