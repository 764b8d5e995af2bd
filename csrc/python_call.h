// Functions of the module _C that take a shorter way than the dispatcher's; see python_call.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace convlab {

void add_python_calls(pybind11::module_& module);

// _C.convolution: dimensions, input, weight, bias, residual, packed (a tensor, a KeptWeight or None), lower, upper,
// stride, padding, dilation, groups, algorithm.
PyObject* call_convolution(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace convlab
