// The checks of a pooling's arguments, once for every device and for the fake kernels (Int = SymInt there).
// Messages follow torch's, so that code which matches on them keeps working.
#pragma once
#include <c10/core/SymInt.h>

#include <string>
#include <vector>

#include "common.h"

namespace convlab {

template <class Int>
struct PoolWindows {
  c10::ArrayRef<Int> kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
};

// "max_pool", 2 -> "max_pool2d"
inline std::string pool_name(const char* kind, size_t spatial) { return kind + std::to_string(spatial) + "d"; }

template <class Int>
void check_pool_argument(const std::string& name, const char* argument, c10::ArrayRef<Int> values, size_t spatial) {
  static const char* const counts[] = {"", "one int", "two ints", "three ints"};
  TORCH_CHECK(values.size() == spatial, name, ": ", argument, " must either be a single int, or a tuple of ",
              counts[spatial], ", but got ", argument, "=", values);
}

inline void check_pool_dtype(const std::string& name, const at::Tensor& input) {
  dispatch_dtype(input.scalar_type(), name.c_str(), [](auto) {});
}

inline void check_pool_rank(const std::string& name, size_t dimensions) {
  TORCH_CHECK(dimensions >= 3 && dimensions <= 5, name,
              ": Expected a batched tensor of 3 to 5 dimensions for input, but got ", dimensions, " dimensions");
}

// Raises unless the windows fit the input; returns the size of the output.
template <class Int>
std::vector<Int> check_pool(const char* kind, c10::ArrayRef<Int> input, const PoolWindows<Int>& windows) {
  const size_t spatial = input.size() < 3 ? 0 : input.size() - 2;
  const std::string name = pool_name(kind, spatial);
  check_pool_rank(name, input.size());
  check_pool_argument(name, "kernel_size", windows.kernel_size, spatial);
  check_pool_argument(name, "stride", windows.stride, spatial);
  check_pool_argument(name, "padding", windows.padding, spatial);
  check_pool_argument(name, "dilation", windows.dilation, spatial);
  for (size_t axis = 0; axis < spatial; ++axis) {
    const Int &kernel = windows.kernel_size[axis], &stride = windows.stride[axis], &padding = windows.padding[axis],
              &dilation = windows.dilation[axis];
    if (spatial == 1) {  // torch words these differently and looks at the kernel first
      TORCH_CHECK(kernel > 0, name, "() kernel_size must be greater than zero, but got ", kernel);
      TORCH_CHECK(stride > 0, name, "() stride must be greater than zero, but got ", stride);
      TORCH_CHECK(dilation > 0, name, "() dilation must be greater than zero, but got ", dilation);
    }
    TORCH_CHECK(stride != 0, name, ": stride should not be zero, but got stride=", windows.stride);
    TORCH_CHECK(kernel > 0, name,
                ": kernel size should be greater than zero, but got kernel_size=", windows.kernel_size);
    TORCH_CHECK(stride > 0, name, ": stride should be greater than zero, but got stride=", windows.stride);
    TORCH_CHECK(dilation > 0, name, ": dilation should be greater than zero, but got dilation=", windows.dilation);
    TORCH_CHECK(padding >= 0, name, ": pad must be non-negative, but got pad: ", padding);
    TORCH_CHECK(padding * 2 <= kernel, name,
                ": pad should be at most half of effective kernel size, but got pad=", padding,
                ", kernel_size=", kernel, " and dilation=", dilation);
  }
  for (size_t dim = 1; dim < input.size(); ++dim)
    TORCH_CHECK(input[dim] != 0, name, ": Expected ", spatial + 1, "D or ", spatial + 2,
                "D (batch mode) tensor with optional 0 dim batch size for input, but got:", input,
                ". Expected input's non-batch dimensions to have positive length, but dimension ", dim, " is empty");
  std::vector<Int> output(input.begin(), input.end());
  bool fits = true;
  for (size_t axis = 0; axis < spatial; ++axis) {
    output[axis + 2] = pooled_size<Int>(input[axis + 2], windows.kernel_size[axis], windows.stride[axis],
                                        windows.padding[axis], windows.dilation[axis], windows.ceil_mode);
    if (output[axis + 2] < 1) fits = false;
  }
  const c10::ArrayRef<Int> computed(output);
  TORCH_CHECK(fits, name, "() Invalid computed output size: ", computed.back(), ". Given input size: ", input.slice(1),
              ". Calculated output size: ", computed.slice(1), ". Output size is too small");
  return output;
}

template <class Int>
std::vector<Int> check_adaptive_pool(const char* kind, c10::ArrayRef<Int> input, c10::ArrayRef<Int> output_size,
                                     bool channels_may_be_empty) {
  const size_t spatial = input.size() < 3 ? 0 : input.size() - 2;
  const std::string name = pool_name(kind, spatial);
  check_pool_rank(name, input.size());
  TORCH_CHECK(output_size.size() == spatial, name, "(): internal error: output_size.size() must be ", spatial,
              ": output_size must be ", spatial, ", but got output_size=", output_size);
  for (size_t dim = channels_may_be_empty ? 2 : 1; dim < input.size(); ++dim)
    TORCH_CHECK(input[dim] != 0, name,
                "(): Expected input to have non-zero size for non-batch dimensions, but input has sizes ", input,
                " with dimension ", dim, " being empty");
  std::vector<Int> output(input.begin(), input.end());
  for (size_t axis = 0; axis < spatial; ++axis) {
    TORCH_CHECK(output_size[axis] >= 0, name,
                ": elements of output_size must be greater than or equal to 0 but received ", output_size,
                ". Trying to create tensor with negative dimension ", output_size[axis]);
    output[axis + 2] = output_size[axis];
  }
  return output;
}

// The size of the output where it follows from the windows, else the size of `like`, whose windows are adaptive.
template <class Int>
std::vector<Int> check_taps(const char* what, c10::ArrayRef<Int> input, const PoolWindows<Int>& windows,
                            c10::ArrayRef<Int> like) {
  std::vector<Int> output;
  if (windows.kernel_size.empty())
    output = check_adaptive_pool<Int>("adaptive_max_pool", input, like.size() > 2 ? like.slice(2) : like, false);
  else
    output = check_pool<Int>("max_pool", input, windows);
  TORCH_CHECK(like == c10::ArrayRef<Int>(output), "expected ", what, " of size ", c10::ArrayRef<Int>(output),
              " for an input of size ", input, ", but got ", what, " of size ", like);
  return output;
}

}  // namespace convlab
