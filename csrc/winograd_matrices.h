// The three matrices of Winograd's minimal filtering F(M, R), for the kernels of every device.
//
// A correlation of M outputs with R taps is the adjoint of a polynomial product, which Toom-Cook evaluates at
// M + R - 1 points (the last at infinity): y = A^T [(G w) * (B^T x)]. The points are 0 and pairs +-p. For F(4,3)
// they are 0, +-sqrt(1/2), +-sqrt(2), infinity: in float32 their error is a third of that of the textbook's 0, +-1,
// +-2 (1.2e-6 to 4e-6 of max|reference|, against up to 1.5e-5).
// References: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; Barabasz et al., "Error
// Analysis and Improving the Accuracy of Winograd Convolution for DNNs", 2020 (choice of points).
#pragma once
#include "host_device.h"

namespace convlab {

template <int Outputs, int Taps>
struct WinogradMatrices {
  static constexpr int M = Outputs, R = Taps, N = Outputs + Taps - 1;
  double input[N][N]{};   // B^T
  double weight[N][R]{};  // G
  double output[M][N]{};  // A^T

  CONVLAB_HD constexpr WinogradMatrices() {
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
