// amx: matrix products on the CPU's tile registers, in every dtype but float64.
//
// Tiles multiply bfloat16. Elements of float32 and float16 are sums of two or three of it, and a product of two of them
// is the sum of six, or three, products of their parts (bfloat16_parts.h): as exact as a plain sum, and still
// ahead of float32's own units, which make a sixteenth of the multiply-adds (tiles.h). Every geometry and both memory
// formats are accepted. Where the CPU has no tiles, they are computed in software, for tests.
#pragma once
#include "conv_algorithm.h"
#include "conv_amx_transfer.h"
#include "conv_amx_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Amx {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(AmxWeight<T>(arguments));
    return body(AmxTransfer<T>(arguments));
  }
};

template <class T>
ConvKernels<T> amx_kernels() {
  return kernels_of<Amx, T>();
}

}  // namespace convlab::cpu::CONVLAB_ISA
