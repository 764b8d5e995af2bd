// What positions read (conv_positions.h), copied as parts of bfloat16: [position][part][channel], a cache line of each
// part at a time, so that it can be done on the side while something else is multiplied.
#pragma once
#include "bfloat16_parts.h"
#include "tiles.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class PositionCopy {
 public:
  static constexpr int kParts = bfloat16_parts<T>;
  static constexpr int64_t kAhead = 16;  // positions whose memory is asked for ahead of time

  PositionCopy() = default;
  // sources: [position + kAhead], null for zeros, which also follow `channels` up to whole steps of 32.
  PositionCopy(const T* const* sources, int64_t positions, int64_t first_channel, int64_t channels, int64_t part_pitch,
               int64_t pitch, char* target)
      : source_(sources),
        end_(sources + positions),
        first_(first_channel),
        channels_(channels),
        part_pitch_(part_pitch),
        pitch_(pitch),
        target_(target) {}

  int64_t lines_left() const { return (end_ - source_) * ceil_divide(channels_, kTileDepth); }

  // So many lines of 32 channels.
  CONVLAB_INLINE void advance(int64_t lines) {
    for (; lines > 0 && source_ < end_; --lines) {
      const T* later = source_[kAhead] + first_ + channel_;
      __builtin_prefetch(later, 0, 1);
      if constexpr (sizeof(T) == 4) __builtin_prefetch(later + kTileDepth / 2, 0, 1);
      char* target = target_ + channel_ * 2;
      if (!*source_)
        for (int part = 0; part < kParts; ++part) std::memset(target + part * part_pitch_, 0, kTileRowBytes);
      else if (channel_ + kTileDepth <= channels_)
        copy_whole(*source_ + first_ + channel_, target);
      else
        copy_some(*source_ + first_ + channel_, channels_ - channel_, target);
      channel_ += kTileDepth;
      if (channel_ < channels_) continue;
      channel_ = 0, ++source_, target_ += pitch_;
    }
  }
  void finish() { advance(INT64_MAX); }

 private:
  CONVLAB_INLINE void copy_whole(const T* source, char* target) const {
    if constexpr (kParts == 1)
      std::memcpy(target, source, kTileRowBytes);
    else
      for (int64_t i = 0; i < kTileDepth; i += 2 * lanes<float>)
        store_parts(load(source + i), load(source + i + lanes<float>), target + 2 * i);
  }
  CONVLAB_INLINE void copy_some(const T* source, int64_t count, char* target) const {
#if defined(CONVLAB_AVX512)
    if constexpr (kParts == 1) {
      _mm512_storeu_si512(target, _mm512_maskz_loadu_epi16((1u << count) - 1u, source));
      return;
    }
#endif
    for (int64_t i = 0; i < kTileDepth; i += 2 * lanes<float>)
      store_parts(load_some(source + i, count - i), load_some(source + i + lanes<float>, count - i - lanes<float>),
                  target + 2 * i);
  }
  CONVLAB_INLINE void store_parts(vec<float> first, vec<float> second, char* target) const {
    vec_bits low[kParts], high[kParts];
    split(first, low);
    split(second, high);
    CONVLAB_UNROLL for (int p = 0; p < kParts; ++p) store_upper_halves(low[p], high[p], target + p * part_pitch_);
  }

  const T *const *source_ = nullptr, *const *end_ = nullptr;
  int64_t first_ = 0, channels_ = 0, channel_ = 0;
  int64_t part_pitch_ = 0, pitch_ = 0;
  char* target_ = nullptr;
};

}  // namespace convlab::cpu::CONVLAB_ISA
