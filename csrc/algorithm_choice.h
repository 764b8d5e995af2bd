// Which algorithms can compute a convolution, why the others refuse, and which one `auto` takes. No torch: the
// operators of every device, `explain_convolution` and the tests ask here.
#pragma once
#include <string>

#include "algorithms.h"
#include "geometry.h"

namespace convlab {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Device : int { cpu, cuda };

struct ConvProblem {
  ConvGeometry geometry;
  Pass pass = Pass::forward;
  Dtype dtype = Dtype::float32;
  Device device = Device::cpu;
};

// Empty if `algorithm` can compute the problem, else the reason why not.
std::string refusal(Algorithm algorithm, const ConvProblem& problem);

// In multiply-adds of a perfectly running matrix product; lower is faster. For algorithms that do not refuse.
double estimated_cost(Algorithm algorithm, const ConvProblem& problem);

// The cheapest algorithm that does not refuse.
Algorithm choose_algorithm(const ConvProblem& problem);

}  // namespace convlab
