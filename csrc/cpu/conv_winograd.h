// Winograd convolution F(4x4, 3x3): 3x3 layers with stride 1, all passes, every dtype and layout.
//
// Four outputs of a line of a 3-tap filter take 6 multiplications instead of 12, so a tile of 4x4 outputs takes 36
// instead of 144. References are in winograd_transform.h, ideas, costs and limits in the two files per kind of pass.
#pragma once
#include "conv_winograd_tiles.h"
#include "conv_winograd_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Winograd {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(WinogradWeight<T>(arguments));
    return body(WinogradTiles<T>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
