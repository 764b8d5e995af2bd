// Convolution: checks, output, algorithm, kernels. The three passes differ in which tensor is written.
#include "convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../algorithm_choice.h"
#include "../cpu/conv_kernels.h"
#include "convolution_checks.h"

namespace convlab {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using OptionalTensor = std::optional<Tensor>;

namespace {

Layout joint_layout(const Tensor& first, const Tensor& second) {
  const bool last =
      layout_of(with_height(first)) == Layout::channels_last || layout_of(with_height(second)) == Layout::channels_last;
  return last ? Layout::channels_last : Layout::channels_first;
}

ConvGeometry make_geometry(IntArrayRef input, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, int64_t groups) {
  ConvGeometry geometry;
  geometry.batch = input[0];
  geometry.in_channels = input[1];
  geometry.out_channels = weight[0];
  geometry.groups = groups;
  const size_t spatial = stride.size(), unused = kMaxSpatial - spatial;
  for (size_t axis = 0; axis < spatial; ++axis) {
    geometry.input[unused + axis] = input[axis + 2];
    geometry.kernel[unused + axis] = weight[axis + 2];
    geometry.stride[unused + axis] = stride[axis];
    geometry.padding[unused + axis] = padding[axis];
    geometry.dilation[unused + axis] = dilation[axis];
  }
  geometry.set_output_size();
  return geometry;
}

Dtype dtype_of(const Tensor& tensor) {
  Dtype dtype = Dtype::float32;
  dispatch_dtype(tensor.scalar_type(), "convolution", [&](auto type) {
    using T = decltype(type);
    dtype = std::is_same_v<T, double>     ? Dtype::float64
            : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
            : std::is_same_v<T, float16>  ? Dtype::float16
                                          : Dtype::float32;
  });
  return dtype;
}

Algorithm algorithm_by_name(std::string_view name, const ConvGeometry& geometry, Pass pass, const Tensor& tensor) {
  const ConvProblem problem{geometry, pass, dtype_of(tensor), tensor.is_cpu() ? Device::cpu : Device::cuda};
  if (name == "auto") return choose_algorithm(problem);
  std::string known = "auto";
  for (int index = 0; index < kAlgorithms; ++index) {
    const auto algorithm = static_cast<Algorithm>(index);
    known += std::string(", ") + algorithm_name(algorithm);
    if (name != algorithm_name(algorithm)) continue;
    const std::string reason = refusal(algorithm, problem);
    TORCH_CHECK(reason.empty(), "algorithm='", name, "' cannot compute this convolution: ", reason);
    return algorithm;
  }
  TORCH_CHECK_VALUE(false, "unknown algorithm '", name, "', expected one of: ", known);
}

// Ranges smaller than this many multiply-adds are not worth a thread.
constexpr int64_t kMultiplyAddsPerThread = 1 << 16;

template <class T>
void run_on_cpu(Algorithm algorithm, cpu::ConvArguments<T> arguments) {
  const auto kernels = cpu::conv_kernels<T>().algorithm[static_cast<int>(algorithm)];
  const cpu::ConvPlan plan = kernels.plan(arguments);
  arguments.shared = thread_scratch(0, plan.shared_bytes);
  const int64_t cost = arguments.geometry.multiply_adds() / plan.rounds / std::max<int64_t>(1, plan.run_tasks) + 1;
  const int64_t grain = std::max<int64_t>(1, kMultiplyAddsPerThread / cost);
  const int64_t copied = plan.shared_bytes / 4 / std::max<int64_t>(1, plan.prepare_tasks) + 1;
  const int64_t copy_grain = std::max<int64_t>(1, kMultiplyAddsPerThread / 4 / copied);
  for (arguments.round = 0; arguments.round < plan.rounds; ++arguments.round) {
    parallel(plan.prepare_tasks, copy_grain, [&](int64_t begin, int64_t end) {
      kernels.prepare(arguments, thread_scratch(1, plan.scratch_bytes), begin, end);
    });
    parallel(plan.run_tasks, grain, [&](int64_t begin, int64_t end) {
      kernels.run(arguments, thread_scratch(1, plan.scratch_bytes), begin, end);
    });
  }
  parallel(plan.finish_tasks, copy_grain, [&](int64_t begin, int64_t end) { kernels.finish(arguments, begin, end); });
}

// Runs one pass. The two tensors that are read may have any strides; the third, just allocated, is dense in
// `layout` (the weight in either format).
void run(Algorithm algorithm, Pass pass, const ConvGeometry& geometry, Layout layout, Tensor input, Tensor weight,
         Tensor output, const OptionalTensor& bias) {
  input = with_height(input);
  weight = with_height(weight);
  output = with_height(output);
  const auto format = memory_format(layout, input.dim());
  input = input.contiguous(format);
  output = output.contiguous(format);
  weight = weight.contiguous(weight.suggest_memory_format());
  const bool channel_is_contiguous = layout_of(weight) == Layout::channels_last;
  const Tensor dense_bias = bias.has_value() && bias->defined() ? bias->contiguous() : Tensor();
  dispatch_dtype(input.scalar_type(), "convolution", [&](auto type) {
    using T = decltype(type);
    cpu::ConvArguments<T> arguments;
    arguments.geometry = geometry;
    arguments.threads = at::get_num_threads();
    arguments.pass = pass;
    arguments.layout = layout;
    arguments.input = const_cast<T*>(const_data<T>(input));
    arguments.weight = const_cast<T*>(const_data<T>(weight));
    arguments.output = const_cast<T*>(const_data<T>(output));
    arguments.bias = dense_bias.defined() ? const_data<T>(dense_bias) : nullptr;
    arguments.weight_stride_channel = channel_is_contiguous ? 1 : geometry.taps();
    arguments.weight_stride_tap = channel_is_contiguous ? geometry.in_channels_per_group() : 1;
    run_on_cpu<T>(algorithm, arguments);
  });
}

// Sums over nothing are zero, plus the bias if there is one.
Tensor& fill_with_bias(Tensor& result, const OptionalTensor& bias) {
  result.zero_();
  if (bias.has_value() && bias->defined()) {
    std::vector<int64_t> shape(static_cast<size_t>(result.dim()), 1);
    shape[1] = bias->numel();
    result.add_(bias->view(shape));
  }
  return result;
}

}  // namespace

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  check_bias<int64_t>(bias, input, weight.size(0), weight.sizes());
  const auto geometry = make_geometry(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const Algorithm chosen = algorithm_by_name(algorithm, geometry, Pass::forward, input);
  const Layout layout = joint_layout(input, weight);
  Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  if (geometry.multiply_adds() == 0) return fill_with_bias(output, bias);
  run(chosen, Pass::forward, geometry, layout, input, weight, output, bias);
  return output;
}

Tensor convolution_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view) {
  const auto size = check_convolution<SymInt>(input.sym_sizes(), weight.sym_sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  check_bias<SymInt>(bias, input, weight.sym_size(0), weight.sym_sizes());
  return empty_in_layout(SymIntArrayRef(size), input, joint_layout(input, weight));
}

Tensor convolution_backward_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                  IntArrayRef input_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                  int64_t groups, std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input_size, weight.sizes(), stride, padding, dilation, groups);
  check_size<int64_t>("grad_output", grad_output.sizes(), size);
  check_same_type("grad_output", grad_output, "weight", weight);
  check_bias<int64_t>(bias, grad_output, input_size[1], weight.sizes());
  const auto geometry = make_geometry(input_size, weight.sizes(), stride, padding, dilation, groups);
  const Algorithm chosen = algorithm_by_name(algorithm, geometry, Pass::backward_input, grad_output);
  const Layout layout = joint_layout(grad_output, weight);
  Tensor grad_input = empty_in_layout(input_size, grad_output, layout);
  if (geometry.multiply_adds() == 0) return fill_with_bias(grad_input, bias);
  run(chosen, Pass::backward_input, geometry, layout, grad_input, weight, grad_output, bias);
  return grad_input;
}

Tensor convolution_backward_input_meta(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                       SymIntArrayRef input_size, SymIntArrayRef stride, SymIntArrayRef padding,
                                       SymIntArrayRef dilation, SymInt groups, std::string_view) {
  const auto size = check_convolution<SymInt>(input_size, weight.sym_sizes(), stride, padding, dilation, groups);
  check_size<SymInt>("grad_output", grad_output.sym_sizes(), size);
  check_same_type("grad_output", grad_output, "weight", weight);
  check_bias<SymInt>(bias, grad_output, input_size[1], weight.sym_sizes());
  return empty_in_layout(input_size, grad_output, joint_layout(grad_output, weight));
}

Tensor convolution_backward_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size,
                                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input.sizes(), weight_size, stride, padding, dilation, groups);
  check_size<int64_t>("grad_output", grad_output.sizes(), size);
  check_same_type("grad_output", grad_output, "input", input);
  const auto geometry = make_geometry(input.sizes(), weight_size, stride, padding, dilation, groups);
  const Algorithm chosen = algorithm_by_name(algorithm, geometry, Pass::backward_weight, input);
  const Layout layout = joint_layout(grad_output, input);
  Tensor grad_weight = empty_in_layout(weight_size, input, layout);
  if (geometry.multiply_adds() == 0) return fill_with_bias(grad_weight, std::nullopt);
  run(chosen, Pass::backward_weight, geometry, layout, input, grad_weight, grad_output, std::nullopt);
  return grad_weight;
}

Tensor convolution_backward_weight_meta(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size,
                                        SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                        SymInt groups, std::string_view) {
  const auto size = check_convolution<SymInt>(input.sym_sizes(), weight_size, stride, padding, dilation, groups);
  check_size<SymInt>("grad_output", grad_output.sym_sizes(), size);
  check_same_type("grad_output", grad_output, "input", input);
  return empty_in_layout(weight_size, input, joint_layout(grad_output, input));
}

}  // namespace convlab
