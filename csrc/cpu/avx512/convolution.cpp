#define CONVLAB_AVX512
#include "../isa.h"

#include "../conv.h"

CONVLAB_INSTANTIATE(ConvKernelTable, conv_kernels)
