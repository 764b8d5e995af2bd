// The interface between csrc/ops and the kernels for CUDA. No torch.
//
// A launcher takes pointers, a geometry and a stream, puts kernels on the stream and returns an error code, 0 for
// success. It allocates nothing and waits for nothing, so CUDA graphs can capture it. A workspace that it needs is told
// by its twin `..._workspace`, in bytes. Tensors are dense and hold at least one element.
#pragma once
#include "../algorithms.h"
#include "../clamp.h"
#include "../dtypes.h"
#include "../geometry.h"

namespace convlab::cuda {

// The pass decides which of input, weight and output is written; the other two are only read.
struct ConvArguments {
  ConvGeometry geometry;
  Pass pass = Pass::forward;
  Dtype dtype = Dtype::float32;
  Layout layout = Layout::channels_first;  // of input and output
  Algorithm algorithm = Algorithm::naive;
  bool tf32 = false;  // float32 operands may be rounded to tf32
  void* input = nullptr;
  void* weight = nullptr;
  void* output = nullptr;
  const void* bias = nullptr;      // added to what the pass writes (never in backward_weight); may be null
  const void* residual = nullptr;  // of the shape of what the pass writes, and added to it; may be null
  Clamp clamp;                     // last, of the forward pass
  int64_t weight_stride_channel = 0, weight_stride_tap = 0;
  void* workspace = nullptr;

  CONVLAB_HD int64_t weight_stride_filter() const { return geometry.in_channels_per_group() * geometry.taps(); }
};

enum class PoolKernel : int { max, max_backward, max_gather, max_indices, average, average_backward };

// Taps are stored in one byte if a window has at most this many, else in eight. The value after the last, 255 or
// -1, says that the window has no tap inside the input. (csrc/cpu/pool_kernels.h has the same rule.)
constexpr int64_t kNarrowTaps = 255;

struct PoolArguments {
  PoolGeometry geometry;
  PoolKernel kernel = PoolKernel::max;
  Dtype dtype = Dtype::float32;
  Layout layout = Layout::channels_first;
  void* input = nullptr;
  void* output = nullptr;
  void* taps = nullptr;        // of the shape and layout of `output`; null: max pooling without taps
  int64_t* indices = nullptr;  // written by max_indices: the winner's offset in its D x H x W plane
};

enum class NormPass : int { forward, backward, double_backward };  // the last of batch norm in training

// As in csrc/cpu/norm_kernels.h: samples x repeats x (groups x channels_per_group) x pixels, or with channels last.
struct NormArguments {
  int64_t samples = 0, repeats = 1, groups = 1, channels_per_group = 1, pixels = 1;
  Dtype dtype = Dtype::float32;
  Layout layout = Layout::channels_first;
  NormPass pass = NormPass::forward;
  Clamp clamp;             // output = clamp(normalized + residual)
  bool statistics = true;  // mean and variance are those of the input, else given constants (running averages)
  double eps = 0;
  const void* input = nullptr;
  const void* residual = nullptr;     // may be null
  const void* grad_output = nullptr;  // backward
  void* output = nullptr;             // the gradient of the input in backward; null in forward: statistics alone
  void* grad_residual = nullptr;      // may be null
  // Under clamp and residual: where the gradient ends, one bit for each element in memory order; may be null. Forward
  // writes it, and backward reads it in the place of the residual.
  void* stopped = nullptr;
  // These are in the accumulation type; all but variance may be null.
  void* mean = nullptr;  // null: RMS norm, which does not center and whose variance is the mean of squares
  void* variance = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  // Double backward of batch norm in training: directions of the gradients of input, residual, weight and bias (null:
  // none), and the gradient of grad_output. `output` and `grad_weight` are the gradients of input and weight.
  const void *v = nullptr, *v_residual = nullptr;
  const void *v_weight = nullptr, *v_bias = nullptr;
  void* grad_grad_output = nullptr;
  void* workspace = nullptr;

  int64_t channels() const { return groups * channels_per_group; }
  int64_t elements() const { return samples * repeats * channels() * pixels; }
};

struct Launchers {
  int (*convolution)(const ConvArguments*, void* stream);
  int64_t (*convolution_workspace)(const ConvArguments*);
  int (*pool)(const PoolArguments*, void* stream);
  int (*norm)(const NormArguments*, void* stream);
  int64_t (*norm_workspace)(const NormArguments*);
  const char* (*error_text)(int code);
};

}  // namespace convlab::cuda

extern "C" {
int convlab_convolution(const convlab::cuda::ConvArguments* arguments, void* stream);
int64_t convlab_convolution_workspace(const convlab::cuda::ConvArguments* arguments);
int convlab_pool(const convlab::cuda::PoolArguments* arguments, void* stream);
int convlab_norm(const convlab::cuda::NormArguments* arguments, void* stream);
int64_t convlab_norm_workspace(const convlab::cuda::NormArguments* arguments);
const char* convlab_error_text(int code);
const convlab::cuda::Launchers* convlab_launchers();
}
