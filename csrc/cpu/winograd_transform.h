// How the matrices of winograd_matrices.h are applied to vectors.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

// What the points p and -p make of two rows: 1 if even columns are equal and odd ones opposite, -1 if the other way
// round, 0 if neither or if there is nothing to share.
template <int Rows, int Columns>
constexpr int mirrored(const double (&matrix)[Rows][Columns], int row) {
  if (row + 1 >= Rows) return 0;
  for (int sign = 1; sign >= -1; sign -= 2) {
    bool opposite = true, shared[2] = {};
    for (int i = 0; i < Columns; ++i) {
      opposite &= matrix[row][i] == (i % 2 ? -sign : sign) * matrix[row + 1][i];
      shared[i % 2] |= matrix[row][i] != 0;
    }
    if (opposite && shared[0] && shared[1]) return sign;
  }
  return 0;
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

// The matrices as types, so that what is in them is known where they are applied.
template <int M, int R>
struct InputTransform {  // B^T
  static constexpr const auto& matrix = winograd<M, R>.input;
};
template <int M, int R>
struct OutputTransform {  // A^T
  static constexpr const auto& matrix = winograd<M, R>.output;
};
template <int M, int R>
struct OutputAdjoint {  // A
  static constexpr const auto& matrix = winograd_adjoint<M, R>.output;
};

// y[j * y_stride] = sum_i matrix[j][i] * x[i * x_stride]; mirrored rows share their even and odd halves.
template <class Transform, class A>
CONVLAB_INLINE void transform(const vec<A>* x, int x_stride, vec<A>* y, int y_stride) {
  constexpr const auto& matrix = Transform::matrix;
  constexpr int rows = static_cast<int>(std::size(matrix));
  const auto row = [&](auto index) __attribute__((always_inline)) {
    constexpr int j = index();
    constexpr bool second = j > 0 && mirrored(matrix, j - 1) && !(j > 1 && mirrored(matrix, j - 2));
    constexpr int sign = mirrored(matrix, j);
    if constexpr (second) {
      return;  // done with the row before
    } else if constexpr (sign != 0) {
      const vec<A> even = combination<A>(matrix[j], x, x_stride, 0, 2);
      const vec<A> odd = combination<A>(matrix[j], x, x_stride, 1, 2);
      y[j * y_stride] = even + odd;
      y[(j + 1) * y_stride] = sign > 0 ? even - odd : odd - even;
    } else {
      y[j * y_stride] = combination<A>(matrix[j], x, x_stride, 0, 1);
    }
  };
  [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
    (row(std::integral_constant<int, J>{}), ...);
  }
  (std::make_integer_sequence<int, rows>{});
}

}  // namespace convlab::cpu::CONVLAB_ISA
