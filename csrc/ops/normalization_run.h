// What the normalization operators share: the geometry that makes them one kernel, their tensors, and the run.
//
// Statistics are the mean and the biased variance of every group, in the accumulation type (float32 for float32 and
// the 16-bit types). Weight and bias have the input's type or, for 16-bit inputs, float32; they are vectors, converted
// by `accumulated`. A gradient of an argument that is absent is a tensor of no elements.
#pragma once
#include "../cuda/launchers.h"
#include "normalization.h"
#include "normalization_checks.h"

namespace convlab {

// ---- Outputs. Like the checks these know symbolic sizes only, so that fake kernels are a check and an allocation.

at::Tensor empty_like_input(const at::Tensor& input);
at::Tensor empty_statistics(const at::Tensor& input, c10::SymIntArrayRef size);
at::Tensor empty_gradient(const OptionalTensor& parameter, const at::Tensor& input);
NormGradients empty_gradients(const at::Tensor& input, at::Tensor grad_input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual);

// ---- The kernel's arguments.

struct NormProblem {
  int64_t samples = 1, repeats = 1, groups = 1, channels_per_group = 1, pixels = 1;
  Layout layout = Layout::channels_first;
  Clamp clamp;
  bool statistics = true, centered = true;
  double eps = 0;

  int64_t elements() const { return samples * repeats * groups * channels_per_group * pixels; }
};

int64_t pixels_of(const at::Tensor& input);

struct NormTensors {
  at::Tensor input, residual, grad_output, output, grad_residual;  // of the input's size
  at::Tensor weight, bias, grad_weight, grad_bias;  // one value per channel; weight and bias may be undefined
  at::Tensor mean, variance;                        // in the accumulation type
  at::Tensor v, v_residual, v_weight, v_bias;       // double backward: directions, may be undefined
  at::Tensor grad_grad_output;
  at::Tensor stopped;  // of batch norm; undefined or empty if there is none
};

// `vector` in the type and layout in which kernels read it; undefined if it is absent.
at::Tensor accumulated(const OptionalTensor& vector, const at::Tensor& input);

NormTensors forward_tensors(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual);
NormTensors backward_tensors(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& variance,
                             const OptionalTensor& residual, const NormGradients& gradients);

using cuda::NormPass;

// Fills the outputs. Statistics and gradients of parameters of nothing are zero.
void run_normalization(const NormProblem& problem, NormTensors tensors, NormPass pass);

}  // namespace convlab
