#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/alloc_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace convlab {

namespace {

constexpr int64_t kReusedBytes = int64_t{128} << 10;     // the smallest result that is one of the blocks
constexpr int64_t kGranule = int64_t{64} << 10;          // sizes of blocks are multiples of it
constexpr int64_t kSlack = 8;                            // a block serves results that leave an eighth of them unused
constexpr int64_t kAlwaysKeptBytes = int64_t{32} << 20;  // layers of small models have blocks of many sizes
constexpr int64_t kAdvisedBytes = int64_t{1} << 20;      // the smallest memory for which huge pages are asked
constexpr int kScratchSlots = 4;
constexpr int64_t kScratchAlignment = 4096;

int64_t round_up(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Where the system hands out huge pages to those who ask (Linux, transparent_hugepage/enabled set to madvise).
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

class ResultAllocator final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything else.
  static ResultAllocator& instance() {
    static ResultAllocator* const allocator = [] {
      auto* made = new ResultAllocator;
#if defined(__unix__) || defined(__APPLE__)
      // A fork while another thread allocates must not leave the child with a locked mutex.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
#endif
      return made;
    }();
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = take(round_up(static_cast<int64_t>(bytes), kGranule));
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  ResultMemory account() {
    const std::lock_guard lock(mutex_);
    return account_;
  }
  void release() {
    const std::lock_guard lock(mutex_);
    free_all();
    account_.most_used = account_.used;
  }
  bool reuses() {
    const std::lock_guard lock(mutex_);
    return reuses_;
  }
  void set_reuses(bool reuses) {
    const std::lock_guard lock(mutex_);
    reuses_ = reuses;
    if (!reuses_) free_all();
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  void* take(int64_t bytes) {
    if (bytes == 0) return nullptr;
    const std::lock_guard lock(mutex_);
    // The smallest that is large enough; of equals that given back last, which is likeliest in cache.
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->bytes >= bytes && block->bytes - bytes <= block->bytes / kSlack &&
          (best == kept_.end() || block->bytes <= best->bytes))
        best = block;
    const Block block = best == kept_.end() ? fresh(bytes) : take_kept(best);
    used_[block.data] = block.bytes;
    account_.used += block.bytes;
    account_.most_used = std::max(account_.most_used, account_.used);
    return block.data;
  }

  Block take_kept(std::vector<Block>::iterator place) {
    const Block block = *place;
    kept_.erase(place);
    account_.kept -= block.bytes;
    return block;
  }

  Block fresh(int64_t bytes) {
    const int64_t used = account_.used + bytes, most = std::max({account_.most_used, used, kAlwaysKeptBytes});
    int64_t kept = account_.kept;
    auto oldest = kept_.begin();
    for (; oldest != kept_.end() && used + kept > most; ++oldest) kept -= oldest->bytes;
    free_before(oldest);
    void* data = nullptr;
    try {
      data = c10::alloc_cpu(static_cast<size_t>(bytes));
    } catch (const c10::Error&) {  // out of memory: perhaps what is kept makes up for it
      free_all();
      data = c10::alloc_cpu(static_cast<size_t>(bytes));
    }
    if (bytes >= kAdvisedBytes) ask_for_huge_pages(data, bytes);
    return {data, bytes};
  }

  void free_before(std::vector<Block>::iterator end) {
    for (auto block = kept_.begin(); block != end; ++block) {
      c10::free_cpu(block->data);
      account_.kept -= block->bytes;
    }
    kept_.erase(kept_.begin(), end);
  }
  void free_all() { free_before(kept_.end()); }

  static void give_back(void* data) {
    if (data == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    ResultAllocator& allocator = instance();
    const std::lock_guard lock(allocator.mutex_);
    const auto found = allocator.used_.find(data);
    const Block block{data, found->second};
    allocator.used_.erase(found);
    allocator.account_.used -= block.bytes;
    if (!allocator.reuses_) return c10::free_cpu(data);
    allocator.kept_.push_back(block);
    allocator.account_.kept += block.bytes;
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> used_;  // bytes of each block in use
  std::vector<Block> kept_;                  // in the order in which they were given back
  ResultMemory account_;
#if defined(__SANITIZE_ADDRESS__)
  bool reuses_ = false;  // or a use after free would not be seen
#else
  bool reuses_ = true;
#endif
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options) {
  auto bytes = static_cast<int64_t>(options.dtype().itemsize());
  for (const int64_t length : size) bytes *= length;
  // A mode may make something else of at::empty, such as a tensor that only pretends to be on the CPU.
  if (bytes < kReusedBytes || !options.device().is_cpu() || c10::impl::dispatch_mode_enabled())
    return at::empty(size, options);
  return at::Tensor(at::detail::empty_generic(size, &ResultAllocator::instance(),
                                              c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              c10::typeMetaToScalarType(options.dtype()), options.memory_format_opt()));
}

at::Tensor empty_result_like(const at::Tensor& like, at::MemoryFormat format) {
  if (!like.device().is_cpu() || c10::impl::dispatch_mode_enabled())
    return at::empty_like(like, like.options(), format);
  return empty_result(like.sizes(), like.options().memory_format(format));
}

ResultMemory result_memory() { return ResultAllocator::instance().account(); }
void release_memory() { ResultAllocator::instance().release(); }
bool reuses_memory() { return ResultAllocator::instance().reuses(); }
void set_reuses_memory(bool reuses) { ResultAllocator::instance().set_reuses(reuses); }

namespace {
struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
struct ScratchBuffer {
  std::unique_ptr<void, FreeAligned> memory;
  int64_t bytes = 0;
};
}  // namespace

void* thread_scratch(int slot, int64_t bytes) {
  static thread_local ScratchBuffer buffers[kScratchSlots];
  TORCH_INTERNAL_ASSERT(slot >= 0 && slot < kScratchSlots);
  ScratchBuffer& buffer = buffers[slot];
  if (bytes == 0) return nullptr;
  const bool oversized = buffer.bytes > kKeptScratchBytes && bytes <= kKeptScratchBytes;
  if (buffer.bytes < bytes || oversized) {
    const int64_t rounded = round_up(bytes, kScratchAlignment);
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

}  // namespace convlab
