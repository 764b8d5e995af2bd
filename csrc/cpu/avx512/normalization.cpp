#define CONVLAB_AVX512
#include "../isa.h"
#include "../norm.h"

CONVLAB_INSTANTIATE(NormKernelTable, norm_kernels)
