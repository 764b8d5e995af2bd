#define CONVLAB_AVX2
#include "../isa.h"

#include "../conv.h"

CONVLAB_INSTANTIATE(ConvKernelTable, conv_kernels)
