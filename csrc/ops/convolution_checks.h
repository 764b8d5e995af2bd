// The checks of a convolution's arguments, once for every device and for the fake kernels (Int = SymInt there).
// Messages follow torch's, so that code which matches on them keeps working.
#pragma once
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>
#include <vector>

#include "common.h"

namespace convlab {

template <class Int>
void check_spatial_argument(const char* name, c10::ArrayRef<Int> values, size_t spatial) {
  TORCH_CHECK(values.size() == spatial, "expected ", name, " to be a single integer value or a list of ", spatial,
              " values to match the convolution dimensions, but got ", name, "=", values);
}

// "5 x 7", as torch writes sizes.
template <class Int>
std::string by(c10::ArrayRef<Int> sizes) {
  std::ostringstream text;
  for (size_t axis = 0; axis < sizes.size(); ++axis) text << (axis ? " x " : "") << sizes[axis];
  return text.str();
}

// Below this, no size computed from a stride, padding or dilation and a tensor's sizes overflows.
constexpr int64_t kMaxParameter = int64_t{1} << 31;

// Raises unless input (N x C x spatial), weight (K x C/groups x kernel) and the four parameters fit together.
// Returns the size of the output, N x K x spatial.
template <class Int>
std::vector<Int> check_convolution(c10::ArrayRef<Int> input, c10::ArrayRef<Int> weight, c10::ArrayRef<Int> stride,
                                   c10::ArrayRef<Int> padding, c10::ArrayRef<Int> dilation, const Int& groups) {
  TORCH_CHECK(weight.size() >= 3 && weight.size() <= 5, "weight should have 3 to 5 dimensions, but got weight of size ",
              weight);
  const size_t spatial = weight.size() - 2;
  TORCH_CHECK(input.size() == weight.size(), "Expected ", weight.size(), "-dimensional input for ", weight.size(),
              "-dimensional weight ", weight, ", but got ", input.size(), "-dimensional input of size ", input,
              " instead");
  check_spatial_argument("stride", stride, spatial);
  check_spatial_argument("padding", padding, spatial);
  check_spatial_argument("dilation", dilation, spatial);
  TORCH_CHECK(groups > 0, "expected groups to be greater than 0, but got groups=", groups);
  for (size_t axis = 0; axis < spatial; ++axis) {
    TORCH_CHECK(stride[axis] > 0, "non-positive stride is not supported, but got stride=", stride);
    TORCH_CHECK(padding[axis] >= 0, "negative padding is not supported, but got padding=", padding);
    TORCH_CHECK(dilation[axis] > 0, "dilation should be greater than zero, but got dilation=", dilation);
    TORCH_CHECK(stride[axis] < kMaxParameter && padding[axis] < kMaxParameter && dilation[axis] < kMaxParameter,
                "expected stride, padding and dilation below ", kMaxParameter, ", but got stride=", stride,
                ", padding=", padding, ", dilation=", dilation);
  }
  TORCH_CHECK(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(input[1] == weight[1] * groups, "Given groups=", groups, ", weight of size ", weight, ", expected input",
              input, " to have ", weight[1] * groups, " channels, but got ", input[1], " channels instead");

  std::vector<Int> output = {input[0], weight[0]};
  bool fits = true;
  std::vector<Int> padded;
  for (size_t axis = 0; axis < spatial; ++axis) {
    const Int& kernel = weight[axis + 2];
    TORCH_CHECK(kernel > 0, "kernel size should be greater than zero, but got weight of size ", weight);
    padded.push_back(input[axis + 2] + padding[axis] * 2);
    if (padded.back() < dilation[axis] * (kernel - 1) + 1) fits = false;
    output.push_back(output_size<Int>(input[axis + 2], kernel, stride[axis], padding[axis], dilation[axis]));
  }
  TORCH_CHECK(fits, "Calculated padded input size per channel: (", by(c10::ArrayRef<Int>(padded)), "). Kernel size: (",
              by(weight.slice(2)), ") with dilation ", dilation,
              ". Kernel size can't be greater than actual input size");
  return output;
}

inline void check_same_type(const char* first_name, const at::Tensor& first, const char* second_name,
                            const at::Tensor& second) {
  TORCH_CHECK(first.scalar_type() == second.scalar_type(), first_name, " type (", toString(first.scalar_type()),
              ") and ", second_name, " type (", toString(second.scalar_type()), ") should be the same");
  TORCH_CHECK(first.device() == second.device(), first_name, " is on ", first.device(), " and ", second_name, " is on ",
              second.device(), ", but they should be on the same device");
}

template <class Int>
void check_bias(const std::optional<at::Tensor>& bias, const at::Tensor& input, const Int& channels,
                c10::ArrayRef<Int> weight) {
  if (!bias.has_value() || !bias->defined()) return;
  check_same_type("Input", input, "bias", *bias);
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == channels, "Given weight of size ", weight,
              ", expected bias to be 1-dimensional with ", channels, " elements, but got bias of size ",
              bias->sym_sizes(), " instead");
}

// `actual` must be the size that the other arguments imply.
template <class Int>
void check_size(const char* name, c10::ArrayRef<Int> actual, const std::vector<Int>& expected) {
  TORCH_CHECK(actual == c10::ArrayRef<Int>(expected), "expected ", name, " of size ", c10::ArrayRef<Int>(expected),
              ", but got ", name, " of size ", actual);
}

}  // namespace convlab
