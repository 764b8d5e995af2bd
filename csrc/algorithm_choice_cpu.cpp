// What the kernels for the CPU refuse, and what they are expected to cost. The constants were fitted on a Zen 5 for
// AVX-512 and on a Zen 3 for AVX2, against the layers of bench/families.py and of timm's models; those that
// cpu::halves_avx512() decides on besides on a Zen 4, amx's on an Intel Xeon. They are ratios of work to work, so they
// move little with the machine.
#include <algorithm>
#include <cmath>

#include "algorithm_choice.h"
#include "cpu/conv_kernels.h"
#include "refusal_text.h"
#include "winograd_cut.h"

namespace convlab {

namespace {

// The channels per group on the side that is read.
int64_t read_channels(const ConvProblem& problem) {
  const ConvGeometry& g = problem.geometry;
  return problem.pass == Pass::backward_input ? g.out_channels_per_group() : g.in_channels_per_group();
}

// On the side that is written; of the weight's gradient, the filters.
int64_t written_channels(const ConvProblem& problem) {
  const ConvGeometry& g = problem.geometry;
  return problem.pass == Pass::backward_input ? g.in_channels_per_group() : g.out_channels_per_group();
}

// Whether a matrix product multiplies two neighbours at a time.
bool in_pairs(const ConvProblem& problem) { return problem.dtype == Dtype::bfloat16 && cpu::multiplies_bfloat16(); }

// Of a vector of float32 or float64.
int64_t lanes_of(Dtype dtype) {
  const cpu::Capability capability = cpu::capability();
  const int64_t lanes = capability == cpu::Capability::avx512 ? 16 : capability == cpu::Capability::avx2 ? 8 : 4;
  return dtype == Dtype::float64 ? lanes / 2 : lanes;
}

// Of `direct`, whose vectors may be shorter than those of the others.
bool direct_halves(const ConvProblem& problem) {
  return !in_pairs(problem) && cpu::direct_halves(problem.pass, written_channels(problem), problem.geometry.strided());
}
int64_t direct_lanes(const ConvProblem& problem) {
  return direct_halves(problem) ? lanes_of(problem.dtype) / 2 : lanes_of(problem.dtype);
}

// AVX-512, whose products are twice as fast; what is around them is not.
bool wide_vectors() { return lanes_of(Dtype::float32) > 8; }

std::string strassen_refusal(const ConvProblem& problem, bool in_words) {
  constexpr int64_t most = 2048;  // a sum of so many is as long as in no other algorithm
  const int64_t read = read_channels(problem), written = written_channels(problem), step = 2 * lanes_of(problem.dtype);
  if (problem.pass == Pass::backward_weight)
    return because(in_words, "strassen computes the forward pass and the gradient of the input, not of the weight");
  if (problem.pass == Pass::backward_input && problem.geometry.strided())
    return because(in_words, "strassen needs stride 1 in backward input, but stride is ", problem.geometry.stride);
  if (problem.dtype != Dtype::float32 && problem.dtype != Dtype::float64)
    return because(in_words, "strassen computes in float32 and float64");
  if (problem.layout != Layout::channels_last) return because(in_words, "strassen needs channels_last tensors");
  if (read % step != 0 || written % step != 0 || read == 0 || written == 0 || read > most)
    return because(in_words, "strassen needs channels in multiples of ", step, " on this CPU and reads at most ", most,
                   ", but reads ", read, " and writes ", written);
  return {};
}

std::string amx_refusal(const ConvProblem& problem, bool in_words) {
  if (problem.dtype == Dtype::float64)
    return because(in_words, "amx multiplies bfloat16, of which float64 would need seven parts");
  return {};
}

// A weight that is brought into a kernel's order, or whose gradient comes from it.
constexpr double kPerPacked = 16, kPerWritten = 2;

double packing_cost(const ConvProblem& problem) {
  return problem.packed ? 0 : kPerPacked * static_cast<double>(problem.geometry.weight_elements());
}

// Winograd's transforms handle whole vectors of channels; 16 is the widest.
double in_whole_vectors(int64_t channels) { return static_cast<double>((channels + 15) / 16 * 16); }

double winograd_cost(const ConvProblem& problem) {
  const ConvGeometry& g = problem.geometry;
  const WinogradCut cut = winograd_cut(g);
  const bool forward = problem.pass != Pass::backward_input, line = cut.axis[0].taps == 1 || cut.axis[1].taps == 1;
  const int64_t* written = forward ? g.output : g.input;
  // Per row and channel; by halves, forward, tiles are of 9x9 pixels, none of them read twice.
  const double per_output = 12, per_input = cut.halves && forward ? 24 : 12;
  const int64_t channels = read_channels(problem), filters = written_channels(problem);
  // Rows of the matrix products along an axis.
  const auto rows = [&](int index) {
    const WinogradAxis& axis = cut.axis[index];
    // Those of one residue, with dilation; the parts of a strided image are channels of what is read or, in backward
    // input, written.
    const int64_t step = forward ? axis.spread : axis.spread * g.stride[index + 1];
    const int64_t outputs = ceil_divide(written[index + 1], step);
    if (cut.halves) return 2 * outputs + ceil_divide<int64_t>(outputs, 4);
    if (axis.taps == 3 && !line) return outputs + 2 * ceil_divide<int64_t>(outputs, 4);
    return axis.points() * ceil_divide(outputs, axis.outputs());
  };
  const bool weight = problem.pass == Pass::backward_weight;
  const auto points = static_cast<double>(cut.axis[0].points() * cut.axis[1].points());
  const double images = static_cast<double>(g.batch * written[0] * cut.spread());
  const double tiles = images * static_cast<double>(rows(0) * rows(1)) / points;
  // Few tiles transform the weights piece by piece, in every call.
  const double per_weight = weight ? 7 : tiles <= 128 ? 12 : problem.packed ? 0 : 7;
  // The taps of a cell lie apart in the kernel.
  const double scattered_weight = !weight || line || cut.cells() == 1       ? 0
                                  : problem.layout == Layout::channels_last ? 40
                                                                            : 15;
  // Each tap along z and each cell reads channels of its own.
  const auto parts = static_cast<double>(cut.parts());
  const double read_cells =
      static_cast<double>(g.kernel[0] * cut.axis[0].segments * cut.axis[1].segments) * (forward ? parts : 1);
  const double written_parts = forward ? 1 : parts;
  const double read = read_cells * static_cast<double>(channels);
  const double c = read_cells * in_whole_vectors(channels);
  const double k = written_parts * in_whole_vectors(filters);
  // Backward weight reads and writes its sums once per round of 128 tiles of 36 rows, or 64 of 81.
  const double round = cut.halves ? 144 : 128 * 36 / points;
  const double rounds = weight ? 1 + std::ceil(tiles / round) : 1;
  const double transforms =
      tiles * (c * per_input + k * per_output) + read * k * (per_weight * rounds + scattered_weight);
  const int64_t vector = lanes_of(problem.dtype);
  // Rows of backward weight's products: cells are filled up to whole vectors, unless they are joined.
  const auto lanes = static_cast<double>(ceil_divide(channels, vector) * vector);
  const double filled = weight && cut.cells() > 1 && !cut.joined(channels, vector)
                            ? lanes / static_cast<double>(std::max<int64_t>(1, channels))
                            : 1;
  // The products of groups of one vector are too small to be fast, unless the CPU takes two cycles for each.
  const int64_t narrowest = cpu::halves_avx512() ? vector : 2 * vector;
  const double narrow = g.groups > 1 && filters < narrowest && !weight ? 2.5 : 1;
  const double scattered = cut.spread() > 1 ? 1.2 : 1;
  const double lines = line ? 1.3 : 1;
  // Where products are fast, those of lines of few planes are hard to beat (conv_lines_weight.h).
  const bool planes =
      weight && wide_vectors() && channels <= 4 && (problem.layout == Layout::channels_first || filters <= 4 * vector);
  const double few = planes ? 1.35 : 1;
  // What is not a plain 3x3 kernel takes longer on Intel's CPUs, of which those with tiles were measured.
  const bool plain = cut.spread() == 1 && cut.cells() == 1 && parts == 1;
  const double apart = cpu::multiplies_tiles() && !plain && !line ? 1.3 : 1;
  const double strided = cpu::halves_avx512() && weight && g.strided() && channels >= 16 ? 0.8 : 1;
  return strided * apart * few * narrow * scattered * lines * points * static_cast<double>(g.groups) *
         (tiles * read * filled * k + transforms);
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
  constexpr double per_sum = 1.5;
  constexpr double dots = 1.8;
  constexpr int64_t few = 8, lanes = 16, few_filters = 4;
  const ConvGeometry& g = problem.geometry;
  int64_t written = written_channels(problem);
  // There the tensors exchange roles (conv_gemm_weight.h).
  if (problem.pass == Pass::backward_weight && g.groups == 1 && !g.strided() && written <= few_filters && g.taps() > 1)
    written = std::max(written, g.in_channels);
  const bool pairs = in_pairs(problem);
  const int64_t read = read_channels(problem);
  // Lines of which every third pixel or less is read are gathered one by one.
  const bool sparse = problem.layout == Layout::channels_first && problem.pass == Pass::forward && g.stride[2] > 2;
  const double per_gathered = sparse ? 80 : 8;
  const double inside = problem.pass == Pass::backward_weight ? 1 : taps_inside(g);
  const double multiply_adds = static_cast<double>(g.multiply_adds()) * inside;
  // The sums of a gradient of few pixels are kept where they belong.
  const bool in_place = problem.pass == Pass::backward_weight && g.taps() == 1;
  const double packing = in_place ? kPerWritten * static_cast<double>(g.weight_elements()) : packing_cost(problem);
  if (problem.pass != Pass::backward_weight && read > 0 && written > 0) {
    if (written <= few && 4 * read >= 3 * lanes) return dots * multiply_adds + packing;
    // Planes. With AVX2, few channels of channels_last alone are worth transposing.
    const bool last = problem.layout == Layout::channels_last, wide = wide_vectors();
    const double each = pairs && cpu::multiplies_tiles() ? 1.8 : wide ? 1.2 : 0.9, per_plane_read = wide ? 3 : 1.8;
    const double per_plane_written = !wide ? 1.8 : last ? 2 : 0.4;
    if (g.taps() > 1 && written <= (pairs ? few : wide ? lanes : last ? 12 : 15))
      return multiply_adds * (each + per_plane_read / static_cast<double>(written) +
                              per_plane_written / static_cast<double>(read)) +
             packing;
  }
  // Sums of one or two terms cost what is around them.
  const auto terms = static_cast<double>(std::max<int64_t>(1, read * g.taps()));
  // CPUs that multiply tiles take their time for pairs.
  const double of_tiles = terms >= 32 ? 1.4 : 1, of_others = problem.pass == Pass::backward_weight ? 0.75 : 0.5;
  const double product = !pairs ? 1 : cpu::multiplies_tiles() ? of_tiles : of_others;
  const double around = problem.pass == Pass::backward_weight ? 0 : per_sum / (terms * terms);
  // Small groups of strided pixels, measured where direct has short vectors for them.
  const bool halves = g.groups > 1 && problem.pass == Pass::backward_weight && direct_halves(problem);
  return multiply_adds * (halves ? 2 : 1) *
             (product + per_gathered / static_cast<double>(std::max<int64_t>(1, written)) + around) +
         packing;
}

// Groups whose written channels fill vectors have a matrix product's tile.
double direct_groups_cost(const ConvProblem& problem) {
  constexpr double per_tap = 1.2, per_column = 1.6, base = 1.05, shortest_sum = 8, short_sum = 64;
  const ConvGeometry& g = problem.geometry;
  const bool wide = wide_vectors(), last = problem.layout == Layout::channels_last;
  const int64_t written = written_channels(problem), lanes = direct_lanes(problem);
  const double filled = static_cast<double>(ceil_divide(written, lanes) * lanes) / static_cast<double>(written);
  const double read = static_cast<double>(std::max<int64_t>(1, read_channels(problem)));
  const bool pointwise = g.taps() == 1 && !g.strided() && read >= shortest_sum &&
                         (read < short_sum || static_cast<double>(written) <= 2 * read);
  // A few channels lie side by side in the strip, and taps cost little.
  const bool few = g.groups == 1 && read <= static_cast<double>(lanes) && g.taps() > 1 && !g.strided();
  // Against products whose rows are reached by pointers: small groups and short sums gain most, channels_last more than
  // lines that are transposed on the way in and out.
  double each = wide ? 1 : 1.05, tap = per_tap;
  const bool halves = direct_halves(problem);
  if (g.groups > 1 || pointwise) {
    each = halves ? 0.95 : 0.85;
  } else if (few) {
    each = wide && last ? 0.75 : 0.9;
    tap = wide && !last ? per_tap / 4 : 0;
  } else if (g.strided()) {
    each = wide && g.kernel[2] > g.stride[2] ? (halves && last ? 1.1 : 1) : 1.3;
    // Three channels and their like stand close in the strip.
    if (wide && last && !cpu::halves_avx512() && read <= 4 && g.stride[2] == 2 && g.kernel[2] > 2) tap = 0;
  }
  const bool quick = wide && (!halves || (g.strided() && problem.pass == Pass::forward));
  if (!last) each *= quick && g.taps() > 1 && g.kernel[0] == 1 ? 1.05 : halves && g.taps() == 1 ? 1.8 : 1.45;
  return static_cast<double>(g.multiply_adds()) * filled * each *
             (base + tap / read + per_column / static_cast<double>(written)) +
         packing_cost(problem);
}

// A multiply-add here comes with more loads than in a matrix product; lanes without a written channel idle.
double direct_cost(const ConvProblem& problem) {
  constexpr int64_t lanes = 16;
  constexpr double windows = 3, strided_windows = 7;
  const bool wide = wide_vectors();
  // Of backward weight. Strided ones of groups take longer where AVX-512 costs two of AVX2.
  const double weights = wide && problem.layout == Layout::channels_first ? 3.8 : 1.7;
  const double broadcast_weights =
      1.4 + (wide ? 0.6 / static_cast<double>(std::max<int64_t>(1, read_channels(problem))) : 0) +
      (direct_halves(problem) && problem.geometry.groups > 1 ? 0.75 : 0);
  const ConvGeometry& g = problem.geometry;
  const int64_t written = written_channels(problem);
  const bool fills = written >= direct_lanes(problem);
  if (problem.pass != Pass::backward_weight && fills && !in_pairs(problem)) return direct_groups_cost(problem);
  const int64_t together = written >= lanes ? 1 : std::min(g.groups, lanes / std::max<int64_t>(1, written));
  const double used = static_cast<double>(together * written) / in_whole_vectors(together * written);
  if (problem.pass == Pass::backward_weight)
    return static_cast<double>(g.multiply_adds()) * (fills ? broadcast_weights : weights) /
               std::max(used, 1.0 / lanes) +
           packing_cost(problem);
  // Windows are of 8 neighbouring pixels of a line.
  const int64_t width = problem.pass == Pass::backward_input ? g.input[2] : g.output[2];
  const double idle = static_cast<double>((width + 7) / 8 * 8) / static_cast<double>(std::max<int64_t>(1, width));
  const bool stepped = problem.pass == Pass::forward && g.strided();
  const double each = stepped ? strided_windows : windows;
  return static_cast<double>(g.multiply_adds()) * each * idle / std::max(used, 1.0 / lanes) + packing_cost(problem);
}

// Weights are not copied, but pixels may be, where their channels do not lie together. Lanes are channels of the input;
// forward, they are added up for each output.
double inner_product_cost(const ConvProblem& problem) {
  constexpr double forward = 1.5, backward = 2, per_output = 64, per_gathered = 16;
  // A gradient's task passes over all pixels, which no cache holds in the end.
  constexpr double many_pixels = 1024, uncached = 6;
  const ConvGeometry& g = problem.geometry;
  const double pixels = static_cast<double>(g.batch * g.input_pixels());
  const double products = pixels * static_cast<double>(g.out_channels) * in_whole_vectors(g.in_channels_per_group());
  const bool apart = problem.layout == Layout::channels_first;
  const double gathered = apart ? per_gathered * pixels * static_cast<double>(g.in_channels + g.out_channels) : 0;
  if (problem.pass != Pass::forward) return (pixels > many_pixels ? uncached : 1) * backward * products + gathered;
  return forward * products + per_output * pixels * static_cast<double>(g.out_channels) + gathered;
}

// The sums of pixels count where few channels are written, those of results where few are read, and the weight, half as
// large again, where there are few pixels. With AVX2, of two machines with the same CPU it was up to a tenth ahead of a
// plain product on one and up to a third behind on the other, where memory was slower: not worth its error.
double strassen_cost(const ConvProblem& problem) {
  constexpr double packing = 1.5, per_weight = 12;
  const bool wide = wide_vectors();
  const double product = wide ? 0.92 : 1.05;
  const double per_written = wide ? 16 : 9, per_read = wide ? 10 : 7;
  const auto read = static_cast<double>(read_channels(problem)),
             written = static_cast<double>(written_channels(problem));
  return static_cast<double>(problem.geometry.multiply_adds()) * (product + per_written / written + per_read / read) +
         packing * packing_cost(problem) + per_weight * static_cast<double>(problem.geometry.weight_elements());
}

// Between lines there are positions that nobody wants; neighbouring lines share them.
double with_gaps(const ConvGeometry& g, const int64_t* size, int axis) {
  const double reach =
      static_cast<double>((g.kernel[axis] - 1) * g.dilation[axis]) / static_cast<double>(g.stride[axis]);
  return static_cast<double>(size[axis]) + std::min(reach / 2, static_cast<double>(g.padding[axis]));
}

// Products of tiles that are filled up, copies of what is read, and what is done with sums; the last two take longer
// with more parts. In backward weight both tensors are copied once per 128 channels of the other.
double amx_cost(const ConvProblem& problem) {
  constexpr double tile = 16, software = 1e4;
  constexpr int64_t depth = 32, edge = 16, part = 128;
  const bool single = problem.dtype == Dtype::bfloat16, full = problem.dtype == Dtype::float32;
  const double products = single ? 1.3 : full ? 8 : 5.5;
  const double per_copied = single ? 12 : full ? 35 : 25, per_stored = single ? 12 : 17;
  const double per_turned = single ? 20 : 32, per_sum = 10;
  const auto whole = [](int64_t count, int64_t unit) { return static_cast<double>(ceil_divide(count, unit) * unit); };
  ConvGeometry g = problem.geometry;
  const bool last = problem.layout == Layout::channels_last, forward = problem.pass != Pass::backward_input;
  int64_t read = read_channels(problem);
  // Per axis, what each tap along z or each residue reads has a copy of its own.
  const auto copies = [&](int axis) {
    return static_cast<double>(axis == 0 ? g.kernel[axis] : std::min(g.stride[axis], g.kernel[axis]));
  };
  double copied = static_cast<double>(forward ? g.batch * g.output_pixels() * g.in_channels : g.output_elements()) *
                  copies(0) * (forward ? copies(1) * copies(2) : 1);
  // Taps of a kernel line that are channels (conv_spans.h).
  if (last && forward && g.groups == 1 && g.dilation[2] == 1 &&
      whole(read * g.kernel[2], depth) < whole(read, depth) * static_cast<double>(g.kernel[2])) {
    copied *= static_cast<double>(g.kernel[2]) / copies(2);
    read *= g.kernel[2];
    g.kernel[2] = 1;
  }
  const int64_t* written_size = forward ? g.output : g.input;
  const double positions = static_cast<double>(g.batch * written_size[0]) * with_gaps(g, written_size, 1) *
                           with_gaps(g, written_size, 2) /
                           (forward ? 1 : static_cast<double>(g.stride[0] * g.stride[1] * g.stride[2]));
  const int64_t written = written_channels(problem);
  const auto groups = static_cast<double>(g.groups), taps = static_cast<double>(g.taps());
  // Channels first, lines are transposed on the way; those of strided pixels are gathered, in 16 bits one by one.
  const double gathered = g.stride[2] > 1 ? (full ? 2 : 4) : 1.5;
  const double format = last ? 1 : gathered, packing = full ? 3.5 : 2;
  if (!cpu::multiplies_tiles()) return software * static_cast<double>(g.multiply_adds());
  if (problem.pass == Pass::backward_weight) {
    const double sums = whole(read, edge) * whole(written, edge) * taps * groups;
    if (!last) copied *= whole(g.output[2], depth) / static_cast<double>(g.output[2]);  // by parts of a line
    return std::max<double>(positions, depth) * sums * products / tile +
           format * per_turned *
               (copied * whole(written, part) / part +
                static_cast<double>(g.output_elements()) * whole(read, part) / part) +
           per_sum * sums;
  }
  // The padding of a tile is copied as well, and short lines one after the other.
  if (groups > 1 && read < depth) copied *= 2.5;
  copied *= whole(read, depth) / static_cast<double>(std::max<int64_t>(1, read));
  if (!forward) copied *= static_cast<double>(g.stride[0] * g.stride[1] * g.stride[2]);  // once per phase
  const double stored = static_cast<double>(forward ? g.output_elements() : g.input_elements());
  return positions * whole(read, depth) * whole(written, edge) * taps * groups * products / tile +
         format * (per_copied * copied + per_stored * stored) + packing * packing_cost(problem);
}

}  // namespace

std::string cpu_refusal(Algorithm algorithm, const ConvProblem& problem, bool in_words) {
  constexpr int64_t most = 64;
  if (algorithm == Algorithm::direct && read_channels(problem) > most)
    return because(in_words, "direct reads at most ", most, " channels per group, but has to read ",
                   read_channels(problem));
  if (algorithm == Algorithm::strassen) return strassen_refusal(problem, in_words);
  if (algorithm == Algorithm::amx) return amx_refusal(problem, in_words);
  return {};
}

double cpu_cost(Algorithm algorithm, const ConvProblem& problem) {
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
    case Algorithm::strassen:
      return strassen_cost(problem);
    case Algorithm::amx:
      return amx_cost(problem);
    default:
      return implicit_gemm_cost(problem);
  }
}

}  // namespace convlab
