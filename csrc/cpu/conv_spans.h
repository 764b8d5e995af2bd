// Few read channels: the taps of a kernel line are channels, too.
//
// In channels_last, what a kernel line reads for a pixel is one span of the tensor, taps x channels elements long. Seen
// so, a 7x7 kernel over 3 channels is a 7x1 kernel over 21, which fills a tile's 32 columns instead of three of them
// seven times. The pixels of this other image overlap in memory; those at the border are made of a span and zeros.
#pragma once
#include "conv_phase.h"
#include "tiles.h"

namespace convlab::cpu::CONVLAB_ISA {

class KernelSpans {
 public:
  KernelSpans() = default;
  KernelSpans(const ConvGeometry& g, Pass pass, Layout layout)
      : channels_(g.in_channels),
        width_(g.input[2]),
        columns_(g.output[2]),
        stride_(g.stride[2]),
        padding_(g.padding[2]) {
    const auto whole = [](int64_t channels) { return ceil_divide(channels, kTileDepth) * kTileDepth; };
    const bool possible = layout == Layout::channels_last && pass != Pass::backward_input && g.groups == 1 &&
                          g.kernel[2] > 1 && g.dilation[2] == 1 && g.kernel[2] <= width_;
    if (possible && whole(g.in_channels * g.kernel[2]) < whole(g.in_channels) * g.kernel[2]) taps_ = g.kernel[2];
  }

  bool used() const { return taps_ > 1; }
  int64_t taps() const { return taps_; }
  int64_t elements() const { return taps_ * channels_; }  // of a span

  // The convolution over spans.
  ConvGeometry apply(ConvGeometry g) const {
    if (!used()) return g;
    g.in_channels = elements();
    g.input[2] = g.output[2];
    g.kernel[2] = g.stride[2] = 1;
    g.padding[2] = 0;
    return g;
  }

  // Where the weight of element k of a span lies, from that of the first.
  int64_t weight_offset(int64_t k, int64_t stride_channel, int64_t stride_tap) const {
    return used() ? k % channels_ * stride_channel + k / channels_ * stride_tap : k * stride_channel;
  }
  // Whether these elements lie together.
  bool weights_follow(int64_t stride_channel, int64_t stride_tap) const {
    return stride_channel == 1 && (!used() || stride_tap == channels_);
  }

  int64_t columns() const { return columns_; }  // of a line
  // Those whose spans lie in the line.
  Range inside() const {
    const int64_t begin = std::clamp<int64_t>(ceil_divide(padding_, stride_), 0, columns_);
    return {begin, std::clamp<int64_t>(floor_divide(width_ + padding_ - taps_, stride_) + 1, begin, columns_)};
  }
  // How many of so many neighbouring pixels may be at the border.
  int64_t most_borders(int64_t pixels) const {
    return used() ? (pixels / columns_ + 2) * (columns_ - inside().size()) : 0;
  }
  // Of line number `line` of a tensor, counted through images.
  template <class T>
  const T* at(const T* tensor, int64_t line, int64_t pixel) const {
    return tensor + (line * width_ + pixel * stride_ - padding_) * channels_;
  }
  int64_t step() const { return stride_ * channels_; }  // from span to span
  // A span at the border.
  template <class T>
  void copy_border(const T* tensor, int64_t line, int64_t pixel, T* target) const {
    const int64_t first = pixel * stride_ - padding_;
    const int64_t begin = std::clamp<int64_t>(-first, 0, taps_),
                  end = std::clamp<int64_t>(width_ - first, begin, taps_);
    std::fill_n(target, elements(), T{});
    std::copy_n(at(tensor, line, pixel) + begin * channels_, (end - begin) * channels_, target + begin * channels_);
  }

 private:
  int64_t taps_ = 1, channels_ = 1, width_ = 1, columns_ = 1, stride_ = 1, padding_ = 0;
};

}  // namespace convlab::cpu::CONVLAB_ISA
