// Memory of results and of scratch, kept between calls.
//
// Memory fresh from the system is faulted in page by page when it is first written, which takes longer than most
// kernels; malloc gives large blocks back to the system again and again. So large results on the CPU take the blocks of
// results that are no longer used. Limit: together with those in use, the blocks kept never exceed the most that
// results have used at one time, or 32 MiB. The former is their own peak; if a process needs most for other things at
// another time, what is kept comes on top.
#pragma once
#include <ATen/core/Tensor.h>

namespace convlab {

// As at::empty and at::empty_like, for results on any device; large ones on the CPU from the blocks kept.
at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options);
at::Tensor empty_result_like(const at::Tensor& like, at::MemoryFormat format);

struct ResultMemory {
  int64_t used = 0, kept = 0, most_used = 0;  // bytes
};
ResultMemory result_memory();
void release_memory();  // gives the blocks kept back to the system, and forgets what was used most
bool reuses_memory();
void set_reuses_memory(bool reuses);  // false: gives the blocks kept back and keeps none

// Scratch memory of this thread. Each slot holds one buffer; a buffer above `kKeptScratchBytes` is given back by the
// next smaller request.
constexpr int64_t kKeptScratchBytes = int64_t{64} << 20;
void* thread_scratch(int slot, int64_t bytes);

}  // namespace convlab
