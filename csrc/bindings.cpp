// What Python sees besides the operators: geometry, the algorithm list and facts about the build. Operators are reached
// through torch.ops.convlab, registered in library.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "algorithm_choice.h"
#include "algorithms.h"
#include "cpu/conv_kernels.h"
#include "cpu/dispatch.h"
#include "cuda/device.h"
#include "geometry.h"
#include "ops/autotune.h"
#include "ops/cuda.h"
#include "ops/memory.h"
#include "python_call.h"
#include "python_run.h"

namespace py = pybind11;

namespace convlab {
namespace {

// One integer per spatial axis, 1 to 3 of them; none means `otherwise` everywhere.
using Axes = std::vector<int64_t>;

void set_axes(int64_t (&target)[kMaxSpatial], const char* name, const Axes& values, size_t spatial, int64_t otherwise) {
  if (!values.empty() && values.size() != spatial)
    throw py::value_error(std::string("expected ") + name + " to have " + std::to_string(spatial) +
                          " values, one per axis of input, but got " + std::to_string(values.size()));
  for (size_t axis = 0; axis < spatial; ++axis)
    target[kMaxSpatial - spatial + axis] = values.empty() ? otherwise : values[axis];
}

ConvGeometry make_geometry(int64_t batch, int64_t in_channels, int64_t out_channels, const Axes& input,
                           const Axes& kernel, const Axes& stride, const Axes& padding, const Axes& dilation,
                           int64_t groups) {
  const size_t spatial = input.size();
  if (spatial < 1 || spatial > kMaxSpatial)
    throw py::value_error("expected input to have 1 to 3 values, but got " + std::to_string(spatial));
  if (groups < 1 || in_channels % groups != 0 || out_channels % groups != 0)
    throw py::value_error("expected groups to divide in_channels and out_channels, but got groups=" +
                          std::to_string(groups));
  ConvGeometry geometry;
  geometry.batch = batch;
  geometry.in_channels = in_channels;
  geometry.out_channels = out_channels;
  geometry.groups = groups;
  set_axes(geometry.input, "input", input, spatial, 1);
  set_axes(geometry.kernel, "kernel", kernel, spatial, 1);
  set_axes(geometry.stride, "stride", stride, spatial, 1);
  set_axes(geometry.padding, "padding", padding, spatial, 0);
  set_axes(geometry.dilation, "dilation", dilation, spatial, 1);
  for (int64_t step : geometry.stride)
    if (step < 1) throw py::value_error("expected stride to be positive, but got " + std::to_string(step));
  geometry.set_output_size();
  return geometry;
}

}  // namespace
}  // namespace convlab

PYBIND11_MODULE(_C, m) {
  using namespace convlab;
  m.doc() = "Compiled part of torch_convlab.";
  add_python_calls(m);
  add_python_normalization_calls(m);
  add_python_run(m);

  m.def("algorithms", [] {
    py::dict list;
    for (int index = 0; index < kAlgorithms; ++index) {
      const auto algorithm = static_cast<Algorithm>(index);
      list[algorithm_name(algorithm)] = algorithm_description(algorithm);
    }
    return list;
  });
  py::enum_<Pass>(m, "Pass")
      .value("forward", Pass::forward)
      .value("backward_input", Pass::backward_input)
      .value("backward_weight", Pass::backward_weight);
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::enum_<Device>(m, "Device").value("cpu", Device::cpu).value("cuda", Device::cuda);
  m.def(
      "explain",
      [](const ConvGeometry& geometry, Pass pass, Dtype dtype, Device device, bool packed, bool channels_last) {
        ConvProblem problem{geometry, pass, dtype, device, device == Device::cuda && tf32_is_allowed(), packed};
        const bool one_pixel = device == Device::cpu && join_axes(problem.geometry);  // as the operators do
        if (channels_last || one_pixel) problem.layout = Layout::channels_last;
        py::dict verdicts;
        for (int index = 0; index < kAlgorithms; ++index) {
          const auto algorithm = static_cast<Algorithm>(index);
          const std::string reason = refusal(algorithm, problem);
          py::object cost = py::none();
          if (reason.empty()) cost = py::float_(estimated_cost(algorithm, problem));
          verdicts[algorithm_name(algorithm)] = py::make_tuple(reason, cost);
        }
        return py::make_tuple(algorithm_name(choose_algorithm(problem)), verdicts);
      },
      py::arg("geometry"), py::arg("pass"), py::arg("dtype"), py::arg("device"), py::arg("packed"),
      py::arg("channels_last"));
  m.def(
      "workspace",
      [](const ConvGeometry& geometry, Pass pass, const std::string& algorithm, bool channels_last, int threads) {
        cpu::ConvArguments<float> arguments;
        arguments.geometry = geometry;
        arguments.pass = pass;
        arguments.layout = channels_last ? Layout::channels_last : Layout::channels_first;
        arguments.weight_stride_channel = channels_last ? 1 : geometry.taps();
        arguments.weight_stride_tap = channels_last ? geometry.in_channels_per_group() : 1;
        arguments.threads = threads;
        for (int index = 0; index < kAlgorithms; ++index)
          if (const auto found = static_cast<Algorithm>(index); algorithm == algorithm_name(found)) {
            if (joins_map(found, geometry)) {
              arguments.geometry = with_map_joined(geometry);
              arguments.layout = Layout::channels_last;
            }
            const cpu::ConvPlan plan = cpu::conv_kernels<float>(found, arguments).plan(arguments);
            return py::make_tuple(plan.packed_bytes + plan.shared_bytes, plan.scratch_bytes);
          }
        throw py::value_error("unknown algorithm: " + algorithm);
      },
      "Bytes that a float32 convolution on the CPU borrows while it runs: shared, and per thread.", py::arg("geometry"),
      py::arg("pass"), py::arg("algorithm"), py::arg("channels_last"), py::arg("threads"));
  m.def("settings", [] {
    const Settings& now = settings();
    return py::make_tuple(now.algorithm < 0 ? "auto" : algorithm_name(static_cast<Algorithm>(now.algorithm)),
                          now.precise, now.autotune);
  });
  m.def(
      "set_settings",
      [](const std::string& algorithm, bool precise, bool autotune) {
        Settings wanted{-1, precise, autotune};
        for (int index = 0; index < kAlgorithms; ++index)
          if (algorithm == algorithm_name(static_cast<Algorithm>(index))) wanted.algorithm = index;
        settings() = wanted;
      },
      py::arg("algorithm"), py::arg("precise"), py::arg("autotune"));
  m.def("tuned_table", [] {
    py::dict list;
    for (const auto& [key, tuned] : tuned_table())
      list[py::str(key)] = py::make_tuple(algorithm_name(tuned.algorithm), tuned.seconds);
    return list;
  });
  m.def("set_tuned_table",
        [](const std::map<std::string, std::pair<std::string, std::map<std::string, double>>>& list) {
          std::map<std::string, Tuned> table;
          for (const auto& [key, entry] : list)
            for (int index = 0; index < kAlgorithms; ++index)
              if (entry.first == algorithm_name(static_cast<Algorithm>(index)))
                table[key] = {static_cast<Algorithm>(index), entry.second};
          set_tuned_table(std::move(table));
        });
  m.def(
      "result_memory",
      [] {
        const ResultMemory now = result_memory();
        return py::dict(py::arg("used") = now.used, py::arg("kept") = now.kept, py::arg("most_used") = now.most_used);
      },
      "Bytes of the blocks of large results on the CPU.");
  m.def("release_memory", &release_memory);
  m.def("reuses_memory", &reuses_memory);
  m.def("set_reuses_memory", &set_reuses_memory, py::arg("reuses"));
  m.def("output_size", &output_size<int64_t>, py::arg("input"), py::arg("kernel"), py::arg("stride") = 1,
        py::arg("padding") = 0, py::arg("dilation") = 1);
  m.def("pooled_size", &pooled_size<int64_t>, py::arg("input"), py::arg("kernel"), py::arg("stride") = 1,
        py::arg("padding") = 0, py::arg("dilation") = 1, py::arg("ceil_mode") = false);
  py::class_<ConvGeometry>(m, "ConvGeometry", "One convolution; 1-D and 2-D are 3-D with unit axes in front.")
      .def(py::init(&make_geometry), py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"),
           py::arg("input"), py::arg("kernel"), py::arg("stride") = Axes{}, py::arg("padding") = Axes{},
           py::arg("dilation") = Axes{}, py::arg("groups") = 1)
      .def_property_readonly("output", [](const ConvGeometry& g) { return std::to_array(g.output); })
      .def("multiply_adds", &ConvGeometry::multiply_adds)
      .def("parameters", &ConvGeometry::parameters, py::arg("bias"))
      .def("bytes", &ConvGeometry::bytes, py::arg("element_size"));
  py::class_<ReceptiveField>(m, "ReceptiveField", "Receptive field of one axis, grown layer by layer.")
      .def(py::init())
      .def("step", &ReceptiveField::step, py::arg("kernel"), py::arg("stride") = 1, py::arg("padding") = 0,
           py::arg("dilation") = 1)
      .def_readonly("size", &ReceptiveField::size)
      .def_readonly("jump", &ReceptiveField::jump)
      .def_readonly("center", &ReceptiveField::center);

  // For the tests of the CUDA kernels; see csrc/emulator.
  m.def("load_emulator", &cuda::load_emulator, py::arg("path"));
  m.def("set_emulating", &cuda::set_emulating, py::arg("on"));

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
    info["cuda"] = cuda::built();
    info["instruction_set"] = cpu::capability_name(cpu::capability());
    info["multiplies_bfloat16"] = cpu::multiplies_bfloat16();
    info["multiplies_tiles"] = cpu::multiplies_tiles();
    info["halves_avx512"] = cpu::halves_avx512();
    return info;
  });
}
