#include "../isa.h"
#include "../pool.h"

CONVLAB_INSTANTIATE(PoolKernelTable, pool_kernels)
