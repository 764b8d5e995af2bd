#include "../conv_amx.h"

#include "../isa.h"

namespace convlab::cpu::CONVLAB_ISA {
template ConvKernels<float> amx_kernels<float>();
template ConvKernels<bfloat16> amx_kernels<bfloat16>();
template ConvKernels<float16> amx_kernels<float16>();
}  // namespace convlab::cpu::CONVLAB_ISA
