// Fused convolutions in a row (torch_convlab/_runs.py), called without the interpreter between them.
//
// Each layer is called as nn.ConvAddReLU.forward calls it, with the attributes that it has at that time. Before the
// first one it is made sure that calling the modules would do the same: no module was put in another's place, and none
// has a hook. A layer that wants the usual way (python_call.h) ends the run.
#include "python_run.h"

#include <torch/csrc/Exceptions.h>

#include "python_call.h"

namespace convlab {
namespace {

PyObject* item(PyObject* tuple, Py_ssize_t index) { return PyTuple_GET_ITEM(tuple, index); }

PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

// (modules of a container, name, module): whether each is where it was.
bool in_place(PyObject* places) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); ++i) {
    PyObject* place = item(places, i);
    if (PyDict_GetItemWithError(item(place, 0), item(place, 1)) != item(place, 2)) return false;
  }
  return true;
}

bool all_empty(PyObject* dicts) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); ++i)
    if (PyDict_Size(item(dicts, i)) != 0) return false;
  return true;
}

// The layer's result as a new reference, NotImplemented for the usual way, or null with an exception.
PyObject* call_layer(PyObject* attributes, PyObject* dimensions, PyObject* input, PyObject* residual) {
  static PyObject *const parameters = name_of("_parameters"), *const weight = name_of("weight"),
                         *const bias = name_of("bias"), *const training = name_of("training"),
                         *const kept = name_of("_kept"), *const relu = name_of("relu"),
                         *const stride = name_of("stride"), *const padding = name_of("padding"),
                         *const dilation = name_of("dilation"), *const groups = name_of("groups"),
                         *const algorithm = name_of("algorithm");
  const auto attribute = [&](PyObject* name) { return PyDict_GetItemWithError(attributes, name); };
  PyObject *own = attribute(parameters), *clamp = attribute(relu);
  if (own == nullptr || !PyDict_Check(own) || clamp == nullptr || !PyTuple_Check(clamp) || PyTuple_GET_SIZE(clamp) < 2)
    return Py_NewRef(Py_NotImplemented);
  PyObject* call[] = {dimensions,
                      input,
                      PyDict_GetItemWithError(own, weight),
                      PyDict_GetItemWithError(own, bias),
                      residual,
                      attribute(training) == Py_False ? attribute(kept) : Py_None,
                      item(clamp, 0),
                      item(clamp, 1),
                      attribute(stride),
                      attribute(padding),
                      attribute(dilation),
                      attribute(groups),
                      attribute(algorithm)};
  pybind11::object held[std::size(call)];  // others may replace them while the kernel runs
  for (size_t i = 0; i < std::size(call); ++i) {
    if (call[i] == nullptr) return Py_NewRef(Py_NotImplemented);
    held[i] = pybind11::reinterpret_borrow<pybind11::object>(call[i]);
  }
  return call_convolution(nullptr, call, std::size(call));
}

// program, values: appends to the list `values` what the layers return, as far as it gets; how many of them those are.
// Program: (places, dicts of hooks, steps); step: (attributes of the layer, spatial dimensions or 0 for an identity,
// number of the input, number of the residual or -1, numbers of the values that nobody reads afterwards).
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2 && PyTuple_Check(arguments[0]) && PyTuple_GET_SIZE(arguments[0]) == 3 &&
                  PyList_CheckExact(arguments[1]),
              "run takes a program and a list of values");
  PyObject *program = arguments[0], *values = arguments[1], *steps = item(program, 2);
  Py_ssize_t done = 0;
  if (!in_place(item(program, 0)) || !all_empty(item(program, 1))) return PyLong_FromSsize_t(done);
  for (; done < PyTuple_GET_SIZE(steps); ++done) {
    PyObject* step = item(steps, done);
    const auto value = [&](PyObject* number) { return PyList_GET_ITEM(values, PyLong_AsSsize_t(number)); };
    PyObject *source = value(item(step, 2)), *result = nullptr;
    if (PyLong_AsLong(item(step, 1)) == 0)
      result = Py_NewRef(source);
    else
      result = call_layer(item(step, 0), item(step, 1), source,
                          PyLong_AsSsize_t(item(step, 3)) < 0 ? Py_None : value(item(step, 3)));
    if (result == nullptr) return nullptr;
    const auto owned = pybind11::reinterpret_steal<pybind11::object>(result);
    if (result == Py_NotImplemented) break;
    if (PyList_Append(values, result) != 0) return nullptr;
    PyObject* dying = item(step, 4);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dying); ++i)
      PyList_SetItem(values, PyLong_AsSsize_t(item(dying, i)), Py_NewRef(Py_None));
  }
  return PyLong_FromSsize_t(done);
  END_HANDLE_TH_ERRORS
}

}  // namespace

void add_python_run(pybind11::module_& module) {
  static PyMethodDef method = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
                               "Calls fused convolutions in a row: see csrc/python_run.cpp."};
  module.add_object("run", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
}

}  // namespace convlab
