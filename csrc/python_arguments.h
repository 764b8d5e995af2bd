// The arguments of a call from Python, read one by one as the interpreter holds them; see python_call.cpp.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "clamp.h"

namespace convlab {

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
  bool at_end() const { return next_ == end_; }
  bool tensor_is_next() const { return next_ != end_ && THPVariable_Check(*next_); }
  // Of a class that pybind11 knows; null for None.
  template <class Value>
  Value* object() {
    PyObject* object = take();
    if (object == Py_None) return nullptr;
    pybind11::detail::make_caster<Value> caster;
    if (object == nullptr || !caster.load(object, false)) return refuse<Value*>();
    return static_cast<Value*>(caster);
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
  double number() {
    PyObject* object = take();
    return object != nullptr && PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : refuse<double>();
  }
  int64_t integer() { return integer(take()); }
  std::optional<int64_t> optional_integer() {
    PyObject* object = take();
    return object == Py_None ? std::nullopt : std::optional<int64_t>(integer(object));
  }
  // As axes(); None stands for `other`.
  Axes axes_or(const Axes& other) {
    if (next_ == end_ || *next_ != Py_None) return axes(static_cast<int64_t>(other.count));
    ++next_;
    return other;
  }
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
  // As many integers as a list has.
  Axes some_axes() {
    const bool is_list = next_ != end_ && PyList_CheckExact(*next_);
    return axes(is_list ? static_cast<int64_t>(PyList_GET_SIZE(*next_)) : -1);
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

  // Whether every argument was what it should be, and the tensors are dense ones on the CPU.
  bool understood() const {
    return plain_ && next_ == end_ && backend(keys_ - c10::default_excluded_set) == c10::DispatchKey::CPU;
  }
  // Whether the dispatcher would end up, below autograd, in the kernel for dense CPU tensors, with nothing on the way.
  bool plain() const {
    const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
    return understood() && backend((keys_ | local.included_) - local.excluded_) == c10::DispatchKey::CPU &&
           !at::impl::torch_function_mode_enabled() &&
           !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
  }

 private:
  // The first in line below autograd. BackendSelect is always there, for operators without tensor arguments.
  static c10::DispatchKey backend(c10::DispatchKeySet keys) {
    return (keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
            c10::DispatchKeySet(c10::DispatchKey::BackendSelect))
        .highestPriorityTypeId();
  }
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

}  // namespace convlab
