// Where the pixels of positions (conv_positions.h) lie: a pointer per position. Those that are read, of channels_last
// tensors, and those that are written, of both formats.
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

// Of the output, of grad_input or, where backward weight reads it, of grad_output.
template <class T>
class PixelTargets {
 public:
  PixelTargets(T* tensor, const int64_t* size, int64_t channels, Layout layout)
      : tensor_(tensor), size_(size), channels_(channels), last_(layout == Layout::channels_last) {}

  // targets[position]: the pixel's channel `first_channel`, or null between lines and up to a whole block of positions.
  void point(const PositionMap& map, const Phase& phase, int64_t first_channel, T** targets) const {
    const int64_t plane = size_[0] * size_[1] * size_[2], pixel = last_ ? channels_ : 1;
    const int64_t step = phase.axis[2].step * pixel, first = first_channel * (last_ ? 1 : plane);
    std::fill_n(targets, round_up(map.count(), PositionMap::kWhole), nullptr);
    PixelWalk walk(phase, 0);
    map.for_each_written_line([&](int64_t position, int64_t image, int64_t z, int64_t y, int64_t x) {
      walk.z = z, walk.y = y, walk.x = x;
      T* target = tensor_ + image * plane * channels_ + first + walk.written_pixel(size_) * pixel;
      for (int64_t i = 0; i < map.block().columns; ++i) targets[position + i] = target + i * step;
    });
  }

 private:
  T* tensor_;
  const int64_t* size_;
  int64_t channels_;
  bool last_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
