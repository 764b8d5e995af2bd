// What every operator needs between the dispatcher and a kernel: dtypes, layouts, threads.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <vector>

#include "../dtypes.h"
#include "../geometry.h"
#include "memory.h"

namespace convlab {

// Calls `body` with a value of the kernels' element type for `dtype`, or raises the error torch raises.
template <class Body>
void dispatch_dtype(at::ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kBFloat16:
      return body(bfloat16{});
    case at::kHalf:
      return body(float16{});
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", name, "\" not implemented for '", toString(dtype),
                                  "' (expected float32, float64, bfloat16 or float16)");
  }
}

inline Dtype dtype_of(at::ScalarType type, const char* name) {
  Dtype dtype = Dtype::float32;
  dispatch_dtype(type, name, [&](auto value) {
    using T = decltype(value);
    dtype = std::is_same_v<T, double>     ? Dtype::float64
            : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
            : std::is_same_v<T, float16>  ? Dtype::float16
                                          : Dtype::float32;
  });
  return dtype;
}

template <class T>
const T* const_data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* const_data(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? const_data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline at::MemoryFormat memory_format(Layout layout, int64_t dim) {
  if (layout == Layout::channels_first) return at::MemoryFormat::Contiguous;
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// Layout torch itself would compute in. Tensors of 4 or 5 dimensions; 3-D ones get a unit height first.
inline Layout layout_of(const at::Tensor& tensor) {
  const auto format = tensor.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d
             ? Layout::channels_last
             : Layout::channels_first;
}

// N x C x L -> N x C x 1 x L, so that 1-D problems share every path, memory formats included, with 2-D ones.
inline at::Tensor with_height(const at::Tensor& tensor) { return tensor.dim() == 3 ? tensor.unsqueeze(2) : tensor; }

// A tensor of `size` in `layout`, of the dtype of `like` unless given; a 3-D one has the strides of its 4-D twin.
template <class Size>
at::Tensor empty_in_layout(Size size, const at::Tensor& like, Layout layout,
                           std::optional<at::ScalarType> dtype = std::nullopt) {
  using Int = typename Size::value_type;
  const bool flat = size.size() == 3;
  std::vector<Int> full(size.size() + flat, Int(1));
  for (size_t dim = 0; dim < size.size(); ++dim) full[dim < 2 ? dim : dim + flat] = size[dim];
  const auto options = like.options()
                           .dtype(dtype.value_or(like.scalar_type()))
                           .memory_format(memory_format(layout, static_cast<int64_t>(full.size())));
  at::Tensor tensor;
  if constexpr (std::is_same_v<Int, c10::SymInt>)
    tensor = at::empty_symint(c10::SymIntArrayRef(full), options);
  else
    tensor = empty_result(at::IntArrayRef(full), options);
  return flat ? tensor.squeeze(2) : tensor;
}

// Calls body(begin, end) on disjoint ranges covering [0, count), on torch's threads, as many as have `grain` of it.
// Each thread begins with a share of its own, for what its cache still holds, and then takes pieces that others have
// not begun: cores are seldom equally fast, and an even split waits for the slowest. Results must not depend on how the
// range is cut.
void parallel(int64_t count, int64_t grain, const c10::function_ref<void(int64_t, int64_t)>& body);

}  // namespace convlab
