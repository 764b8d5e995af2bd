// The interface between ops/pooling.cpp and the pooling kernels of the CPU. No torch.
//
// Every kernel is two functions: `plan` says how many independent tasks a problem has, what one costs and how much
// scratch memory a thread needs; `run` computes a range of tasks. Results never depend on how tasks are cut into
// ranges.
#pragma once
#include "../geometry.h"
#include "dispatch.h"

namespace convlab::cpu {

// Taps are stored in one byte if a window has at most this many, else in eight. The value after the last, 255 or
// -1, says that the window has no tap inside the input.
constexpr int64_t kNarrowTaps = 255;

// input, output: N x C x D x H x W, dense in `layout`; each kernel writes one of them and reads the other.
template <class T>
struct PoolArguments {
  PoolGeometry geometry;
  Layout layout = Layout::channels_first;
  T* input = nullptr;
  T* output = nullptr;
  void* taps = nullptr;        // of the shape and layout of `output`; null: max pooling without taps
  int64_t* indices = nullptr;  // written by `max_indices`: the winner's offset in its D x H x W plane

  bool narrow() const { return geometry.taps() <= kNarrowTaps; }
};

struct PoolPlan {
  int64_t tasks = 0;
  int64_t cost = 1;  // of one task, in elements read
  int64_t scratch_bytes = 0;
};

template <class T>
struct PoolKernel {
  PoolPlan (*plan)(const PoolArguments<T>&) = nullptr;
  void (*run)(const PoolArguments<T>&, void* scratch, int64_t begin, int64_t end) = nullptr;
};

template <class T>
struct PoolKernelTable {
  PoolKernel<T> max;           // writes output and taps
  PoolKernel<T> max_backward;  // writes input: each element sums the outputs that chose it
  PoolKernel<T> max_gather;    // writes output: the input element that each tap names; the adjoint of max_backward
  PoolKernel<T> max_indices;
  PoolKernel<T> average;           // writes output
  PoolKernel<T> average_backward;  // writes input; the adjoint of average
};

}  // namespace convlab::cpu

CONVLAB_KERNEL_TABLE(PoolKernelTable, pool_kernels)
