// What a convolution computes behind its sum: a clamp (clamp.h), or the value times a gate that opens with it.
// Gates: the sigmoid, which makes SiLU (Elfwing et al. 2017, Ramachandran et al. 2017), its piecewise linear substitute
// clamp(value + 3, 0, 6) / 6, which makes Hardswish (Howard et al. 2019), and the distribution function of the normal
// distribution, which makes GELU (Hendrycks and Gimpel 2016), or what approximates it there by a hyperbolic tangent.
#pragma once
#include "clamp.h"

namespace convlab {

enum class Gate : int { none, sigmoid, hard_sigmoid, normal, normal_tanh };

struct Activation : Clamp {
  Gate gate = Gate::none;

  Activation() = default;
  Activation(Bound lower, Bound upper, Gate gate) : Clamp(lower, upper), gate(gate) {}
};

}  // namespace convlab
