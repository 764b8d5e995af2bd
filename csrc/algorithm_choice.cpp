// The choice is plain arithmetic on the geometry, the dtype and the memory format: the same on every run and for every
// number of threads.
#include "algorithm_choice.h"

#include "refusal_text.h"
#include "winograd_cut.h"

namespace convlab {

namespace {

std::string winograd_excludes(const ConvGeometry& g, bool in_words) {
  constexpr int64_t most_parts = WinogradCut::kMostParts;
  for (int axis = 1; axis < kMaxSpatial; ++axis) {
    if (g.stride[axis] > most_parts)
      return because(in_words, "winograd needs strides of at most ", most_parts,
                     " along the last two axes, but stride is ", g.stride);
    if (g.dilation[axis] > 1 && g.stride[axis] > 1 && g.kernel[axis] > 1)
      return because(in_words, "winograd needs stride 1 along an axis with dilation, but dilation is ", g.dilation,
                     " and stride is ", g.stride);
  }
  if (g.kernel[1] <= g.stride[1] && g.kernel[2] <= g.stride[2])
    return because(in_words, "winograd needs windows that overlap along one of the last two axes, but kernel is ",
                   g.kernel, " and stride is ", g.stride);
  if (!winograd_cut(g).possible)
    return because(in_words, "winograd cuts kernels into at most ", WinogradCut::kMostSegments,
                   " segments of a few taps along each of the last two axes, but kernel is ", g.kernel,
                   " and stride is ", g.stride);
  return {};
}

std::string depthwise_excludes(const ConvGeometry& g, bool in_words) {
  if (g.groups == g.in_channels && g.groups == g.out_channels) return {};
  return because(in_words, "depthwise needs groups == in_channels == out_channels, but groups is ", g.groups,
                 ", in_channels ", g.in_channels, " and out_channels ", g.out_channels);
}

std::string inner_product_excludes(const ConvGeometry& g, bool in_words) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.kernel[axis] != 1 || g.padding[axis] != 0 || g.input[axis] != g.output[axis])
      return because(
          in_words,
          "inner_product needs a 1x1 kernel without padding that reads every pixel or, on the CPU, one as large as "
          "the map without padding, dilation and groups, but the kernel is ",
          g.kernel, ", padding ", g.padding, ", stride ", g.stride, " and the input ", g.input);
  return {};
}

std::string strassen_excludes(const ConvGeometry& g, bool in_words) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.kernel[axis] != 1 || g.padding[axis] != 0)
      return because(in_words, "strassen needs a 1x1 kernel without padding, but the kernel is ", g.kernel,
                     " and padding ", g.padding);
  if (g.groups != 1) return because(in_words, "strassen needs one group, but groups is ", g.groups);
  // A line may be a batch of images of one pixel (join_axes), whose results must not depend on each other.
  if (g.input[0] * g.input[1] == 1)
    return because(in_words, "strassen needs images of several lines, but the input is ", g.input);
  return {};
}

// Why the idea of an algorithm does not fit, on any device.
std::string excludes(Algorithm algorithm, const ConvGeometry& geometry, bool in_words) {
  switch (algorithm) {
    case Algorithm::winograd:
      return winograd_excludes(geometry, in_words);
    case Algorithm::depthwise:
      return depthwise_excludes(geometry, in_words);
    case Algorithm::inner_product:
      return inner_product_excludes(geometry, in_words);
    case Algorithm::strassen:
      return strassen_excludes(geometry, in_words);
    default:
      return {};
  }
}

ConvProblem as_computed(Algorithm algorithm, ConvProblem problem) {
  if (problem.device == Device::cpu && joins_map(algorithm, problem.geometry)) {
    problem.geometry = with_map_joined(problem.geometry);
    problem.layout = Layout::channels_last;
  }
  return problem;
}

std::string refusal(Algorithm algorithm, const ConvProblem& given, bool in_words) {
  const ConvProblem problem = as_computed(algorithm, given);
  const std::string reason = excludes(algorithm, problem.geometry, in_words);
  if (!reason.empty()) return reason;
  return problem.device == Device::cuda ? cuda_refusal(algorithm, problem) : cpu_refusal(algorithm, problem, in_words);
}

}  // namespace

bool join_axes(ConvGeometry& geometry) {
  // A kernel along z sees y and x as one axis, and z can be y.
  const auto untouched = [&](int axis) {
    return geometry.kernel[axis] == 1 && geometry.stride[axis] == 1 && geometry.padding[axis] == 0;
  };
  const bool depthwise = geometry.groups == geometry.in_channels && geometry.groups == geometry.out_channels;
  if (geometry.kernel[0] > 1 && untouched(1) && untouched(2) && !depthwise) {
    geometry.input[2] *= geometry.input[1], geometry.output[2] *= geometry.output[1];
    for (int64_t(*field)[kMaxSpatial] : {&geometry.input, &geometry.kernel, &geometry.stride, &geometry.padding,
                                         &geometry.dilation, &geometry.output}) {
      (*field)[1] = (*field)[0];
      (*field)[0] = 1;
    }
    geometry.padding[0] = 0;
    return false;
  }
  if (geometry.taps() != 1 || geometry.input_pixels() != 1 || geometry.output_pixels() != 1) return false;
  for (const int64_t padding : geometry.padding)
    if (padding != 0) return false;  // what is read may be the padding
  geometry.input[2] = geometry.output[2] = geometry.batch;
  geometry.stride[2] = geometry.batch = 1;
  return true;
}

bool covers_map(const ConvGeometry& g) {
  if (g.groups != 1 || g.taps() == 1) return false;
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.kernel[axis] != g.input[axis] || g.padding[axis] != 0 || (g.dilation[axis] != 1 && g.kernel[axis] != 1))
      return false;
  return true;
}

bool joins_map(Algorithm algorithm, const ConvGeometry& geometry) {
  return (algorithm == Algorithm::implicit_gemm || algorithm == Algorithm::inner_product) && covers_map(geometry);
}

ConvGeometry with_map_joined(ConvGeometry geometry) {
  geometry.in_channels *= geometry.taps();
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    geometry.input[axis] = geometry.kernel[axis] = geometry.stride[axis] = geometry.dilation[axis] = 1;
  join_axes(geometry);
  return geometry;
}

std::string refusal(Algorithm algorithm, const ConvProblem& problem) { return refusal(algorithm, problem, true); }

double estimated_cost(Algorithm algorithm, const ConvProblem& problem) {
  return problem.device == Device::cuda ? cuda_cost(algorithm, problem)
                                        : cpu_cost(algorithm, as_computed(algorithm, problem));
}

Settings& settings() {
  static Settings current;
  return current;
}

bool eligible(Algorithm algorithm, const ConvProblem& problem, const Settings& settings) {
  // Who computes in float64 wants the digits that these give up.
  const bool rounds_more = algorithm == Algorithm::winograd || algorithm == Algorithm::strassen;
  if (rounds_more && (settings.precise || problem.dtype == Dtype::float64)) return false;
  return refusal(algorithm, problem, false).empty();
}

Algorithm choose_algorithm(const ConvProblem& problem, const Settings& settings) {
  if (settings.algorithm >= 0) {
    const auto wanted = static_cast<Algorithm>(settings.algorithm);
    if (refusal(wanted, problem, false).empty()) return wanted;
  }
  Algorithm best = Algorithm::naive;
  double best_cost = estimated_cost(best, problem);
  for (int index = 0; index < kAlgorithms; ++index) {
    const auto algorithm = static_cast<Algorithm>(index);
    if (!eligible(algorithm, problem, settings)) continue;
    const double cost = estimated_cost(algorithm, problem);
    if (cost < best_cost) best = algorithm, best_cost = cost;
  }
  return best;
}

}  // namespace convlab
