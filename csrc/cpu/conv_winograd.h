// Winograd convolution of layers with 3x3 taps along the last two axes, every dtype and layout: F(4x4, 3x3) with stride
// 1 and F(4x4, 2x2) of the input's phases with stride 2, all passes.
//
// Four outputs of a line of a 3-tap filter take 6 multiplications instead of 12, so a tile of 4x4 outputs takes 36
// instead of 144; with stride 2 it takes 81. References are in ../winograd_matrices.h, ideas, costs and limits in the
// files per kind of pass.
#pragma once
#include "conv_winograd_tiles.h"
#include "conv_winograd_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Winograd {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    const bool weight = arguments.pass == Pass::backward_weight;
    if (arguments.geometry.stride[1] == 2)
      return weight ? body(WinogradWeight<T, 2>(arguments)) : body(WinogradTiles<T, 2>(arguments));
    return weight ? body(WinogradWeight<T, 3>(arguments)) : body(WinogradTiles<T, 3>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
