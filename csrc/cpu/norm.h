// The table of normalization kernels of one instruction set.
#pragma once
#include "norm_columns.h"
#include "norm_double.h"
#include "norm_rows.h"
#include "norm_runs.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
NormPlan<T> norm_forward(const NormArguments<T>& a) {
  if (a.layout == Layout::channels_last) return NormColumns<T>::forward(a);
  if (a.rows() == 1 && (a.channels_per_group > 1 || !a.centered)) return NormRows<T>::forward(a);
  return NormRuns<T>::forward(a);
}

template <class T>
NormPlan<T> norm_backward(const NormArguments<T>& a) {
  if (a.layout == Layout::channels_last) return NormColumns<T>::backward(a);
  if (a.rows() == 1 && (a.channels_per_group > 1 || !a.centered)) return NormRows<T>::backward(a);
  return NormRuns<T>::backward(a);
}

template <class T>
NormKernelTable<T> norm_kernels() {
  return {lanes<accumulate_t<T>>, norm_forward<T>, norm_backward<T>, NormDouble<T>::plan};
}

}  // namespace convlab::cpu::CONVLAB_ISA
