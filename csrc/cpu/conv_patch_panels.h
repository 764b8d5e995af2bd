// Patches of the read tensor, channels last, as columns of the weight gradient's product (conv_gemm_weight.h).
//
// Rows of the packed panels are pixels, columns are (tap, channel). A pixel's row of one tap, or of a kernel line
// inside the image, is a span of the tensor: packing is copying.
#pragma once
#include "conv_gemm_gradient.h"

namespace convlab::cpu::CONVLAB_ISA {

// A range of the patch's elements, of a group.
struct PatchColumns {
  int64_t group, first, count;
};

template <class T>
class PatchPanels {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  // From one panel to the next: off a power of two.
  static constexpr int64_t kPanelPitch =
      GradientPacking<T>::kBlockPixels * kPanel<A> + 64 / static_cast<int64_t>(sizeof(S));

  PatchPanels(const T* data, const ConvGeometry& geometry) : data_(data), geometry_(geometry) {
    pointwise_ = is_unpadded_tap() && geometry.stride[0] == 1 && geometry.stride[1] == 1 && geometry.stride[2] == 1;
  }

  const T* data() const { return data_; }
  // Whether every patch is one pixel.
  bool is_unpadded_tap() const {
    return geometry_.taps() == 1 && geometry_.padding[0] == 0 && geometry_.padding[1] == 0 && geometry_.padding[2] == 0;
  }
  // Whether patch i is pixel i.
  bool pointwise() const { return pointwise_; }

  // With one tap: where the group's channels of the pixels from `begin` on lie.
  void list_pixels(const Phase& phase, int64_t group, int64_t begin, int64_t count, const T** pixels) const {
    const int64_t* size = geometry_.input;
    PixelWalk pixel(phase, begin);
    for (int64_t p = 0; p < count; ++p, pixel.advance(1)) {
      const int64_t z = pixel.z * phase.axis[0].read_step, y = pixel.y * phase.axis[1].read_step;
      const int64_t x = pixel.x * phase.axis[2].read_step;
      pixels[p] = data_ + (((pixel.n * size[0] + z) * size[1] + y) * size[2] + x) * geometry_.in_channels +
                  group * geometry_.in_channels_per_group();
    }
  }

  // The panels of some columns: each pixel's row is made of spans of channels, one per tap touched. `zeros` has kPanel
  // elements where a step takes two pixels.
  void gather(const Phase& phase, const PatchColumns& columns, int64_t begin, int64_t pixels, S* panels,
              S* zeros) const {
    if constexpr (products<S> == 2) std::fill(zeros, zeros + kPanel<A>, S{});
    const int64_t* size = geometry_.input;
    const int64_t stride = geometry_.in_channels, channels = geometry_.in_channels_per_group();
    const int64_t first_tap = columns.first / channels, first_channel = columns.first % channels;
    const int64_t first_x = first_tap % geometry_.kernel[2], first_line = first_tap / geometry_.kernel[2];
    const int64_t first_y = first_line % geometry_.kernel[1], first_z = first_line / geometry_.kernel[1];
    const int64_t last_panel = columns.count / kPanel<A>, rest = columns.count % kPanel<A>;
    if (pointwise_) {
      const T* from = data_ + begin * stride + columns.group * channels + first_channel;
      for (int64_t p = 0; p < pixels; p += products<S>, from += products<S> * stride) {
        for (int64_t i = 0; i < products<S>; ++i) prefetch_row(from + i * stride, stride, columns.count);
        copy_to_panels(from, p + 1 < pixels ? from + stride : nullptr, p, 0, columns.count, columns.count, panels,
                       zeros);
      }
    } else {
      PixelWalk pixel(phase, begin);
      for (int64_t p = 0; p < pixels; p += products<S>) {
        const PixelWalk first = pixel;
        pixel.advance(1);
        const PixelWalk second = pixel;
        if constexpr (products<S> == 2) pixel.advance(1);
        int64_t channel = first_channel, jx = first_x, jy = first_y, jz = first_z;
        // With one group, taps of a kernel line that lie inside the input's line are one span.
        const bool both_inside = is_inside(phase, first) && (products<S> == 1 || is_inside(phase, second));
        for (int64_t column = 0; column < columns.count;) {
          const int64_t together = both_inside ? geometry_.kernel[2] - jx : 1;
          const int64_t count = std::min(together * channels - channel, columns.count - column);
          const auto source = [&](const PixelWalk& pixel) -> const T* {
            const int64_t z = pixel.z * phase.axis[0].read_step + phase.axis[0].offset(jz);
            const int64_t y = pixel.y * phase.axis[1].read_step + phase.axis[1].offset(jy);
            const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset(jx);
            if (z < 0 || z >= size[0] || y < 0 || y >= size[1] || x < 0 || x >= size[2]) return nullptr;
            return data_ + (((pixel.n * size[0] + z) * size[1] + y) * size[2] + x) * stride + columns.group * channels +
                   channel;
          };
          const T* next = products<S> == 2 && p + 1 < pixels ? source(second) : nullptr;
          copy_to_panels(source(first), next, p, column, count, columns.count, panels, zeros);
          column += count;
          channel = 0;
          jx += together;
          if (jx == geometry_.kernel[2]) {
            jx = 0;
            if (++jy == geometry_.kernel[1]) jy = 0, ++jz;
          }
        }
      }
    }
    const int64_t width = round_up(rest, lanes<A>) * products<S>, used = rest * products<S>;
    S* panel = panels + last_panel * kPanelPitch;
    if (used < width)
      for (int64_t step = 0; step < divide_up(pixels, products<S>); ++step)
        std::fill(panel + step * width + used, panel + (step + 1) * width, S{});
  }

 private:
  // `count` elements of pixel p, and of the next one where they make pairs, go to the columns from `column` on; null
  // stands for zeros.
  CONVLAB_INLINE void copy_to_panels(const T* from, [[maybe_unused]] const T* next, int64_t p, int64_t column,
                                     int64_t count, int64_t columns, S* panels, const S* zeros) const {
    for (const int64_t end = column + count; column < end;) {
      const int64_t panel = column / kPanel<A>, within = column % kPanel<A>;
      const int64_t length = std::min(kPanel<A> - within, end - column);
      S* to = panels + panel * kPanelPitch + p * panel_width<A>(columns, panel) + within * products<S>;
      if constexpr (products<S> == 2) {
        interleave<1>(from ? from : zeros, next, 1, length, to);
      } else if (!from) {
        std::fill(to, to + length, S{});
      } else if (length == kPanel<A>) {
        CONVLAB_UNROLL for (int j = 0; j < kPanel<A>; j += lanes<A>) store(to + j, load(from + j));
      } else {
        copy_span<1>(from, 1, length, to);
      }
      if (from) from += length;
      if (next) next += length;
      column += length;
    }
  }

  // Whether a kernel line of all taps and channels is one span of the input's line.
  bool is_inside(const Phase& phase, const PixelWalk& pixel) const {
    const int64_t x = pixel.x * phase.axis[2].read_step + phase.axis[2].offset(0);
    return geometry_.groups == 1 && geometry_.dilation[2] == 1 && x >= 0 &&
           x + geometry_.kernel[2] <= geometry_.input[2];
  }

  const T* data_;
  ConvGeometry geometry_;
  bool pointwise_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
