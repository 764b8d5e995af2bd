// The table of convolution algorithms of one instruction set.
#pragma once
#include "conv_implicit_gemm.h"
#include "conv_naive.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
ConvKernelTable<T> conv_kernels() {
  ConvKernelTable<T> table;
  auto& naive = table.algorithm[static_cast<int>(Algorithm::naive)];
  naive.plan = NaiveConvolution<T>::plan;
  naive.run = NaiveConvolution<T>::run;
  auto& implicit_gemm = table.algorithm[static_cast<int>(Algorithm::implicit_gemm)];
  implicit_gemm.plan = ImplicitGemm<T>::plan;
  implicit_gemm.prepare = ImplicitGemm<T>::prepare;
  implicit_gemm.run = ImplicitGemm<T>::run;
  implicit_gemm.finish = ImplicitGemm<T>::finish;
  return table;
}

}  // namespace convlab::cpu::CONVLAB_ISA
