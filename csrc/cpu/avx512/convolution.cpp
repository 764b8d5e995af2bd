#define CONVLAB_AVX512
#include "../conv.h"
#include "../isa.h"

CONVLAB_INSTANTIATE(ConvKernelTable, conv_kernels)
