// Convolution: checks, output, algorithm, kernels. The three passes differ in which tensor is written.
#include "convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/silu.h>

#include <map>

#include "../algorithm_choice.h"
#include "autotune.h"
#include "convolution_checks.h"
#include "convolution_cpu.h"
#include "cuda.h"

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

// One pass. The two tensors that are read may have any strides; the third, just allocated, is dense in `layout` (the
// weight in either format).
struct Call {
  Pass pass;
  ConvGeometry geometry;
  Layout layout;
  Tensor input, weight, output;
  OptionalTensor bias, residual = std::nullopt;
  Activation activation;
  OptionalTensor packed = std::nullopt;  // the weight as pack_weight left it, if it is kept

  const Tensor& written() const {
    return pass == Pass::forward ? output : pass == Pass::backward_input ? input : weight;
  }
  ConvProblem problem() const {
    const Tensor& tensor = written();
    const bool on_cuda = runs_on_cuda(tensor);
    return {geometry,
            pass,
            dtype_of(tensor.scalar_type(), "convolution"),
            on_cuda ? Device::cuda : Device::cpu,
            on_cuda && tf32_is_allowed(),
            packed.has_value() && packed->defined(),
            layout};
  }
};

// The algorithm called `name`; none for "auto".
std::optional<Algorithm> algorithm_by_name(std::string_view name, const ConvProblem& problem) {
  if (name == "auto") return std::nullopt;
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

// The algorithm called `name`, or what `auto` takes; measured, if that is wanted, with a packed weight if one is kept.
template <class T>
Algorithm algorithm_for(const Call& call, const cpu::ConvArguments<T>& arguments, std::string_view name) {
  const ConvProblem problem = call.problem();
  if (const auto named = algorithm_by_name(name, problem)) return *named;
  if (!settings().autotune || settings().algorithm >= 0) return choose_algorithm(problem);
  std::map<Algorithm, Tensor> packed;
  return autotuned(problem, call.layout, arguments.threads, [&](Algorithm candidate) {
    if (problem.packed && packed.count(candidate) == 0) packed[candidate] = pack_weight(candidate, arguments);
    run_on_cpu<T>(candidate, arguments, problem.packed ? OptionalTensor(packed[candidate]) : std::nullopt);
  });
}

// The kernels' view of a call; the tensors that it points into are made dense in place.
template <class T>
cpu::ConvArguments<T> cpu_arguments(Call& call) {
  const auto in_layout = [&](const Tensor& tensor) {
    return with_height(tensor).contiguous(memory_format(call.layout, std::max<int64_t>(4, tensor.dim())));
  };
  const auto dense = [&](Tensor& tensor) {
    tensor = in_layout(tensor);
    return const_cast<T*>(const_data<T>(tensor));
  };
  cpu::ConvArguments<T> arguments;
  arguments.geometry = call.geometry;
  arguments.threads = at::get_num_threads();
  arguments.pass = call.pass;
  arguments.layout = call.layout;
  if (call.input.defined()) arguments.input = dense(call.input);
  if (call.output.defined()) arguments.output = dense(call.output);
  if (call.residual.has_value()) arguments.residual = dense(*call.residual);
  arguments.activation = call.activation;
  call.weight = with_height(call.weight);
  call.weight =
      covers_map(call.geometry) ? in_layout(call.weight) : call.weight.contiguous(call.weight.suggest_memory_format());
  arguments.weight = const_cast<T*>(const_data<T>(call.weight));
  const bool channel_is_contiguous = layout_of(call.weight) == Layout::channels_last;
  arguments.weight_stride_channel = channel_is_contiguous ? 1 : call.geometry.taps();
  arguments.weight_stride_tap = channel_is_contiguous ? call.geometry.in_channels_per_group() : 1;
  if (call.bias.has_value()) call.bias = call.bias->contiguous();
  arguments.bias = const_data<T>(call.bias);
  return arguments;
}

// The same for CUDA. Only one order of the weight's elements is dense in what its kernels read at once: the layout's.
cuda::ConvArguments cuda_arguments(Call& call) {
  const auto dense = [&](Tensor& tensor) {
    tensor = with_height(tensor).contiguous(memory_format(call.layout, std::max<int64_t>(4, tensor.dim())));
    return const_cast<void*>(tensor.const_data_ptr());
  };
  const bool channel_is_contiguous = call.layout == Layout::channels_last;
  cuda::ConvArguments arguments;
  arguments.geometry = call.geometry;
  arguments.pass = call.pass;
  arguments.dtype = dtype_of(call.written().scalar_type(), "convolution");
  arguments.layout = call.layout;
  arguments.tf32 = tf32_is_allowed();
  arguments.input = dense(call.input);
  arguments.weight = dense(call.weight);
  arguments.output = dense(call.output);
  if (call.bias.has_value()) call.bias = call.bias->contiguous();
  arguments.bias = call.bias.has_value() ? call.bias->const_data_ptr() : nullptr;
  if (call.residual.has_value()) arguments.residual = dense(*call.residual);
  arguments.clamp = call.activation;
  arguments.weight_stride_channel = channel_is_contiguous ? 1 : call.geometry.taps();
  arguments.weight_stride_tap = channel_is_contiguous ? call.geometry.in_channels_per_group() : 1;
  return arguments;
}

// By torch, where the kernels do not.
void open_gate(Tensor result, Gate gate) {
  if (gate == Gate::sigmoid) at::silu_(result);
  if (gate == Gate::hard_sigmoid) at::hardswish_(result);
  if (gate == Gate::normal) at::gelu_(result);
  if (gate == Gate::normal_tanh) at::gelu_(result, "tanh");
}

// The gate is torch's: an exponential in the kernels' last stores would cost them registers that they have not.
void run_on_cuda(Call call, std::string_view name) {
  const ConvProblem problem = call.problem();
  cuda::ConvArguments arguments = cuda_arguments(call);
  const auto named = algorithm_by_name(name, problem);
  arguments.algorithm = named ? *named : choose_algorithm(problem);
  const Tensor workspace = cuda_workspace(
      call.written(), [&](const cuda::Launchers& launchers) { return launchers.convolution_workspace(&arguments); });
  arguments.workspace = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
  launch_on_cuda(call.written(), "convolution", [&](const cuda::Launchers& launchers, void* stream) {
    return launchers.convolution(&arguments, stream);
  });
  open_gate(call.written(), call.activation.gate);
}

void run(Call call, std::string_view name) {
  if (runs_on_cuda(call.written())) return run_on_cuda(std::move(call), name);
  if (join_axes(call.geometry)) call.layout = Layout::channels_last;
  dispatch_dtype(call.written().scalar_type(), "convolution", [&](auto type) {
    using T = decltype(type);
    const auto arguments = cpu_arguments<T>(call);
    run_on_cpu<T>(algorithm_for(call, arguments, name), arguments, call.packed);
  });
}

// Sums over nothing are zero, plus what is added to them.
void fill(const Call& call) {
  Tensor result = call.written();
  result.zero_();
  if (call.bias.has_value()) {
    std::vector<int64_t> shape(static_cast<size_t>(result.dim()), 1);
    shape[1] = call.bias->numel();
    result.add_(call.bias->view(shape));
  }
  if (call.residual.has_value()) result.add_(*call.residual);
  const Activation& activation = call.activation;
  if (activation.cuts()) {
    const auto bound = [](double value) { return value == value ? std::optional<at::Scalar>(value) : std::nullopt; };
    result.clamp_(bound(activation.lower), bound(activation.upper));
  }
  open_gate(result, activation.gate);
}

Tensor compute(const Call& call, std::string_view algorithm) {
  if (call.geometry.multiply_adds() == 0) {
    algorithm_by_name(algorithm, call.problem());  // an unknown name is an error here too
    fill(call);
  } else {
    run(call, algorithm);
  }
  return call.written();
}

// An undefined tensor is none.
OptionalTensor present(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

template <class Int>
void check_residual(const OptionalTensor& residual, const Tensor& input, const std::vector<Int>& size) {
  if (!present(residual)) return;
  check_same_type("Input", input, "residual", *residual);
  if constexpr (std::is_same_v<Int, SymInt>)
    check_size<Int>("residual", residual->sym_sizes(), size);
  else
    check_size<Int>("residual", residual->sizes(), size);
}

}  // namespace

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  return convolution_fused(input, weight, bias, std::nullopt, std::nullopt, std::nullopt, std::nullopt, stride, padding,
                           dilation, groups, algorithm);
}

Tensor convolution_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view algorithm) {
  return convolution_fused_meta(input, weight, bias, std::nullopt, std::nullopt, std::nullopt, std::nullopt, stride,
                                padding, dilation, groups, algorithm);
}

Gate gate_by_name(std::string_view name) {
  if (name == "none") return Gate::none;
  if (name == "sigmoid") return Gate::sigmoid;
  if (name == "hard_sigmoid") return Gate::hard_sigmoid;
  if (name == "normal") return Gate::normal;
  TORCH_CHECK_VALUE(name == "normal_tanh", "unknown gate '", name,
                    "', expected one of: none, sigmoid, hard_sigmoid, normal, normal_tanh");
  return Gate::normal_tanh;
}

Tensor convolution_fused(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalTensor& packed, Bound lower, Bound upper,
                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         std::string_view algorithm, std::string_view gate) {
  const auto size = check_convolution<int64_t>(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  check_bias<int64_t>(bias, input, weight.size(0), weight.sizes());
  check_residual<int64_t>(residual, input, size);
  const auto geometry = make_geometry(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const Layout layout = joint_layout(input, weight);
  const Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  Call call{Pass::forward, geometry, layout, input, weight, output, present(bias), present(residual)};
  call.activation = {lower, upper, gate_by_name(gate)};
  call.packed = present(packed);
  return compute(call, algorithm);
}

Tensor convolution_fused_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor&, Bound, Bound,
                              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                              std::string_view, std::string_view gate) {
  gate_by_name(gate);
  const auto size = check_convolution<SymInt>(input.sym_sizes(), weight.sym_sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  check_bias<SymInt>(bias, input, weight.sym_size(0), weight.sym_sizes());
  check_residual<SymInt>(residual, input, size);
  return empty_in_layout(SymIntArrayRef(size), input, joint_layout(input, weight));
}

Tensor convolution_pack(const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  const auto geometry = make_geometry(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  Tensor packed = at::empty({0}, at::TensorOptions().dtype(at::kByte));
  if (geometry.multiply_adds() == 0 || runs_on_cuda(weight)) return packed;  // CUDA kernels pack nothing
  const Layout layout = joint_layout(input, weight);
  Call call{Pass::forward, geometry, layout, input, weight, empty_in_layout(size, input, layout), std::nullopt};
  call.packed = packed;
  if (join_axes(call.geometry)) call.layout = Layout::channels_last;
  dispatch_dtype(input.scalar_type(), "convolution", [&](auto type) {
    const auto arguments = cpu_arguments<decltype(type)>(call);
    packed = pack_weight(algorithm_for(call, arguments, algorithm), arguments);
  });
  return packed;
}

Tensor convolution_backward_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                  IntArrayRef input_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                  int64_t groups, std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input_size, weight.sizes(), stride, padding, dilation, groups);
  check_size<int64_t>("grad_output", grad_output.sizes(), size);
  check_same_type("grad_output", grad_output, "weight", weight);
  check_bias<int64_t>(bias, grad_output, input_size[1], weight.sizes());
  const auto geometry = make_geometry(input_size, weight.sizes(), stride, padding, dilation, groups);
  const Layout layout = joint_layout(grad_output, weight);
  const Tensor grad_input = empty_in_layout(input_size, grad_output, layout);
  return compute({Pass::backward_input, geometry, layout, grad_input, weight, grad_output, present(bias)}, algorithm);
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
  const Layout layout = joint_layout(grad_output, input);
  const Tensor grad_weight = empty_in_layout(weight_size, input, layout);
  return compute({Pass::backward_weight, geometry, layout, input, grad_weight, grad_output, std::nullopt}, algorithm);
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
