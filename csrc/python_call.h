// Functions of the module _C that take a shorter way than the dispatcher's; see python_call.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace convlab {

void add_python_calls(pybind11::module_& module);

}  // namespace convlab
