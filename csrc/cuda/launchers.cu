// The table of launchers, and the words for the error codes that they return.
#include "launchers.h"
#include "simt.h"

extern "C" const char* convlab_error_text(int code) {
#if defined(__CUDACC__)
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return convlab::emulator::error_text(code);
#endif
}

extern "C" CONVLAB_EXPORT const convlab::cuda::Launchers* convlab_launchers() {
  static const convlab::cuda::Launchers launchers = {convlab_convolution,    convlab_convolution_workspace,
                                                     convlab_pool,           convlab_norm,
                                                     convlab_norm_workspace, convlab_error_text};
  return &launchers;
}
