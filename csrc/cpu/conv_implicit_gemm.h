// implicit_gemm: convolution as a blocked matrix product whose patch matrix exists only as panels in cache.
//
// Reference: "cuDNN: Efficient Primitives for Deep Learning", Chetlur et al. 2014 (the idea of the implicit product);
// the row pointers of the channels-last kernels are the indirection buffer of "The Indirect Convolution Algorithm",
// Dukhan 2019. One class per layout and kind of pass; every geometry, dtype and pass is accepted.
#pragma once
#include "conv_gemm_channels_first.h"
#include "conv_gemm_channels_last.h"
#include "conv_gemm_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct ImplicitGemm {
  // Calls body with the object that computes this problem.
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(GemmWeight<T>(arguments));
    if (arguments.layout == Layout::channels_last) return body(GemmChannelsLast<T>(arguments));
    return body(GemmChannelsFirst<T>(arguments));
  }

  static ConvPlan plan(const ConvArguments<T>& arguments) {
    return with(arguments, [](const auto& gemm) { return gemm.plan(); });
  }
  static void prepare(const ConvArguments<T>& arguments, int64_t begin, int64_t end) {
    with(arguments, [&](const auto& gemm) {
      if constexpr (requires { gemm.prepare(begin); })
        for (int64_t task = begin; task < end; ++task) gemm.prepare(task);
    });
  }
  static void run(const ConvArguments<T>& arguments, void* scratch, int64_t begin, int64_t end) {
    with(arguments, [&](const auto& gemm) {
      for (int64_t task = begin; task < end; ++task) gemm.run(scratch, task);
    });
  }
  static void finish(const ConvArguments<T>& arguments, int64_t begin, int64_t end) {
    with(arguments, [&](const auto& gemm) {
      if constexpr (requires { gemm.finish(begin); })
        for (int64_t task = begin; task < end; ++task) gemm.finish(task);
    });
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
