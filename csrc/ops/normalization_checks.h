// The checks of a normalization's arguments, once for every device and for the fake kernels. Sizes are symbolic, which
// costs next to nothing where they are plain integers. Messages follow torch's.
#pragma once
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <optional>
#include <sstream>

#include "common.h"

namespace convlab {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_input(const char* name, const at::Tensor& input) {
  dispatch_dtype(input.scalar_type(), name, [](auto) {});
}

inline void check_type(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == input.scalar_type() || type == accumulate_type(input.scalar_type()),
              "mixed dtype (CPU): expect parameter to have scalar type of ",
              toString(accumulate_type(input.scalar_type())), ", but got ", name, " of type ", toString(type),
              " for an input of type ", toString(input.scalar_type()));
  TORCH_CHECK(tensor.device() == input.device(), name, " is on ", tensor.device(), " and input is on ", input.device(),
              ", but they should be on the same device");
}

inline void check_vector(const char* name, const OptionalTensor& tensor, const at::Tensor& input,
                         const c10::SymInt& channels) {
  if (!given(tensor)) return;
  TORCH_CHECK(tensor->sym_numel() == channels, name, " should contain ", channels, " elements not ",
              tensor->sym_numel());
  check_type(name, *tensor, input);
}

inline void check_twin(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(tensor.sym_sizes() == input.sym_sizes(), "expected ", name, " of the input's size ", input.sym_sizes(),
              ", but got ", name, " of size ", tensor.sym_sizes());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "expected ", name, " of the input's type ",
              toString(input.scalar_type()), ", but got ", toString(tensor.scalar_type()));
}

// `marked`: there are a residual and a clamp.
inline void check_stopped(const at::Tensor& stopped, const c10::SymInt& size, bool marked) {
  TORCH_CHECK(marked && stopped.scalar_type() == at::kByte && stopped.dim() == 1 && stopped.sym_size(0) == size,
              "expected stopped to be what batch_norm_train gave for the same input, residual and clamp, uint8 of ",
              size, " elements, but got ", toString(stopped.scalar_type()), " of size ", stopped.sym_sizes(),
              marked ? "" : " without residual or clamp");
}

inline void check_batch_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& residual) {
  check_input("batch_norm", input);
  TORCH_CHECK_INDEX(input.dim() >= 2, "batch_norm expects an input of at least 2 dimensions, N x C x ..., but got ",
                    input.dim(), "-dimensional input of size ", input.sym_sizes());
  check_vector("weight", weight, input, input.sym_size(1));
  check_vector("bias", bias, input, input.sym_size(1));
  if (given(residual)) check_twin("residual", *residual, input);
}

inline void check_batch_norm_train(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& residual) {
  check_batch_norm(input, weight, bias, residual);
  TORCH_CHECK_VALUE(input.sym_numel() == 0 || input.sym_numel() != input.sym_size(1),
                    "Expected more than 1 value per channel when training, got input size torch.Size(",
                    input.sym_sizes(), ")");
}

inline void check_batch_norm_eval(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& residual) {
  check_batch_norm(input, weight, bias, residual);
  check_vector("running_mean", mean, input, input.sym_size(1));
  check_vector("running_var", variance, input, input.sym_size(1));
}

inline void check_group_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const c10::SymInt& groups) {
  check_input("GroupNormKernelImpl", input);
  TORCH_CHECK(input.dim() >= 2, "Expected at least 2 dimensions for input tensor but received ", input.dim());
  TORCH_CHECK(groups > 0, "Expected num groups to be greater than 0, got ", groups);
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK(channels % groups == 0, "Expected number of channels in input to be divisible by num_groups, but got ",
              "input of shape ", input.sym_sizes(), " and num_groups=", groups);
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    if (!given(tensor)) return;
    TORCH_CHECK(tensor->dim() == 1 && tensor->sym_size(0) == channels, "Expected ", name,
                " to be a vector of size equal to the number of channels in input, but got ", name, " of shape ",
                tensor->sym_sizes(), " and input of shape ", input.sym_sizes());
    check_type(name, *tensor, input);
  };
  check("weight", weight);
  check("bias", bias);
}

inline void check_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             c10::SymIntArrayRef shape) {
  check_input("LayerNormKernelImpl", input);
  TORCH_CHECK(!shape.empty(), "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one ",
              "element, but got normalized_shape = ", shape);
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    if (!given(tensor)) return;
    TORCH_CHECK(tensor->sym_sizes() == shape, "Expected ", name, " to be of same shape as normalized_shape, but got ",
                name, " of shape ", tensor->sym_sizes(), " and normalized_shape = ", shape);
    check_type(name, *tensor, input);
  };
  check("weight", weight);
  check("bias", bias);
  const auto sizes = input.sym_sizes();
  if (sizes.size() >= shape.size() && sizes.slice(sizes.size() - shape.size()) == shape) return;
  std::ostringstream expected;
  for (const c10::SymInt& size : shape) expected << ", " << size;
  TORCH_CHECK(false, "Given normalized_shape=", shape, ", expected input with shape [*", expected.str(),
              "], but got input of size", sizes);
}

inline void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                           const at::Tensor& variance, const c10::SymInt& groups) {
  check_twin("grad_output", grad_output, input);
  check_vector("mean", mean, input, groups);
  check_vector("variance", variance, input, groups);
}

}  // namespace convlab
