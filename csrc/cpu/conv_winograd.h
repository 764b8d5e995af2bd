// Winograd convolution of layers with square kernels and strides along the last two axes, every dtype and layout, all
// passes: F(m x m, R x R) with m + R = 7 for kernels of R = 2 to 5 taps per stride, and F(4x4, 2x2) of the input's
// halves for 3x3 kernels with stride 2.
//
// Four outputs of a line of a 3-tap filter take 6 multiplications instead of 12, so a tile of 4x4 outputs takes 36
// instead of 144. References are in ../winograd_matrices.h, ideas, costs and limits in the files per kind of pass.
#pragma once
#include "conv_winograd_tiles.h"
#include "conv_winograd_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Winograd {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    const ConvGeometry& g = arguments.geometry;
    if (g.kernel[1] == 3 && g.stride[1] == 2) return with_cut<Halves>(arguments, body);
    switch (divide_up(g.kernel[1], g.stride[1])) {
      case 2:
        return with_cut<SixPoints<2>>(arguments, body);
      case 3:
        return with_cut<SixPoints<3>>(arguments, body);
      case 4:
        return with_cut<SixPoints<4>>(arguments, body);
      default:
        return with_cut<SixPoints<5>>(arguments, body);
    }
  }

 private:
  template <class Cut, class Body>
  static auto with_cut(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(WinogradWeight<T, Cut>(arguments));
    return body(WinogradTiles<T, Cut>(arguments));
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
