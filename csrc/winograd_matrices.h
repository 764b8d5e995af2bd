// The three matrices of Winograd's minimal filtering F(M, R), for the kernels of every device.
//
// A correlation of M outputs with R taps is the adjoint of a polynomial product, which Toom-Cook evaluates at
// M + R - 1 points (the last at infinity): y = A^T [(G w) * (B^T x)]. The finite points are pairs +-p and 0, near those
// of the least error in float32: for F(4, 3), sqrt(1/2) and sqrt(2), with a third of the error of the textbook's 0,
// +-1,
// +-2 (1.2e-6 to 4e-6 of max|reference|, against up to 1.5e-5). They are fractions of two, so that the matrices are
// exact and rows of opposite points are mirrored.
// All of M + R = 7 are one family: they have the same six points, and the same B^T. F(4, 2) has five points of its own.
// For fewer outputs the points are the first ones of the largest M's, and G is that one's without the rows of the
// others: what its rows would differ by is in B^T. So tiles of fewer outputs, at borders, use the same transformed
// weights.
// References: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; Barabasz et al., "Error
// Analysis and Improving the Accuracy of Winograd Convolution for DNNs", 2020 (choice of points).
#pragma once
#include "host_device.h"

namespace convlab {

template <int Outputs, int Taps>
struct WinogradMatrices {
  static constexpr int M = Outputs, R = Taps, N = Outputs + Taps - 1;
  static_assert(M >= 1 && R >= 1 && M + R <= 7);
  double input[N][N]{};   // B^T
  double weight[N][R]{};  // G
  double output[M][N]{};  // A^T

  CONVLAB_HD constexpr WinogradMatrices() {
    constexpr double four[4] = {13.0 / 32, -13.0 / 32, 19.0 / 16, -19.0 / 16};
    constexpr double five[5] = {45.0 / 64, -45.0 / 64, 0, 45.0 / 32, -45.0 / 32};
    constexpr int all = R == 2 && M <= 4 ? 4 : 5;
    const double* point = all == 4 ? four : five;
    for (int j = 0; j < N; ++j) {
      const bool infinite = j == N - 1;
      double polynomial[N + 1] = {1};  // product of (x - point[k]) over k != j
      double kept = 1, dropped = 1;    // products of point[j] - point[k]
      int degree = 0;
      for (int k = 0; k < N - 1; ++k) {
        if (k == j) continue;
        for (int i = degree + 1; i > 0; --i) polynomial[i] = polynomial[i - 1] - point[k] * polynomial[i];
        polynomial[0] *= -point[k];
        ++degree;
        kept *= infinite ? 1 : point[j] - point[k];
      }
      for (int k = N - 1; k < all && !infinite; ++k) dropped *= point[j] - point[k];
      for (int i = 0; i < N; ++i) input[j][i] = dropped * polynomial[i];
      double power = 1;
      for (int i = 0; i < M; ++i, power *= infinite ? 0 : point[j]) output[i][j] = infinite ? i == M - 1 : power;
      power = 1;
      for (int i = 0; i < R; ++i, power *= infinite ? 0 : point[j])
        weight[j][i] = infinite ? i == R - 1 : power / (kept * dropped);
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

  CONVLAB_HD constexpr WinogradAdjoint() {
    constexpr WinogradMatrices<M, R> matrices;
    for (int j = 0; j < N; ++j) {
      for (int i = 0; i < R; ++i) weight[i][j] = matrices.weight[j][i];
      for (int i = 0; i < M; ++i) output[j][i] = matrices.output[i][j];
    }
  }
};

template <int M, int R>
constexpr WinogradAdjoint<M, R> winograd_adjoint{};

}  // namespace convlab
