// The short way from Python to a convolution, a linear layer or a pooling, for calls that nothing but the CPU kernel
// has a say in; to normalizations: python_call_norm.cpp.
//
// The dispatcher's way boxes every argument, which takes longer than a small kernel. These functions look at the
// arguments as they are; where anything else may be concerned (autograd, autocast, transforms, modes, subclasses,
// profilers, other devices, unusual arguments) they return NotImplemented, and the caller takes the usual way, which
// also words the errors. torch.compile cannot look into them: it is to take the usual way, too.
#include "python_call.h"

#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/Exceptions.h>

#include <vector>

#include "kept_weight.h"
#include "ops/convolution.h"
#include "ops/convolution_strips.h"
#include "ops/pooling.h"
#include "python_arguments.h"
#include "python_results.h"

namespace convlab {
namespace {

// Of a batched tensor; -1, which no call takes, for what has none.
int64_t spatial(const at::Tensor* tensor) { return tensor == nullptr || tensor->dim() < 3 ? -1 : tensor->dim() - 2; }

// kept, input, weight, stride, padding, dilation, groups, algorithm: the packed weight for such an input, or None.
PyObject* packed_weight(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  KeptWeight* kept = take.object<KeptWeight>();
  const at::Tensor *input = take.tensor(), *weight = take.tensor();
  const Parameters p = take.parameters(spatial(weight));
  if (!take.understood() || kept == nullptr) return Py_NewRef(Py_None);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::tracer::impl::NoTracerDispatchMode untraced;  // a constant of the trace
  const OptionalTensor packed =
      kept->packed_for(*input, *weight, p.stride, p.padding, p.dilation, p.groups, p.algorithm);
  return packed.has_value() ? wrapped(*packed) : Py_NewRef(Py_None);
  END_HANDLE_TH_ERRORS
}

// The arguments of _C.convolution (python_call.h); `plain` if nothing but the kernel has a say in the call.
struct FusedCall {
  const at::Tensor *input, *weight;
  OptionalTensor bias, residual, packed;
  KeptWeight* kept = nullptr;
  Bound lower, upper;
  std::string_view gate = "none";
  Parameters parameters;
  bool plain;

  FusedCall(PyObject* const* arguments, Py_ssize_t count) {
    Arguments take(arguments, count);
    const int64_t dimensions = take.integer();
    input = take.tensor(), weight = take.tensor();
    bias = take.optional_tensor(), residual = take.optional_tensor();
    if (take.tensor_is_next())
      packed = take.optional_tensor();
    else
      kept = take.object<KeptWeight>();
    lower = take.bound(), upper = take.bound();
    parameters = take.parameters(dimensions);
    if (!take.at_end()) gate = take.text();
    plain = take.plain() && input->dim() == dimensions + 2 && weight->dim() == dimensions + 2;
  }
};

// dimensions, grad_output, weight, bias, input_size, stride, padding, dilation, groups, algorithm
PyObject* backward_input(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const int64_t dimensions = take.integer();
  const at::Tensor *grad_output = take.tensor(), *weight = take.tensor();
  const OptionalTensor bias = take.optional_tensor();
  const Axes size = take.axes(dimensions + 2);
  const Parameters p = take.parameters(dimensions);
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return convolution_backward_input(*grad_output, *weight, bias, size, p.stride, p.padding, p.dilation, p.groups,
                                      p.algorithm);
  });
  END_HANDLE_TH_ERRORS
}

// dimensions, grad_output, input, weight_size, stride, padding, dilation, groups, algorithm
PyObject* backward_weight(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const int64_t dimensions = take.integer();
  const at::Tensor *grad_output = take.tensor(), *input = take.tensor();
  const Axes size = take.axes(dimensions + 2);
  const Parameters p = take.parameters(dimensions);
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return convolution_backward_weight(*grad_output, *input, size, p.stride, p.padding, p.dilation, p.groups,
                                       p.algorithm);
  });
  END_HANDLE_TH_ERRORS
}

// input, weight, bias, residual, kept, lower, upper, gate: of input * transposed weight + bias + residual, as
// convolution's arguments. It is a convolution of images of one pixel.
PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *input = take.tensor(), *weight = take.tensor();
  const OptionalTensor bias = take.optional_tensor(), residual = take.optional_tensor();
  KeptWeight* const kept = take.object<KeptWeight>();
  const Bound lower = take.bound(), upper = take.bound();
  const std::string_view gate = take.text();
  if (!take.plain() || weight->dim() != 2 || input->dim() == 0) return usual_way();
  const int64_t features = weight->size(1), outputs = weight->size(0);
  if (input->size(-1) != features || input->numel() == 0 || outputs == 0 || weight->dtype() != input->dtype())
    return usual_way();
  if (bias.has_value() && (bias->dim() != 1 || bias->size(0) != outputs)) return usual_way();
  std::vector<int64_t> size = input->sizes().vec();
  size.back() = outputs;
  if (residual.has_value() && residual->sizes() != size) return usual_way();
  const int64_t one[] = {1, 1}, zero[] = {0, 0};
  const auto images = [](const at::Tensor& rows) { return rows.reshape({-1, rows.size(-1), 1, 1}); };
  OptionalTensor packed;
  if (kept != nullptr && !c10::GradMode::is_enabled()) {
    const at::Tensor filters = images(*weight);  // not below autograd: there it would not share the version
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    packed = kept->packed_for_some(images(*input), filters, one, zero, one, 1, "auto");
  }
  return result_of([&] {
    const OptionalTensor added = residual.has_value() ? OptionalTensor(images(*residual)) : std::nullopt;
    return convolution_fused(images(*input), images(*weight), bias, added, packed, lower, upper, one, zero, one, 1,
                             "auto", gate)
        .view(size);
  });
  END_HANDLE_TH_ERRORS
}

// ---- Pooling: the operators' own arguments, but that stride may be None. The spatial dimensions are the tensor's
// last.

// input, kernel_size, stride, padding, dilation, ceil_mode, with_taps
PyObject* max_pooling(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const Axes kernel = take.axes(spatial(input)), stride = take.axes_or(kernel), padding = take.axes(spatial(input)),
             dilation = take.axes(spatial(input));
  const bool ceil_mode = take.boolean(), with_taps = take.boolean();
  if (!take.plain()) return usual_way();
  return result_of([&] { return max_pool(*input, kernel, stride, padding, dilation, ceil_mode, with_taps); });
  END_HANDLE_TH_ERRORS
}

// grad_output, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode
PyObject* max_pooling_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor *grad_output = take.tensor(), *taps = take.tensor();
  const int64_t dimensions = spatial(grad_output);
  const Axes size = take.axes(dimensions + 2), kernel = take.axes(dimensions), stride = take.axes(dimensions),
             padding = take.axes(dimensions), dilation = take.axes(dimensions);
  const bool ceil_mode = take.boolean();
  if (!take.plain()) return usual_way();
  return result_of(
      [&] { return max_pool_backward(*grad_output, *taps, size, kernel, stride, padding, dilation, ceil_mode); });
  END_HANDLE_TH_ERRORS
}

// input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
PyObject* average_pooling(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const Axes kernel = take.axes(spatial(input)), stride = take.axes_or(kernel), padding = take.axes(spatial(input));
  const bool ceil_mode = take.boolean(), count_include_pad = take.boolean();
  const std::optional<int64_t> divisor = take.optional_integer();
  if (!take.plain()) return usual_way();
  return result_of([&] { return avg_pool(*input, kernel, stride, padding, ceil_mode, count_include_pad, divisor); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input_size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
PyObject* average_pooling_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* grad_output = take.tensor();
  const int64_t dimensions = spatial(grad_output);
  const Axes size = take.axes(dimensions + 2), kernel = take.axes(dimensions), stride = take.axes(dimensions),
             padding = take.axes(dimensions);
  const bool ceil_mode = take.boolean(), count_include_pad = take.boolean();
  const std::optional<int64_t> divisor = take.optional_integer();
  if (!take.plain()) return usual_way();
  return result_of([&] {
    return avg_pool_backward(*grad_output, size, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  });
  END_HANDLE_TH_ERRORS
}

// input, output_size
PyObject* adaptive_average_pooling(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* input = take.tensor();
  const Axes size = take.axes(spatial(input));
  if (!take.plain()) return usual_way();
  return result_of([&] { return adaptive_avg_pool(*input, size); });
  END_HANDLE_TH_ERRORS
}

// grad_output, input_size
PyObject* adaptive_average_pooling_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments take(arguments, count);
  const at::Tensor* grad_output = take.tensor();
  const Axes size = take.axes(spatial(grad_output) + 2);
  if (!take.plain()) return usual_way();
  return result_of([&] { return adaptive_avg_pool_backward(*grad_output, size); });
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyObject* call_convolution(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  FusedCall call(arguments, count);
  if (!call.plain) return usual_way();
  if (call.kept != nullptr && !c10::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Parameters& p = call.parameters;
    call.packed =
        call.kept->packed_for(*call.input, *call.weight, p.stride, p.padding, p.dilation, p.groups, p.algorithm);
  }
  return result_of([&] {
    const Parameters& p = call.parameters;
    return convolution_fused(*call.input, *call.weight, call.bias, call.residual, call.packed, call.lower, call.upper,
                             p.stride, p.padding, p.dilation, p.groups, p.algorithm, call.gate);
  });
  END_HANDLE_TH_ERRORS
}

PyObject* call_together(const std::vector<PyObject* const*>& layers, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::vector<FusedCall> calls;
  for (PyObject* const* arguments : layers) calls.emplace_back(arguments, count);
  std::vector<StripLayer> strips;
  for (const FusedCall& call : calls) {
    if (!call.plain || call.kept == nullptr || c10::GradMode::is_enabled()) return usual_way();
    const Parameters& p = call.parameters;
    strips.push_back({*call.weight, call.bias, call.residual, call.kept->if_current(*call.weight, p.algorithm),
                      call.lower, call.upper, p.stride, p.padding, p.dilation, p.groups, p.algorithm, call.gate});
    if (!strips.back().packed.has_value()) return usual_way();
  }
  OptionalTensor output;
  {
    pybind11::gil_scoped_release no_lock;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = convolution_strips(*calls.front().input, strips);
  }
  return output.has_value() ? wrapped(std::move(*output)) : usual_way();
  END_HANDLE_TH_ERRORS
}

void add_python_calls(pybind11::module_& module) {
  static PyMethodDef methods[] = {method("convolution", call_convolution),
                                  method("packed_weight", packed_weight),
                                  method("convolution_backward_input", backward_input),
                                  method("convolution_backward_weight", backward_weight),
                                  method("linear", linear),
                                  method("max_pool", max_pooling),
                                  method("max_pool_backward", max_pooling_backward),
                                  method("avg_pool", average_pooling),
                                  method("avg_pool_backward", average_pooling_backward),
                                  method("adaptive_avg_pool", adaptive_average_pooling),
                                  method("adaptive_avg_pool_backward", adaptive_average_pooling_backward)};
  pybind11::class_<KeptWeight>(module, "KeptWeight", "A layer's packed weight: see csrc/kept_weight.h.")
      .def(pybind11::init())
      .def_property_readonly("packed",
                             [](const KeptWeight& kept) {
                               if (!kept.packed().has_value()) return pybind11::object(pybind11::none());
                               return pybind11::reinterpret_steal<pybind11::object>(wrapped(*kept.packed()));
                             })
      .def("__reduce__", [](const pybind11::object& self) {  // copies start empty
        return pybind11::make_tuple(pybind11::type::of(self), pybind11::tuple());
      });
  add_methods(module, methods);
}

}  // namespace convlab
