// The interface between ops/normalization_run.cpp and the normalization kernels of the CPU. No torch.
//
// Batch, group, instance and layer normalization are one computation: elements are cut into groups, each group is
// shifted by its mean and divided by its deviation, and every channel is scaled and shifted by its own weight and
// bias. They differ in what a group is:
//
//                 samples  repeats  groups    channels_per_group  pixels
//   batch norm          1        N       C                     1       S
//   group norm          N        1       G                   C/G       S
//   instance norm       N        1       C                     1       S
//   layer norm       rows        1       1                 D = C       1
//   RMS norm         rows        1       1                 D = C       1    (not shifted: divided by sqrt(mean(x^2)))
//
// The input is samples x repeats x (groups x channels_per_group) x pixels in channels_first order, and
// samples x repeats x pixels x (groups x channels_per_group) in channels_last order; statistics are taken over
// repeats, the channels of the group and pixels.
//
// A computation is a short list of phases, run one after another; each is a number of independent tasks. What a task
// computes depends on the geometry alone, so the result is the same for every number of threads.
#pragma once
#include "../clamp.h"
#include "../dtypes.h"
#include "../geometry.h"
#include "dispatch.h"

namespace convlab::cpu {

template <class T>
struct NormArguments {
  using A = accumulate_t<T>;
  int64_t samples = 0, repeats = 1, groups = 1, channels_per_group = 1, pixels = 1;
  Layout layout = Layout::channels_first;
  Clamp clamp;             // output = clamp(normalized + residual)
  bool statistics = true;  // mean and variance are those of the input, else given constants (running averages)
  bool centered = true;    // false: RMS norm, whose mean is null and whose variance is the mean of squares
  double eps = 0;

  const T* input = nullptr;
  const T* residual = nullptr;     // may be null
  const T* grad_output = nullptr;  // backward
  T* output = nullptr;             // the gradient of the input in backward; null in forward: statistics alone
  T* grad_residual = nullptr;      // may be null
  // Under clamp and residual: where the gradient ends, one bit per element; may be null. Forward writes it and
  // backward reads it in the place of the residual.
  uint8_t* stopped = nullptr;
  const A* weight = nullptr;  // one per channel; null stands for ones
  const A* bias = nullptr;    // one per channel; null stands for zeros
  A* mean = nullptr;          // samples x groups
  A* variance = nullptr;      // samples x groups, biased
  A* grad_weight = nullptr;   // one per channel; may be null
  A* grad_bias = nullptr;     // one per channel; may be null

  // Double backward of batch norm: directions of the gradients of input, residual, weight and bias (null: none), and
  // the gradient of grad_output. `output` and `grad_weight` are the gradients of input and weight.
  const T *v = nullptr, *v_residual = nullptr;
  const A *v_weight = nullptr, *v_bias = nullptr;
  T* grad_grad_output = nullptr;

  void* shared = nullptr;  // NormPlan::shared_bytes

  int64_t channels() const { return groups * channels_per_group; }
  int64_t rows() const { return repeats * pixels; }  // of one sample, in channels_last order
  int64_t group_elements() const { return rows() * channels_per_group; }
  int64_t elements() const { return samples * rows() * channels(); }
};

// Bytes of the bits of a run of neighbouring elements: pixels of a channel, or channels of a pixel. Every vector of
// `lanes` elements has bytes of its own.
template <class Int>
Int stopped_bytes(Int run, int lanes) {
  return (run + (lanes - 1)) / lanes * (lanes > 8 ? 2 : 1);
}

template <class T>
struct NormPhase {
  void (*run)(const NormArguments<T>&, int64_t begin, int64_t end) = nullptr;
  int64_t tasks = 0;
  int64_t task_elements = 0;  // read or written by one task, about
};

template <class T>
struct NormPlan {
  int64_t shared_bytes = 0;
  int phases = 0;
  NormPhase<T> phase[6];

  void add(void (*run)(const NormArguments<T>&, int64_t, int64_t), int64_t tasks, int64_t task_elements) {
    phase[phases++] = {run, tasks, task_elements};
  }
};

// Problems have at least one element.
template <class T>
struct NormKernelTable {
  int lanes = 0;                                              // of a vector
  NormPlan<T> (*forward)(const NormArguments<T>&) = nullptr;  // writes mean and variance if `statistics`
  NormPlan<T> (*backward)(const NormArguments<T>&) = nullptr;
  NormPlan<T> (*double_backward)(const NormArguments<T>&) = nullptr;  // of batch norm in training
};

}  // namespace convlab::cpu

CONVLAB_KERNEL_TABLE(NormKernelTable, norm_kernels)
