// A function of the module _C that calls fused convolutions in a row; see python_run.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace convlab {

void add_python_run(pybind11::module_& module);

}  // namespace convlab
