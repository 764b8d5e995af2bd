// The activation that a kernel computes behind its sum: values are cut to [lower, upper]. ReLU has the lower bound 0
// and no upper one, ReLU6 has 0 and 6. NaN is never cut. An absent bound is itself NaN, with which no comparison holds.
#pragma once
#include <limits>
#include <optional>

#include "host_device.h"

namespace convlab {

using Bound = std::optional<double>;  // as the operators take it

struct Clamp {
  double lower = std::numeric_limits<double>::quiet_NaN(), upper = lower;

  Clamp() = default;
  Clamp(Bound lower, Bound upper) : Clamp() {
    if (lower.has_value()) this->lower = *lower;
    if (upper.has_value()) this->upper = *upper;
  }

  bool cuts() const { return lower == lower || upper == upper; }
};

// The same, in the type in which a kernel computes.
template <class A>
struct Bounds {
  A lower, upper;
  bool cut;

  Bounds() : Bounds(Clamp()) {}
  Bounds(const Clamp& clamp)
      : lower(static_cast<A>(clamp.lower)), upper(static_cast<A>(clamp.upper)), cut(clamp.cuts()) {}

  CONVLAB_HD A clamped(A value) const {
    value = value < lower ? lower : value;
    return upper < value ? upper : value;
  }
  // Whether the gradient ends at an output that was this before it was cut: beyond the bounds and at them, as in torch.
  CONVLAB_HD bool stops(A value) const { return value <= lower || value >= upper; }
};

}  // namespace convlab
