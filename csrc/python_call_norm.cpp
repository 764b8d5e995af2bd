// The short way (python_call.cpp) to normalizations: the operators' own arguments.
#include <torch/csrc/Exceptions.h>

#include <tuple>
#include <type_traits>

#include "ops/normalization.h"
#include "python_arguments.h"
#include "python_call.h"
#include "python_results.h"

namespace convlab {
namespace {

// An argument as it is held until the call, by the type of the operator's parameter.
template <class Parameter>
auto held(Arguments& take) {
  if constexpr (std::is_same_v<Parameter, const at::Tensor&>)
    return take.tensor();
  else if constexpr (std::is_same_v<Parameter, const OptionalTensor&>)
    return take.optional_tensor();
  else if constexpr (std::is_same_v<Parameter, Bound>)
    return take.bound();
  else if constexpr (std::is_same_v<Parameter, bool>)
    return take.boolean();
  else if constexpr (std::is_same_v<Parameter, double>)
    return take.number();
  else if constexpr (std::is_same_v<Parameter, int64_t>)
    return take.integer();
  else
    return take.some_axes();
}
template <class Parameter, class Held>
Parameter given(const Held& held) {
  if constexpr (std::is_same_v<Parameter, const at::Tensor&>)
    return *held;
  else
    return held;
}

// Calls an operator's kernel with its arguments in the schema's order.
template <auto kernel>
struct ShortWay;
template <class Result, class... Parameters, Result (*kernel)(Parameters...)>
struct ShortWay<kernel> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    Arguments take(arguments, count);
    const std::tuple<decltype(held<Parameters>(take))...> all{held<Parameters>(take)...};  // braces: in their order
    if (!take.plain()) return usual_way();
    return result_of(
        [&] { return std::apply([](const auto&... each) { return kernel(given<Parameters>(each)...); }, all); });
    END_HANDLE_TH_ERRORS
  }
};

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

}  // namespace

void add_python_normalization_calls(pybind11::module_& module) {
  static PyMethodDef methods[] = {method("batch_norm_train", ShortWay<&batch_norm_train>::call),
                                  method("batch_norm_eval", ShortWay<&batch_norm_eval>::call),
                                  method("batch_norm_backward", ShortWay<&batch_norm_backward>::call),
                                  method("update_running", update_running),
                                  method("group_norm", ShortWay<&group_norm>::call),
                                  method("group_norm_backward", ShortWay<&group_norm_backward>::call),
                                  method("layer_norm", ShortWay<&layer_norm>::call),
                                  method("layer_norm_backward", ShortWay<&layer_norm_backward>::call),
                                  method("rms_norm", ShortWay<&rms_norm>::call),
                                  method("rms_norm_backward", ShortWay<&rms_norm_backward>::call)};
  add_methods(module, methods);
}

}  // namespace convlab
