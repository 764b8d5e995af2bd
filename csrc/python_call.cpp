// The short way from Python to a convolution or a linear layer, for calls that nothing but the CPU kernel has a say in.
//
// The dispatcher's way boxes every argument, which takes longer than a small convolution. These functions look at the
// arguments as they are; where anything else may be concerned (autograd, autocast, transforms, modes, subclasses,
// profilers, other devices, unusual arguments) they return NotImplemented, and the caller takes the usual way, which
// also words the errors. torch.compile cannot look into them: it is to take the usual way, too.
#include "python_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <vector>

#include "ops/convolution.h"

namespace convlab {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// One integer per axis.
struct Axes {
  int64_t values[5];
  size_t count = 0;

  operator at::IntArrayRef() const { return {values, count}; }
};

// What every convolution ends with.
struct Parameters {
  Axes stride, padding, dilation;
  int64_t groups = 1;
  std::string_view algorithm;
};

// Takes the arguments of a call one by one; `plain` ends up false if one of them, or what is switched on around the
// call, wants the usual way.
class Arguments {
 public:
  Arguments(PyObject* const* next, Py_ssize_t count) : next_(next), end_(next + count) {}

  const at::Tensor* tensor() {
    PyObject* object = take();
    if (object == nullptr || !THPVariable_CheckExact(object)) return refuse<const at::Tensor*>();
    const at::Tensor& tensor = THPVariable_Unpack(object);
    keys_ = keys_ | tensor.key_set();
    const bool has_tangent = tensor.unsafeGetTensorImpl()->autograd_meta() != nullptr && tensor._fw_grad(0).defined();
    if (has_tangent || (c10::GradMode::is_enabled() && tensor.requires_grad())) plain_ = false;
    return &tensor;
  }
  OptionalTensor optional_tensor() {
    if (next_ != end_ && *next_ == Py_None) {
      ++next_;
      return std::nullopt;
    }
    const at::Tensor* present = tensor();
    return present == nullptr ? std::nullopt : OptionalTensor(*present);
  }
  bool boolean() {
    PyObject* object = take();
    return object != nullptr && PyBool_Check(object) ? object == Py_True : refuse<bool>();
  }
  Bound bound() {
    PyObject* object = take();
    if (object == Py_None) return std::nullopt;
    return object != nullptr && PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : refuse<Bound>();
  }
  int64_t integer() { return integer(take()); }
  // `axes` integers, or one for all of them.
  Axes axes(int64_t axes) {
    Axes result;
    PyObject* object = take();
    if (object == nullptr || axes < 0 || axes > 5) return refuse<Axes>();
    result.count = static_cast<size_t>(axes);
    if (PyLong_CheckExact(object)) {
      std::fill(result.values, result.values + axes, integer(object));
    } else if ((PyTuple_Check(object) || PyList_CheckExact(object)) && PySequence_Fast_GET_SIZE(object) == axes) {
      for (int64_t axis = 0; axis < axes; ++axis) result.values[axis] = integer(PySequence_Fast_GET_ITEM(object, axis));
    } else {
      return refuse<Axes>();
    }
    return result;
  }
  std::string_view text() {
    PyObject* object = take();
    Py_ssize_t length = 0;
    const char* data =
        object != nullptr && PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &length) : nullptr;
    if (data == nullptr) {
      PyErr_Clear();
      return refuse<std::string_view>();
    }
    return {data, static_cast<size_t>(length)};
  }

  Parameters parameters(int64_t dimensions) {
    Parameters p;
    p.stride = axes(dimensions), p.padding = axes(dimensions), p.dilation = axes(dimensions);
    p.groups = integer();
    p.algorithm = text();
    return p;
  }

  // Whether the dispatcher would end up, below autograd, in the kernel for dense CPU tensors, with nothing on the way.
  bool plain() const {
    if (!plain_ || next_ != end_) return false;
    const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
    // BackendSelect is always there, for operators without tensor arguments.
    const c10::DispatchKeySet below_autograd = ((keys_ | local.included_) - local.excluded_) -
                                               c10::autograd_dispatch_keyset_with_ADInplaceOrView -
                                               c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
    return below_autograd.highestPriorityTypeId() == c10::DispatchKey::CPU &&
           !at::impl::torch_function_mode_enabled() &&
           !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
  }

 private:
  PyObject* take() { return next_ == end_ ? nullptr : *next_++; }
  template <class Value>
  Value refuse() {
    plain_ = false;
    return Value{};
  }
  int64_t integer(PyObject* object) {
    if (object == nullptr || !PyLong_CheckExact(object)) return refuse<int64_t>();
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0 ? value : refuse<int64_t>();
  }

  PyObject* const* next_;
  PyObject* const* end_;
  c10::DispatchKeySet keys_;
  bool plain_ = true;
};

// What `compute` returns, without the interpreter's lock.
template <class Compute>
PyObject* result_of(const Compute& compute) {
  at::Tensor result;
  {
    pybind11::gil_scoped_release no_lock;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = compute();
  }
  return THPVariable_Wrap(std::move(result));
}

PyObject* usual_way() { return Py_NewRef(Py_NotImplemented); }

// dimensions, input, weight, bias, residual, packed, lower, upper, stride, padding, dilation, groups, algorithm
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const int64_t dimensions = take.integer();
  const at::Tensor *input = take.tensor(), *weight = take.tensor();
  const OptionalTensor bias = take.optional_tensor(), residual = take.optional_tensor(),
                       packed = take.optional_tensor();
  const Bound lower = take.bound(), upper = take.bound();
  const Parameters p = take.parameters(dimensions);
  if (!take.plain() || input->dim() != dimensions + 2 || weight->dim() != dimensions + 2) return usual_way();
  return result_of([&] {
    return convolution_fused(*input, *weight, bias, residual, packed, lower, upper, p.stride, p.padding, p.dilation,
                             p.groups, p.algorithm);
  });
  END_HANDLE_TH_ERRORS
}

// dimensions, grad_output, weight, bias, input_size, stride, padding, dilation, groups, algorithm
PyObject* backward_input(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const int64_t dimensions = take.integer();
  const at::Tensor *grad_output = take.tensor(), *weight = take.tensor();
  const OptionalTensor bias = take.optional_tensor();
  const Axes size = take.axes(dimensions + 2);
  const Parameters p = take.parameters(dimensions);
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return convolution_backward_input(*grad_output, *weight, bias, size, p.stride, p.padding, p.dilation, p.groups,
                                      p.algorithm);
  });
  END_HANDLE_TH_ERRORS
}

// dimensions, grad_output, input, weight_size, stride, padding, dilation, groups, algorithm
PyObject* backward_weight(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const int64_t dimensions = take.integer();
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const Axes size = take.axes(dimensions + 2);
  const Parameters p = take.parameters(dimensions);
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return convolution_backward_weight(*grad_output, *input, size, p.stride, p.padding, p.dilation, p.groups,
                                       p.algorithm);
  });
  END_HANDLE_TH_ERRORS
}

// input, weight, bias, relu: relu(input * transposed weight + bias), a convolution of images of one pixel.
PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *input = take.tensor(), *weight = take.tensor();
  const OptionalTensor bias = take.optional_tensor();
  const Bound lower = take.boolean() ? Bound(0.0) : std::nullopt;
  if (!take.plain() || weight->dim() != 2 || input->dim() == 0) return usual_way();
  const int64_t features = weight->size(1), outputs = weight->size(0);
  if (input->size(-1) != features || input->numel() == 0 || outputs == 0 || weight->dtype() != input->dtype())
    return usual_way();
  if (bias.has_value() && (bias->dim() != 1 || bias->size(0) != outputs)) return usual_way();
  return result_of([&] {
    std::vector<int64_t> size = input->sizes().vec();
    size.back() = outputs;
    const int64_t one[] = {1, 1}, zero[] = {0, 0};
    return convolution_fused(input->reshape({-1, features, 1, 1}), weight->reshape({outputs, features, 1, 1}), bias,
                             std::nullopt, std::nullopt, lower, std::nullopt, one, zero, one, 1, "auto")
        .view(size);
  });
  END_HANDLE_TH_ERRORS
}

using Call = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Call call) {
  // CPython's own way of storing a function with another signature.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          "On the CPU, or NotImplemented: see csrc/python_call.cpp."};
}

}  // namespace

void add_python_calls(pybind11::module_& module) {
  static PyMethodDef methods[] = {method("convolution", forward), method("convolution_backward_input", backward_input),
                                  method("convolution_backward_weight", backward_weight), method("linear", linear)};
  for (PyMethodDef& each : methods)
    module.add_object(each.ml_name,
                      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&each, nullptr, nullptr)));
}

}  // namespace convlab
