#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../activation.h"

namespace convlab {

struct StripLayer {
  const at::Tensor& weight;
  std::optional<at::Tensor> bias, residual, packed;  // packed: what convolution_pack returned for this weight
  Bound lower, upper;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  std::string_view algorithm, gate;
};

// A pointwise convolution, the depthwise one that reads it and, if there is a third layer, the pointwise one that reads
// that: convolution_fused by one after the other, to the bit, on the CPU. None if they are not such layers, or if there
// is nothing to gain.
std::optional<at::Tensor> convolution_strips(const at::Tensor& input, c10::ArrayRef<StripLayer> layers);

}  // namespace convlab
