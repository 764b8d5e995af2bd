#include "normalization_run.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../cpu/norm_kernels.h"
#include "cuda.h"

namespace convlab {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Tensor empty_like_input(const Tensor& input) {
  const Tensor full = with_height(input);
  const auto format = memory_format(layout_of(full), full.dim());
  const Tensor result = empty_result_like(full, format);
  return input.dim() == 3 ? result.squeeze(2) : result;
}

Tensor empty_statistics(const Tensor& input, SymIntArrayRef size) {
  return at::empty_symint(size, input.options().dtype(accumulate_type(input.scalar_type())));
}

Tensor empty_gradient(const OptionalTensor& parameter, const Tensor& input) {
  if (!given(parameter)) return at::empty({0}, input.options());
  return at::empty_symint(parameter->sym_sizes(), parameter->options());
}

NormGradients empty_gradients(const Tensor& input, Tensor grad_input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual) {
  return {std::move(grad_input), empty_gradient(weight, input), empty_gradient(bias, input),
          given(residual) ? empty_like_input(input) : at::empty({0}, input.options())};
}

int64_t pixels_of(const Tensor& input) {
  int64_t pixels = 1;
  for (int64_t axis = 2; axis < input.dim(); ++axis) pixels *= input.size(axis);
  return pixels;
}

Tensor accumulated(const OptionalTensor& vector, const Tensor& input) {
  if (!given(vector)) return {};
  const auto type = accumulate_type(input.scalar_type());
  if (vector->scalar_type() == type && vector->is_contiguous()) return *vector;  // the usual case, at no cost
  return vector->to(type).contiguous();
}

NormTensors forward_tensors(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual) {
  NormTensors tensors;
  tensors.input = input;
  tensors.weight = accumulated(weight, input);
  tensors.bias = accumulated(bias, input);
  if (given(residual)) tensors.residual = *residual;
  return tensors;
}

NormTensors backward_tensors(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                             const OptionalTensor& residual, const NormGradients& gradients) {
  NormTensors tensors = forward_tensors(input, weight, bias, residual);
  tensors.grad_output = grad_output;
  if (mean.defined()) tensors.mean = accumulated(mean, input);
  tensors.variance = accumulated(variance, input);
  std::tie(tensors.output, tensors.grad_weight, tensors.grad_bias, tensors.grad_residual) = gradients;
  return tensors;
}

namespace {

// The elements of `tensor` in the memory order of `like`, copied if they have another one.
Tensor ordered_as(const Tensor& tensor, const Tensor& like) {
  if (like.dim() == 3) return tensor.unsqueeze(2).contiguous(memory_format(layout_of(like.unsqueeze(2)), 4));
  return tensor.contiguous(memory_format(layout_of(like), like.dim()));
}

constexpr int64_t kElementsPerThread = 1 << 14;  // smaller ranges are not worth a thread

template <class T>
T* data_or_null(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? mutable_data<T>(tensor) : nullptr;
}

template <class T>
void run_on_cpu(const NormProblem& problem, const NormTensors& tensors, NormPass pass) {
  using A = accumulate_t<T>;
  cpu::NormArguments<T> a;
  a.samples = problem.samples;
  a.repeats = problem.repeats;
  a.groups = problem.groups;
  a.channels_per_group = problem.channels_per_group;
  a.pixels = problem.pixels;
  a.layout = problem.layout;
  a.clamp = problem.clamp;
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
  a.v = tensors.v.defined() ? const_data<T>(tensors.v) : nullptr;
  a.v_residual = tensors.v_residual.defined() ? const_data<T>(tensors.v_residual) : nullptr;
  a.v_weight = tensors.v_weight.defined() ? const_data<A>(tensors.v_weight) : nullptr;
  a.v_bias = tensors.v_bias.defined() ? const_data<A>(tensors.v_bias) : nullptr;
  a.stopped = data_or_null<uint8_t>(tensors.stopped);
  a.grad_grad_output = data_or_null<T>(tensors.grad_grad_output);

  const auto kernels = cpu::norm_kernels<T>();
  const auto plan = pass == NormPass::forward    ? kernels.forward(a)
                    : pass == NormPass::backward ? kernels.backward(a)
                                                 : kernels.double_backward(a);
  a.shared = thread_scratch(0, plan.shared_bytes);
  for (int index = 0; index < plan.phases; ++index) {
    const auto& phase = plan.phase[index];
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, phase.task_elements));
    parallel(phase.tasks, grain, [&](int64_t begin, int64_t end) { phase.run(a, begin, end); });
  }
}

void run_on_cuda(const NormProblem& problem, const NormTensors& tensors, NormPass pass) {
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
  a.pass = pass;
  a.clamp = problem.clamp;
  a.statistics = problem.statistics;
  a.eps = problem.eps;
  a.input = data(tensors.input);
  a.residual = data(tensors.residual);
  a.grad_output = data(tensors.grad_output);
  a.output = data(tensors.output);
  a.grad_residual = data(tensors.grad_residual);
  a.stopped = data(tensors.stopped);
  a.mean = data(tensors.mean);
  a.variance = data(tensors.variance);
  a.weight = data(tensors.weight);
  a.bias = data(tensors.bias);
  a.grad_weight = data(tensors.grad_weight);
  a.grad_bias = data(tensors.grad_bias);
  a.v = data(tensors.v);
  a.v_residual = data(tensors.v_residual);
  a.v_weight = data(tensors.v_weight);
  a.v_bias = data(tensors.v_bias);
  a.grad_grad_output = data(tensors.grad_grad_output);
  const Tensor workspace =
      cuda_workspace(tensors.input, [&](const cuda::Launchers& launchers) { return launchers.norm_workspace(&a); });
  a.workspace = data(workspace);
  launch_on_cuda(tensors.input, "normalization",
                 [&](const cuda::Launchers& launchers, void* stream) { return launchers.norm(&a, stream); });
}

}  // namespace

void run_normalization(const NormProblem& problem, NormTensors tensors, NormPass pass) {
  if (problem.elements() == 0) {
    const auto clear = [](const Tensor& tensor) {
      if (tensor.defined()) tensor.zero_();
    };
    if (pass == NormPass::forward && problem.statistics) clear(tensors.mean), clear(tensors.variance);
    clear(tensors.grad_weight), clear(tensors.grad_bias);
    return;
  }
  const Tensor like = tensors.output.defined() ? tensors.output : tensors.input;
  for (Tensor* tensor : {&tensors.input, &tensors.residual, &tensors.grad_output, &tensors.v, &tensors.v_residual})
    if (tensor->defined()) *tensor = ordered_as(*tensor, like);
  // Gradients of parameters are written in the accumulation type and rounded once.
  const Tensor grad_weight = tensors.grad_weight, grad_bias = tensors.grad_bias;
  const auto accumulating = [&](const Tensor& gradient) {
    return gradient.defined() ? gradient.to(accumulate_type(tensors.input.scalar_type())) : gradient;
  };
  tensors.grad_weight = accumulating(grad_weight);
  tensors.grad_bias = accumulating(grad_bias);
  if (runs_on_cuda(tensors.input))
    run_on_cuda(problem, tensors, pass);
  else
    dispatch_dtype(tensors.input.scalar_type(), "normalization",
                   [&](auto type) { run_on_cpu<decltype(type)>(problem, tensors, pass); });
  if (!grad_weight.is_same(tensors.grad_weight)) grad_weight.copy_(tensors.grad_weight);
  if (!grad_bias.is_same(tensors.grad_bias)) grad_bias.copy_(tensors.grad_bias);
}

}  // namespace convlab
