// The operators of library.cpp for tensors on a GPU: the same functions as for the CPU, which ask where a tensor is
// after the checks. Only in builds with CUDA.
#include <torch/library.h>

#include "ops/convolution.h"
#include "ops/normalization.h"
#include "ops/pooling.h"

#if defined(CONVLAB_WITH_CUDA)
TORCH_LIBRARY_IMPL(convlab, CUDA, m) {
  m.impl("convolution", convlab::convolution);
  m.impl("convolution_fused", convlab::convolution_fused);
  m.impl("convolution_pack", convlab::convolution_pack);
  m.impl("convolution_backward_input", convlab::convolution_backward_input);
  m.impl("convolution_backward_weight", convlab::convolution_backward_weight);
  m.impl("batch_norm_train", convlab::batch_norm_train);
  m.impl("batch_norm_eval", convlab::batch_norm_eval);
  m.impl("batch_norm_backward", convlab::batch_norm_backward);
  m.impl("group_norm", convlab::group_norm);
  m.impl("group_norm_backward", convlab::group_norm_backward);
  m.impl("layer_norm", convlab::layer_norm);
  m.impl("layer_norm_backward", convlab::layer_norm_backward);
  m.impl("batch_norm_statistics", convlab::batch_norm_statistics);
  m.impl("rms_norm", convlab::rms_norm);
  m.impl("rms_norm_backward", convlab::rms_norm_backward);
  m.impl("max_pool", convlab::max_pool);
  m.impl("adaptive_max_pool", convlab::adaptive_max_pool);
  m.impl("max_pool_indices", convlab::max_pool_indices);
  m.impl("max_pool_backward", convlab::max_pool_backward);
  m.impl("max_pool_gather", convlab::max_pool_gather);
  m.impl("avg_pool", convlab::avg_pool);
  m.impl("avg_pool_backward", convlab::avg_pool_backward);
  m.impl("adaptive_avg_pool", convlab::adaptive_avg_pool);
  m.impl("adaptive_avg_pool_backward", convlab::adaptive_avg_pool_backward);
}
#endif
