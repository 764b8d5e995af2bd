// What the direct algorithm reads: lines of pixels spread over the lanes of a vector of written channels.
//
// A vector holds the written channels of one or several groups. Its lane w needs, one after another, the read channels
// j of its own group; a spread line holds them as [pixel][j][lane], zero-padded, in the accumulation type. Spreading is
// one permutation per (pixel, j), and serves every tap and output that reads the pixel, in either memory format.
#pragma once
#include "conv_depthwise.h"

namespace convlab::cpu::CONVLAB_ISA {

// v[index[lane]] for every lane.
CONVLAB_INLINE vec<float> permute(vec<float> v, vec_mask<float> index) {
#if defined(CONVLAB_AVX512)
  return (vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(CONVLAB_AVX2)
  return (vec<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  vec<float> result;
  for (int lane = 0; lane < lanes<float>; ++lane) result[lane] = v[index[lane]];
  return result;
#endif
}
CONVLAB_INLINE vec<double> permute(vec<double> v, vec_mask<double> index) {
#if defined(CONVLAB_AVX512)
  return (vec<double>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#else
  vec<double> result;
  for (int lane = 0; lane < lanes<double>; ++lane) result[lane] = v[static_cast<int>(index[lane])];
  return result;
#endif
}

// The written channels of one vector, and what they read.
template <class A>
struct ChannelBlock {
  int64_t first, count;      // written channels
  int64_t first_read, span;  // read channels
  int64_t reads;             // of each written channel
  int64_t written_per_group;

  // Whole groups where they fit into a vector, else parts of one.
  static int64_t per_group(int64_t written) { return written >= lanes<A> ? divide_up(written, lanes<A>) : 1; }
  static int64_t groups_per_block(int64_t written) { return written >= lanes<A> ? 1 : lanes<A> / written; }
  static int64_t blocks(int64_t groups, int64_t written) {
    return divide_up(groups, groups_per_block(written)) * per_group(written);
  }

  ChannelBlock(int64_t index, int64_t groups, int64_t reads, int64_t written)
      : reads(reads), written_per_group(written) {
    const int64_t parts = per_group(written), together = groups_per_block(written);
    const int64_t group = index / parts * together, part = index % parts * lanes<A>;
    first = group * written + part;
    count = written >= lanes<A> ? std::min<int64_t>(lanes<A>, written - part)
                                : std::min(together, groups - group) * written;
    first_read = group * reads;
    span = (written >= lanes<A> ? 1 : std::min(together, groups - group)) * reads;
  }
  // The read channel, counted from the first, of a lane.
  int64_t source(int64_t lane, int64_t j) const {
    return ((first + std::min(lane, count - 1)) / written_per_group - first / written_per_group) * reads + j;
  }
};

template <class T>
class SpreadLines {
 public:
  using A = accumulate_t<T>;

  // Pixels x .. x + slots of each line are wanted.
  SpreadLines(Layout layout, const int64_t* size, int64_t all_channels, const ChannelBlock<A>& block, int64_t x,
              int64_t slots)
      : last_(layout == Layout::channels_last),
        size_(size),
        all_channels_(all_channels),
        block_(block),
        x_(x),
        slots_(slots) {
    identity_ = block.reads == 1 && block.written_per_group == 1;
    for (int64_t lane = 0; lane < lanes<A>; ++lane)
      start_[lane] = static_cast<decltype(+start_[0])>(block.source(lane, 0));
  }

  static int64_t elements(int64_t slots, int64_t reads) { return slots * reads * lanes<A>; }
  // Of the buffer that `spread` needs, in elements.
  static int64_t buffer(int64_t slots) { return slots * lanes<A>; }

  // Line (z, y) of an image -> target; zeros if there is no such line.
  void spread(const T* image, int64_t z, int64_t y, A* buffer, A* target) const {
    const int64_t step = block_.reads * lanes<A>;
    const bool outside = z < 0 || z >= size_[0] || y < 0 || y >= size_[1];
    const int64_t begin = outside ? slots_ : std::clamp<int64_t>(-x_, 0, slots_);
    const int64_t end = outside ? slots_ : std::clamp<int64_t>(size_[2] - x_, begin, slots_);
    std::fill(target, target + begin * step, A(0));
    std::fill(target + end * step, target + slots_ * step, A(0));
    if (begin == end) return;
    const int64_t pixel = (z * size_[1] + y) * size_[2] + x_ + begin;
    const int64_t plane = size_[0] * size_[1] * size_[2];
    const T* from = image + (last_ ? pixel * all_channels_ + block_.first_read : block_.first_read * plane + pixel);
    target += begin * step;
    if (block_.span > lanes<A>) {
      const int64_t pixel_stride = last_ ? all_channels_ : 1, channel_stride = last_ ? 1 : plane;
      for (int64_t i = 0; i < end - begin; ++i)
        for (int64_t j = 0; j < block_.reads; ++j, target += lanes<A>)
          for (int64_t lane = 0; lane < lanes<A>; ++lane)
            target[lane] = to_accumulate(from[i * pixel_stride + block_.source(lane, j) * channel_stride]);
    } else if (last_) {
      for (int64_t i = 0; i < end - begin; ++i, from += all_channels_, target += step)
        spread_pixel(block_.span == lanes<A> ? load(from) : load_partial(from, block_.span), target);
    } else {
      A* transposed = identity_ ? target : buffer;
      transpose_matrix(from, plane, block_.span, end - begin, transposed, lanes<A>);
      if (!identity_)
        for (int64_t i = 0; i < end - begin; ++i, target += step) spread_pixel(load(buffer + i * lanes<A>), target);
    }
  }

 private:
  CONVLAB_INLINE void spread_pixel(vec<A> pixel, A* target) const {
    vec_mask<A> index = start_;
    for (int64_t j = 0; j < block_.reads; ++j, ++index, target += lanes<A>)
      store(target, identity_ ? pixel : permute(pixel, index));
  }

  bool last_, identity_;
  const int64_t* size_;
  int64_t all_channels_;
  ChannelBlock<A> block_;
  int64_t x_, slots_;
  vec_mask<A> start_{};  // read channel of each lane, for j = 0
};

}  // namespace convlab::cpu::CONVLAB_ISA
