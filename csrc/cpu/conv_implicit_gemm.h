#pragma once
#include "conv_naive.h"
namespace convlab::cpu::CONVLAB_ISA {
template <class T> struct ImplicitGemm { 
  static ConvPlan plan(const ConvArguments<T>& a) { return NaiveConvolution<T>::plan(a); }
  static void prepare(const ConvArguments<T>&, int64_t, int64_t) {}
  static void finish(const ConvArguments<T>&, int64_t, int64_t) {}
  static void run(const ConvArguments<T>& a, void* s, int64_t b, int64_t e) { NaiveConvolution<T>::run(a, s, b, e); }
};
}
