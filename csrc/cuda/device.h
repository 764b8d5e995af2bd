// Which kernels compute CUDA's share: those of this build, or the emulated ones that tests load. No torch.
#pragma once
#include "launchers.h"

namespace convlab::cuda {

// Whether kernels for the GPU were compiled into this library.
bool built();

// While true, operators on CPU tensors run the kernels for the GPU in the emulator. For tests; off by default.
bool emulating();

// Loads the emulated kernels from the shared library at `path`. Throws std::runtime_error if that fails.
void load_emulator(const char* path);
void set_emulating(bool on);

// The emulated kernels while emulating, else the GPU's; null if there are none.
const Launchers* launchers();

}  // namespace convlab::cuda
