#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../activation.h"

namespace convlab {

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       std::string_view algorithm);
at::Tensor convolution_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            c10::SymInt groups, std::string_view algorithm);

// "none", "sigmoid", "hard_sigmoid", "normal" or "normal_tanh".
Gate gate_by_name(std::string_view name);
// clamp(convolution + residual), then the gate, each part if asked for; for inference. `packed` is what
// convolution_pack returned for this weight, or empty.
at::Tensor convolution_fused(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& packed,
                             Bound lower, Bound upper, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups, std::string_view algorithm,
                             std::string_view gate = "none");
at::Tensor convolution_fused_meta(const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                                  const std::optional<at::Tensor>& packed, Bound lower, Bound upper,
                                  c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                  c10::SymInt groups, std::string_view algorithm, std::string_view gate = "none");
// The weight in the order in which the forward kernel for such inputs reads it; empty if it reads it as it is.
at::Tensor convolution_pack(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                            std::string_view algorithm);

// `bias` is that of a transposed convolution, whose forward pass this is.
at::Tensor convolution_backward_input(const at::Tensor& grad_output, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, at::IntArrayRef input_size,
                                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, std::string_view algorithm);
at::Tensor convolution_backward_input_meta(const at::Tensor& grad_output, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias, c10::SymIntArrayRef input_size,
                                           c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                           c10::SymIntArrayRef dilation, c10::SymInt groups,
                                           std::string_view algorithm);

at::Tensor convolution_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                       at::IntArrayRef weight_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                       at::IntArrayRef dilation, int64_t groups, std::string_view algorithm);
at::Tensor convolution_backward_weight_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                            c10::SymIntArrayRef weight_size, c10::SymIntArrayRef stride,
                                            c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                            c10::SymInt groups, std::string_view algorithm);

}  // namespace convlab
