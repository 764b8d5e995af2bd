// The three matrices of Winograd's minimal filtering F(M, R) and how they are applied to vectors.
//
// A correlation of M outputs with R taps is the adjoint of a polynomial product, which Toom-Cook evaluates at
// M + R - 1 points (the last at infinity): y = A^T [(G w) * (B^T x)]. The points are 0 and pairs +-p. For F(4,3)
// they are 0, +-sqrt(1/2), +-sqrt(2), infinity: in float32 their error is a third of that of the textbook's 0, +-1,
// +-2 (1.2e-6 to 4e-6 of max|reference|, against up to 1.5e-5).
// References: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; Barabasz et al., "Error
// Analysis and Improving the Accuracy of Winograd Convolution for DNNs", 2020 (choice of points).
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

template <int Outputs, int Taps>
struct WinogradMatrices {
  static constexpr int M = Outputs, R = Taps, N = Outputs + Taps - 1;
  double input[N][N]{};   // B^T
  double weight[N][R]{};  // G
  double output[M][N]{};  // A^T

  constexpr WinogradMatrices() {
    constexpr double half = 0.70710678118654752440, two = 1.41421356237309504880;  // sqrt(1/2), sqrt(2)
    constexpr double small[5] = {0, 1, -1, 0, 0}, large[5] = {0, half, -half, two, -two};
    const double* point = N <= 4 ? small : large;
    for (int j = 0; j < N; ++j) {
      const bool infinite = j == N - 1;
      double polynomial[N + 1] = {1}, scale = 1;  // product of (x - point[k]) over k != j
      int degree = 0;
      for (int k = 0; k < N - 1; ++k) {
        if (k == j) continue;
        for (int i = degree + 1; i > 0; --i) polynomial[i] = polynomial[i - 1] - point[k] * polynomial[i];
        polynomial[0] *= -point[k];
        ++degree;
        scale *= infinite ? 1 : point[j] - point[k];
      }
      for (int i = 0; i < N; ++i) input[j][i] = polynomial[i];
      double power = 1;
      for (int i = 0; i < M; ++i, power *= infinite ? 0 : point[j]) output[i][j] = infinite ? i == M - 1 : power;
      power = 1;
      for (int i = 0; i < R; ++i, power *= infinite ? 0 : point[j])
        weight[j][i] = infinite ? i == R - 1 : power / scale;
    }
  }
};

template <int M, int R>
constexpr WinogradMatrices<M, R> winograd{};

// The transposes of G and A^T, for the weight gradient.
template <int Outputs, int Taps>
struct WinogradAdjoint {
  static constexpr int M = Outputs, R = Taps, N = Outputs + Taps - 1;
  double weight[R][N]{};
  double output[N][M]{};

  constexpr WinogradAdjoint() {
    for (int j = 0; j < N; ++j) {
      for (int i = 0; i < R; ++i) weight[i][j] = winograd<M, R>.weight[j][i];
      for (int i = 0; i < M; ++i) output[j][i] = winograd<M, R>.output[i][j];
    }
  }
};

template <int M, int R>
constexpr WinogradAdjoint<M, R> winograd_adjoint{};

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
