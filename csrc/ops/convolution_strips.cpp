// Pointwise and depthwise convolutions in a row, a strip of lines at a time.
//
// Idea: mobile networks expand a pixel's channels, mostly six-fold, convolve each channel by itself, and project them
// back. What lies between are their largest tensors, which leave the caches before they are read. Here each thread
// takes some lines through all layers by itself, in scratch memory that stays in its L2. Cost: that of the layers, and
// the lines that two strips read are expanded twice. Memory: per thread about 2 * kStripBytes, in place of the tensors
// between. Limits: channels_last, two dimensions, packed weights, algorithms whose results do not depend on how lines
// are cut; nothing is gained where the tensors between are small, and lost where strips share many of their lines.
// Lines of the padding are zeros that are multiplied: an infinite weight makes NaN of them.
#include "convolution_strips.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

#include "convolution.h"
#include "convolution_cpu.h"

namespace convlab {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kStripBytes = int64_t{448} << 10;  // of the expanded lines; with the rest, of an L2 of 1 MiB
constexpr int64_t kLeastBytes = int64_t{256} << 10;  // of all of them: less stays in the caches anyway
constexpr double kMostExpandedTwice = 0.2;           // of the lines
constexpr int kStripScratch = 3;                     // beside the kernels' own slots

bool all(at::IntArrayRef values, int64_t value) {
  return std::all_of(values.begin(), values.end(), [&](int64_t each) { return each == value; });
}

bool is_valid(const StripLayer& layer) {
  const auto least = [](at::IntArrayRef values, int64_t value) {
    return values.size() == 2 && std::all_of(values.begin(), values.end(), [&](int64_t each) { return each >= value; });
  };
  return least(layer.stride, 1) && least(layer.padding, 0) && least(layer.dilation, 1);
}
bool is_pointwise(const StripLayer& layer, int64_t channels) {
  const Tensor& weight = layer.weight;
  return weight.dim() == 4 && weight.size(1) == channels && all(weight.sizes().slice(2), 1) && layer.groups == 1 &&
         all(layer.stride, 1) && all(layer.padding, 0);
}
bool is_depthwise(const StripLayer& layer, int64_t channels) {
  return layer.weight.dim() == 4 && layer.weight.size(0) == channels && layer.weight.size(1) == 1 &&
         layer.groups == channels && all(layer.dilation, 1) && !layer.residual.has_value();
}
bool is_channels_last(const Tensor& tensor) {
  return tensor.dim() == 4 && layout_of(tensor) == Layout::channels_last &&
         tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// One layer and its kernels.
template <class T>
class Layer {
 public:
  // Of all lines. Whether `packed` is what its kernels read, and they need no more than one round of tasks.
  bool set(const StripLayer& layer, at::IntArrayRef input) {
    ConvGeometry& g = arguments_.geometry;
    g.batch = input[0], g.in_channels = input[1], g.out_channels = layer.weight.size(0), g.groups = layer.groups;
    for (size_t axis = 1; axis < kMaxSpatial; ++axis) {
      g.input[axis] = input[axis + 1];
      g.kernel[axis] = layer.weight.size(static_cast<int64_t>(axis) + 1);
      g.stride[axis] = layer.stride[axis - 1], g.padding[axis] = layer.padding[axis - 1];
      if (g.input[axis] + 2 * g.padding[axis] < g.kernel[axis]) return false;
    }
    g.set_output_size();
    arguments_.layout = Layout::channels_last;
    arguments_.weight = const_cast<T*>(const_data<T>(layer.weight));
    arguments_.bias = const_data<T>(layer.bias);
    arguments_.residual = const_data<T>(layer.residual);
    arguments_.activation = {layer.lower, layer.upper, gate_by_name(layer.gate)};
    const bool channel_is_contiguous = layout_of(layer.weight) == Layout::channels_last;
    arguments_.weight_stride_channel = channel_is_contiguous ? 1 : g.taps();
    arguments_.weight_stride_tap = channel_is_contiguous ? g.in_channels_per_group() : 1;
    return fits(layer) && find_kernels(layer);
  }

  const ConvGeometry& geometry() const { return arguments_.geometry; }
  std::array<int64_t, 4> output_size() const {
    const ConvGeometry& g = geometry();
    return {g.batch, g.out_channels, g.output[1], g.output[2]};
  }
  int64_t line_read() const { return geometry().input[2] * geometry().in_channels; }
  int64_t line_written() const { return geometry().output[2] * geometry().out_channels; }

  // Some lines, without padding above and below; `offset` is where `output` lies in what the layer writes.
  void run(const T* input, T* output, int64_t lines, int64_t offset) const {
    cpu::ConvArguments<T> own = arguments_;
    own.geometry.batch = 1;
    own.geometry.input[1] = lines;
    own.geometry.padding[1] = 0;
    own.geometry.set_output_size();
    own.input = const_cast<T*>(input), own.output = output;
    if (own.residual) own.residual += offset;
    const cpu::ConvPlan plan = kernels_.plan(own);
    TORCH_INTERNAL_ASSERT(is_plain(plan));
    kernels_.run(own, thread_scratch(1, plan.scratch_bytes), 0, plan.run_tasks);
  }

 private:
  // What the checks of convolution_fused would let pass, as it lies in memory.
  bool fits(const StripLayer& layer) const {
    const auto size = output_size();
    const auto dtype = layer.weight.dtype();
    return (!layer.bias.has_value() || (layer.bias->dim() == 1 && layer.bias->numel() == size[1] &&
                                        layer.bias->is_contiguous() && layer.bias->dtype() == dtype)) &&
           (!layer.residual.has_value() || (layer.residual->sizes() == at::IntArrayRef(size) &&
                                            is_channels_last(*layer.residual) && layer.residual->dtype() == dtype)) &&
           layer.packed.has_value() && layer.packed->numel() >= static_cast<int64_t>(sizeof(PackedHeader));
  }
  bool find_kernels(const StripLayer& layer) {
    const Tensor& packed = *layer.packed;
    const auto algorithm = static_cast<Algorithm>(static_cast<const PackedHeader*>(packed.const_data_ptr())->fields[0]);
    if (!cuts_lines(algorithm) || !is_taken(algorithm, layer)) return false;
    kernels_ = cpu::conv_kernels<T>(algorithm, arguments_);
    const cpu::ConvPlan plan = kernels_.plan(arguments_);
    arguments_.packed = const_cast<char*>(static_cast<const char*>(packed.const_data_ptr())) + sizeof(PackedHeader);
    return !joins_map(algorithm, arguments_.geometry) && is_plain(plan) &&
           PackedHeader(algorithm, arguments_, Layout::channels_last, plan).heads(packed);
  }
  // Whether a line's results are the same to the bit whichever lines are computed with it, and need no workspace.
  static bool cuts_lines(Algorithm algorithm) {
    return algorithm == Algorithm::implicit_gemm || algorithm == Algorithm::direct || algorithm == Algorithm::depthwise;
  }
  // Whether the layer by itself would be computed by this algorithm.
  bool is_taken(Algorithm algorithm, const StripLayer& layer) const {
    if (layer.algorithm != "auto") return layer.algorithm == algorithm_name(algorithm);
    if (settings().autotune && settings().algorithm < 0) return false;
    ConvGeometry joined = geometry();
    join_axes(joined);
    const Dtype dtype = dtype_of(layer.weight.scalar_type(), "convolution");
    return choose_algorithm({joined, Pass::forward, dtype, Device::cpu, false, true, Layout::channels_last}) ==
           algorithm;
  }
  static bool is_plain(const cpu::ConvPlan& plan) {
    return plan.rounds == 1 && plan.prepare_tasks == 0 && plan.finish_tasks == 0 && plan.shared_bytes == 0;
  }

  cpu::ConvArguments<T> arguments_;
  cpu::ConvKernels<T> kernels_;
};

// How the lines that a depthwise convolution writes are cut.
class Strips {
 public:
  // As few strips as fit into kStripBytes, and one for each thread.
  Strips(const ConvGeometry& depthwise, int64_t line_bytes) : g_(depthwise) {
    const int64_t written = g_.output[1], threads = at::get_num_threads();
    const int64_t fit = std::max<int64_t>(1, (kStripBytes / line_bytes - g_.kernel[1]) / g_.stride[1] + 1);
    count_ = std::max(divided(written, fit), std::min(written, divided(threads, g_.batch)));
    rows_ = divided(written, count_);
    count_ = divided(written, rows_);
    const auto twice = static_cast<double>((count_ - 1) * std::max<int64_t>(0, g_.kernel[1] - g_.stride[1]));
    worthwhile_ =
        lines(rows_) * line_bytes <= 2 * kStripBytes && twice <= kMostExpandedTwice * static_cast<double>(g_.input[1]);
  }

  bool worthwhile() const { return worthwhile_; }
  int64_t in_all() const { return g_.batch * count_; }
  int64_t rows() const { return rows_; }                                                  // written, at most
  int64_t lines(int64_t rows) const { return (rows - 1) * g_.stride[1] + g_.kernel[1]; }  // read

  struct Strip {
    int64_t image, row, rows;                  // written
    int64_t begin, end, above, inside, below;  // read: lines [begin, end) of the image, and how many lie where
  };
  Strip at(int64_t index) const {
    Strip strip;
    strip.image = index / count_, strip.row = index % count_ * rows_;
    strip.rows = std::min(rows_, g_.output[1] - strip.row);
    const int64_t first = strip.row * g_.stride[1] - g_.padding[1], height = g_.input[1];
    strip.begin = std::clamp<int64_t>(first, 0, height);
    strip.end = std::clamp<int64_t>(first + lines(strip.rows), strip.begin, height);
    strip.inside = strip.end - strip.begin;
    strip.above = std::clamp<int64_t>(-first, 0, lines(strip.rows));
    strip.below = lines(strip.rows) - strip.above - strip.inside;
    return strip;
  }

 private:
  static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

  const ConvGeometry& g_;
  int64_t count_, rows_;  // strips per image
  bool worthwhile_;
};

template <class T>
OptionalTensor run_strips(const Tensor& input, c10::ArrayRef<StripLayer> layers) {
  Layer<T> expand, convolve, project;
  const bool projects = layers.size() == 3;
  if (!expand.set(layers[0], input.sizes()) || !convolve.set(layers[1], expand.output_size())) return std::nullopt;
  if (projects && !project.set(layers[2], convolve.output_size())) return std::nullopt;
  const int64_t line = convolve.line_read(), written = convolve.line_written();
  const Strips strips(convolve.geometry(), line * static_cast<int64_t>(sizeof(T)));
  if (!strips.worthwhile()) return std::nullopt;

  const Layer<T>& last = projects ? project : convolve;
  const Tensor output = empty_in_layout(at::IntArrayRef(last.output_size()), input, Layout::channels_last);
  const T* from = const_data<T>(input);
  T* to = mutable_data<T>(output);
  const int64_t expanded = strips.lines(strips.rows()) * line, convolved = projects ? strips.rows() * written : 0;
  parallel(strips.in_all(), 1, [&](int64_t begin, int64_t end) {
    T* const between =
        static_cast<T*>(thread_scratch(kStripScratch, (expanded + convolved) * static_cast<int64_t>(sizeof(T))));
    for (int64_t index = begin; index < end; ++index) {
      const auto strip = strips.at(index);
      T* const inside = std::fill_n(between, strip.above * line, T{});
      std::fill_n(inside + strip.inside * line, strip.below * line, T{});
      if (strip.inside > 0)
        expand.run(from + (strip.image * expand.geometry().input[1] + strip.begin) * expand.line_read(), inside,
                   strip.inside, 0);
      const int64_t offset = (strip.image * convolve.geometry().output[1] + strip.row) * last.line_written();
      T* const target = projects ? between + expanded : to + offset;
      convolve.run(between, target, strips.lines(strip.rows), 0);
      if (projects) project.run(target, to + offset, strip.rows, offset);
    }
  });
  return output;
}

}  // namespace

OptionalTensor convolution_strips(const Tensor& input, c10::ArrayRef<StripLayer> layers) {
  if (layers.size() < 2 || layers.size() > 3 || !is_channels_last(input) || input.numel() == 0) return std::nullopt;
  if (!std::all_of(layers.begin(), layers.end(), is_valid)) return std::nullopt;
  const int64_t channels = layers[0].weight.numel() > 0 ? layers[0].weight.size(0) : 0;
  const int64_t bytes = input.numel() / input.size(1) * channels * input.element_size();
  if (bytes < kLeastBytes || !is_pointwise(layers[0], input.size(1)) || layers[0].residual.has_value() ||
      !is_depthwise(layers[1], channels) || (layers.size() == 3 && !is_pointwise(layers[2], channels)))
    return std::nullopt;
  for (const StripLayer& layer : layers)
    if (layer.weight.dtype() != input.dtype()) return std::nullopt;
  OptionalTensor output;
  dispatch_dtype(input.scalar_type(), "convolution",
                 [&](auto type) { output = run_strips<decltype(type)>(input, layers); });
  return output;
}

}  // namespace convlab
