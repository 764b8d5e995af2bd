// What a convolution computes behind its sum: a clamp (clamp.h), or the value times a gate that opens with it.
// Gates: the sigmoid, which makes SiLU (Elfwing et al. 2017, Ramachandran et al. 2017), and its piecewise linear
// substitute clamp(value + 3, 0, 6) / 6, which makes Hardswish (Howard et al. 2019).
#pragma once
#include "clamp.h"

namespace convlab {

enum class Gate : int { none, sigmoid, hard_sigmoid };

struct Activation : Clamp {
  Gate gate = Gate::none;

  Activation() = default;
  Activation(Bound lower, Bound upper, Gate gate) : Clamp(lower, upper), gate(gate) {}
};

}  // namespace convlab
