// implicit_gemm: convolution as a blocked matrix product whose patch matrix exists only as panels in cache.
//
// Reference: "cuDNN: Efficient Primitives for Deep Learning", Chetlur et al. 2014 (the idea of the implicit product);
// the row pointers of the channels-last kernels are the indirection buffer of "The Indirect Convolution Algorithm",
// Dukhan 2019. One class per layout and kind of pass; every geometry, dtype and pass is accepted.
#pragma once
#include "conv_gemm_channels_first.h"
#include "conv_gemm_channels_last.h"
#include "conv_gemm_dots.h"
#include "conv_gemm_patches.h"
#include "conv_gemm_planes.h"
#include "conv_gemm_strips.h"
#include "conv_gemm_weight.h"
#include "conv_lines_weight.h"
#include "conv_planes_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct ImplicitGemm {
  template <class Body>
  static auto with(const ConvArguments<T>& given, const Body& body) {
    if (given.pass == Pass::backward_weight) {
      if (LinesWeight<T>::suits(given)) return body(LinesWeight<T>(given));
      if (PlanesWeight<T>::suits(given)) return body(PlanesWeight<T>(given));
      return body(GemmWeight<T>(given));
    }
    ConvArguments<T> arguments = given;
    if (given.pass == Pass::backward_input) arguments.geometry = with_patches_apart(given.geometry);
    if (GemmPatches<T>::suits(arguments)) return body(GemmPatches<T>(arguments));
    if (GemmDots<T>::suits(arguments)) return body(GemmDots<T>(arguments));
    if (GemmPlanes<T>::suits(arguments)) return body(GemmPlanes<T>(arguments));
    if (arguments.layout == Layout::channels_last) return body(GemmChannelsLast<T>(arguments));
    if constexpr (products<operand_t<T>> == 1)
      if (GemmStrips<T>::suits(arguments)) return body(GemmStrips<T>(arguments));
    return body(GemmChannelsFirst<T>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
