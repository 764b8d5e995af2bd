#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// Windows are given by kernel_size, stride, padding, dilation and ceil_mode, or, where taps are read, by an empty
// kernel_size: the adaptive windows of the two sizes. Taps are positions inside a window, numbered in row-major
// order: uint8 if a window has at most 255, else int64.
namespace convlab {

std::tuple<at::Tensor, at::Tensor> max_pool(const at::Tensor& input, at::IntArrayRef kernel_size,
                                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                            bool ceil_mode, bool with_taps);
std::tuple<at::Tensor, at::Tensor> max_pool_meta(const at::Tensor& input, c10::SymIntArrayRef kernel_size,
                                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                 c10::SymIntArrayRef dilation, bool ceil_mode, bool with_taps);

std::tuple<at::Tensor, at::Tensor> adaptive_max_pool(const at::Tensor& input, at::IntArrayRef output_size,
                                                     bool with_taps);
std::tuple<at::Tensor, at::Tensor> adaptive_max_pool_meta(const at::Tensor& input, c10::SymIntArrayRef output_size,
                                                          bool with_taps);

// Offsets of the winners in their plane of the input, as torch returns them; -1 for a window without any tap.
at::Tensor max_pool_indices(const at::Tensor& taps, at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);
at::Tensor max_pool_indices_meta(const at::Tensor& taps, c10::SymIntArrayRef input_size,
                                 c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                 c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool ceil_mode);

at::Tensor max_pool_backward(const at::Tensor& grad_output, const at::Tensor& taps, at::IntArrayRef input_size,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode);
at::Tensor max_pool_backward_meta(const at::Tensor& grad_output, const at::Tensor& taps, c10::SymIntArrayRef input_size,
                                  c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                  c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool ceil_mode);

// output[q] = input at the winner of window q; the adjoint of max_pool_backward.
at::Tensor max_pool_gather(const at::Tensor& input, const at::Tensor& taps, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);
at::Tensor max_pool_gather_meta(const at::Tensor& input, const at::Tensor& taps, c10::SymIntArrayRef kernel_size,
                                c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                bool ceil_mode);

at::Tensor avg_pool(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                    at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                    std::optional<int64_t> divisor_override);
at::Tensor avg_pool_meta(const at::Tensor& input, c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                         c10::SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                         std::optional<int64_t> divisor_override);

at::Tensor avg_pool_backward(const at::Tensor& grad_output, at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                             std::optional<int64_t> divisor_override);
at::Tensor avg_pool_backward_meta(const at::Tensor& grad_output, c10::SymIntArrayRef input_size,
                                  c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride,
                                  c10::SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                                  std::optional<int64_t> divisor_override);

at::Tensor adaptive_avg_pool(const at::Tensor& input, at::IntArrayRef output_size);
at::Tensor adaptive_avg_pool_meta(const at::Tensor& input, c10::SymIntArrayRef output_size);

at::Tensor adaptive_avg_pool_backward(const at::Tensor& grad_output, at::IntArrayRef input_size);
at::Tensor adaptive_avg_pool_backward_meta(const at::Tensor& grad_output, c10::SymIntArrayRef input_size);

}  // namespace convlab
