#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace convlab {

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       std::string_view algorithm);
at::Tensor convolution_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            c10::SymInt groups, std::string_view algorithm);

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
