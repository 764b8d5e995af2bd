// The table of pooling kernels of one instruction set.
#pragma once
#include "pool_average_backward.h"
#include "pool_max_backward.h"
#include "pool_max_follow.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class Kernel, class T>
PoolKernel<T> pool_kernel() {
  return {Kernel::plan, Kernel::run};
}

template <class T>
PoolKernelTable<T> pool_kernels() {
  PoolKernelTable<T> table;
  table.max = pool_kernel<MaxForward<T>, T>();
  table.max_backward = pool_kernel<MaxBackward<T>, T>();
  table.max_gather = pool_kernel<MaxFollow<T, false>, T>();
  table.max_indices = pool_kernel<MaxFollow<T, true>, T>();
  table.average = pool_kernel<AverageForward<T>, T>();
  table.average_backward = pool_kernel<AverageBackward<T>, T>();
  return table;
}

}  // namespace convlab::cpu::CONVLAB_ISA
