#include "cuda.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace convlab {

namespace {
const cuda::Launchers& launchers_for(const at::Tensor& tensor) {
  const cuda::Launchers* launchers = cuda::launchers();
  TORCH_CHECK_NOT_IMPLEMENTED(launchers, "this build of torch_convlab has no kernels for tensors on ", tensor.device());
  return *launchers;
}
}  // namespace

void launch_on_cuda(const at::Tensor& like, const char* name,
                    const c10::function_ref<int(const cuda::Launchers&, void*)>& put) {
  const cuda::Launchers& launchers = launchers_for(like);
  const c10::DeviceGuard guard(like.device());
  void* stream = nullptr;
  if (!like.is_cpu())
    stream = c10::impl::VirtualGuardImpl(like.device().type()).getStream(like.device()).native_handle();
  const int code = put(launchers, stream);
  TORCH_CHECK(code == 0, name, ": the kernel could not be run: ", launchers.error_text(code), " (error ", code, ")");
}

at::Tensor cuda_workspace(const at::Tensor& like, const c10::function_ref<int64_t(const cuda::Launchers&)>& bytes) {
  const int64_t size = bytes(launchers_for(like));
  return size == 0 ? at::Tensor() : at::empty({size}, like.options().dtype(at::kByte));
}

bool tf32_is_allowed() { return at::globalContext().allowTF32CuDNN(); }

}  // namespace convlab
