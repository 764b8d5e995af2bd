// Pooling: checks, geometry, output, kernels.
#include "pooling.h"

#include <ATen/ops/empty.h>

#include "../cpu/pool_kernels.h"
#include "cuda.h"
#include "pooling_checks.h"

namespace convlab {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using cuda::PoolKernel;

namespace {

// Size of the largest adaptive window along one axis, or one more.
template <class Int>
Int adaptive_kernel(const Int& input, const Int& output) {
  if (output == 0) return Int(1);
  if (input % output == 0) return input / output;
  return input / output + 2;
}

template <class Int>
at::ScalarType taps_dtype(c10::ArrayRef<Int> input, c10::ArrayRef<Int> output, c10::ArrayRef<Int> kernel_size) {
  Int taps = 1;
  for (size_t axis = 2; axis < input.size(); ++axis)
    taps = taps * (kernel_size.empty() ? adaptive_kernel<Int>(input[axis], output[axis]) : kernel_size[axis - 2]);
  return taps <= cpu::kNarrowTaps ? at::kByte : at::kLong;
}

template <class Int>
Tensor empty_taps(const Tensor& input, const std::vector<Int>& output, c10::ArrayRef<Int> size,
                  c10::ArrayRef<Int> kernel_size, bool with_taps, Layout layout) {
  const auto dtype = taps_dtype<Int>(size, output, kernel_size);
  if (!with_taps) return at::empty({0}, input.options().dtype(dtype));
  return empty_in_layout(c10::ArrayRef<Int>(output), input, layout, dtype);
}

// Windows that together are the whole input are one run of taps, whatever the number of axes.
void flatten_global(PoolGeometry& g) {
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    if (g.adaptive || g.output[axis] != 1 || g.kernel[axis] != g.input[axis] || g.padding[axis] != 0 ||
        g.dilation[axis] != 1)
      return;
  g.kernel[2] = g.input[2] = g.stride[2] = g.input_pixels();
  for (int axis = 0; axis < 2; ++axis) g.kernel[axis] = g.input[axis] = g.stride[axis] = 1;
}

PoolGeometry make_geometry(IntArrayRef input, IntArrayRef output, const PoolWindows<int64_t>& windows) {
  PoolGeometry g;
  g.batch = input[0];
  g.channels = input[1];
  const size_t spatial = input.size() - 2, unused = kMaxSpatial - spatial;
  for (size_t axis = 0; axis < spatial; ++axis) {
    const size_t to = unused + axis;
    g.input[to] = input[axis + 2];
    g.output[to] = output[axis + 2];
    if (windows.kernel_size.empty()) {
      g.adaptive = g.adaptive || g.input[to] % g.output[to] != 0;
      g.kernel[to] = g.stride[to] = adaptive_kernel(g.input[to], g.output[to]);
    } else {
      g.kernel[to] = windows.kernel_size[axis];
      g.stride[to] = windows.stride[axis];
      g.padding[to] = windows.padding[axis];
      g.dilation[to] = windows.dilation.empty() ? 1 : windows.dilation[axis];
    }
  }
  flatten_global(g);
  return g;
}

// Ranges that read fewer elements than this are not worth a thread.
constexpr int64_t kElementsPerThread = 1 << 15;

template <class T>
cpu::PoolKernel<T> cpu_kernel(PoolKernel kernel) {
  const auto kernels = cpu::pool_kernels<T>();
  switch (kernel) {
    case PoolKernel::max:
      return kernels.max;
    case PoolKernel::max_backward:
      return kernels.max_backward;
    case PoolKernel::max_gather:
      return kernels.max_gather;
    case PoolKernel::max_indices:
      return kernels.max_indices;
    case PoolKernel::average:
      return kernels.average;
    default:
      return kernels.average_backward;
  }
}

template <class T>
void run_on_cpu(PoolKernel kernel, const PoolGeometry& geometry, Layout layout, const Tensor& input,
                const Tensor& output, const Tensor& taps, const Tensor& indices) {
  cpu::PoolArguments<T> arguments;
  arguments.geometry = geometry;
  arguments.layout = layout;
  arguments.input = input.defined() ? const_cast<T*>(const_data<T>(input)) : nullptr;
  arguments.output = output.defined() ? const_cast<T*>(const_data<T>(output)) : nullptr;
  arguments.taps = taps.defined() ? const_cast<void*>(taps.const_data_ptr()) : nullptr;
  arguments.indices = indices.defined() ? mutable_data<int64_t>(indices) : nullptr;
  const cpu::PoolKernel<T> functions = cpu_kernel<T>(kernel);
  const cpu::PoolPlan plan = functions.plan(arguments);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, plan.cost));
  parallel(plan.tasks, grain, [&](int64_t begin, int64_t end) {
    functions.run(arguments, thread_scratch(1, plan.scratch_bytes), begin, end);
  });
}

void run_on_cuda(PoolKernel kernel, const PoolGeometry& geometry, Dtype dtype, Layout layout, const Tensor& input,
                 const Tensor& output, const Tensor& taps, const Tensor& indices) {
  const auto data = [](const Tensor& tensor) {
    return tensor.defined() ? const_cast<void*>(tensor.const_data_ptr()) : nullptr;
  };
  cuda::PoolArguments arguments;
  arguments.geometry = geometry;
  arguments.kernel = kernel;
  arguments.dtype = dtype;
  arguments.layout = layout;
  arguments.input = data(input);
  arguments.output = data(output);
  arguments.taps = data(taps);
  arguments.indices = static_cast<int64_t*>(data(indices));
  launch_on_cuda(taps.defined() ? taps : input, "pooling",
                 [&](const cuda::Launchers& launchers, void* stream) { return launchers.pool(&arguments, stream); });
}

// Runs one kernel. Tensors that are read may have any strides; those just allocated are dense in `layout`.
void run(PoolKernel kernel, const PoolGeometry& geometry, Layout layout, Tensor input, Tensor output, Tensor taps,
         Tensor indices) {
  const auto dense = [layout](const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    const Tensor full = with_height(tensor);
    return full.contiguous(memory_format(layout, full.dim()));
  };
  input = dense(input);
  output = dense(output);
  taps = dense(taps);
  indices = dense(indices);
  // Indices do not depend on the values, so any element type serves where there are none.
  const auto dtype = input.defined() ? input.scalar_type() : at::kFloat;
  if (runs_on_cuda(taps.defined() ? taps : input))
    return run_on_cuda(kernel, geometry, dtype_of(dtype, "pooling"), layout, input, output, taps, indices);
  dispatch_dtype(dtype, "pooling", [&](auto type) {
    run_on_cpu<decltype(type)>(kernel, geometry, layout, input, output, taps, indices);
  });
}

std::tuple<Tensor, Tensor> run_max(const Tensor& input, const std::vector<int64_t>& size,
                                   const PoolWindows<int64_t>& windows, bool with_taps) {
  const Layout layout = layout_of(with_height(input));
  Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  Tensor taps = empty_taps<int64_t>(input, size, input.sizes(), windows.kernel_size, with_taps, layout);
  if (output.numel() > 0)
    run(PoolKernel::max, make_geometry(input.sizes(), size, windows), layout, input, output,
        with_taps ? taps : Tensor(), Tensor());
  return {output, taps};
}

void check_taps_dtype(const Tensor& taps, at::ScalarType expected) {
  TORCH_CHECK(taps.scalar_type() == expected, "expected taps of dtype ", toString(expected),
              " for windows of this size, but got taps of dtype ", toString(taps.scalar_type()));
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                    IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, bool with_taps) {
  const PoolWindows<int64_t> windows = {kernel_size, stride, padding, dilation, ceil_mode};
  const auto size = check_pool<int64_t>("max_pool", input.sizes(), windows);
  check_pool_dtype("max_pool", input);
  return run_max(input, size, windows, with_taps);
}

std::tuple<Tensor, Tensor> max_pool_meta(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                                         SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode,
                                         bool with_taps) {
  const auto size =
      check_pool<SymInt>("max_pool", input.sym_sizes(), {kernel_size, stride, padding, dilation, ceil_mode});
  check_pool_dtype("max_pool", input);
  const Layout layout = layout_of(with_height(input));
  return {empty_in_layout(SymIntArrayRef(size), input, layout),
          empty_taps<SymInt>(input, size, input.sym_sizes(), kernel_size, with_taps, layout)};
}

std::tuple<Tensor, Tensor> adaptive_max_pool(const Tensor& input, IntArrayRef output_size, bool with_taps) {
  const auto size = check_adaptive_pool<int64_t>("adaptive_max_pool", input.sizes(), output_size, false);
  check_pool_dtype("adaptive_max_pool", input);
  return run_max(input, size, {}, with_taps);
}

std::tuple<Tensor, Tensor> adaptive_max_pool_meta(const Tensor& input, SymIntArrayRef output_size, bool with_taps) {
  const auto size = check_adaptive_pool<SymInt>("adaptive_max_pool", input.sym_sizes(), output_size, false);
  check_pool_dtype("adaptive_max_pool", input);
  const Layout layout = layout_of(with_height(input));
  return {empty_in_layout(SymIntArrayRef(size), input, layout),
          empty_taps<SymInt>(input, size, input.sym_sizes(), {}, with_taps, layout)};
}

Tensor max_pool_indices(const Tensor& taps, IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                        IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const PoolWindows<int64_t> windows = {kernel_size, stride, padding, dilation, ceil_mode};
  const auto size = check_taps<int64_t>("taps", input_size, windows, taps.sizes());
  check_taps_dtype(taps, taps_dtype<int64_t>(input_size, size, kernel_size));
  const Layout layout = layout_of(with_height(taps));
  Tensor indices = empty_in_layout(IntArrayRef(size), taps, layout, at::kLong);
  if (indices.numel() > 0)
    run(PoolKernel::max_indices, make_geometry(input_size, size, windows), layout, Tensor(), Tensor(), taps, indices);
  return indices;
}

Tensor max_pool_indices_meta(const Tensor& taps, SymIntArrayRef input_size, SymIntArrayRef kernel_size,
                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  const auto size =
      check_taps<SymInt>("taps", input_size, {kernel_size, stride, padding, dilation, ceil_mode}, taps.sym_sizes());
  return empty_in_layout(SymIntArrayRef(size), taps, layout_of(with_height(taps)), at::kLong);
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& taps, IntArrayRef input_size, IntArrayRef kernel_size,
                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const PoolWindows<int64_t> windows = {kernel_size, stride, padding, dilation, ceil_mode};
  const auto size = check_taps<int64_t>("taps", input_size, windows, taps.sizes());
  check_taps<int64_t>("grad_output", input_size, windows, grad_output.sizes());
  check_taps_dtype(taps, taps_dtype<int64_t>(input_size, size, kernel_size));
  check_pool_dtype("max_pool_backward", grad_output);
  const Layout layout = layout_of(with_height(taps));
  Tensor grad_input = empty_in_layout(input_size, grad_output, layout);
  if (grad_output.numel() == 0) return grad_input.zero_();
  run(PoolKernel::max_backward, make_geometry(input_size, size, windows), layout, grad_input, grad_output, taps,
      Tensor());
  return grad_input;
}

Tensor max_pool_backward_meta(const Tensor& grad_output, const Tensor& taps, SymIntArrayRef input_size,
                              SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding,
                              SymIntArrayRef dilation, bool ceil_mode) {
  const PoolWindows<SymInt> windows = {kernel_size, stride, padding, dilation, ceil_mode};
  check_taps<SymInt>("taps", input_size, windows, taps.sym_sizes());
  check_taps<SymInt>("grad_output", input_size, windows, grad_output.sym_sizes());
  return empty_in_layout(input_size, grad_output, layout_of(with_height(taps)));
}

Tensor max_pool_gather(const Tensor& input, const Tensor& taps, IntArrayRef kernel_size, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const PoolWindows<int64_t> windows = {kernel_size, stride, padding, dilation, ceil_mode};
  const auto size = check_taps<int64_t>("taps", input.sizes(), windows, taps.sizes());
  check_taps_dtype(taps, taps_dtype<int64_t>(input.sizes(), size, kernel_size));
  check_pool_dtype("max_pool_gather", input);
  const Layout layout = layout_of(with_height(taps));
  Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  if (output.numel() > 0)
    run(PoolKernel::max_gather, make_geometry(input.sizes(), size, windows), layout, input, output, taps, Tensor());
  return output;
}

Tensor max_pool_gather_meta(const Tensor& input, const Tensor& taps, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                            SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  const auto size = check_taps<SymInt>("taps", input.sym_sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                                       taps.sym_sizes());
  return empty_in_layout(SymIntArrayRef(size), input, layout_of(with_height(taps)));
}

namespace {

// A window of an average has no dilation.
template <class Int>
struct AverageWindows {
  std::vector<Int> dilation;
  PoolWindows<Int> windows;

  AverageWindows(c10::ArrayRef<Int> kernel_size, c10::ArrayRef<Int> stride, c10::ArrayRef<Int> padding, bool ceil_mode,
                 size_t dim)
      : dilation(dim > 2 ? dim - 2 : 0, Int(1)), windows{kernel_size, stride, padding, dilation, ceil_mode} {}
};

void check_divisor(std::optional<int64_t> divisor_override) {
  TORCH_CHECK(!divisor_override.has_value() || *divisor_override != 0,
              "divisor must be not zero, but got divisor_override=0");
}

Tensor run_average(const Tensor& input, const std::vector<int64_t>& size, const PoolWindows<int64_t>& windows,
                   bool count_include_pad, std::optional<int64_t> divisor_override) {
  const Layout layout = layout_of(with_height(input));
  Tensor output = empty_in_layout(IntArrayRef(size), input, layout);
  if (output.numel() == 0) return output;
  PoolGeometry geometry = make_geometry(input.sizes(), size, windows);
  geometry.count_include_pad = count_include_pad;
  geometry.divisor_override = divisor_override.value_or(0);
  run(PoolKernel::average, geometry, layout, input, output, Tensor(), Tensor());
  return output;
}

Tensor run_average_backward(const Tensor& grad_output, IntArrayRef input_size, const PoolWindows<int64_t>& windows,
                            bool count_include_pad, std::optional<int64_t> divisor_override) {
  const Layout layout = layout_of(with_height(grad_output));
  Tensor grad_input = empty_in_layout(input_size, grad_output, layout);
  if (grad_output.numel() == 0) return grad_input.zero_();
  PoolGeometry geometry = make_geometry(input_size, grad_output.sizes(), windows);
  geometry.count_include_pad = count_include_pad;
  geometry.divisor_override = divisor_override.value_or(0);
  run(PoolKernel::average_backward, geometry, layout, grad_input, grad_output, Tensor(), Tensor());
  return grad_input;
}

template <class Int>
void check_grad_size(c10::ArrayRef<Int> actual, const std::vector<Int>& expected) {
  TORCH_CHECK(actual == c10::ArrayRef<Int>(expected), "expected grad_output of size ", c10::ArrayRef<Int>(expected),
              ", but got grad_output of size ", actual);
}

}  // namespace

Tensor avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                bool count_include_pad, std::optional<int64_t> divisor_override) {
  const AverageWindows<int64_t> average(kernel_size, stride, padding, ceil_mode, input.sizes().size());
  const auto size = check_pool<int64_t>("avg_pool", input.sizes(), average.windows);
  check_divisor(divisor_override);
  check_pool_dtype("avg_pool", input);
  return run_average(input, size, average.windows, count_include_pad, divisor_override);
}

Tensor avg_pool_meta(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding,
                     bool ceil_mode, bool, std::optional<int64_t> divisor_override) {
  const AverageWindows<SymInt> average(kernel_size, stride, padding, ceil_mode, input.sym_sizes().size());
  const auto size = check_pool<SymInt>("avg_pool", input.sym_sizes(), average.windows);
  check_divisor(divisor_override);
  check_pool_dtype("avg_pool", input);
  return empty_in_layout(SymIntArrayRef(size), input, layout_of(with_height(input)));
}

Tensor avg_pool_backward(const Tensor& grad_output, IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                         std::optional<int64_t> divisor_override) {
  const AverageWindows<int64_t> average(kernel_size, stride, padding, ceil_mode, input_size.size());
  check_grad_size<int64_t>(grad_output.sizes(), check_pool<int64_t>("avg_pool", input_size, average.windows));
  check_divisor(divisor_override);
  check_pool_dtype("avg_pool_backward", grad_output);
  return run_average_backward(grad_output, input_size, average.windows, count_include_pad, divisor_override);
}

Tensor avg_pool_backward_meta(const Tensor& grad_output, SymIntArrayRef input_size, SymIntArrayRef kernel_size,
                              SymIntArrayRef stride, SymIntArrayRef padding, bool ceil_mode, bool,
                              std::optional<int64_t> divisor_override) {
  const AverageWindows<SymInt> average(kernel_size, stride, padding, ceil_mode, input_size.size());
  check_grad_size<SymInt>(grad_output.sym_sizes(), check_pool<SymInt>("avg_pool", input_size, average.windows));
  check_divisor(divisor_override);
  return empty_in_layout(input_size, grad_output, layout_of(with_height(grad_output)));
}

Tensor adaptive_avg_pool(const Tensor& input, IntArrayRef output_size) {
  const auto size = check_adaptive_pool<int64_t>("adaptive_avg_pool", input.sizes(), output_size, true);
  check_pool_dtype("adaptive_avg_pool", input);
  return run_average(input, size, {}, true, std::nullopt);
}

Tensor adaptive_avg_pool_meta(const Tensor& input, SymIntArrayRef output_size) {
  const auto size = check_adaptive_pool<SymInt>("adaptive_avg_pool", input.sym_sizes(), output_size, true);
  check_pool_dtype("adaptive_avg_pool", input);
  return empty_in_layout(SymIntArrayRef(size), input, layout_of(with_height(input)));
}

Tensor adaptive_avg_pool_backward(const Tensor& grad_output, IntArrayRef input_size) {
  const auto output_size = grad_output.dim() > 2 ? grad_output.sizes().slice(2) : grad_output.sizes();
  const auto size = check_adaptive_pool<int64_t>("adaptive_avg_pool", input_size, output_size, true);
  check_grad_size<int64_t>(grad_output.sizes(), size);
  check_pool_dtype("adaptive_avg_pool_backward", grad_output);
  return run_average_backward(grad_output, input_size, {}, true, std::nullopt);
}

Tensor adaptive_avg_pool_backward_meta(const Tensor& grad_output, SymIntArrayRef input_size) {
  const auto sizes = grad_output.sym_sizes();
  const auto output_size = sizes.size() > 2 ? sizes.slice(2) : sizes;
  check_grad_size<SymInt>(sizes, check_adaptive_pool<SymInt>("adaptive_avg_pool", input_size, output_size, true));
  return empty_in_layout(input_size, grad_output, layout_of(with_height(grad_output)));
}

}  // namespace convlab
