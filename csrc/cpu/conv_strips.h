// Strips: some lines of a phase's written pixels, and the lines that these read, which are brought together in scratch.
#pragma once
#include "conv_gather.h"
#include "conv_phase.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

// Pixels of a line that `columns` written ones read.
inline int64_t slots_of(const AxisPhase& axis, int64_t columns) {
  return (columns - 1) * axis.read_step + std::max<int64_t>(1, axis.reach());
}

// What strips of lines of `columns` pixels read: the most that any phase needs.
struct StripReach {
  int64_t slots = 1;   // pixels of a line
  int64_t planes = 1;  // taps along z
  int64_t lines = 1;   // that one written line reads
  int64_t row_step = 1;

  StripReach() = default;
  template <class T>
  StripReach(const Transfer<T>& t, int64_t columns) : row_step(t.phase(0).axis[1].read_step) {
    for (int64_t index = 0; index < t.phase_count; ++index) {
      const Phase phase = t.phase(index);
      slots = std::max(slots, slots_of(phase.axis[2], columns));
      planes = std::max(planes, phase.axis[0].taps);
      lines = std::max(lines, phase.axis[1].reach());
    }
  }
  int64_t lines_of(int64_t rows) const { return (rows - 1) * row_step + lines; }
};

// Some neighbouring channels of an image's lines, pixels x .. x + slots, brought together as [slot][channel]. What lies
// behind the channels of a slot is undefined.
template <class T>
struct StripLines {
  using A = accumulate_t<T>;

  Layout layout;
  const int64_t* size;  // of the image
  int64_t all_channels, first_channel, channels;
  int64_t x, slots, pitch;  // from slot to slot: kFew, or at least `channels` in whole vectors

  static constexpr int64_t kFew = 4;  // channels that are not filled up to a vector

  // Line (z, y) -> target; zeros outside the image. With pitch kFew up to a vector behind the line is overwritten.
  void copy(const T* image, int64_t z, int64_t y, A* target) const {
    const int64_t begin = std::clamp<int64_t>(-x, 0, slots), end = std::clamp(size[2] - x, begin, slots);
    const bool outside = z < 0 || z >= size[0] || y < 0 || y >= size[1] || begin == end;
    std::fill(target, target + (outside ? slots : begin) * pitch, A(0));
    if (outside) return;
    const int64_t plane = size[0] * size[1] * size[2], pixel = (z * size[1] + y) * size[2] + x + begin;
    A* const to = target + begin * pitch;
    if (layout == Layout::channels_last) {
      copy_slots(image + pixel * all_channels + first_channel, end - begin, to,
                 (plane - pixel) * all_channels - first_channel);
    } else {
      for (int64_t c = 0; c < channels; c += lanes<A>)
        transpose_matrix(image + (first_channel + c) * plane + pixel, plane, std::min<int64_t>(lanes<A>, channels - c),
                         end - begin, to + c, pitch);
    }
    std::fill(target + end * pitch, target + slots * pitch, A(0));
  }

 private:
  // Without masks where `left`, what is left of the image, allows it.
  void copy_slots(const T* from, int64_t count, A* to, int64_t left) const {
    const bool few = pitch == kFew && channels <= kFew && std::is_same_v<T, A>;
    const int64_t copied = few ? kFew : round_up(channels, lanes<A>);
    const int64_t whole = left < copied || pitch < copied ? 0 : std::min(count, (left - copied) / all_channels + 1);
    int64_t i = 0;
    if (few)
      for (; i < whole; ++i, from += all_channels, to += pitch) std::memcpy(to, from, kFew * sizeof(T));
    for (; i < whole; ++i, from += all_channels, to += pitch)
      for (int64_t c = 0; c < channels; c += lanes<A>) store(to + c, load(from + c));
    for (; i < count; ++i, from += all_channels, to += pitch) copy_span<1>(from, 1, channels, to);
  }
};

// Halves a strip's written lines, `rows` at first, until it is small enough and there are enough tasks.
template <class TooLarge>
int64_t strip_rows(int64_t rows, const TooLarge& too_large) {
  while (rows > 1 && too_large(rows)) rows = divide_up(rows, 2);
  return rows;
}

}  // namespace convlab::cpu::CONVLAB_ISA
