// Turns a class that computes convolutions into the functions of conv_kernels.h. A stub per algorithm and instruction
// set includes this after the algorithm's header, so that they compile side by side.
#pragma once
#include "conv_kernels.h"
#include "isa.h"

namespace convlab::cpu::CONVLAB_ISA {

// An algorithm's `with(arguments, body)` calls body with the object that computes this problem; the object has
// plan(), run(scratch, task) and, where it needs them, pack(task), prepare(scratch, task) and finish(task).
template <template <class> class Algorithm, class T>
ConvKernels<T> kernels_of() {
  ConvKernels<T> kernels;
  kernels.plan = [](const ConvArguments<T>& arguments) {
    return Algorithm<T>::with(arguments, [](const auto& problem) { return problem.plan(); });
  };
  kernels.pack = [](const ConvArguments<T>& arguments, int64_t begin, int64_t end) {
    Algorithm<T>::with(arguments, [&](const auto& problem) {
      if constexpr (requires { problem.pack(begin); })
        for (int64_t task = begin; task < end; ++task) problem.pack(task);
    });
  };
  kernels.prepare = [](const ConvArguments<T>& arguments, void* scratch, int64_t begin, int64_t end) {
    Algorithm<T>::with(arguments, [&](const auto& problem) {
      if constexpr (requires { problem.prepare(scratch, begin); })
        for (int64_t task = begin; task < end; ++task) problem.prepare(scratch, task);
    });
  };
  kernels.run = [](const ConvArguments<T>& arguments, void* scratch, int64_t begin, int64_t end) {
    Algorithm<T>::with(arguments, [&](const auto& problem) {
      for (int64_t task = begin; task < end; ++task) problem.run(scratch, task);
    });
  };
  kernels.finish = [](const ConvArguments<T>& arguments, int64_t begin, int64_t end) {
    Algorithm<T>::with(arguments, [&](const auto& problem) {
      if constexpr (requires { problem.finish(begin); })
        for (int64_t task = begin; task < end; ++task) problem.finish(task);
    });
  };
  return kernels;
}

}  // namespace convlab::cpu::CONVLAB_ISA

#define CONVLAB_ALGORITHM(Algorithm)                                \
  namespace convlab::cpu::CONVLAB_ISA {                             \
  template ConvKernels<float> kernels_of<Algorithm, float>();       \
  template ConvKernels<double> kernels_of<Algorithm, double>();     \
  template ConvKernels<bfloat16> kernels_of<Algorithm, bfloat16>(); \
  template ConvKernels<float16> kernels_of<Algorithm, float16>();   \
  }
