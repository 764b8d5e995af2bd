// Only what multiplies bfloat16 as it is; every other algorithm and dtype is that of avx512/.
#define CONVLAB_AVX512
#define CONVLAB_BF16
#include "../conv_algorithm.h"
#include "../conv_implicit_gemm.h"
#include "../isa.h"

namespace convlab::cpu::CONVLAB_ISA {
template ConvKernels<bfloat16> kernels_of<ImplicitGemm, bfloat16>();
}
