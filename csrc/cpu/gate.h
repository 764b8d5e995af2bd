// Gates (activation.h) on every lane: value * sigmoid(value), and Hardswish.
//
// Idea: e^x = 2^n e^r with n the integer next to x / ln 2, so that |r| <= ln(2) / 2; e^r is a Taylor polynomial whose
// first term left out is below half a unit in the last place, and 2^n is added to the exponent's bits. Cost: 7 fused
// multiply-adds (13 in double), a division and a dozen others per vector. Accuracy: 4 epsilons of the value.
// In place, on what has just been stored and is in L1, and not inlined: there are many copies of the code around the
// kernels' last stores, and a call between them would cost what they keep in registers. 16-bit values are rounded
// before, too, as if another layer computed the gate.
#pragma once
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

template <class A>
CONVLAB_INLINE vec<A> gated(vec<A> value, Gate gate) {
  const vec<A> one = broadcast(A(1)), zero{}, six = broadcast(A(6));
  if (gate == Gate::sigmoid) return value / (one + exponential<A>(-value));
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
