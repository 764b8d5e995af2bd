// Convolution: checks, output, algorithm, kernels. The three passes differ in which tensor is written.
#include "convolution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstring>
#include <map>
#include <vector>

#include "../algorithm_choice.h"
#include "../cpu/conv_kernels.h"
#include "autotune.h"
#include "convolution_checks.h"
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
  Clamp clamp;
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

// In front of a packed weight: what it was packed for. Whoever asks with another problem has the weight packed anew.
struct alignas(64) PackedHeader {
  int64_t fields[8];

  // `layout`: of the operands as they were given.
  template <class T>
  PackedHeader(Algorithm algorithm, const cpu::ConvArguments<T>& a, Layout layout, const cpu::ConvPlan& plan)
      : fields{static_cast<int64_t>(algorithm),
               (has_one_output(a.geometry) ? 1 : 0) << 24 |
                   (static_cast<int64_t>(layout) * 4 + static_cast<int64_t>(a.pass)) << 16 | instruction_set() << 8 |
                   static_cast<int64_t>(sizeof(T)) << 1 | (std::is_same_v<T, bfloat16> ? 1 : 0),
               a.geometry.out_channels,
               a.geometry.in_channels,
               a.geometry.groups,
               joined(a.geometry.kernel),
               joined(a.geometry.stride),
               plan.packed_bytes} {}

  // The order of the elements follows the instruction set.
  static int64_t instruction_set() {
    return static_cast<int64_t>(cpu::capability()) * 2 + (cpu::multiplies_bfloat16() ? 1 : 0);
  }
  // For which there are other kernels.
  static bool has_one_output(const ConvGeometry& g) { return g.taps() > 1 && g.output_pixels() == 1; }
  static int64_t joined(const int64_t (&sizes)[kMaxSpatial]) { return sizes[0] << 40 | sizes[1] << 20 | sizes[2]; }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHeader)) + fields[7]; }
  bool heads(const Tensor& packed) const {
    return packed.numel() == bytes() && std::memcmp(packed.const_data_ptr(), fields, sizeof fields) == 0;
  }
};

// What the algorithm's kernels compute in the place of the problem (joins_map). `biases` keeps what `bias` points to.
template <class T>
cpu::ConvArguments<T> as_computed(Algorithm algorithm, cpu::ConvArguments<T> a, std::vector<T>& biases) {
  const bool last = a.layout == Layout::channels_last;
  const int64_t taps = a.geometry.taps(), channels = a.geometry.in_channels;
  if (!joins_map(algorithm) || !covers_map(a.geometry)) return a;
  a.geometry = with_map_joined(a.geometry);
  a.layout = Layout::channels_last;
  a.weight_stride_channel = a.weight_stride_tap = 1;
  if (a.bias && a.pass == Pass::backward_input) {
    biases.resize(static_cast<size_t>(channels * taps));
    for (int64_t i = 0; i < channels * taps; ++i)
      biases[static_cast<size_t>(i)] = a.bias[last ? i % channels : i / taps];
    a.bias = biases.data();
  }
  return a;
}

// Ranges smaller than this many multiply-adds are not worth a thread.
constexpr int64_t kMultiplyAddsPerThread = 1 << 16;

// Whether each thread packs the weight for itself, which is worth a quarter of its time: what another core has just
// written takes longer to read than what this one has, several times across the parts of a processor, and no thread
// waits for another.
template <class T>
bool packs_alone(const cpu::ConvArguments<T>& arguments, const cpu::ConvPlan& plan) {
  constexpr int64_t per_element = 10, share = 4, most_bytes = int64_t{64} << 20;
  const int64_t elements = plan.packed_bytes / static_cast<int64_t>(sizeof(float));
  return arguments.threads > 1 && elements > 0 && !plan.packs_in_place &&
         plan.packed_bytes * arguments.threads <= most_bytes &&
         elements * per_element * share * arguments.threads <= arguments.geometry.multiply_adds();
}

template <class T>
void run_on_cpu(Algorithm algorithm, const cpu::ConvArguments<T>& given, const OptionalTensor& packed) {
  std::vector<T> biases;
  cpu::ConvArguments<T> arguments = as_computed(algorithm, given, biases);
  const auto kernels = cpu::conv_kernels<T>(algorithm, arguments);
  const cpu::ConvPlan plan = kernels.plan(arguments);
  const bool kept = plan.packed_bytes > 0 && packed.has_value() &&
                    PackedHeader(algorithm, arguments, given.layout, plan).heads(*packed);
  const bool alone = !kept && packs_alone(arguments, plan);
  const int64_t packed_bytes = kept || alone ? 0 : (plan.packed_bytes + 63) / 64 * 64;
  char* shared = static_cast<char*>(thread_scratch(0, packed_bytes + plan.shared_bytes));
  arguments.packed = kept ? static_cast<char*>(packed->data_ptr()) + sizeof(PackedHeader) : alone ? nullptr : shared;
  arguments.shared = shared + packed_bytes;
  static std::atomic<int64_t> calls = 0;
  const int64_t call = calls++;
  const int64_t cost = arguments.geometry.multiply_adds() / plan.rounds / std::max<int64_t>(1, plan.run_tasks) + 1;
  const int64_t grain = std::max<int64_t>(1, kMultiplyAddsPerThread / cost);
  const auto copy_grain = [](int64_t bytes, int64_t tasks) {
    return std::max<int64_t>(1, kMultiplyAddsPerThread / (bytes / std::max<int64_t>(1, tasks) + 4));
  };
  if (!kept && !alone)
    parallel(plan.pack_tasks, copy_grain(plan.packed_bytes, plan.pack_tasks),
             [&](int64_t begin, int64_t end) { kernels.pack(arguments, begin, end); });
  const int64_t prepare_grain = plan.prepare_multiplies ? 1 : copy_grain(plan.shared_bytes, plan.prepare_tasks);
  for (arguments.round = 0; arguments.round < plan.rounds; ++arguments.round) {
    parallel(plan.prepare_tasks, prepare_grain, [&](int64_t begin, int64_t end) {
      kernels.prepare(arguments, thread_scratch(1, plan.scratch_bytes), begin, end);
    });
    parallel(plan.run_tasks, grain, [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(1, plan.scratch_bytes);
      if (!alone) return kernels.run(arguments, scratch, begin, end);
      cpu::ConvArguments<T> own = arguments;
      own.packed = thread_scratch(2, plan.packed_bytes);
      static thread_local int64_t packed_in = -1;
      if (packed_in != call) kernels.pack(own, 0, plan.pack_tasks);
      packed_in = call;
      kernels.run(own, scratch, begin, end);
    });
  }
  parallel(plan.finish_tasks, prepare_grain,
           [&](int64_t begin, int64_t end) { kernels.finish(arguments, begin, end); });
}

// The weight in the order in which the algorithm's kernel reads it; empty if it reads it as it is.
template <class T>
Tensor pack_weight(Algorithm algorithm, const cpu::ConvArguments<T>& given) {
  std::vector<T> biases;
  cpu::ConvArguments<T> arguments = as_computed(algorithm, given, biases);
  const auto kernels = cpu::conv_kernels<T>(algorithm, arguments);
  const cpu::ConvPlan plan = kernels.plan(arguments);
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  if (plan.packed_bytes == 0) return at::empty({0}, bytes);
  const PackedHeader header(algorithm, arguments, given.layout, plan);
  Tensor packed = empty_result({header.bytes()}, bytes);
  std::memcpy(packed.mutable_data_ptr(), header.fields, sizeof header.fields);
  arguments.packed = static_cast<char*>(packed.mutable_data_ptr()) + sizeof(PackedHeader);
  parallel(plan.pack_tasks, 1, [&](int64_t begin, int64_t end) { kernels.pack(arguments, begin, end); });
  return packed;
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
  arguments.clamp = call.clamp;
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
  arguments.clamp = call.clamp;
  arguments.weight_stride_channel = channel_is_contiguous ? 1 : call.geometry.taps();
  arguments.weight_stride_tap = channel_is_contiguous ? call.geometry.in_channels_per_group() : 1;
  return arguments;
}

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
  if (call.clamp.cuts()) {
    const auto bound = [](double value) { return value == value ? std::optional<at::Scalar>(value) : std::nullopt; };
    result.clamp_(bound(call.clamp.lower), bound(call.clamp.upper));
  }
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

Tensor convolution_fused(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalTensor& packed, Bound lower, Bound upper,
                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         std::string_view algorithm) {
  const auto size = check_convolution<int64_t>(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_same_type("Input", input, "weight", weight);
  check_bias<int64_t>(bias, input, weight.size(0), weight.sizes());
  check_residual<int64_t>(residual, input, size);
  const auto geometry = make_geometry(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const Layout layout = joint_layout(input, weight);
  const Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  Call call{Pass::forward, geometry, layout, input, weight, output, present(bias), present(residual)};
  call.clamp = {lower, upper};
  call.packed = present(packed);
  return compute(call, algorithm);
}

Tensor convolution_fused_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor&, Bound, Bound,
                              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                              std::string_view) {
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
