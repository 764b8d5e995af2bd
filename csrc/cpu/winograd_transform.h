// How the matrices of winograd_matrices.h are applied to vectors.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

// Even columns equal and odd ones opposite: what the points p and -p make of two rows.
template <int Rows, int Columns>
constexpr bool mirrored(const double (&matrix)[Rows][Columns], int row) {
  if (row + 1 >= Rows) return false;
  double odd = 0;
  for (int i = 0; i < Columns; ++i) {
    if (matrix[row][i] != (i % 2 ? -matrix[row + 1][i] : matrix[row + 1][i])) return false;
    odd += i % 2 ? matrix[row][i] * matrix[row][i] : 0;
  }
  return odd > 0;
}

template <class A>
CONVLAB_INLINE vec<A> add_scaled(double factor, vec<A> x, vec<A> sum, bool first) {
  if (first) return factor == 1 ? x : x * static_cast<A>(factor);
  if (factor == 1) return sum + x;
  if (factor == -1) return sum - x;
  return fma(broadcast(static_cast<A>(factor)), x, sum);
}

// sum over i in first, first+step, .. of factors[i] * x[i * stride]
template <class A, int Columns>
CONVLAB_INLINE vec<A> combination(const double (&factors)[Columns], const vec<A>* x, int stride, int first, int step) {
  vec<A> sum{};
  bool empty = true;
  CONVLAB_UNROLL for (int i = first; i < Columns; i += step) {
    if (factors[i] == 0) continue;
    sum = add_scaled<A>(factors[i], x[i * stride], sum, empty);
    empty = false;
  }
  return sum;
}

// y[j * y_stride] = sum_i matrix[j][i] * x[i * x_stride]; mirrored rows share their even and odd halves.
// The matrices are compile-time constants: after unrolling only the multiply-adds are left.
template <class A, int Rows, int Columns>
CONVLAB_INLINE void transform(const double (&matrix)[Rows][Columns], const vec<A>* x, int x_stride, vec<A>* y,
                              int y_stride) {
  CONVLAB_UNROLL for (int j = 0; j < Rows; ++j) {
    if (j > 0 && mirrored(matrix, j - 1) && !(j > 1 && mirrored(matrix, j - 2))) continue;  // done with the row before
    if (mirrored(matrix, j)) {
      const vec<A> even = combination<A>(matrix[j], x, x_stride, 0, 2);
      const vec<A> odd = combination<A>(matrix[j], x, x_stride, 1, 2);
      y[j * y_stride] = even + odd;
      y[(j + 1) * y_stride] = even - odd;
    } else {
      y[j * y_stride] = combination<A>(matrix[j], x, x_stride, 0, 1);
    }
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
