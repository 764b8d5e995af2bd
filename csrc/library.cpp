// Every operator of the library: the table of contents. Shapes are checked in ops/, kernels are in cpu/ and cuda/.
#include <torch/library.h>

#include "ops/convolution.h"
#include "ops/normalization.h"
#include "ops/pooling.h"

// Spatial arguments hold one integer per spatial dimension (1 to 3); tensors are batched.
TORCH_LIBRARY(convlab, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // Convolution. `algorithm` is "auto" or a name of csrc/algorithms.h.
  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);
  // clamp(convolution + residual), each part if asked for; for inference. `packed`: what convolution_pack returned for
  // this weight, and the caller's word that the weight has not changed since. clamp cuts to [lower, upper]: ReLU has
  // the bounds 0 and None, ReLU6 0 and 6. `gate` multiplies the value: sigmoid makes SiLU, hard_sigmoid
  // Hardswish, normal and normal_tanh GELU.
  m.def(
      "convolution_fused(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? packed, float? lower, "
      "float? upper, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm, "
      "str gate='none') -> Tensor",
      tags);
  m.def(
      "convolution_pack(Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
      "str algorithm) -> Tensor");
  m.def(
      "convolution_backward_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] input_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);
  m.def(
      "convolution_backward_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);

  // Normalization. Results are output, mean and biased variance; gradients are those of input, weight, bias and, for
  // batch norm, residual. batch_norm's output is clamp(normalized + residual), each part if asked for; gradients end at
  // the bounds. Where, batch_norm_train writes down as bits if asked to `mark` it and there is a residual.
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float? lower, float? upper, "
      "float eps, bool mark=False) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, Tensor? residual, "
      "float? lower, float? upper, float eps) -> Tensor",
      tags);
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor variance, Tensor? residual, float? lower, float? upper, bool train, float eps, Tensor? stopped=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      tags);
  // Gradients of grad_output, input and weight; v, v_weight, ... are those of the results of batch_norm_backward.
  m.def(
      "batch_norm_double_backward(Tensor v, Tensor? v_weight, Tensor? v_bias, Tensor? v_residual, Tensor grad_output, "
      "Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, Tensor? residual, float? lower, "
      "float? upper, "
      "float eps) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "group_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt num_groups, float eps) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "group_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor variance, SymInt num_groups, float eps) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "layer_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt[] normalized_shape, float eps) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor variance, SymInt[] normalized_shape, float eps) -> (Tensor, Tensor, Tensor)",
      tags);

  m.def("batch_norm_statistics(Tensor input) -> (Tensor, Tensor)", tags);
  m.def("rms_norm(Tensor input, Tensor? weight, SymInt[] normalized_shape, float eps) -> (Tensor, Tensor)", tags);
  m.def(
      "rms_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean_square, "
      "SymInt[] normalized_shape, float eps) -> (Tensor, Tensor)",
      tags);

  // Max pooling. `taps` names the winner of each window by its position in it; empty unless with_taps. Where taps
  // are read, an empty kernel_size stands for adaptive windows.
  m.def(
      "max_pool(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "bool ceil_mode, bool with_taps) -> (Tensor, Tensor)",
      tags);
  m.def("adaptive_max_pool(Tensor input, SymInt[] output_size, bool with_taps) -> (Tensor, Tensor)", tags);
  m.def(
      "max_pool_indices(Tensor taps, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool ceil_mode) -> Tensor",
      tags);
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor taps, SymInt[] input_size, SymInt[] kernel_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode) -> Tensor",
      tags);
  m.def(
      "max_pool_gather(Tensor input, Tensor taps, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool ceil_mode) -> Tensor",
      tags);

  // Average pooling.
  m.def(
      "avg_pool(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override) -> Tensor",
      tags);
  m.def(
      "avg_pool_backward(Tensor grad_output, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, "
      "SymInt[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor",
      tags);
  m.def("adaptive_avg_pool(Tensor input, SymInt[] output_size) -> Tensor", tags);
  m.def("adaptive_avg_pool_backward(Tensor grad_output, SymInt[] input_size) -> Tensor", tags);
}

// The operators ask where a tensor is after their checks: one list for both devices.
static void register_operators(torch::Library& m) {
  m.impl("convolution", convlab::convolution);
  m.impl("convolution_fused", convlab::convolution_fused);
  m.impl("convolution_pack", convlab::convolution_pack);
  m.impl("convolution_backward_input", convlab::convolution_backward_input);
  m.impl("convolution_backward_weight", convlab::convolution_backward_weight);
  m.impl("batch_norm_train", convlab::batch_norm_train);
  m.impl("batch_norm_eval", convlab::batch_norm_eval);
  m.impl("batch_norm_backward", convlab::batch_norm_backward);
  m.impl("batch_norm_double_backward", convlab::batch_norm_double_backward);
  m.impl("group_norm", convlab::group_norm);
  m.impl("group_norm_backward", convlab::group_norm_backward);
  m.impl("layer_norm", convlab::layer_norm);
  m.impl("layer_norm_backward", convlab::layer_norm_backward);
  m.impl("batch_norm_statistics", convlab::batch_norm_statistics);
  m.impl("rms_norm", convlab::rms_norm);
  m.impl("rms_norm_backward", convlab::rms_norm_backward);
  m.impl("max_pool", convlab::max_pool);
  m.impl("adaptive_max_pool", convlab::adaptive_max_pool);
  m.impl("max_pool_indices", convlab::max_pool_indices);
  m.impl("max_pool_backward", convlab::max_pool_backward);
  m.impl("max_pool_gather", convlab::max_pool_gather);
  m.impl("avg_pool", convlab::avg_pool);
  m.impl("avg_pool_backward", convlab::avg_pool_backward);
  m.impl("adaptive_avg_pool", convlab::adaptive_avg_pool);
  m.impl("adaptive_avg_pool_backward", convlab::adaptive_avg_pool_backward);
}

TORCH_LIBRARY_IMPL(convlab, CPU, m) { register_operators(m); }

#if defined(CONVLAB_WITH_CUDA)
TORCH_LIBRARY_IMPL(convlab, CUDA, m) { register_operators(m); }
#endif

TORCH_LIBRARY_IMPL(convlab, Meta, m) {
  m.impl("convolution", convlab::convolution_meta);
  m.impl("convolution_fused", convlab::convolution_fused_meta);
  m.impl("convolution_backward_input", convlab::convolution_backward_input_meta);
  m.impl("convolution_backward_weight", convlab::convolution_backward_weight_meta);
  m.impl("batch_norm_train", convlab::batch_norm_train_meta);
  m.impl("batch_norm_eval", convlab::batch_norm_eval_meta);
  m.impl("batch_norm_backward", convlab::batch_norm_backward_meta);
  m.impl("batch_norm_double_backward", convlab::batch_norm_double_backward_meta);
  m.impl("group_norm", convlab::group_norm_meta);
  m.impl("group_norm_backward", convlab::group_norm_backward_meta);
  m.impl("layer_norm", convlab::layer_norm_meta);
  m.impl("layer_norm_backward", convlab::layer_norm_backward_meta);
  m.impl("batch_norm_statistics", convlab::batch_norm_statistics_meta);
  m.impl("rms_norm", convlab::rms_norm_meta);
  m.impl("rms_norm_backward", convlab::rms_norm_backward_meta);
  m.impl("max_pool", convlab::max_pool_meta);
  m.impl("adaptive_max_pool", convlab::adaptive_max_pool_meta);
  m.impl("max_pool_indices", convlab::max_pool_indices_meta);
  m.impl("max_pool_backward", convlab::max_pool_backward_meta);
  m.impl("max_pool_gather", convlab::max_pool_gather_meta);
  m.impl("avg_pool", convlab::avg_pool_meta);
  m.impl("avg_pool_backward", convlab::avg_pool_backward_meta);
  m.impl("adaptive_avg_pool", convlab::adaptive_avg_pool_meta);
  m.impl("adaptive_avg_pool_backward", convlab::adaptive_avg_pool_backward_meta);
}
