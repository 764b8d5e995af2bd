// Lines of sums, [pixel][column of a panel], to lines of the planes of an NC(D)HW tensor.
#pragma once
#include "epilogue.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

// `target`: the first pixel in the first column's plane; its pixels are `step` apart, planes `plane`.
template <class T>
void store_lines(const Epilogue<T>& epilogue, const accumulate_t<T>* sums, int64_t pixels, int64_t columns, T* target,
                 int64_t plane, int64_t step = 1) {
  using A = accumulate_t<T>;
  for (int64_t k = 0; k < columns; k += lanes<A>)
    for (int64_t x = 0; x < pixels; x += lanes<A>) {
      const int64_t count = std::min<int64_t>(lanes<A>, pixels - x);
      vec<A> block[lanes<A>];
      for (int64_t j = 0; j < lanes<A>; ++j) block[j] = j < count ? load(sums + (x + j) * kPanel<A> + k) : vec<A>{};
      transpose<A>(block);
      for (int64_t j = 0; j < std::min<int64_t>(lanes<A>, columns - k); ++j) {
        T* to = target + (k + j) * plane + x * step;
        if (step != 1)
          for (int64_t i = 0; i < count; ++i) epilogue.store_one(to + i * step, block[j][i]);
        else if (count == lanes<A>)
          epilogue.store(to, block[j]);
        else
          epilogue.store_partial(to, block[j], count);
        if (step == 1) epilogue.open_gate(to, count);
      }
    }
}

}  // namespace convlab::cpu::CONVLAB_ISA
