// Where what positions read lies (conv_positions.h), for channels_last tensors: a pointer per position.
#pragma once
#include "conv_positions.h"
#include "conv_spans.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class PixelSources {
 public:
  PixelSources(const T* tensor, const int64_t* size, int64_t channels, const KernelSpans& spans)
      : tensor_(tensor), size_(size), channels_(channels), spans_(spans) {}

  // Elements of `borders` that point() fills, at most.
  int64_t border_elements(int64_t positions) const { return spans_.most_borders(positions) * spans_.elements(); }

  // sources[position]: the pixel's first channel of a group, or null for zeros. With spans (conv_spans.h), those of
  // pixels at the border are put together in `borders`.
  void point(const PositionMap& map, int64_t first_channel, const T** sources, T* borders) const {
    const int64_t plane = size_[0] * size_[1] * size_[2], step = map.x_step() * channels_;
    map.for_each_run([&](int64_t position, int64_t length, int64_t pixel, int64_t image) {
      if (pixel < 0) {
        std::fill_n(sources + position, length, nullptr);
      } else if (spans_.used()) {
        borders = point_at_spans(image * plane + pixel, length, sources + position, borders);
      } else {
        const T* source = tensor_ + (image * plane + pixel) * channels_ + first_channel;
        for (int64_t i = 0; i < length; ++i) sources[position + i] = source + i * step;
      }
    });
  }

 private:
  T* point_at_spans(int64_t pixel, int64_t length, const T** sources, T* borders) const {
    const Range inside = spans_.inside();
    int64_t line = pixel / spans_.columns(), x = pixel % spans_.columns();
    for (int64_t i = 0; i < length; ++i) {
      sources[i] = spans_.at(tensor_, line, x);
      if (x < inside.begin || x >= inside.end) {
        spans_.copy_border(tensor_, line, x, borders);
        sources[i] = borders;
        borders += spans_.elements();
      }
      if (++x == spans_.columns()) x = 0, ++line;
    }
    return borders;
  }

  const T* tensor_;
  const int64_t* size_;
  int64_t channels_;
  const KernelSpans& spans_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
