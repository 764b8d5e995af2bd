// Batch norm: one group of all samples and pixels for every channel.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../cpu/norm_kernels.h"
#include "cuda.h"
#include "normalization_run.h"

namespace convlab {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

namespace {

NormProblem batch_norm_problem(const Tensor& input, const Clamp& clamp, bool statistics, double eps) {
  NormProblem problem;
  problem.repeats = input.size(0);
  problem.groups = input.size(1);
  problem.pixels = pixels_of(input);
  problem.layout = problem.pixels == 1 ? Layout::channels_last : layout_of(with_height(input));
  problem.clamp = clamp;
  problem.statistics = statistics;
  problem.eps = eps;
  return problem;
}

bool on_cuda(const Tensor& input) { return input.is_cuda() || cuda::emulating(); }

// Bytes of `stopped`: of all runs of neighbouring elements, as the kernels of the CPU see them; CUDA's count elements.
SymInt stopped_size(const Tensor& input) {
  if (on_cuda(input)) return (input.sym_numel() + 7) / 8;
  int lanes = 0;
  dispatch_dtype(input.scalar_type(), "batch_norm",
                 [&](auto type) { lanes = cpu::norm_kernels<decltype(type)>().lanes; });
  const SymInt channels = input.sym_size(1), batch = input.sym_size(0);
  SymInt pixels = 1;
  for (int64_t axis = 2; axis < input.dim(); ++axis) pixels = pixels * input.sym_size(axis);
  if (pixels == 1 || layout_of(with_height(input)) == Layout::channels_last)
    return batch * pixels * cpu::stopped_bytes(channels, lanes);
  return batch * channels * cpu::stopped_bytes(pixels, lanes);
}

Tensor empty_stopped(const Tensor& input, bool wanted) {
  const auto options = input.options().dtype(at::kByte);
  if (!wanted) return at::empty({0}, options);
  const SymInt size = stopped_size(input);
  if (const auto bytes = size.maybe_as_int()) return empty_result({*bytes}, options);
  return at::empty_symint({size}, options);
}

}  // namespace

BatchNormResult batch_norm_train_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& residual, Bound lower, Bound upper, double, bool mark) {
  check_batch_norm_train(input, weight, bias, residual);
  const SymInt size[] = {input.sym_size(1)};
  return {empty_like_input(input), empty_statistics(input, size), empty_statistics(input, size),
          empty_stopped(input, mark && given(residual) && Clamp(lower, upper).cuts())};
}

BatchNormResult batch_norm_train(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, Bound lower, Bound upper, double eps, bool mark) {
  const BatchNormResult result = batch_norm_train_meta(input, weight, bias, residual, lower, upper, eps, mark);
  NormTensors tensors = forward_tensors(input, weight, bias, residual);
  std::tie(tensors.output, tensors.mean, tensors.variance, tensors.stopped) = result;
  run_normalization(batch_norm_problem(input, {lower, upper}, true, eps), tensors, NormPass::forward);
  return result;
}

std::tuple<Tensor, Tensor> batch_norm_statistics_meta(const Tensor& input) {
  check_batch_norm(input, std::nullopt, std::nullopt, std::nullopt);
  const SymInt size[] = {input.sym_size(1)};
  return {empty_statistics(input, size), empty_statistics(input, size)};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& input) {
  const auto result = batch_norm_statistics_meta(input);
  NormTensors tensors;
  tensors.input = input;
  std::tie(tensors.mean, tensors.variance) = result;
  run_normalization(batch_norm_problem(input, {}, true, 0), tensors, NormPass::forward);
  return result;
}

Tensor batch_norm_eval_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const Tensor& mean, const Tensor& variance, const OptionalTensor& residual, Bound, Bound,
                            double) {
  check_batch_norm_eval(input, weight, bias, mean, variance, residual);
  return empty_like_input(input);
}

Tensor batch_norm_eval(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Tensor& mean, const Tensor& variance, const OptionalTensor& residual, Bound lower,
                       Bound upper, double eps) {
  NormTensors tensors = forward_tensors(input, weight, bias, residual);
  tensors.output = batch_norm_eval_meta(input, weight, bias, mean, variance, residual, lower, upper, eps);
  tensors.mean = accumulated(mean, input);
  tensors.variance = accumulated(variance, input);
  run_normalization(batch_norm_problem(input, {lower, upper}, false, eps), tensors, NormPass::forward);
  return tensors.output;
}

NormGradients batch_norm_backward_meta(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                       const OptionalTensor& residual, Bound lower, Bound upper, bool, double,
                                       const OptionalTensor& stopped) {
  check_batch_norm(input, weight, bias, residual);
  check_backward(grad_output, input, mean, variance, input.sym_size(1));
  const OptionalTensor clamped = Clamp(lower, upper).cuts() ? residual : std::nullopt;
  if (given(stopped) && stopped->sym_numel() != 0) check_stopped(*stopped, stopped_size(input), given(clamped));
  return empty_gradients(input, empty_like_input(input), weight, bias, clamped);
}

NormGradients batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                  const OptionalTensor& residual, Bound lower, Bound upper, bool train, double eps,
                                  const OptionalTensor& stopped) {
  const auto gradients = batch_norm_backward_meta(grad_output, input, weight, bias, mean, variance, residual, lower,
                                                  upper, train, eps, stopped);
  NormTensors tensors = backward_tensors(grad_output, input, weight, bias, mean, variance, residual, gradients);
  if (given(stopped)) tensors.stopped = *stopped;
  run_normalization(batch_norm_problem(input, {lower, upper}, train, eps), tensors, NormPass::backward);
  return gradients;
}

// ---- Double backward.

NormResult batch_norm_double_backward_meta(const Tensor& v, const OptionalTensor& v_weight,
                                           const OptionalTensor& v_bias, const OptionalTensor& v_residual,
                                           const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                           const OptionalTensor& residual, Bound, Bound, double) {
  check_batch_norm(input, weight, bias, residual);
  check_backward(grad_output, input, mean, variance, input.sym_size(1));
  check_twin("v", v, input);
  check_vector("v_weight", v_weight, input, input.sym_size(1));
  check_vector("v_bias", v_bias, input, input.sym_size(1));
  if (given(v_residual)) check_twin("v_residual", *v_residual, input);
  return {empty_like_input(input), empty_like_input(input), empty_gradient(weight, input)};
}

NormResult batch_norm_double_backward(const Tensor& v, const OptionalTensor& v_weight, const OptionalTensor& v_bias,
                                      const OptionalTensor& v_residual, const Tensor& grad_output, const Tensor& input,
                                      const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                      const Tensor& variance, const OptionalTensor& residual, Bound lower, Bound upper,
                                      double eps) {
  const NormResult result = batch_norm_double_backward_meta(v, v_weight, v_bias, v_residual, grad_output, input, weight,
                                                            bias, mean, variance, residual, lower, upper, eps);
  NormTensors tensors = backward_tensors(grad_output, input, weight, bias, mean, variance, residual,
                                         {std::get<1>(result), std::get<2>(result), Tensor(), Tensor()});
  tensors.grad_grad_output = std::get<0>(result);
  tensors.v = v;
  tensors.v_weight = accumulated(v_weight, input);
  tensors.v_bias = accumulated(v_bias, input);
  if (given(v_residual)) tensors.v_residual = *v_residual;
  run_normalization(batch_norm_problem(input, {lower, upper}, true, eps), tensors, NormPass::double_backward);
  return result;
}

}  // namespace convlab
