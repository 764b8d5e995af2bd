// Group, layer and RMS norm, instance norm among them: groups within a sample.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "normalization_run.h"

namespace convlab {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

namespace {

NormResult group_norm_outputs(const Tensor& input, const SymInt& groups) {
  const SymInt size[] = {input.sym_size(0), groups};
  return {empty_like_input(input), empty_statistics(input, size), empty_statistics(input, size)};
}

// Statistics have the input's leading sizes and ones for the normalized dimensions.
NormResult layer_norm_outputs(const Tensor& input, size_t normalized) {
  std::vector<SymInt> size = input.sym_sizes().vec();
  std::fill(size.end() - static_cast<int64_t>(normalized), size.end(), SymInt(1));
  return {empty_result_like(input, at::MemoryFormat::Contiguous), empty_statistics(input, size),
          empty_statistics(input, size)};
}

NormProblem group_norm_problem(const Tensor& input, int64_t groups, double eps) {
  NormProblem problem;
  problem.samples = input.size(0);
  problem.groups = groups;
  problem.channels_per_group = input.size(1) / groups;
  problem.pixels = pixels_of(input);
  problem.layout = problem.pixels == 1 ? Layout::channels_first : layout_of(with_height(input));
  problem.eps = eps;
  return problem;
}

NormProblem layer_norm_problem(const Tensor& input, size_t normalized, double eps) {
  NormProblem problem;
  for (int64_t axis = 0; axis < input.dim(); ++axis)
    (axis < input.dim() - static_cast<int64_t>(normalized) ? problem.samples : problem.channels_per_group) *=
        input.size(axis);
  problem.eps = eps;
  return problem;
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

// ---- Group norm; instance norm is the case of as many groups as channels.

NormResult group_norm_meta(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           SymInt num_groups, double) {
  check_group_norm(input, weight, bias, num_groups);
  return group_norm_outputs(input, num_groups);
}

NormResult group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups,
                      double eps) {
  const NormResult result = group_norm_meta(input, weight, bias, num_groups, eps);
  NormTensors tensors = forward_tensors(input, weight, bias, std::nullopt);
  std::tie(tensors.output, tensors.mean, tensors.variance) = result;
  run_normalization(group_norm_problem(input, num_groups, eps), tensors, NormPass::forward);
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
  run_normalization(group_norm_problem(input, num_groups, eps),
                    backward_tensors(grad_output, input, weight, bias, mean, variance, std::nullopt, gradients),
                    NormPass::backward);
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
  NormTensors tensors = forward_tensors(input.contiguous(), weight, bias, std::nullopt);
  std::tie(tensors.output, tensors.mean, tensors.variance) = result;
  run_normalization(layer_norm_problem(input, normalized_shape.size(), eps), tensors, NormPass::forward);
  return result;
}

NormResult layer_norm_backward_meta(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                    SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, bias, normalized_shape);
  check_backward(grad_output, input, mean, variance, rows_of(input, normalized_shape.size()));
  const Tensor grad_input = empty_result_like(input, at::MemoryFormat::Contiguous);
  return first_three(empty_gradients(input, grad_input, weight, bias, std::nullopt));
}

NormResult layer_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                               at::IntArrayRef normalized_shape, double eps) {
  const auto result = layer_norm_backward_meta(grad_output, input, weight, bias, mean, variance,
                                               c10::fromIntArrayRefSlow(normalized_shape), eps);
  const auto gradients = std::tuple_cat(result, std::make_tuple(Tensor()));
  run_normalization(layer_norm_problem(input, normalized_shape.size(), eps),
                    backward_tensors(grad_output, input, weight, bias, mean, variance, std::nullopt, gradients),
                    NormPass::backward);
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
  NormTensors tensors = forward_tensors(input.contiguous(), weight, std::nullopt, std::nullopt);
  std::tie(tensors.output, tensors.variance) = result;
  NormProblem problem = layer_norm_problem(input, normalized_shape.size(), eps);
  problem.centered = false;
  run_normalization(problem, tensors, NormPass::forward);
  return result;
}

std::tuple<Tensor, Tensor> rms_norm_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                  const OptionalTensor& weight, const Tensor& mean_square,
                                                  SymIntArrayRef normalized_shape, double) {
  check_layer_norm(input, weight, std::nullopt, normalized_shape);
  check_twin("grad_output", grad_output, input);
  check_vector("mean_square", mean_square, input, rows_of(input, normalized_shape.size()));
  return {empty_result_like(input, at::MemoryFormat::Contiguous), empty_gradient(weight, input)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input,
                                             const OptionalTensor& weight, const Tensor& mean_square,
                                             at::IntArrayRef normalized_shape, double eps) {
  const auto result =
      rms_norm_backward_meta(grad_output, input, weight, mean_square, c10::fromIntArrayRefSlow(normalized_shape), eps);
  const NormGradients gradients = {std::get<0>(result), std::get<1>(result), Tensor(), Tensor()};
  NormProblem problem = layer_norm_problem(input, normalized_shape.size(), eps);
  problem.centered = false;
  run_normalization(
      problem,
      backward_tensors(grad_output, input, weight, std::nullopt, Tensor(), mean_square, std::nullopt, gradients),
      NormPass::backward);
  return result;
}

}  // namespace convlab
