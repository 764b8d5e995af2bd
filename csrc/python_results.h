// What the functions of the short way (python_call.cpp) return to Python, and how they get there.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <tuple>
#include <utility>

namespace convlab {

inline PyObject* usual_way() { return Py_NewRef(Py_NotImplemented); }

inline PyObject* wrapped(at::Tensor result) { return THPVariable_Wrap(std::move(result)); }

template <class... Tensors>
PyObject* wrapped(std::tuple<Tensors...> results) {
  const auto object = [](at::Tensor& tensor) {
    return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(tensor)));
  };
  return std::apply([&](auto&... each) { return pybind11::make_tuple(object(each)...); }, results).release().ptr();
}

// What `compute` returns, computed without the interpreter's lock.
template <class Compute>
PyObject* result_of(const Compute& compute) {
  decltype(compute()) result;
  {
    pybind11::gil_scoped_release no_lock;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = compute();
  }
  return wrapped(std::move(result));
}

using Call = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef method(const char* name, Call call) {
  // CPython's own way of storing a function with another signature.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          "On the CPU, or NotImplemented: see csrc/python_call.cpp."};
}

// The methods must outlive the module.
template <size_t Count>
void add_methods(pybind11::module_& module, PyMethodDef (&methods)[Count]) {
  for (PyMethodDef& each : methods)
    module.add_object(each.ml_name,
                      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&each, nullptr, nullptr)));
}

}  // namespace convlab
