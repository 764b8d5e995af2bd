// Convolutions of bfloat16 alone, which this instruction set multiplies and rounds; other dtypes are avx512/'s.
#define CONVLAB_AVX512
#define CONVLAB_BF16
#include "../conv.h"
#include "../conv_algorithm.h"
#include "../conv_depthwise.h"
#include "../conv_direct.h"
#include "../conv_implicit_gemm.h"
#include "../conv_inner_product.h"
#include "../conv_naive.h"
#include "../conv_strassen.h"
#include "../conv_winograd.h"
#include "../isa.h"

namespace convlab::cpu::CONVLAB_ISA {
template ConvKernelTable<bfloat16> conv_kernels<bfloat16>();
}
