// The table of convolution algorithms of one instruction set.
#pragma once
#include "conv_depthwise.h"
#include "conv_direct.h"
#include "conv_implicit_gemm.h"
#include "conv_naive.h"
#include "conv_winograd.h"

namespace convlab::cpu::CONVLAB_ISA {

// An algorithm's `with(arguments, body)` calls body with the object that computes this problem; the object has
// plan(), run(scratch, task) and, where it needs them, prepare(scratch, task) and finish(task).
template <template <class> class Algorithm, class T>
ConvKernels<T> kernels_of() {
  ConvKernels<T> kernels;
  kernels.plan = [](const ConvArguments<T>& arguments) {
    return Algorithm<T>::with(arguments, [](const auto& problem) { return problem.plan(); });
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

template <class T>
ConvKernelTable<T> conv_kernels() {
  ConvKernelTable<T> table;
  table.algorithm[static_cast<int>(Algorithm::naive)] = kernels_of<Naive, T>();
  table.algorithm[static_cast<int>(Algorithm::implicit_gemm)] = kernels_of<ImplicitGemm, T>();
  table.algorithm[static_cast<int>(Algorithm::winograd)] = kernels_of<Winograd, T>();
  table.algorithm[static_cast<int>(Algorithm::direct)] = kernels_of<Direct, T>();
  table.algorithm[static_cast<int>(Algorithm::depthwise)] = kernels_of<Depthwise, T>();
  return table;
}

}  // namespace convlab::cpu::CONVLAB_ISA
