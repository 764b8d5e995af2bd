// Gates (activation.h) on every lane: value * sigmoid(value), Hardswish, and GELU.
//
// Idea: e^x = 2^n e^r with n the integer next to x / ln 2, so that |r| <= ln(2) / 2; e^r is a Taylor polynomial whose
// first term left out is below half a unit in the last place, and 2^n is added to the exponent's bits. Cost: 7 fused
// multiply-adds (13 in double), a division and a dozen others per vector. Accuracy: 4 epsilons of the value.
// The normal distribution function left of zero is e^(-x^2 / 2) times t q(t), t = 1 / (1 + |x| / sqrt(8)) and q a
// polynomial that was fitted to the scaled complementary error function by Chebyshev points (5e-8 of the value); right
// of zero it is what is left to 1. Accuracy: 8 epsilons of the value, also where 1 + erf(x) would cancel. In double it
// is the C library's, lane by lane. What approximates it by tanh is as exact as its exponent: 14 epsilons from -5 on,
// 100 at -10, zero below.
// In place, on what has just been stored and is in L1, and not inlined: there are many copies of the code around the
// kernels' last stores, and a call between them would cost what they keep in registers. 16-bit values are rounded
// before, too, as if another layer computed the gate.
#pragma once
#include <cmath>
#include <iterator>

#include "../activation.h"
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class A>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLeast = -86.6f, kMost = 88.72283f;  // between them all steps are normal numbers
  static constexpr float kRound = 12582912.0f;                // 1.5 * 2^23: what is added to it is rounded
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kTerms = 7;
};
template <>
struct Exponential<double> {
  static constexpr double kLeast = -707.6, kMost = 709.78;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52, kTerms = 13;
};

template <class A>
CONVLAB_INLINE vec<A> exponential(vec<A> x) {
  using E = Exponential<A>;
  const vec<A> least = broadcast(E::kLeast), most = broadcast(E::kMost);
  const vec<A> inside = x < least ? least : x > most ? most : x;
  const vec<A> rounded = inside * broadcast(A(1.4426950408889634)) + broadcast(E::kRound);
  const vec<A> n = rounded - broadcast(E::kRound);
  const vec<A> r = fma(n, broadcast(-E::kLn2Low), fma(n, broadcast(-E::kLn2High), inside));
  A factorial = 1;
  for (int k = 2; k <= E::kTerms; ++k) factorial *= A(k);
  vec<A> power = broadcast(1 / factorial);
  CONVLAB_UNROLL for (int k = E::kTerms; k > 0; --k) {
    factorial /= A(k);
    power = fma(power, r, broadcast(1 / factorial));
  }
  // Half of 2^n first: n may be one more than the largest exponent.
  const vec_mask<A> exponent = ((vec_mask<A>)rounded - 1) << E::kMantissa;
  const vec<A> result = (vec<A>)((vec_mask<A>)power + exponent) * broadcast(A(2));
  return x > most ? broadcast(std::numeric_limits<A>::infinity()) : result;
}

// The probability that a normally distributed variable is below x.
CONVLAB_INLINE vec<float> normal_distribution(vec<float> x) {
  constexpr float farthest = 13.16f;  // beyond it is no normal number
  constexpr float q[] = {1.410417383e-01f, 1.412167647e-01f,  1.213161339e-01f, 1.023677574e-01f, -1.593831260e-02f,
                         1.431214322e-01f, -2.473962560e-01f, 1.442197654e-01f, -2.994904779e-02f};
  constexpr int degree = static_cast<int>(std::size(q)) - 1;
  const vec<float> zero{}, one = broadcast(1.0f), half = broadcast(0.5f);
  const vec<float> distance = x < zero ? -x : x, far = broadcast(farthest), z = distance > far ? far : distance;
  const vec<float> t = one / fma(z, broadcast(0.35355339f), one);
  vec<float> sum = broadcast(q[degree]);
  CONVLAB_UNROLL for (int k = degree - 1; k >= 0; --k) sum = fma(sum, t, broadcast(q[k]));
  // What the square loses by rounding counts, times its size.
  const vec<float> square = z * z, lost = fma(z, z, -square);
  const vec<float> density = exponential<float>(-half * square) * fma(-half, lost, one);
  const vec<float> beyond = distance >= far ? zero : density * t * sum;
  return x < zero ? beyond : one - beyond;
}
CONVLAB_INLINE vec<double> normal_distribution(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
  return x;
}

template <class A>
CONVLAB_INLINE vec<A> gated(vec<A> value, Gate gate) {
  const vec<A> one = broadcast(A(1)), zero{}, six = broadcast(A(6));
  if (gate == Gate::sigmoid) return value / (one + exponential<A>(-value));
  if (gate == Gate::normal) return value * normal_distribution(value);
  if (gate == Gate::normal_tanh) {  // 1 + tanh(u) is twice the sigmoid of 2u
    constexpr A factor = A(1.5957691216057307), cubed = A(0.07135481627260025);  // 2 sqrt(2 / pi), and 0.044715 of it
    return value / (one + exponential<A>(-value * fma(value * value, broadcast(cubed), broadcast(factor))));
  }
  const vec<A> shifted = value + broadcast(A(3)), open = shifted < zero ? zero : shifted > six ? six : shifted;
  return value * open / six;
}

// Of `count` values in a row, in place.
template <class T>
[[gnu::noinline]] void open_gate(T* values, int64_t count, Gate gate) {
  using A = accumulate_t<T>;
  for (; count >= lanes<A>; count -= lanes<A>, values += lanes<A>) store(values, gated<A>(load(values), gate));
  if (count > 0) store_partial(values, gated<A>(load_partial(values, count), gate), count);
}

}  // namespace convlab::cpu::CONVLAB_ISA
