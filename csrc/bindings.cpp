// The only file with pybind11: geometry, the algorithm list and facts about the build. Operators are reached
// through torch.ops.convlab, registered in library.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "algorithms.h"
#include "cpu/dispatch.h"
#include "geometry.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace convlab;
  m.doc() = "Compiled part of torch_convlab.";

  m.def("algorithms", [] {
    py::dict list;
    for (int index = 0; index < kAlgorithms; ++index) {
      const auto algorithm = static_cast<Algorithm>(index);
      list[algorithm_name(algorithm)] = algorithm_description(algorithm);
    }
    return list;
  });
  m.def("output_size", &output_size<int64_t>, py::arg("input"), py::arg("kernel"), py::arg("stride") = 1,
        py::arg("padding") = 0, py::arg("dilation") = 1);
  m.def("pooled_size", &pooled_size<int64_t>, py::arg("input"), py::arg("kernel"), py::arg("stride") = 1,
        py::arg("padding") = 0, py::arg("dilation") = 1, py::arg("ceil_mode") = false);
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["cpp_standard"] = __cplusplus;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = 0;
#endif
#ifdef NDEBUG
    info["debug"] = false;
#else
    info["debug"] = true;
#endif
    info["instruction_set"] = cpu::capability_name(cpu::capability());
    return info;
  });
}
