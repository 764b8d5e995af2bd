// Packing of the tensor whose pixels are read once in the weight gradient's product (conv_gemm_weight.h): grad_output,
// or the input where the two exchange roles. Its channels are called filters here.
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

// What a pixel further on needs: the hardware does not see that rows go on.
template <class T>
CONVLAB_INLINE void prefetch_row(const T* row, int64_t stride, int64_t count) {
  constexpr int64_t rows_ahead = 16, line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + rows_ahead * stride + i);
}

// A range of the filters of a group.
struct Filters {
  int64_t first, count;
};

template <class T>
class GradientPacking {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  static constexpr int64_t kBlockPixels = 256;  // one chain of additions
  // Channels last, filters that lie together in the packed grad_output: a vector if that is a cache line, otherwise
  // the rows of a tile, which then reads nothing else.
  static constexpr int kStripe = CONVLAB_VECTOR_BYTES == 64 ? lanes<A> : kTileRows;
  // Off a power of two: what is used together would share cache sets.
  static constexpr int64_t kRowPitch = kBlockPixels + lanes<S>;
  static constexpr int64_t kStripePitch = kBlockPixels * kStripe + lanes<S>;

  // `all_filters`, of all groups, of `image` pixels; `filters` per group.
  GradientPacking(const T* data, int64_t all_filters, int64_t filters, int64_t image)
      : data_(data), all_filters_(all_filters), filters_(filters), image_(image) {}

  const T* at(int64_t group, const Filters& filters, int64_t pixel) const {
    return data_ + pixel * all_filters_ + group * filters_ + filters.first;
  }

  // [pixel][filter] -> [stripe][step][filter][products]
  void pack_stripes(int64_t group, const Filters& filters, int64_t begin, int64_t pixels, S* target) const {
    const int64_t stride = all_filters_;
    const T* source = data_ + begin * stride + group * filters_ + filters.first;
    if constexpr (products<S> == 2) {
      for (int64_t p = 0; p < pixels; p += 2, source += 2 * stride) {
        prefetch_row(source, stride, filters.count);
        prefetch_row(source + stride, stride, filters.count);
        for (int64_t k = 0; k < filters.count; k += lanes<A>)
          interleave<1>(source + k, p + 1 < pixels ? source + stride + k : nullptr, 1,
                        std::min<int64_t>(lanes<A>, filters.count - k),
                        target + k / lanes<A> * kStripePitch + p * lanes<A>);
      }
    } else {
      // Stores of stripes that are no whole cache lines follow each other for some pixels. What a store writes too
      // much, the next one overwrites.
      constexpr int64_t together = kStripe == lanes<A> ? 1 : 16;
      for (int64_t first = 0; first < pixels; first += together) {
        for (int64_t p = first; p < first + together; ++p) prefetch_row(source + p * stride, stride, filters.count);
        for (int64_t k = 0; k < filters.count; k += kStripe) {
          const T* from = source + first * stride + k;
          S* to = target + k / kStripe * kStripePitch + first * kStripe;
          const int64_t left = filters.count - k, end = std::min(pixels, first + together);
          for (int64_t p = first; p < end; ++p, from += stride, to += kStripe)
            CONVLAB_UNROLL for (int j = 0; j < kStripe; j += lanes<A>) {
              if (left >= j + lanes<A>)
                store(to + j, load(from + j));
              else if (left > j)
                store(to + j, load_partial(from + j, left - j));
            }
        }
      }
    }
  }

  // [pixel][filter] -> [panel][pixel][filter]
  void copy_panels(int64_t group, const Filters& filters, int64_t begin, int64_t pixels, S* target) const {
    const int64_t stride = all_filters_;
    const T* source = data_ + begin * stride + group * filters_ + filters.first;
    for (int64_t p = 0; p < pixels; ++p, source += stride) {
      prefetch_row(source, stride, filters.count);
      for (int64_t k = 0; k < filters.count; k += lanes<A>) {
        const int64_t panel = k / kPanel<A> * kPanel<A>, left = filters.count - k;
        S* to = target + panel * kBlockPixels + p * panel_width<A>(filters.count - panel, 0) + k - panel;
        store(to, left >= lanes<A> ? load(source + k) : load_partial(source + k, left));
      }
    }
  }

  // [filter][pixel] of up to several images -> [panel][step][filter][products]
  void transpose_panels(int64_t group, const Filters& filters, int64_t begin, int64_t pixels, S* target,
                        S* spare) const {
    const int64_t image = image_;
    if constexpr (products<S> == 2)
      return transpose_pairs(group, filters, begin, pixels, target, spare);
    else
      for (int64_t done = 0; done < pixels;) {
        const int64_t n = (begin + done) / image, pixel = (begin + done) % image;
        const int64_t length = std::min(pixels - done, image - pixel);
        const T* source = data_ + (n * all_filters_ + group * filters_ + filters.first) * image + pixel;
        for (int64_t column = 0; column < filters.count; column += lanes<A>) {
          const int64_t panel = column / kPanel<A> * kPanel<A>;
          const int width = panel_width<A>(filters.count - panel, 0);
          transpose_matrix(source + column * image, image, std::min<int64_t>(lanes<A>, filters.count - column), length,
                           target + panel * kBlockPixels + done * width + column - panel, width);
        }
        done += length;
      }
  }

 private:
  // The same through rows of a whole block, because a pair may straddle images; transposed as if pairs were floats.
  void transpose_pairs(int64_t group, const Filters& filters, int64_t begin, int64_t pixels, S* target,
                       S* spare) const {
    const int64_t image = image_, steps = divide_up(pixels, 2);
    for (int64_t column = 0; column < filters.count; column += lanes<A>) {
      const int64_t panel = column / kPanel<A> * kPanel<A>, count = std::min<int64_t>(lanes<A>, filters.count - column);
      for (int64_t filter = 0; filter < count; ++filter) {
        S* row = spare + filter * kRowPitch;
        for (int64_t done = 0; done < pixels;) {
          const int64_t n = (begin + done) / image, pixel = (begin + done) % image;
          const int64_t length = std::min(pixels - done, image - pixel);
          const int64_t plane = n * all_filters_ + group * filters_ + filters.first + column + filter;
          copy_span<1>(data_ + plane * image + pixel, 1, length, row + done);
          done += length;
        }
        std::fill(row + pixels, row + 2 * steps, S{});
      }
      const int width = panel_width<A>(filters.count - panel, 0);
      transpose_matrix(reinterpret_cast<const A*>(spare), kRowPitch / 2, count, steps,
                       reinterpret_cast<A*>(target + panel * kBlockPixels) + column - panel, width);
    }
  }

  const T* data_;
  int64_t all_filters_, filters_, image_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
