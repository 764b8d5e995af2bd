// From an algorithm to its kernels. What they cannot compute has been refused: csrc/algorithm_choice_cuda.cpp.
#include "conv.h"

namespace {

using namespace convlab;
using cuda::ConvArguments;

struct Kernels {
  int (*run)(const ConvArguments&, void* stream);
  int64_t (*workspace)(const ConvArguments&);
};

int64_t nothing(const ConvArguments&) { return 0; }

Kernels kernels_of(const ConvArguments& a) {
  using namespace cuda;
  const bool to_weight = a.pass == Pass::backward_weight;
  switch (a.algorithm) {
    case Algorithm::implicit_gemm:
      return {implicit_gemm_convolution, implicit_gemm_workspace};
    case Algorithm::winograd:
      return {winograd_convolution, winograd_workspace};
    case Algorithm::direct:
      if (!to_weight) return {direct_pixels_convolution, nothing};
      return {direct_weight_convolution, direct_weight_workspace};
    case Algorithm::depthwise:
      if (!to_weight) return {depthwise_pixels_convolution, nothing};
      return {direct_weight_convolution, direct_weight_workspace};
    case Algorithm::inner_product:
      return {inner_product_convolution, inner_product_workspace};
    default:
      return {naive_convolution, nothing};
  }
}

}  // namespace

extern "C" int64_t convlab_convolution_workspace(const convlab::cuda::ConvArguments* arguments) {
  return kernels_of(*arguments).workspace(*arguments);
}

extern "C" int convlab_convolution(const convlab::cuda::ConvArguments* arguments, void* stream) {
  return kernels_of(*arguments).run(*arguments, stream);
}
