// Gathers what a block of pixels reads from an NC(D)HW tensor: one row per (channel, tap), one column per pixel; where
// two elements make a step of the reduction (operand.h), one row per (pair of channels, tap), one pair per column.
//
// Pixels of a block are cut into runs that lie in one line of the written tensor; per run and tap the borders are
// found once, and then every channel copies the same span.
#pragma once
#include "conv_phase.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

struct Run {
  int64_t n, z, y, x;  // first pixel, in the phase's coordinates
  int64_t length;
  int64_t column;  // of the first pixel in the block
  int64_t target;  // where column 0 of the run goes in row 0 of the gathered matrix
  int64_t pitch;   // from one gathered row to the next
};

template <class A, int... Lane>
CONVLAB_INLINE vec<A> even_lanes_of(vec<A> a, vec<A> b, std::integer_sequence<int, Lane...>) {
  return shuffle(a, b, std::integer_sequence<int, 2 * Lane...>{});
}
template <class A>
CONVLAB_INLINE vec<A> even_lanes(vec<A> a, vec<A> b) {
  return even_lanes_of<A>(a, b, std::make_integer_sequence<int, lanes<A>>{});
}

// Spans are short, and a call of memcpy would cost more than the copy: two pieces that may overlap make up every
// length.
template <int Piece>
CONVLAB_INLINE bool copy_in_pieces(const char* source, int64_t bytes, char* target) {
  if (bytes < Piece) return false;
  for (int64_t i = 0; i + Piece < bytes; i += Piece) std::memcpy(target + i, source + i, Piece);
  std::memcpy(target + bytes - Piece, source + bytes - Piece, Piece);
  return true;
}
CONVLAB_INLINE void copy_bytes(const void* source, int64_t bytes, void* target) {
  const auto* from = static_cast<const char*>(source);
  auto* to = static_cast<char*>(target);
  copy_in_pieces<64>(from, bytes, to) || copy_in_pieces<32>(from, bytes, to) || copy_in_pieces<16>(from, bytes, to) ||
      copy_in_pieces<8>(from, bytes, to) || copy_in_pieces<4>(from, bytes, to) || copy_in_pieces<2>(from, bytes, to);
}

// target[i] = source[i * step]
template <int Step, class T>
CONVLAB_INLINE void copy_span(const T* source, int64_t step, int64_t count, accumulate_t<T>* target) {
  using A = accumulate_t<T>;
  int64_t i = 0;
  if constexpr (Step == 1) {
#if !defined(CONVLAB_AVX512)
    if constexpr (std::is_same_v<T, A>) return copy_bytes(source, count * static_cast<int64_t>(sizeof(T)), target);
#endif
    for (; i + lanes<A> <= count; i += lanes<A>) store(target + i, load(source + i));
#if defined(CONVLAB_AVX512)
    if constexpr (std::is_same_v<T, A>) {
      if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
      return;
    }
#endif
  }
  if constexpr (Step == 2) {
    // Even elements of two neighbouring vectors; the second one's last element may lie past the span's end.
    for (; i + lanes<A> < count; i += lanes<A>)
      store(target + i, even_lanes<A>(load(source + 2 * i), load(source + 2 * i + lanes<A>)));
  }
  const int64_t distance = Step ? Step : step;
  for (; i < count; ++i) target[i] = to_accumulate(source[i * distance]);
}

template <int Step, class T>
  requires is_reduced<T>
CONVLAB_INLINE void copy_span(const T* source, int64_t step, int64_t count, T* target) {
  if constexpr (Step == 1) return copy_bytes(source, count * static_cast<int64_t>(sizeof(T)), target);
  int64_t i = 0;
#if defined(CONVLAB_AVX512)
  constexpr int64_t width = lanes<T>;
  if constexpr (Step == 2) {  // the second vector's last element may lie past the span's end
    const __m512i low_half = _mm512_set1_epi32(0xffff);
    for (; i + width < count; i += width) {
      const __m512i first = _mm512_and_si512(_mm512_loadu_si512(source + 2 * i), low_half);
      const __m512i second = _mm512_and_si512(_mm512_loadu_si512(source + 2 * i + width), low_half);
      const __m512i in_order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
      _mm512_storeu_si512(target + i, _mm512_permutexvar_epi64(in_order, _mm512_packus_epi32(first, second)));
    }
  }
#endif
  const int64_t distance = Step ? Step : step;
  for (; i < count; ++i) target[i] = source[i * distance];
}

// The tensor that is read, from the first channel wanted.
template <class T>
struct GatherSource {
  const T* data;
  int64_t batch_stride, channel_stride, pixel_stride;
  const int64_t* size;
  int64_t channels;  // wanted
};

// The pixels begin..end of a run of `length` that read inside a line of `size` when pixel i reads x + i*step.
struct Inside {
  int64_t begin, end;
  Inside(int64_t x, int64_t step, int64_t length, int64_t size) {
    begin = x >= 0 ? 0 : std::min(length, divide_up(-x, step));
    const int64_t last = x + (length - 1) * step;
    end = last < size ? length : std::max(begin, x < size ? divide_up(size - x, step) : 0);
  }
};

// Pixels begin..end of a line, of one channel or of two.
template <int Pair, int Step, class T, class S>
CONVLAB_INLINE void copy_pixels(const T* from, const T* next, int64_t step, int64_t begin, int64_t end, S* row) {
  if constexpr (Pair == 1)
    copy_span<Step>(from + begin * step, step, end - begin, row + begin);
  else if (end > begin)
    interleave<Step>(from + begin * step, next ? next + begin * step : nullptr, step, end - begin, row + 2 * begin);
}

// Fills matrix rows channel*channel_rows + tap*tap_rows for all channels wanted and all taps of the phase. A channel of
// the matrix is as many of the tensor's as Pair says; zeros make up for one that is not there.
template <class T, class S, int Pair = products<S>>
void gather(const GatherSource<T>& source, const Phase& phase, const Run* runs, int64_t run_count, S* matrix,
            int64_t channel_rows, int64_t tap_rows) {
  const int64_t read_step = phase.axis[2].read_step, step = read_step * source.pixel_stride;
  const int64_t plane = phase.axis[2].taps, lines = phase.axis[1].taps;
  for (const Run* run = runs; run < runs + run_count; ++run)
    for (int64_t jx = 0; jx < plane; ++jx) {
      const int64_t x = run->x * read_step + phase.axis[2].offset(jx);
      const Inside inside(x, read_step, run->length, source.size[2]);
      for (int64_t jz = 0; jz < phase.axis[0].taps; ++jz)
        for (int64_t jy = 0; jy < lines; ++jy) {
          const int64_t z = run->z * phase.axis[0].read_step + phase.axis[0].offset(jz);
          const int64_t y = run->y * phase.axis[1].read_step + phase.axis[1].offset(jy);
          const bool outside = z < 0 || z >= source.size[0] || y < 0 || y >= source.size[1];
          const int64_t begin = outside ? run->length : inside.begin, end = outside ? begin : inside.end;
          const int64_t tap = (jz * lines + jy) * plane + jx;
          S* row = matrix + (run->target + tap * tap_rows * run->pitch) * Pair;
          const int64_t pixel = (z * source.size[1] + y) * source.size[2] + x;
          const T* from = source.data + run->n * source.batch_stride + pixel * source.pixel_stride;
          for (int64_t c = 0; c < source.channels; c += Pair) {
            const T* next = c + 1 < source.channels ? from + source.channel_stride : nullptr;
            for (int64_t i = 0; i < begin * Pair; ++i) row[i] = S{};
            if (step == 1)
              copy_pixels<Pair, 1>(from, next, 1, begin, end, row);
            else if (step == 2)
              copy_pixels<Pair, 2>(from, next, 2, begin, end, row);
            else
              copy_pixels<Pair, 0>(from, next, step, begin, end, row);
            for (int64_t i = end * Pair; i < run->length * Pair; ++i) row[i] = S{};
            row += channel_rows * run->pitch * Pair;
            from += source.channel_stride * Pair;
          }
        }
    }
}

}  // namespace convlab::cpu::CONVLAB_ISA
