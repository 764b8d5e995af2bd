// What `auto` compares: the estimated cost of each algorithm, in multiply-adds of a perfectly running matrix product.
//
// The constants were fitted on one core of a Zen 5 with AVX-512 against the ResNet-50 and VGG-16 layers at batch 1 and
// 8; they are ratios of work to work, so they move little with the machine. Plain arithmetic on the geometry: the same
// choice on every run and for every number of threads.
#pragma once
#include <algorithm>

#include "algorithms.h"
#include "geometry.h"

namespace convlab {

// Winograd's transforms handle whole vectors of channels; 16 is the widest.
inline double in_whole_vectors(int64_t channels) { return static_cast<double>((channels + 15) / 16 * 16); }

// Few written channels per group leave lanes idle or make the gather count.
inline double implicit_gemm_cost(const ConvGeometry& g, Pass pass) {
  constexpr double per_gathered = 8;
  const int64_t written = pass == Pass::backward_input ? g.in_channels_per_group() : g.out_channels_per_group();
  return static_cast<double>(g.multiply_adds()) * (1 + per_gathered / static_cast<double>(std::max<int64_t>(1, written)));
}

inline double winograd_cost(const ConvGeometry& g, Pass pass) {
  constexpr double points = 36, per_input = 12, per_output = 12, per_weight = 7;
  const bool forward = pass == Pass::forward;
  const int64_t* written = forward ? g.output : g.input;
  const int64_t read_channels = forward ? g.in_channels_per_group() : g.out_channels_per_group();
  const int64_t written_channels = forward ? g.out_channels_per_group() : g.in_channels_per_group();
  const double tiles = static_cast<double>(g.batch * ((written[1] + 3) / 4) * ((written[2] + 3) / 4));
  const double c = in_whole_vectors(read_channels), k = in_whole_vectors(written_channels);
  const double product = tiles * static_cast<double>(read_channels) * k;
  const double transforms = tiles * (c * per_input + k * per_output) + static_cast<double>(read_channels) * k * per_weight;
  return points * static_cast<double>(g.groups) * (product + transforms);
}

// Lower is faster. Only for algorithms that do not refuse the problem.
inline double estimated_cost(Algorithm algorithm, const ConvGeometry& g, Pass pass) {
  constexpr double scalar = 40;  // one multiply-add of the naive loop, against one of a vector
  constexpr double shifted = 4;  // a load for every multiply-add
  switch (algorithm) {
    case Algorithm::naive:
      return scalar * static_cast<double>(g.multiply_adds());
    case Algorithm::winograd:
      return winograd_cost(g, pass);
    case Algorithm::depthwise:
      return shifted * static_cast<double>(g.multiply_adds());
    default:
      return implicit_gemm_cost(g, pass);
  }
}

}  // namespace convlab
