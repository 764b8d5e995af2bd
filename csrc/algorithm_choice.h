// Which algorithms can compute a convolution, why the others refuse, and which one `auto` takes. No torch: the
// operators of every device, `explain_convolution` and the tests ask here.
#pragma once
#include <string>

#include "algorithms.h"
#include "dtypes.h"
#include "geometry.h"

namespace convlab {

enum class Device : int { cpu, cuda };

struct ConvProblem {
  ConvGeometry geometry;
  Pass pass = Pass::forward;
  Dtype dtype = Dtype::float32;
  Device device = Device::cpu;
  bool tf32 = false;    // on CUDA, float32 operands may be rounded to tf32
  bool packed = false;  // on the CPU, the weight is kept in the order in which the kernel reads it
  Layout layout = Layout::channels_first;
};

// Axes that a kernel for the CPU need not tell apart become one: those that a kernel along z does not see and, as in a
// fully connected layer, images of one pixel, which are dense in both layouts. Returns whether they are of one pixel.
bool join_axes(ConvGeometry& geometry);

// A kernel as large as the map, which reads every element once, is a fully connected layer: in memory, if the weight
// lies as the input does, a pointwise convolution of images of one pixel that has the map's elements as channels.
bool covers_map(const ConvGeometry& geometry);
ConvGeometry with_map_joined(ConvGeometry geometry);
// Whether the CPU's kernels of the algorithm compute this one as that.
bool joins_map(Algorithm algorithm, const ConvGeometry& geometry);

// Empty if `algorithm` can compute the problem, else the reason why not.
std::string refusal(Algorithm algorithm, const ConvProblem& problem);

// In multiply-adds of a perfectly running matrix product, on CUDA of its scalar units; lower is faster. For algorithms
// that do not refuse.
double estimated_cost(Algorithm algorithm, const ConvProblem& problem);

// The same for problems of one device (algorithm_choice_cpu.cpp, algorithm_choice_cuda.cpp): what its kernels refuse,
// beside what the idea of an algorithm excludes on every device.
std::string cpu_refusal(Algorithm algorithm, const ConvProblem& problem, bool in_words);
double cpu_cost(Algorithm algorithm, const ConvProblem& problem);
std::string cuda_refusal(Algorithm algorithm, const ConvProblem& problem);
double cuda_cost(Algorithm algorithm, const ConvProblem& problem);

// What `auto` may take. Process-wide, set by `torch_convlab.backends`.
struct Settings {
  int algorithm = -1;     // an Algorithm to take wherever it does not refuse, or -1
  bool precise = false;   // only algorithms whose error is that of a plain sum
  bool autotune = false;  // measure each new problem (ops/autotune.h) instead of estimating its cost

  bool operator==(const Settings&) const = default;
};
Settings& settings();

// Whether `auto` may take the algorithm at all; the others are for those who name them.
bool eligible(Algorithm algorithm, const ConvProblem& problem, const Settings& settings);

// The setting's algorithm if it does not refuse, else the cheapest of the eligible ones.
Algorithm choose_algorithm(const ConvProblem& problem, const Settings& settings = settings());

}  // namespace convlab
