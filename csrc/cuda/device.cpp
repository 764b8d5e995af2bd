#include "device.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace convlab::cuda {

namespace {
const Launchers* emulated = nullptr;
std::atomic<bool> emulator_is_on{false};
}  // namespace

bool built() {
#if defined(CONVLAB_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

bool emulating() { return emulator_is_on.load(std::memory_order_relaxed); }

void load_emulator(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("cannot load the emulated kernels: ") + dlerror());
  using Function = const Launchers* (*)();
  const auto function = reinterpret_cast<Function>(dlsym(library, "convlab_launchers"));
  if (!function) throw std::runtime_error(std::string("no emulated kernels in ") + path);
  emulated = function();
}

void set_emulating(bool on) {
  if (on && !emulated) throw std::runtime_error("load_emulator() comes before set_emulating(True)");
  emulator_is_on = on;
}

const Launchers* launchers() {
  if (emulating()) return emulated;
#if defined(CONVLAB_WITH_CUDA)
  return convlab_launchers();
#else
  return nullptr;
#endif
}

}  // namespace convlab::cuda
