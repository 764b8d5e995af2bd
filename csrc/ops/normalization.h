#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../clamp.h"

namespace convlab {

using OptionalTensor = std::optional<at::Tensor>;
using NormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using NormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Output, mean, biased variance, and `stopped`: with residual and clamp and if asked for, the bits of where gradients
// end at the clamp, in an order of the kernels' own; else nothing. They save batch_norm_backward the residual.
using BatchNormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
BatchNormResult batch_norm_train(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, Bound lower, Bound upper, double eps, bool mark);
BatchNormResult batch_norm_train_meta(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& residual, Bound lower, Bound upper, double eps, bool mark);

// Mean and biased variance of every channel; zeros for an empty batch.
std::tuple<at::Tensor, at::Tensor> batch_norm_statistics(const at::Tensor& input);
std::tuple<at::Tensor, at::Tensor> batch_norm_statistics_meta(const at::Tensor& input);

at::Tensor batch_norm_eval(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& residual,
                           Bound lower, Bound upper, double eps);
at::Tensor batch_norm_eval_meta(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& residual,
                                Bound lower, Bound upper, double eps);

NormGradients batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& variance,
                                  const OptionalTensor& residual, Bound lower, Bound upper, bool train, double eps,
                                  const OptionalTensor& stopped);
NormGradients batch_norm_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                       const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
                                       const at::Tensor& variance, const OptionalTensor& residual, Bound lower,
                                       Bound upper, bool train, double eps, const OptionalTensor& stopped);

// Gradients of grad_output, input and weight of <v, dx> + <v_weight, dw> + <v_bias, db> + <v_residual, d(residual)>, in
// training.
NormResult batch_norm_double_backward(const at::Tensor& v, const OptionalTensor& v_weight, const OptionalTensor& v_bias,
                                      const OptionalTensor& v_residual, const at::Tensor& grad_output,
                                      const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const at::Tensor& mean, const at::Tensor& variance,
                                      const OptionalTensor& residual, Bound lower, Bound upper, double eps);
NormResult batch_norm_double_backward_meta(const at::Tensor& v, const OptionalTensor& v_weight,
                                           const OptionalTensor& v_bias, const OptionalTensor& v_residual,
                                           const at::Tensor& grad_output, const at::Tensor& input,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const at::Tensor& mean, const at::Tensor& variance,
                                           const OptionalTensor& residual, Bound lower, Bound upper, double eps);

NormResult group_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      int64_t num_groups, double eps);
NormResult group_norm_meta(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           c10::SymInt num_groups, double eps);

NormResult group_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& variance,
                               int64_t num_groups, double eps);
NormResult group_norm_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                    const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
                                    const at::Tensor& variance, c10::SymInt num_groups, double eps);

NormResult layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      at::IntArrayRef normalized_shape, double eps);
NormResult layer_norm_meta(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           c10::SymIntArrayRef normalized_shape, double eps);

NormResult layer_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& variance,
                               at::IntArrayRef normalized_shape, double eps);
NormResult layer_norm_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                    const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
                                    const at::Tensor& variance, c10::SymIntArrayRef normalized_shape, double eps);

// Results are the output and the mean of squares, the latter of the input's size with ones for normalized_shape.
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& input, const OptionalTensor& weight,
                                            at::IntArrayRef normalized_shape, double eps);
std::tuple<at::Tensor, at::Tensor> rms_norm_meta(const at::Tensor& input, const OptionalTensor& weight,
                                                 c10::SymIntArrayRef normalized_shape, double eps);

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const OptionalTensor& weight, const at::Tensor& mean_square,
                                                     at::IntArrayRef normalized_shape, double eps);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                                          const OptionalTensor& weight, const at::Tensor& mean_square,
                                                          c10::SymIntArrayRef normalized_shape, double eps);

}  // namespace convlab
