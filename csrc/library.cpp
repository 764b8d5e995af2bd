// Every operator of the library: the table of contents. Shapes are checked in ops/, kernels are in cpu/ and cuda/.
#include <torch/library.h>

#include "ops/convolution.h"

// Spatial arguments hold one integer per spatial dimension (1 to 3); tensors are batched.
TORCH_LIBRARY(convlab, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // Convolution. `algorithm` is "auto" or a name of csrc/algorithms.h.
  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);
  m.def(
      "convolution_backward_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] input_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);
  m.def(
      "convolution_backward_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(convlab, CPU, m) {
  m.impl("convolution", convlab::convolution);
  m.impl("convolution_backward_input", convlab::convolution_backward_input);
  m.impl("convolution_backward_weight", convlab::convolution_backward_weight);
}

TORCH_LIBRARY_IMPL(convlab, Meta, m) {
  m.impl("convolution", convlab::convolution_meta);
  m.impl("convolution_backward_input", convlab::convolution_backward_input_meta);
  m.impl("convolution_backward_weight", convlab::convolution_backward_weight_meta);
}
