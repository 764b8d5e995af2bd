// From an algorithm to its kernels.
#include "conv.h"

namespace {
bool by_implicit_gemm(const convlab::cuda::ConvArguments& a) {
  return a.algorithm == convlab::Algorithm::implicit_gemm && convlab::cuda::implicit_gemm_fits(a);
}
}  // namespace

extern "C" int64_t convlab_convolution_workspace(const convlab::cuda::ConvArguments* arguments) {
  return by_implicit_gemm(*arguments) ? convlab::cuda::implicit_gemm_workspace(*arguments) : 0;
}

extern "C" int convlab_convolution(const convlab::cuda::ConvArguments* arguments, void* stream) {
  if (by_implicit_gemm(*arguments)) return convlab::cuda::implicit_gemm_convolution(*arguments, stream);
  return convlab::cuda::naive_convolution(*arguments, stream);
}
