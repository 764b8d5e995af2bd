// The table of convolution algorithms of one instruction set.
#pragma once
#include "conv_kernels.h"
#include "isa.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Naive;
template <class T>
struct ImplicitGemm;
template <class T>
struct Winograd;
template <class T>
struct Direct;
template <class T>
struct Depthwise;
template <class T>
class InnerProduct;
template <class T>
class Strassen;

template <template <class> class Algorithm, class T>
ConvKernels<T> kernels_of();  // conv_algorithm.h

template <class T>
ConvKernelTable<T> conv_kernels() {
  ConvKernelTable<T> table;
  table.algorithm[static_cast<int>(Algorithm::naive)] = kernels_of<Naive, T>();
  table.algorithm[static_cast<int>(Algorithm::implicit_gemm)] = kernels_of<ImplicitGemm, T>();
  table.algorithm[static_cast<int>(Algorithm::winograd)] = kernels_of<Winograd, T>();
  table.algorithm[static_cast<int>(Algorithm::direct)] = kernels_of<Direct, T>();
  table.algorithm[static_cast<int>(Algorithm::depthwise)] = kernels_of<Depthwise, T>();
  table.algorithm[static_cast<int>(Algorithm::inner_product)] = kernels_of<InnerProduct, T>();
  table.algorithm[static_cast<int>(Algorithm::strassen)] = kernels_of<Strassen, T>();
  return table;
}

}  // namespace convlab::cpu::CONVLAB_ISA
