// Fused convolutions in a row (torch_convlab/_runs.py), called without the interpreter between them.
//
// Each layer is called as nn.ConvAddReLU.forward calls it, with the attributes that it has at that time. Before the
// first one it is made sure that calling the modules would do the same (`stands`). A layer that wants the usual way
// (python_call.h) ends the run.
#include "python_run.h"

#include <torch/csrc/Exceptions.h>

#include <vector>

#include "python_call.h"

namespace convlab {
namespace {

PyObject* item(PyObject* tuple, Py_ssize_t index) { return PyTuple_GET_ITEM(tuple, index); }

PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

PyObject* attribute_of(PyObject* attributes, PyObject* name) { return PyDict_GetItemWithError(attributes, name); }

// (attributes of a container, name, module): whether each module is where it was.
bool in_place(PyObject* places) {
  static PyObject* const modules = name_of("_modules");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); ++i) {
    PyObject *place = item(places, i), *own = attribute_of(item(place, 0), modules);
    if (own == nullptr || !PyDict_Check(own) || attribute_of(own, item(place, 1)) != item(place, 2)) return false;
  }
  return true;
}

// (class, name, function): whether each class still has it.
bool have_their_code(PyObject* code) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code); ++i) {
    PyObject* each = item(code, i);
    const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(item(each, 0), item(each, 1)));
    if (found.ptr() != item(each, 2)) return false;
  }
  return true;
}

bool is_empty(PyObject* dict) { return dict != nullptr && PyDict_Check(dict) && PyDict_Size(dict) == 0; }

// Whether calling a module is calling its class's `forward`: it has neither hooks nor a forward pass of its own.
bool is_plain(PyObject* module, PyObject* attributes, PyObject* code) {
  static PyObject *const own[] = {name_of("forward"), name_of("_compiled_call_impl")},
                         *const hooks[] = {name_of("_forward_hooks"), name_of("_forward_pre_hooks"),
                                           name_of("_backward_hooks"), name_of("_backward_pre_hooks")};
  auto* const kind = reinterpret_cast<PyObject*>(Py_TYPE(module));
  bool known = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code); ++i) known |= item(item(code, i), 0) == kind;
  for (PyObject* name : own) {
    PyObject* found = attribute_of(attributes, name);
    known &= found == nullptr || found == Py_None;
  }
  for (PyObject* name : hooks) known &= is_empty(attribute_of(attributes, name));
  return known;
}

// Whether the steps stand for what calling the modules would do.
bool stands(PyObject* program) {
  PyObject *code = item(program, 1), *hooks = item(program, 2), *steps = item(program, 3);
  if (!in_place(item(program, 0)) || !have_their_code(code)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hooks); ++i)
    if (!is_empty(item(hooks, i))) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); ++i)
    if (!is_plain(item(item(steps, i), 0), item(item(steps, i), 1), code)) return false;
  return true;
}

// The arguments of a call of a layer (python_call.h), with the attributes that it has now.
struct LayerCall {
  static constexpr size_t kArguments = 14;
  PyObject* arguments[kArguments];
  pybind11::object held[kArguments];  // others may replace them while the kernel runs
  bool complete = true;

  LayerCall(PyObject* attributes, PyObject* dimensions, PyObject* input, PyObject* residual) {
    static PyObject *const parameters = name_of("_parameters"), *const weight = name_of("weight"),
                           *const bias = name_of("bias"), *const training = name_of("training"),
                           *const kept = name_of("_kept"), *const relu = name_of("relu"),
                           *const stride = name_of("stride"), *const padding = name_of("padding"),
                           *const dilation = name_of("dilation"), *const groups = name_of("groups"),
                           *const algorithm = name_of("algorithm"), *const none = name_of("none");
    const auto attribute = [&](PyObject* name) { return PyDict_GetItemWithError(attributes, name); };
    PyObject *own = attribute(parameters), *clamp = attribute(relu);
    complete =
        own != nullptr && PyDict_Check(own) && clamp != nullptr && PyTuple_Check(clamp) && PyTuple_GET_SIZE(clamp) >= 3;
    if (!complete) return;
    PyObject* const found[kArguments] = {dimensions,
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
                                         attribute(algorithm),
                                         PyTuple_GET_SIZE(clamp) > 3 ? item(clamp, 3) : none};
    for (size_t i = 0; i < kArguments; ++i) {
      arguments[i] = found[i];
      held[i] = pybind11::reinterpret_borrow<pybind11::object>(found[i]);
      complete &= found[i] != nullptr;
    }
  }
};

// One step of a program, and what it reads.
struct Step {
  PyObject *attributes, *dimensions, *source, *residual, *dying;
  Py_ssize_t together;

  Step(PyObject* step, PyObject* values)
      : attributes(item(step, 1)), dimensions(item(step, 2)), dying(item(step, 5)), together(number(item(step, 6))) {
    const auto value = [&](PyObject* index) {
      const Py_ssize_t i = number(index);
      return i < 0 || i >= PyList_GET_SIZE(values) ? Py_None : PyList_GET_ITEM(values, i);
    };
    source = value(item(step, 3)), residual = value(item(step, 4));
  }
  static Py_ssize_t number(PyObject* object) { return PyLong_AsSsize_t(object); }
  // What the layer returns, NotImplemented for the usual way, or null with an exception; a new reference.
  PyObject* call() const {
    if (number(dimensions) == 0) return Py_NewRef(source);
    const LayerCall layer(attributes, dimensions, source, residual);
    return layer.complete ? call_convolution(nullptr, layer.arguments, layer.kArguments) : Py_NewRef(Py_NotImplemented);
  }
};

// The same of several layers, each of which alone reads what the one before returns.
PyObject* call_steps(const std::vector<Step>& steps) {
  std::vector<LayerCall> layers;
  std::vector<PyObject* const*> arguments;
  layers.reserve(steps.size());
  for (const Step& step : steps) {
    layers.emplace_back(step.attributes, step.dimensions, steps.front().source, step.residual);
    if (!layers.back().complete) return Py_NewRef(Py_NotImplemented);
    arguments.push_back(layers.back().arguments);
  }
  return call_together(arguments, LayerCall::kArguments);
}

// Appends a result; whether there is one.
bool append(PyObject* result, PyObject* values, const Step& step) {
  const auto owned = pybind11::reinterpret_steal<pybind11::object>(result);
  if (result == nullptr || result == Py_NotImplemented || PyList_Append(values, result) != 0) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(step.dying); ++i)
    PyList_SetItem(values, Step::number(item(step.dying, i)), Py_NewRef(Py_None));
  return true;
}

// program, values: appends to the list `values` what the layers return, as far as it gets; how many of them those are.
// Program: (places, code, dicts of hooks, steps); step: (layer, its attributes, spatial dimensions or 0 for an
// identity, number of the input, number of the residual or -1, numbers of the values that nobody reads afterwards, how
// many layers, this one included, may be computed together, so that None stands for what all but the last return).
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2 && PyTuple_Check(arguments[0]) && PyTuple_GET_SIZE(arguments[0]) == 4 &&
                  PyList_CheckExact(arguments[1]),
              "run takes a program and a list of values");
  PyObject *program = arguments[0], *values = arguments[1], *steps = item(program, 3);
  Py_ssize_t done = 0;
  if (!stands(program)) return PyErr_Occurred() ? nullptr : PyLong_FromSsize_t(done);
  while (done < PyTuple_GET_SIZE(steps)) {
    std::vector<Step> together{Step(item(steps, done), values)};
    for (Py_ssize_t i = 1; i < together.front().together; ++i) together.emplace_back(item(steps, done + i), values);
    for (; together.size() > 1; together.pop_back()) {
      PyObject* result = call_steps(together);
      if (result == nullptr) return nullptr;
      if (result == Py_NotImplemented) {
        Py_DECREF(result);
        continue;
      }
      for (const Step& step : together)
        if (!append(&step == &together.back() ? result : Py_NewRef(Py_None), values, step)) return nullptr;
      break;
    }
    if (together.size() == 1 && !append(together.front().call(), values, together.front())) break;
    done += static_cast<Py_ssize_t>(together.size());
  }
  return PyErr_Occurred() ? nullptr : PyLong_FromSsize_t(done);
  END_HANDLE_TH_ERRORS
}

}  // namespace

void add_python_run(pybind11::module_& module) {
  static PyMethodDef method = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
                               "Calls fused convolutions in a row: see csrc/python_run.cpp."};
  module.add_object("run", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
}

}  // namespace convlab
