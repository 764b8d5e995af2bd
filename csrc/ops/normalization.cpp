// Batch, group, instance and layer normalization: checks, outputs, and the geometry that makes them one kernel.
//
// Statistics are the mean and the biased variance of every group, in the accumulation type (float32 for float32 and
// the 16-bit types). Weight and bias have the input's type or, for 16-bit inputs, float32; they are vectors, converted
// here. A gradient of an argument that is absent is a tensor of no elements.
#include "normalization.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../cpu/norm_kernels.h"
#include "cuda.h"
#include "normalization_checks.h"

namespace convlab {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

namespace {

// ---- Outputs. Like the checks these know symbolic sizes only, so that fake kernels are a check and an allocation.

Tensor empty_like_input(const Tensor& input) {
  const Tensor full = with_height(input);
  const auto format = memory_format(layout_of(full), full.dim());
  const Tensor result = on_huge_pages(at::empty_like(full, full.options(), format));
  return input.dim() == 3 ? result.squeeze(2) : result;
}

Tensor empty_statistics(const Tensor& input, SymIntArrayRef size) {
  return at::empty_symint(size, input.options().dtype(accumulate_type(input.scalar_type())));
}

Tensor empty_gradient(const OptionalTensor& parameter, const Tensor& input) {
  if (!given(parameter)) return at::empty({0}, input.options());
  return at::empty_symint(parameter->sym_sizes(), parameter->options());
}

NormResult group_norm_outputs(const Tensor& input, const SymInt& groups) {
  const SymInt size[] = {input.sym_size(0), groups};
  return {empty_like_input(input), empty_statistics(input, size), empty_statistics(input, size)};
}

// Statistics have the input's leading sizes and ones for the normalized dimensions.
NormResult layer_norm_outputs(const Tensor& input, size_t normalized) {
  std::vector<SymInt> size = input.sym_sizes().vec();
  std::fill(size.end() - static_cast<int64_t>(normalized), size.end(), SymInt(1));
  return {on_huge_pages(at::empty_like(input, input.options(), at::MemoryFormat::Contiguous)),
          empty_statistics(input, size), empty_statistics(input, size)};
}

NormGradients empty_gradients(const Tensor& input, Tensor grad_input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual) {
  return {std::move(grad_input), empty_gradient(weight, input), empty_gradient(bias, input),
          given(residual) ? empty_like_input(input) : at::empty({0}, input.options())};
}

// ---- The kernel's arguments.

struct Problem {
  int64_t samples = 1, repeats = 1, groups = 1, channels_per_group = 1, pixels = 1;
  Layout layout = Layout::channels_first;
  bool relu = false, statistics = true, centered = true;
  double eps = 0;

  int64_t elements() const { return samples * repeats * groups * channels_per_group * pixels; }
};

int64_t pixels_of(const Tensor& input) {
  int64_t pixels = 1;
  for (int64_t axis = 2; axis < input.dim(); ++axis) pixels *= input.size(axis);
  return pixels;
}

Problem batch_norm_problem(const Tensor& input, bool relu, bool statistics, double eps) {
  Problem problem;
  problem.repeats = input.size(0);
  problem.groups = input.size(1);
  problem.pixels = pixels_of(input);
  problem.layout = problem.pixels == 1 ? Layout::channels_last : layout_of(with_height(input));
  problem.relu = relu;
  problem.statistics = statistics;
  problem.eps = eps;
  return problem;
}

Problem group_norm_problem(const Tensor& input, int64_t groups, double eps) {
  Problem problem;
  problem.samples = input.size(0);
  problem.groups = groups;
  problem.channels_per_group = input.size(1) / groups;
  problem.pixels = pixels_of(input);
  problem.layout = problem.pixels == 1 ? Layout::channels_first : layout_of(with_height(input));
  problem.eps = eps;
  return problem;
}

Problem layer_norm_problem(const Tensor& input, size_t normalized, double eps) {
  Problem problem;
  for (int64_t axis = 0; axis < input.dim(); ++axis)
    (axis < input.dim() - static_cast<int64_t>(normalized) ? problem.samples : problem.channels_per_group) *=
        input.size(axis);
  problem.eps = eps;
  return problem;
}

struct Tensors {
  Tensor input, residual, grad_output, output, grad_residual;  // of the input's size
  Tensor weight, bias, grad_weight, grad_bias;  // one value per channel; weight and bias may be undefined
  Tensor mean, variance;                        // in the accumulation type
};

Tensor accumulated(const OptionalTensor& vector, const Tensor& input) {
  if (!given(vector)) return {};
  const auto type = accumulate_type(input.scalar_type());
  if (vector->scalar_type() == type && vector->is_contiguous()) return *vector;  // the usual case, at no cost
  return vector->to(type).contiguous();
}

// The elements of `tensor` in the memory order of `like`, copied if they have another one.
Tensor ordered_as(const Tensor& tensor, const Tensor& like) {
  if (like.dim() == 3) return tensor.unsqueeze(2).contiguous(memory_format(layout_of(like.unsqueeze(2)), 4));
  return tensor.contiguous(memory_format(layout_of(like), like.dim()));
}

enum class Direction { forward, backward };
constexpr int64_t kElementsPerThread = 1 << 14;  // smaller ranges are not worth a thread

template <class T>
T* data_or_null(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? mutable_data<T>(tensor) : nullptr;
}

template <class T>
void run_on_cpu(const Problem& problem, const Tensors& tensors, Direction direction) {
  using A = accumulate_t<T>;
  cpu::NormArguments<T> a;
  a.samples = problem.samples;
  a.repeats = problem.repeats;
  a.groups = problem.groups;
  a.channels_per_group = problem.channels_per_group;
  a.pixels = problem.pixels;
  a.layout = problem.layout;
  a.relu = problem.relu;
  a.statistics = problem.statistics;
  a.centered = problem.centered;
  a.eps = problem.eps;
  a.input = const_data<T>(tensors.input);
  a.residual = tensors.residual.defined() ? const_data<T>(tensors.residual) : nullptr;
  a.grad_output = tensors.grad_output.defined() ? const_data<T>(tensors.grad_output) : nullptr;
  a.output = data_or_null<T>(tensors.output);
  a.grad_residual = data_or_null<T>(tensors.grad_residual);
  a.weight = tensors.weight.defined() ? const_data<A>(tensors.weight) : nullptr;
  a.bias = tensors.bias.defined() ? const_data<A>(tensors.bias) : nullptr;
  a.mean = tensors.mean.defined() ? const_cast<A*>(const_data<A>(tensors.mean)) : nullptr;
  a.variance = const_cast<A*>(const_data<A>(tensors.variance));
  a.grad_weight = data_or_null<A>(tensors.grad_weight);
  a.grad_bias = data_or_null<A>(tensors.grad_bias);

  const auto kernels = cpu::norm_kernels<T>();
  const auto plan = direction == Direction::forward ? kernels.forward(a) : kernels.backward(a);
  a.shared = thread_scratch(0, plan.shared_bytes);
  for (int index = 0; index < plan.phases; ++index) {
    const auto& phase = plan.phase[index];
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, phase.task_elements));
    parallel(phase.tasks, grain, [&](int64_t begin, int64_t end) { phase.run(a, begin, end); });
  }
}

void run_on_cuda(const Problem& problem, const Tensors& tensors, Direction direction) {
  const auto data = [](const Tensor& tensor) {
    return tensor.defined() && tensor.numel() > 0 ? const_cast<void*>(tensor.const_data_ptr()) : nullptr;
  };
  cuda::NormArguments a;
  a.samples = problem.samples;
  a.repeats = problem.repeats;
  a.groups = problem.groups;
  a.channels_per_group = problem.channels_per_group;
  a.pixels = problem.pixels;
  a.dtype = dtype_of(tensors.input.scalar_type(), "normalization");
  a.layout = problem.layout;
  a.backward = direction == Direction::backward;
  a.relu = problem.relu;
  a.statistics = problem.statistics;
  a.eps = problem.eps;
  a.input = data(tensors.input);
  a.residual = data(tensors.residual);
  a.grad_output = data(tensors.grad_output);
  a.output = data(tensors.output);
  a.grad_residual = data(tensors.grad_residual);
  a.mean = data(tensors.mean);
  a.variance = data(tensors.variance);
  a.weight = data(tensors.weight);
  a.bias = data(tensors.bias);
  a.grad_weight = data(tensors.grad_weight);
  a.grad_bias = data(tensors.grad_bias);
  const Tensor workspace =
      cuda_workspace(tensors.input, [&](const cuda::Launchers& launchers) { return launchers.norm_workspace(&a); });
  a.workspace = data(workspace);
  launch_on_cuda(tensors.input, "normalization",
                 [&](const cuda::Launchers& launchers, void* stream) { return launchers.norm(&a, stream); });
}

// Fills the outputs. Statistics and gradients of parameters of nothing are zero.
void run(const Problem& problem, Tensors tensors, Direction direction) {
  if (problem.elements() == 0) {
    const auto clear = [](const Tensor& tensor) {
      if (tensor.defined()) tensor.zero_();
    };
    if (direction == Direction::forward && problem.statistics) clear(tensors.mean), clear(tensors.variance);
    clear(tensors.grad_weight), clear(tensors.grad_bias);
    return;
  }
  const Tensor like = tensors.output.defined() ? tensors.output : tensors.input;
  tensors.input = ordered_as(tensors.input, like);
  if (tensors.residual.defined()) tensors.residual = ordered_as(tensors.residual, like);
  if (tensors.grad_output.defined()) tensors.grad_output = ordered_as(tensors.grad_output, like);
  // Gradients of parameters are written in the accumulation type and rounded once.
  const Tensor grad_weight = tensors.grad_weight, grad_bias = tensors.grad_bias;
  const auto accumulating = [&](const Tensor& gradient) {
    return gradient.defined() ? gradient.to(accumulate_type(tensors.input.scalar_type())) : gradient;
  };
  tensors.grad_weight = accumulating(grad_weight);
  tensors.grad_bias = accumulating(grad_bias);
  if (runs_on_cuda(tensors.input))
    run_on_cuda(problem, tensors, direction);
  else
    dispatch_dtype(tensors.input.scalar_type(), "normalization",
                   [&](auto type) { run_on_cpu<decltype(type)>(problem, tensors, direction); });
  if (!grad_weight.is_same(tensors.grad_weight)) grad_weight.copy_(tensors.grad_weight);
  if (!grad_bias.is_same(tensors.grad_bias)) grad_bias.copy_(tensors.grad_bias);
}

Tensors forward_tensors(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual) {
  Tensors tensors;
  tensors.input = input;
  tensors.weight = accumulated(weight, input);
  tensors.bias = accumulated(bias, input);
  if (given(residual)) tensors.residual = *residual;
  return tensors;
}

Tensors backward_tensors(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                         const OptionalTensor& residual, const NormGradients& gradients) {
  Tensors tensors = forward_tensors(input, weight, bias, residual);
  tensors.grad_output = grad_output;
  if (mean.defined()) tensors.mean = accumulated(mean, input);
  tensors.variance = accumulated(variance, input);
  std::tie(tensors.output, tensors.grad_weight, tensors.grad_bias, tensors.grad_residual) = gradients;
  return tensors;
}

NormResult first_three(const NormGradients& gradients) {
  return {std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

SymInt rows_of(const Tensor& input, size_t normalized) {
  SymInt rows = 1;
  for (int64_t axis = 0; axis < input.dim() - static_cast<int64_t>(normalized); ++axis) rows *= input.sym_size(axis);
  return rows;
}

}  // namespace

// ---- Batch norm.

NormResult batch_norm_train_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, bool, double) {
  check_batch_norm_train(input, weight, bias, residual);
  const SymInt size[] = {input.sym_size(1)};
  return {empty_like_input(input), empty_statistics(input, size), empty_statistics(input, size)};
}

NormResult batch_norm_train(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, bool relu, double eps) {
  const NormResult result = batch_norm_train_meta(input, weight, bias, residual, relu, eps);
  Tensors tensors = forward_tensors(input, weight, bias, residual);
  std::tie(tensors.output, tensors.mean, tensors.variance) = result;
  run(batch_norm_problem(input, relu, true, eps), tensors, Direction::forward);
  return result;
}

std::tuple<Tensor, Tensor> batch_norm_statistics_meta(const Tensor& input) {
  check_batch_norm(input, std::nullopt, std::nullopt, std::nullopt);
  const SymInt size[] = {input.sym_size(1)};
  return {empty_statistics(input, size), empty_statistics(input, size)};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input) {
  const auto result = batch_norm_statistics_meta(input);
  Tensors tensors;
  tensors.input = input;
  std::tie(tensors.mean, tensors.variance) = result;
  run(batch_norm_problem(input, false, true, 0), tensors, Direction::forward);
  return result;
}

Tensor batch_norm_eval_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const Tensor& mean, const Tensor& variance, const OptionalTensor& residual, bool, double) {
  check_batch_norm_eval(input, weight, bias, mean, variance, residual);
  return empty_like_input(input);
}

Tensor batch_norm_eval(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Tensor& mean, const Tensor& variance, const OptionalTensor& residual, bool relu,
                       double eps) {
  Tensors tensors = forward_tensors(input, weight, bias, residual);
  tensors.output = batch_norm_eval_meta(input, weight, bias, mean, variance, residual, relu, eps);
  tensors.mean = accumulated(mean, input);
  tensors.variance = accumulated(variance, input);
  run(batch_norm_problem(input, relu, false, eps), tensors, Direction::forward);
  return tensors.output;
}

NormGradients batch_norm_backward_meta(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                       const OptionalTensor& residual, bool relu, bool, double) {
  check_batch_norm(input, weight, bias, residual);
  check_backward(grad_output, input, mean, variance, input.sym_size(1));
  return empty_gradients(input, empty_like_input(input), weight, bias, relu ? residual : std::nullopt);
}

NormGradients batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                  const OptionalTensor& residual, bool relu, bool train, double eps) {
  const auto gradients =
      batch_norm_backward_meta(grad_output, input, weight, bias, mean, variance, residual, relu, train, eps);
  run(batch_norm_problem(input, relu, train, eps),
      backward_tensors(grad_output, input, weight, bias, mean, variance, residual, gradients), Direction::backward);
  return gradients;
}

// ---- Group norm; instance norm is the case of as many groups as channels.

NormResult group_norm_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           SymInt num_groups, double) {
  check_group_norm(input, weight, bias, num_groups);
  return group_norm_outputs(input, num_groups);
}

NormResult group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups,
                      double eps) {
  const NormResult result = group_norm_meta(input, weight, bias, num_groups, eps);
  Tensors tensors = forward_tensors(input, weight, bias, std::nullopt);
  std::tie(tensors.output, tensors.mean, tensors.variance) = result;
  run(group_norm_problem(input, num_groups, eps), tensors, Direction::forward);
  return result;
}

NormResult group_norm_backward_meta(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                    SymInt num_groups, double) {
  check_group_norm(input, weight, bias, num_groups);
  check_backward(grad_output, input, mean, variance, input.sym_size(0) * num_groups);
  return first_three(empty_gradients(input, empty_like_input(input), weight, bias, std::nullopt));
}

NormResult group_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                               int64_t num_groups, double eps) {
  const auto result = group_norm_backward_meta(grad_output, input, weight, bias, mean, variance, num_groups, eps);
  const auto gradients = std::tuple_cat(result, std::make_tuple(Tensor()));
  run(group_norm_problem(input, num_groups, eps),
      backward_tensors(grad_output, input, weight, bias, mean, variance, std::nullopt, gradients), Direction::backward);
  return result;
}

// ---- Layer norm.

NormResult layer_norm_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, bias, normalized_shape);
  return layer_norm_outputs(input, normalized_shape.size());
}

NormResult layer_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      at::IntArrayRef normalized_shape, double eps) {
  const NormResult result = layer_norm_meta(input, weight, bias, c10::fromIntArrayRefSlow(normalized_shape), eps);
  Tensors tensors = forward_tensors(input.contiguous(), weight, bias, std::nullopt);
  std::tie(tensors.output, tensors.mean, tensors.variance) = result;
  run(layer_norm_problem(input, normalized_shape.size(), eps), tensors, Direction::forward);
  return result;
}

NormResult layer_norm_backward_meta(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                    SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, bias, normalized_shape);
  check_backward(grad_output, input, mean, variance, rows_of(input, normalized_shape.size()));
  const Tensor grad_input = on_huge_pages(at::empty_like(input, input.options(), at::MemoryFormat::Contiguous));
  return first_three(empty_gradients(input, grad_input, weight, bias, std::nullopt));
}

NormResult layer_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                               at::IntArrayRef normalized_shape, double eps) {
  const auto result = layer_norm_backward_meta(grad_output, input, weight, bias, mean, variance,
                                               c10::fromIntArrayRefSlow(normalized_shape), eps);
  const auto gradients = std::tuple_cat(result, std::make_tuple(Tensor()));
  run(layer_norm_problem(input, normalized_shape.size(), eps),
      backward_tensors(grad_output, input, weight, bias, mean, variance, std::nullopt, gradients), Direction::backward);
  return result;
}

// ---- RMS norm: layer norm that does not center.

std::tuple<Tensor, Tensor> rms_norm_meta(const Tensor& input, const OptionalTensor& weight,
                                         SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, std::nullopt, normalized_shape);
  const NormResult result = layer_norm_outputs(input, normalized_shape.size());
  return {std::get<0>(result), std::get<2>(result)};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, const OptionalTensor& weight, at::IntArrayRef normalized_shape,
                                    double eps) {
  const auto result = rms_norm_meta(input, weight, c10::fromIntArrayRefSlow(normalized_shape), eps);
  Tensors tensors = forward_tensors(input.contiguous(), weight, std::nullopt, std::nullopt);
  std::tie(tensors.output, tensors.variance) = result;
  Problem problem = layer_norm_problem(input, normalized_shape.size(), eps);
  problem.centered = false;
  run(problem, tensors, Direction::forward);
  return result;
}

std::tuple<Tensor, Tensor> rms_norm_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                  const OptionalTensor& weight, const Tensor& mean_square,
                                                  SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, std::nullopt, normalized_shape);
  check_twin("grad_output", grad_output, input);
  check_vector("mean_square", mean_square, input, rows_of(input, normalized_shape.size()));
  return {on_huge_pages(at::empty_like(input, input.options(), at::MemoryFormat::Contiguous)),
          empty_gradient(weight, input)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input,
                                             const OptionalTensor& weight, const Tensor& mean_square,
                                             at::IntArrayRef normalized_shape, double eps) {
  const auto result =
      rms_norm_backward_meta(grad_output, input, weight, mean_square, c10::fromIntArrayRefSlow(normalized_shape), eps);
  const NormGradients gradients = {std::get<0>(result), std::get<1>(result), Tensor(), Tensor()};
  Problem problem = layer_norm_problem(input, normalized_shape.size(), eps);
  problem.centered = false;
  run(problem,
      backward_tensors(grad_output, input, weight, std::nullopt, Tensor(), mean_square, std::nullopt, gradients),
      Direction::backward);
  return result;
}

}  // namespace convlab
