// The products of a depthwise convolution's weight gradient: of outputs' gradients and what neighbouring taps read.
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

// What a row of taps reads: of a line, pixels `pitch` apart for neighbouring taps, `step` for neighbouring outputs.
template <class T>
struct LinePixels {
  const T* from;
  int64_t pitch, step;

  CONVLAB_INLINE const T* at(int64_t tap) const { return from + tap * pitch; }
  CONVLAB_INLINE void next_tap() {
    from += pitch;
    pin_pointer(from);  // counted up: multiples of the pitch would not fit into registers
  }
  CONVLAB_INLINE void next_outputs(int64_t count) { from += count * step; }
};

// Of a list of pixels, the same channels of each.
template <class T>
struct ListedLine {
  const T* const* list;
  int64_t channel, step;

  CONVLAB_INLINE const T* at(int64_t tap) const { return list[tap] + channel; }
  CONVLAB_INLINE void next_tap() { ++list; }
  CONVLAB_INLINE void next_outputs(int64_t count) { list += count * step; }
};

// A run of outputs, whose gradients are `gradient_pitch` apart, and what their rows of taps read; of each vector,
// `left` lanes are there.
template <class T, class Pixels, int Rows>
struct ProductRun {
  const T* gradient;
  int64_t gradient_pitch, left;
  Pixels input[Rows];

  template <bool Whole>
  CONVLAB_INLINE vec<accumulate_t<T>> value(const T* p) const {
    return Whole ? load(p) : load_partial(p, left);
  }
};

// chain[output % Chains][row][j] += the products of tap j, for a few outputs, which are passed.
template <int Outputs, int Step, bool Whole, class T, class Pixels, int Rows, int Taps, int Chains>
CONVLAB_INLINE void add_outputs(ProductRun<T, Pixels, Rows>& run, vec<accumulate_t<T>> (&chain)[Chains][Rows][Taps]) {
  using A = accumulate_t<T>;
  vec<A> gradient[Outputs];
  CONVLAB_UNROLL for (int p = 0; p < Outputs; ++p) {
    gradient[p] = run.template value<Whole>(run.gradient);
    run.gradient += run.gradient_pitch;
  }
  CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) {
    Pixels from = run.input[r];
    if constexpr (Step > 0) {
      CONVLAB_UNROLL for (int q = 0; q < (Outputs - 1) * Step + Taps; ++q) {
        vec<A> x = run.template value<Whole>(from.at(0));
        pin(x);
        from.next_tap();
        CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
          const int p = (q - j) / Step;
          if (q >= j && (q - j) % Step == 0 && p < Outputs)
            chain[p % Chains][r][j] = fma(x, gradient[p], chain[p % Chains][r][j]);
        }
      }
    } else {
      CONVLAB_UNROLL for (int p = 0; p < Outputs; ++p, from.next_outputs(1))
          CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) chain[p % Chains][r][j] =
              fma(run.template value<Whole>(from.at(j)), gradient[p], chain[p % Chains][r][j]);
    }
    run.input[r].next_outputs(Outputs);
  }
}

// sum[row][j] += the products of tap j over `count` outputs. Step: outputs are so many taps apart (0: any, and no input
// is read twice by neighbouring outputs).
template <int Step, bool Whole, class T, class Pixels, int Rows, int Taps>
CONVLAB_INLINE void add_products(ProductRun<T, Pixels, Rows> run, int64_t count,
                                 vec<accumulate_t<T>> (&sum)[Rows][Taps]) {
  using A = accumulate_t<T>;
  constexpr int chains = Rows * Taps > 4 ? 1 : Rows * Taps > 1 ? 2 : 4;
  vec<A> chain[chains][Rows][Taps];
  CONVLAB_UNROLL for (int c = 0; c < chains; ++c) CONVLAB_UNROLL for (int r = 0; r < Rows; ++r)
      CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) chain[c][r][j] = c == 0 ? sum[r][j] : vec<A>{};
  for (; count >= 4; count -= 4) add_outputs<4, Step, Whole>(run, chain);
  if (count >= 2) add_outputs<2, Step, Whole>(run, chain);
  if (count % 2) add_outputs<1, Step, Whole>(run, chain);
  CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
    sum[r][j] = chain[0][r][j];
    CONVLAB_UNROLL for (int c = 1; c < chains; ++c) sum[r][j] += chain[c][r][j];
  }
}

// Whether a line of taps is what three rows of nine sums are made for.
inline bool three_neighbours(const AxisPhase& axis) {
  return axis.taps == 3 && axis.offset_step == 1 && axis.read_step <= 2;
}

}  // namespace convlab::cpu::CONVLAB_ISA
