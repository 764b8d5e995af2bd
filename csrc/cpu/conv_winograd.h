// Winograd convolution of 3x3 layers, every dtype and layout: F(4x4, 3x3) with stride 1, all passes, and F(4x4, 2x2) of
// the input's phases with stride 2, forward and backward input.
//
// Four outputs of a line of a 3-tap filter take 6 multiplications instead of 12, so a tile of 4x4 outputs takes 36
// instead of 144; with stride 2 it takes 81. References are in ../winograd_matrices.h, ideas, costs and limits in the
// files per kind of pass.
#pragma once
#include "conv_winograd_stride2.h"
#include "conv_winograd_tiles.h"
#include "conv_winograd_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Winograd {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(WinogradWeight<T>(arguments));
    if (arguments.geometry.stride[1] == 2) return body(WinogradStride2<T>(arguments));
    return body(WinogradTiles<T>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
