// The constants of the cost model were fitted on one core of a Zen 5 with AVX-512 against the layers of ResNet-50,
// VGG-16 and MobileNetV2 at batch 1 and 8. They are ratios of work to work, so they move little with the machine. It is
// plain arithmetic on the geometry and the dtype: the same choice on every run and for every number of threads.
#include "algorithm_choice.h"

#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"

namespace convlab {

namespace {

std::string text(const char* words) { return words; }
std::string text(int64_t number) { return std::to_string(number); }
std::string text(const int64_t (&sizes)[kMaxSpatial]) {
  return text(sizes[0]) + "x" + text(sizes[1]) + "x" + text(sizes[2]);
}

// A reason to refuse. `auto` asks for it on every call and only wants to know whether there is one.
template <class... Parts>
std::string because(bool in_words, const Parts&... parts) {
  return in_words ? (text(parts) + ...) : "refused";
}

// Taps that a Winograd convolution sees on each part of a strided image.
int64_t taps_per_stride(const ConvGeometry& g) { return (g.kernel[1] + g.stride[1] - 1) / g.stride[1]; }

std::string winograd_excludes(const ConvGeometry& g, bool in_words) {
  constexpr int64_t fewest = 2, most = 5, most_stride = 4;
  if (g.kernel[1] != g.kernel[2])
    return because(in_words, "winograd needs a kernel that is square along the last two axes, but the kernel is ",
                   g.kernel);
  if (g.stride[1] != g.stride[2] || g.stride[1] > most_stride)
    return because(in_words, "winograd needs one stride of at most ", most_stride,
                   " along both of the last two axes, but stride is ", g.stride);
  if (g.dilation[1] != g.dilation[2] || (g.dilation[1] > 1 && g.stride[1] > 1))
    return because(in_words, "winograd needs one dilation along both of the last two axes, and stride 1 with it, but ",
                   "dilation is ", g.dilation, " and stride is ", g.stride);
  if (taps_per_stride(g) < fewest || taps_per_stride(g) > most)
    return because(in_words, "winograd needs a kernel of ", fewest, " to ", most,
                   " taps per stride along the last two axes, but kernel is ", g.kernel, " and stride is ", g.stride);
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
      return because(in_words,
                     "inner_product needs a 1x1 kernel without padding that reads every pixel, but the kernel is ",
                     g.kernel, ", padding ", g.padding, " and stride ", g.stride);
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
    default:
      return {};
  }
}

// The channels per group on the side that is read.
int64_t read_channels(const ConvProblem& problem) {
  const ConvGeometry& g = problem.geometry;
  return problem.pass == Pass::backward_input ? g.out_channels_per_group() : g.in_channels_per_group();
}

// What the kernels for the CPU refuse besides.
std::string cpu_refusal(Algorithm algorithm, const ConvProblem& problem, bool in_words) {
  constexpr int64_t most = 64;
  if (algorithm == Algorithm::direct && read_channels(problem) > most)
    return because(in_words, "direct reads at most ", most, " channels per group, but has to read ",
                   read_channels(problem));
  return {};
}

std::string refusal(Algorithm algorithm, const ConvProblem& problem, bool in_words) {
  const std::string reason = excludes(algorithm, problem.geometry, in_words);
  if (!reason.empty()) return reason;
  return problem.device == Device::cuda ? cuda_refusal(algorithm, problem) : cpu_refusal(algorithm, problem, in_words);
}

// A weight that is brought into a kernel's order, or whose gradient comes from it.
constexpr double kPerPacked = 16, kPerWritten = 2;

double packing_cost(const ConvProblem& problem) {
  return problem.packed ? 0 : kPerPacked * static_cast<double>(problem.geometry.weight_elements());
}

// Winograd's transforms handle whole vectors of channels; 16 is the widest.
double in_whole_vectors(int64_t channels) { return static_cast<double>((channels + 15) / 16 * 16); }

double winograd_cost(const ConvProblem& problem) {
  constexpr double points = 36, per_output = 12;
  const ConvGeometry& g = problem.geometry;
  const bool forward = problem.pass != Pass::backward_input;
  const int64_t* written = forward ? g.output : g.input;
  const bool halves = g.stride[1] == 2 && g.kernel[1] == 3;
  const double per_input = halves && forward ? 24 : 12;  // tiles of 9x9 pixels, none of them read twice
  // The parts of a strided image are channels of what is read or, in backward input, written.
  const int64_t parts = halves ? 1 : g.stride[1], taps = taps_per_stride(g);
  const int64_t read_channels = forward ? g.in_channels_per_group() : g.out_channels_per_group();
  const int64_t written_channels = forward ? g.out_channels_per_group() : g.in_channels_per_group();
  // Rows of the matrix products, in tiles of 36.
  const auto rows = [&](int64_t size) {
    // Those of one residue, with dilation.
    const int64_t step = forward ? g.dilation[1] : g.dilation[1] * g.stride[1], outputs = (size + step - 1) / step;
    if (halves) return 2 * outputs + (outputs + 3) / 4;
    if (taps == 3) return outputs + 2 * ((outputs + 3) / 4);
    return 6 * ((outputs + 6 - taps) / (7 - taps));
  };
  const bool weight = problem.pass == Pass::backward_weight;
  const double images = static_cast<double>(g.batch * written[0] * g.dilation[1] * g.dilation[1]);
  const double tiles = images * static_cast<double>(rows(written[1]) * rows(written[2])) / points;
  // Few tiles transform the weights piece by piece, in every call.
  const double per_weight = weight ? 7 : tiles <= 128 ? 12 : problem.packed ? 0 : 7;
  // Each tap along z reads channels of its own.
  const auto slices = static_cast<double>(g.kernel[0]);
  const double read_parts = forward ? static_cast<double>(parts * parts) : 1;
  const double written_parts = forward ? 1 : static_cast<double>(parts * parts);
  const double read = slices * read_parts * static_cast<double>(read_channels);
  const double c = slices * read_parts * in_whole_vectors(read_channels);
  const double k = written_parts * in_whole_vectors(written_channels);
  // Backward weight reads and writes its sums once per round of 128 tiles of 36 rows, or 64 of 81.
  const double rounds = weight ? 1 + std::ceil(tiles / (halves ? 144 : 128)) : 1;
  const double transforms = tiles * (c * per_input + k * per_output) + read * k * per_weight * rounds;
  // The products of groups of one vector are too small to be fast.
  const int64_t vector = cpu::capability() == cpu::Capability::avx512 ? 16 : 8;
  const double narrow = g.groups > 1 && written_channels < 2 * vector && !weight ? 2.5 : 1;
  const double scattered = g.dilation[1] > 1 ? 1.2 : 1;
  return narrow * scattered * points * static_cast<double>(g.groups) * (tiles * read * k + transforms);
}

// How many of a dilated kernel's taps lie in the tensor; a product leaves out those that are in the padding with a
// whole tile of pixels.
double taps_inside(const ConvGeometry& g) {
  double inside = 1;
  for (int axis = 1; axis < kMaxSpatial; ++axis) {
    if (g.dilation[axis] == 1) continue;
    int64_t count = 0;
    for (int64_t tap = 0; tap < g.kernel[axis]; ++tap) {
      const int64_t first = tap * g.dilation[axis] - g.padding[axis], stride = g.stride[axis];
      const int64_t begin = first < 0 ? (-first + stride - 1) / stride : 0;
      const int64_t end = std::min(g.output[axis], (g.input[axis] - first + stride - 1) / stride);
      count += std::max<int64_t>(0, end - begin);
    }
    inside *= static_cast<double>(count) / static_cast<double>(std::max<int64_t>(1, g.kernel[axis] * g.output[axis]));
  }
  return inside;
}

// Few written channels per group leave lanes idle or make the gather count; forward and backward input have kernels
// whose lanes are read channels or neighbouring pixels instead. Where the CPU multiplies pairs of bfloat16, a matrix
// product does so twice as fast, but must pack both operands in backward weight; everything else computes in float32.
double implicit_gemm_cost(const ConvProblem& problem) {
  constexpr double per_gathered = 8;
  constexpr double dots = 1.8, planes = 1.2, per_plane_read = 3, per_plane_written = 2;
  constexpr int64_t few = 8, lanes = 16, few_filters = 4;
  const ConvGeometry& g = problem.geometry;
  int64_t written = problem.pass == Pass::backward_input ? g.in_channels_per_group() : g.out_channels_per_group();
  // There the tensors exchange roles (conv_gemm_weight.h).
  const bool unit_stride = g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1;
  if (problem.pass == Pass::backward_weight && g.groups == 1 && unit_stride && written <= few_filters && g.taps() > 1)
    written = std::max(written, g.in_channels);
  const bool pairs = problem.dtype == Dtype::bfloat16 && cpu::multiplies_bfloat16();
  const int64_t read = read_channels(problem);
  const double inside = problem.pass == Pass::backward_weight ? 1 : taps_inside(g);
  const double multiply_adds = static_cast<double>(g.multiply_adds()) * inside;
  // The sums of a gradient of few pixels are kept where they belong.
  const bool in_place = problem.pass == Pass::backward_weight && g.taps() == 1;
  const double packing = in_place ? kPerWritten * static_cast<double>(g.weight_elements()) : packing_cost(problem);
  if (problem.pass != Pass::backward_weight && read > 0 && written > 0) {
    if (written <= few && 4 * read >= 3 * lanes) return dots * multiply_adds + packing;
    if (written <= (pairs ? few : lanes) && g.taps() > 1)
      return multiply_adds * (planes + per_plane_read / static_cast<double>(written) +
                              per_plane_written / static_cast<double>(read)) +
             packing;
  }
  const double product = !pairs ? 1 : problem.pass == Pass::backward_weight ? 0.75 : 0.5;
  return multiply_adds * (product + per_gathered / static_cast<double>(std::max<int64_t>(1, written))) + packing;
}

// A multiply-add here comes with more loads than in a matrix product; lanes without a written channel idle.
double direct_cost(const ConvProblem& problem) {
  constexpr int64_t lanes = 16;
  constexpr double windows = 3, strided_windows = 7, weights = 1.7;
  const ConvGeometry& g = problem.geometry;
  const int64_t written = problem.pass == Pass::backward_input ? g.in_channels_per_group() : g.out_channels_per_group();
  const int64_t together = written >= lanes ? 1 : std::min(g.groups, lanes / std::max<int64_t>(1, written));
  const double used = static_cast<double>(together * written) / in_whole_vectors(together * written);
  // Windows are of 8 neighbouring pixels of a line.
  const int64_t width = problem.pass == Pass::backward_input ? g.input[2] : g.output[2];
  const double idle = static_cast<double>((width + 7) / 8 * 8) / static_cast<double>(std::max<int64_t>(1, width));
  const bool strided = problem.pass == Pass::forward && (g.stride[0] > 1 || g.stride[1] > 1 || g.stride[2] > 1);
  const double each = problem.pass == Pass::backward_weight ? weights : strided ? strided_windows : windows;
  return static_cast<double>(g.multiply_adds()) * each * idle / std::max(used, 1.0 / lanes) + packing_cost(problem);
}

// Weights are not copied, but pixels may be, where their channels do not lie together. Lanes are channels of the input;
// forward, they are added up for each output.
double inner_product_cost(const ConvProblem& problem) {
  constexpr double forward = 1.5, backward = 2, per_output = 64, per_gathered = 16;
  const ConvGeometry& g = problem.geometry;
  const double pixels = static_cast<double>(g.batch * g.input_pixels());
  const double products = pixels * static_cast<double>(g.out_channels) * in_whole_vectors(g.in_channels_per_group());
  const double gathered = per_gathered * pixels * static_cast<double>(g.in_channels + g.out_channels);
  if (problem.pass != Pass::forward) return backward * products + gathered;
  return forward * products + per_output * pixels * static_cast<double>(g.out_channels) + gathered;
}

}  // namespace

bool join_pixels(ConvGeometry& geometry) {
  if (geometry.taps() != 1 || geometry.input_pixels() != 1 || geometry.output_pixels() != 1) return false;
  geometry.input[2] = geometry.output[2] = geometry.batch;
  geometry.stride[2] = geometry.batch = 1;
  return true;
}

std::string refusal(Algorithm algorithm, const ConvProblem& problem) { return refusal(algorithm, problem, true); }

double estimated_cost(Algorithm algorithm, const ConvProblem& problem) {
  if (problem.device == Device::cuda) return cuda_cost(algorithm, problem);
  constexpr double scalar = 40;    // one multiply-add of the naive loop, against one of a vector
  constexpr double windows = 1.5;  // of a depthwise convolution, which no other algorithm should be asked for
  const double multiply_adds = static_cast<double>(problem.geometry.multiply_adds());
  switch (algorithm) {
    case Algorithm::naive:
      return scalar * multiply_adds;
    case Algorithm::winograd:
      return winograd_cost(problem);
    case Algorithm::direct:
      return direct_cost(problem);
    case Algorithm::depthwise:
      return windows * multiply_adds;
    case Algorithm::inner_product:
      return inner_product_cost(problem);
    default:
      return implicit_gemm_cost(problem);
  }
}

Settings& settings() {
  static Settings current;
  return current;
}

bool eligible(Algorithm algorithm, const ConvProblem& problem, const Settings& settings) {
  // Who computes in float64 wants the digits that winograd gives up.
  if (algorithm == Algorithm::winograd && (settings.precise || problem.dtype == Dtype::float64)) return false;
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
