// Functions of the module _C that take a shorter way than the dispatcher's; see python_call.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace convlab {

void add_python_calls(pybind11::module_& module);
void add_python_normalization_calls(pybind11::module_& module);

// _C.convolution: dimensions, input, weight, bias, residual, packed (a tensor, a KeptWeight or None), lower, upper,
// stride, padding, dilation, groups, algorithm and, if there is one, the gate.
PyObject* call_convolution(PyObject*, PyObject* const* arguments, Py_ssize_t count);
// Some of them, each of what the one before returns (but the first, their own inputs are not looked at), as
// ops/convolution_strips.h has it; NotImplemented for the usual way.
PyObject* call_together(const std::vector<PyObject* const*>& layers, Py_ssize_t count);

}  // namespace convlab
