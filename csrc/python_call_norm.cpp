// The short way (python_call.cpp) to normalizations: the operators' own arguments.
#include <torch/csrc/Exceptions.h>

#include "ops/normalization.h"
#include "python_arguments.h"
#include "python_call.h"
#include "python_results.h"

namespace convlab {
namespace {

// input, weight, bias, residual, lower, upper, eps, mark
PyObject* train(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor(),
                       residual = take.optional_tensor();
  const Bound lower = take.bound(), upper = take.bound();
  const double eps = take.number();
  const bool mark = take.boolean();
  if (!take.plain()) return usual_way();
  return result_of([&] { return batch_norm_train(*input, weight, bias, residual, lower, upper, eps, mark); });
  END_HANDLE_TH_ERRORS
}

// input, weight, bias, mean, variance, residual, lower, upper, eps
PyObject* eval(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const at::Tensor *mean = take.tensor(), *variance = take.tensor();
  const OptionalTensor residual = take.optional_tensor();
  const Bound lower = take.bound(), upper = take.bound();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of(
      [&] { return batch_norm_eval(*input, weight, bias, *mean, *variance, residual, lower, upper, eps); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input, weight, bias, mean, variance, residual, lower, upper, train, eps, stopped
PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const at::Tensor *mean = take.tensor(), *variance = take.tensor();
  const OptionalTensor residual = take.optional_tensor();
  const Bound lower = take.bound(), upper = take.bound();
  const bool in_training = take.boolean();
  const double eps = take.number();
  const OptionalTensor stopped = take.optional_tensor();
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return batch_norm_backward(*grad_output, *input, weight, bias, *mean, *variance, residual, lower, upper,
                               in_training, eps, stopped);
  });
  END_HANDLE_TH_ERRORS
}

template <class T>
void move_toward(const at::Tensor& running, const at::Tensor& value, double momentum, double factor) {
  T* const average = running.mutable_data_ptr<T>();
  const T* const from = value.const_data_ptr<T>();
  const auto kept = static_cast<T>(1 - momentum), added = static_cast<T>(momentum * factor);
  for (int64_t i = 0; i < running.numel(); ++i) average[i] = average[i] * kept + from[i] * added;
}

// running_mean, running_var, mean, variance, count, momentum: the averages move toward the mean and the unbiased
// variance of `count` values, in place.
PyObject* update_running(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *running_mean = take.tensor(), *running_var = take.tensor();
  const at::Tensor *mean = take.tensor(), *variance = take.tensor();
  const int64_t values = take.integer();
  const double momentum = take.number();
  if (!take.plain() || values < 2) return usual_way();
  const auto type = running_mean->scalar_type();
  for (const at::Tensor* each : {running_mean, running_var, mean, variance})
    if (each->scalar_type() != type || !each->is_contiguous() || each->sizes() != mean->sizes() || each->is_inference())
      return usual_way();
  const double unbiased = static_cast<double>(values) / static_cast<double>(values - 1);
  if (type == at::kFloat) {
    move_toward<float>(*running_mean, *mean, momentum, 1);
    move_toward<float>(*running_var, *variance, momentum, unbiased);
  } else if (type == at::kDouble) {
    move_toward<double>(*running_mean, *mean, momentum, 1);
    move_toward<double>(*running_var, *variance, momentum, unbiased);
  } else {
    return usual_way();
  }
  for (const at::Tensor* each : {running_mean, running_var}) each->unsafeGetTensorImpl()->bump_version();
  return Py_NewRef(Py_None);
  END_HANDLE_TH_ERRORS
}

// input, weight, bias, num_groups, eps
PyObject* group(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const int64_t groups = take.integer();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of([&] { return group_norm(*input, weight, bias, groups, eps); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input, weight, bias, mean, variance, num_groups, eps
PyObject* group_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const at::Tensor *mean = take.tensor(), *variance = take.tensor();
  const int64_t groups = take.integer();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of(
      [&] { return group_norm_backward(*grad_output, *input, weight, bias, *mean, *variance, groups, eps); });
  END_HANDLE_TH_ERRORS
}

// input, weight, bias, normalized_shape, eps
PyObject* layer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const Axes shape = take.some_axes();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of([&] { return layer_norm(*input, weight, bias, shape, eps); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input, weight, bias, mean, variance, normalized_shape, eps
PyObject* layer_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const OptionalTensor weight = take.optional_tensor(), bias = take.optional_tensor();
  const at::Tensor *mean = take.tensor(), *variance = take.tensor();
  const Axes shape = take.some_axes();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of(
      [&] { return layer_norm_backward(*grad_output, *input, weight, bias, *mean, *variance, shape, eps); });
  END_HANDLE_TH_ERRORS
}

// input, weight, normalized_shape, eps
PyObject* root_mean_square(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const OptionalTensor weight = take.optional_tensor();
  const Axes shape = take.some_axes();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of([&] { return rms_norm(*input, weight, shape, eps); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input, weight, mean_square, normalized_shape, eps
PyObject* root_mean_square_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const OptionalTensor weight = take.optional_tensor();
  const at::Tensor* mean_square = take.tensor();
  const Axes shape = take.some_axes();
  const double eps = take.number();
  if (!take.plain()) return usual_way();
  return result_of([&] { return rms_norm_backward(*grad_output, *input, weight, *mean_square, shape, eps); });
  END_HANDLE_TH_ERRORS
}

}  // namespace

void add_python_normalization_calls(pybind11::module_& module) {
  static PyMethodDef methods[] = {method("batch_norm_train", train),
                                  method("batch_norm_eval", eval),
                                  method("batch_norm_backward", backward),
                                  method("update_running", update_running),
                                  method("group_norm", group),
                                  method("group_norm_backward", group_backward),
                                  method("layer_norm", layer),
                                  method("layer_norm_backward", layer_backward),
                                  method("rms_norm", root_mean_square),
                                  method("rms_norm_backward", root_mean_square_backward)};
  add_methods(module, methods);
}

}  // namespace convlab
