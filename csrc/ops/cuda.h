// What an operator needs to put kernels on a GPU's stream: the device guard, the stream, workspaces, errors.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include "../cuda/device.h"

namespace convlab {

// Whether the kernels in csrc/cuda compute on this tensor: it is on a GPU, or they are being emulated.
inline bool runs_on_cuda(const at::Tensor& tensor) { return !tensor.is_cpu() || cuda::emulating(); }

// Calls put(launchers, stream) with the current stream of the tensor's device; raises if it returns an error code.
void launch_on_cuda(const at::Tensor& like, const char* name,
                    const c10::function_ref<int(const cuda::Launchers&, void*)>& put);

// Memory for one launch, from torch's allocator, which knows about streams and graphs. Undefined for 0 bytes.
at::Tensor cuda_workspace(const at::Tensor& like, const c10::function_ref<int64_t(const cuda::Launchers&)>& bytes);

// Whether convolutions of float32 may round their operands to tf32: torch.backends.cudnn.allow_tf32 and its successors.
bool tf32_is_allowed();

}  // namespace convlab
