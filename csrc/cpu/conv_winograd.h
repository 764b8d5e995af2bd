// Winograd convolution along the last two axes, every dtype and layout, all passes: F(m x m, R x R) with m + R = 7 for
// parts and segments of R = 2 to 5 taps, F(m, R) for kernels of one line of taps, and F(4x4, 2x2) of the input's halves
// for 3x3 kernels with stride 2.
//
// Four outputs of a line of a 3-tap filter take 6 multiplications instead of 12, so a tile of 4x4 outputs takes 36
// instead of 144. References are in ../winograd_matrices.h, how kernels are cut in ../winograd_cut.h, ideas, costs and
// limits in the files per kind of pass.
#pragma once
#include "conv_winograd_tiles.h"
#include "conv_winograd_weight.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Winograd {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    const WinogradCut cut = winograd_cut(arguments.geometry);
    if (cut.halves) return with_cut<Halves>(arguments, body);
    switch (cut.axis[0].taps * 10 + cut.axis[1].taps) {
      case 13:
        return with_cut<SixPoints<1, 3>>(arguments, body);
      case 14:
        return with_cut<SixPoints<1, 4>>(arguments, body);
      case 31:
        return with_cut<SixPoints<3, 1>>(arguments, body);
      case 41:
        return with_cut<SixPoints<4, 1>>(arguments, body);
      case 22:
        return with_cut<SixPoints<2, 2>>(arguments, body);
      case 33:
        return with_cut<SixPoints<3, 3>>(arguments, body);
      case 44:
        return with_cut<SixPoints<4, 4>>(arguments, body);
      default:
        return with_cut<SixPoints<5, 5>>(arguments, body);
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
