// What the kernels for CUDA refuse, and what they are expected to cost. Not fitted: no GPU has been measured. The
// ratios follow from the instructions in the kernels and the data sheet of an H200: 30e12 scalar multiply-adds a
// second, ten times that on tensor cores in 16 bits, and 4.3e12 bytes.
#include <algorithm>
#include <cmath>
#include <utility>

#include "algorithm_choice.h"

namespace convlab {

namespace {

constexpr int64_t kMostBlocks = 65535;  // along the grid's second and third axis

constexpr double kPerByte = 7, kPerLaunch = 6e7;  // 2 microseconds until a kernel fills the GPU after another
// A multiply-add on tensor cores, in float32 rounded to tf32, or thrice for all of its digits.
constexpr double kIn16Bits = 0.1, kInTf32 = 0.2, kInSplitFloat32 = 0.6;

double rounded_up(int64_t value, int64_t unit) { return static_cast<double>(ceil_divide(value, unit) * unit); }

// Places, pixels and taps are counted in 32 bits, with room for sums of a few of them.
std::string size_refusal(const std::string& name, const ConvGeometry& g) {
  constexpr int64_t limit = int64_t{1} << 29;
  int64_t largest =
      std::max({g.batch * g.input_pixels(), g.batch * g.output_pixels(), g.taps() * (g.in_channels + g.out_channels)});
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    largest = std::max({largest, g.input[axis] + g.padding[axis], g.output[axis] + g.stride[axis],
                        g.kernel[axis] * g.dilation[axis], g.output[axis] * g.stride[axis]});
  if (largest < limit) return {};
  return name + " counts pixels and taps up to 2^29 on CUDA, but there are " + std::to_string(largest);
}

std::string winograd_refusal(const ConvProblem& problem) {
  constexpr int64_t points = 36;  // each a block's third coordinate, for each group
  const ConvGeometry& g = problem.geometry;
  if (problem.dtype == Dtype::float64) return "winograd needs tensor cores on CUDA, which it does not use in float64";
  if (problem.dtype != Dtype::float32)
    return "winograd has no kernel for 16 bits on CUDA: its transforms would take longer than the products they save";
  if (g.kernel[0] != 1 || g.input[0] != 1 || g.output[0] != 1)
    return "winograd needs a 2-D kernel and input on CUDA, but they are of " + std::to_string(g.kernel[0]) + " and " +
           std::to_string(g.input[0]) + " slices";
  for (int axis = 1; axis < kMaxSpatial; ++axis) {
    if (g.kernel[axis] != 3)
      return "winograd needs a 3x3 kernel on CUDA, but it is of " + std::to_string(g.kernel[1]) + "x" +
             std::to_string(g.kernel[2]);
    if (g.dilation[axis] != 1)
      return "winograd needs dilation 1 on CUDA, but dilation is " + std::to_string(g.dilation[axis]);
    if (g.stride[axis] != 1) return "winograd needs stride 1 on CUDA, but stride is " + std::to_string(g.stride[axis]);
  }
  if (points * g.groups > kMostBlocks)
    return "winograd has at most " + std::to_string(kMostBlocks / points) + " groups on CUDA, but there are " +
           std::to_string(g.groups);
  return {};
}

std::string depthwise_refusal(const ConvGeometry& g) {
  constexpr int64_t most_taps = 3072, most_elements = int64_t{1} << 31;  // filters are kept in shared memory
  if (g.taps() > most_taps)
    return "depthwise has filters of at most " + std::to_string(most_taps) + " taps on CUDA, but there are " +
           std::to_string(g.taps());
  if (std::max(g.input_elements(), g.output_elements()) >= most_elements)
    return "depthwise has tensors of at most 2^31 elements on CUDA, but there are " +
           std::to_string(std::max(g.input_elements(), g.output_elements()));
  return {};
}

// The sum over the reads of one written element, and what is written: the matrices of conv_gemm.h, for one group.
struct Product {
  int64_t rows, columns, depth;

  explicit Product(const ConvProblem& problem) {
    const ConvGeometry& g = problem.geometry;
    const int64_t filters = g.out_channels_per_group(), channels = g.in_channels_per_group();
    const bool to_input = problem.pass == Pass::backward_input;
    rows = g.batch * (to_input ? g.input_pixels() : g.output_pixels());
    columns = to_input ? channels : filters;
    depth = g.taps() * (to_input ? filters : channels);
    if (problem.pass == Pass::backward_weight) {
      depth = rows;
      rows = filters;
      columns = g.taps() * channels;
    }
  }
};

// A tile is 64 wide, and half of it idles where a group has 32 channels. Where channels do not fill 16 bytes, operands
// come element by element, at about 30 instructions each.
double implicit_gemm_cost(const ConvProblem& problem, int64_t element_size) {
  constexpr double per_gathered = 30;
  constexpr int64_t tile = 64;
  const ConvGeometry& g = problem.geometry;
  const Product product(problem);
  const double padded = static_cast<double>(g.groups) * rounded_up(product.rows, tile) *
                        rounded_up(product.columns, tile) * rounded_up(product.depth, tile / element_size);
  const int64_t chunk = 16 / element_size;
  const bool whole = g.in_channels_per_group() % chunk == 0 && g.out_channels_per_group() % chunk == 0;
  const double gathered = whole ? 0 : padded * 2 / tile;
  const double each = element_size == 2 ? kIn16Bits : problem.tf32 ? kInTf32 : kInSplitFloat32;
  return std::max(padded * each, gathered * per_gathered);
}

// Products of whole tiles, a quarter of a convolution's; the transformed tiles of both tensors, written and read; three
// kernels for each chunk of them.
double winograd_cost(const ConvProblem& problem) {
  constexpr int64_t points = 36, tile = 64, slice = 16;
  const ConvGeometry& g = problem.geometry;
  const int64_t* written = problem.pass == Pass::backward_input ? g.input : g.output;
  const int64_t tiles = g.batch * ceil_divide<int64_t>(written[1], 4) * ceil_divide<int64_t>(written[2], 4);
  int64_t rows = tiles, columns = g.out_channels_per_group(), depth = g.in_channels_per_group();
  if (problem.pass == Pass::backward_input) std::swap(columns, depth);
  if (problem.pass == Pass::backward_weight) std::swap(rows, depth);
  const double products = static_cast<double>(points * g.groups) * rounded_up(rows, tile) * rounded_up(columns, tile) *
                          rounded_up(depth, slice);
  const double channels = rounded_up(g.in_channels_per_group(), 4) + rounded_up(g.out_channels_per_group(), 4);
  const double transformed = static_cast<double>(points * tiles * g.groups) * channels * sizeof(float);
  const double weights = static_cast<double>(points * g.weight_elements() / 9) * sizeof(float);
  const double launches = 1 + 3 * std::ceil(transformed / (32 << 20));
  return kInSplitFloat32 * products + kPerByte * (2 * transformed + 3 * weights) + kPerLaunch * launches;
}

// Products hide behind the weights on their way from or to memory (which every algorithm pays for: cuda_cost). Beyond
// four or eight pixels weights come again, from the L2 cache; backward weight reads the pixels again for each block of
// 32 filters and 128 channels.
double inner_product_cost(const ConvProblem& problem, int64_t element_size) {
  constexpr double instructions = 1.5, per_cached_byte = 3, read_again = 1.0 / 32 + 1.0 / 128;
  const ConvGeometry& g = problem.geometry;
  const int64_t pixels = g.batch * g.input_pixels();
  const int64_t at_once = problem.pass == Pass::forward && element_size < 8 ? 8 : 4;
  const double weight_bytes = static_cast<double>(g.weight_elements() * element_size);
  const double again = problem.pass == Pass::backward_weight ? read_again * static_cast<double>(pixels)
                                                             : static_cast<double>(ceil_divide(pixels, at_once) - 1);
  const double products = instructions * static_cast<double>(g.multiply_adds());
  return std::max(products + per_cached_byte * weight_bytes * again - kPerByte * weight_bytes, 0.0);
}

// A thread has four channels of a group; with fewer it idles, and reads as many times for less.
double direct_cost(const ConvProblem& problem) {
  constexpr double windows = 2, by_element = 1.5;
  const ConvGeometry& g = problem.geometry;
  const int64_t filters = g.out_channels_per_group(), channels = g.in_channels_per_group();
  const int64_t written = problem.pass == Pass::backward_input ? channels : filters;
  const double idle = written == 1 ? 1 : rounded_up(written, 4) / static_cast<double>(written);
  const double reads = filters % 4 == 0 && channels % 4 == 0 ? 1 : by_element;
  return static_cast<double>(g.multiply_adds()) * windows * idle * reads;
}

}  // namespace

std::string cuda_refusal(Algorithm algorithm, const ConvProblem& problem) {
  const ConvGeometry& g = problem.geometry;
  const std::string name = algorithm_name(algorithm);
  if (algorithm == Algorithm::naive) return {};
  if (algorithm == Algorithm::strassen) return "strassen has kernels for the CPU alone";
  if (algorithm == Algorithm::amx) return "amx has kernels for the CPU alone";
  if (algorithm == Algorithm::inner_product) {
    constexpr int64_t most = (int64_t{1} << 31) - 1;  // along the grid's first axis
    const int64_t needed = ceil_divide<int64_t>(g.batch * g.input_pixels(), 8) * (g.in_channels + g.out_channels);
    if (needed > most)
      return name + " cuts pixels and channels into at most 2^31 blocks on CUDA, but needs up to " +
             std::to_string(needed);
    return size_refusal(name, g);
  }
  if (algorithm == Algorithm::winograd)
    if (const std::string reason = winograd_refusal(problem); !reason.empty()) return reason;
  if (algorithm == Algorithm::implicit_gemm && problem.dtype == Dtype::float64)
    return "implicit_gemm needs tensor cores on CUDA, which it does not use in float64";
  if (algorithm == Algorithm::depthwise)
    if (const std::string reason = depthwise_refusal(g); !reason.empty()) return reason;
  const int64_t blocks =
      algorithm == Algorithm::implicit_gemm
          ? std::max(g.groups,
                     ceil_divide<int64_t>(g.taps() * g.in_channels_per_group() + g.out_channels_per_group(), 64))
          : g.in_channels + g.out_channels;
  if (blocks > kMostBlocks)
    return name + " cuts channels into at most " + std::to_string(kMostBlocks) + " blocks on CUDA, but needs up to " +
           std::to_string(blocks);
  return size_refusal(name, g);
}

double cuda_cost(Algorithm algorithm, const ConvProblem& problem) {
  constexpr double scalar = 20, windows = 1.3;
  const int64_t element_size = problem.dtype == Dtype::float64 ? 8 : problem.dtype == Dtype::float32 ? 4 : 2;
  const double multiply_adds = static_cast<double>(problem.geometry.multiply_adds());
  double cost = scalar * multiply_adds;
  if (algorithm == Algorithm::implicit_gemm) cost = implicit_gemm_cost(problem, element_size);
  if (algorithm == Algorithm::winograd) cost = winograd_cost(problem);
  if (algorithm == Algorithm::direct) cost = direct_cost(problem);
  if (algorithm == Algorithm::inner_product) cost = inner_product_cost(problem, element_size);
  if (algorithm == Algorithm::depthwise) cost = windows * multiply_adds;
  return cost + kPerByte * static_cast<double>(problem.geometry.bytes(element_size));
}

}  // namespace convlab
