#define CONVLAB_AVX2
#include "../conv.h"
#include "../isa.h"

CONVLAB_INSTANTIATE(ConvKernelTable, conv_kernels)
