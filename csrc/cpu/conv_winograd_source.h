// Where the tiles of a Winograd convolution read their pixels.
//
// A kernel is cut into parts and segments (../winograd_cut.h), which are more channels: each pair of them, one per
// axis, is a cell. A run is what lies together of them: the channels of a cell's pixel or, where they are few, of
// neighbouring pixels that belong to parts along x. NCHW slices go through a strip buffer in NHWC order, and so do
// joined runs, which then have no borders to look at, and 16-bit tensors, so that the transforms are compiled for float
// alone.
#pragma once
#include "../winograd_cut.h"
#include "conv_gather.h"
#include "conv_gemm_channels_last.h"

namespace convlab::cpu::CONVLAB_ISA {

// The slice that slice z of the written tensor (of grad_output, in backward weight) reads through a tap along z; -1 if
// none.
inline int64_t read_slice(const ConvGeometry& g, Pass pass, int64_t z, int64_t tap) {
  if (pass != Pass::backward_input) {
    const int64_t slice = z * g.stride[0] - g.padding[0] + tap * g.dilation[0];
    return slice >= 0 && slice < g.input[0] ? slice : -1;
  }
  const int64_t distance = z + g.padding[0] - tap * g.dilation[0];
  return distance >= 0 && distance % g.stride[0] == 0 && distance / g.stride[0] < g.output[0] ? distance / g.stride[0]
                                                                                              : -1;
}

// Tiles lie in images: a slice of the written tensor (of grad_output, in backward weight) or, with dilation, the pixels
// of one residue of it.
struct WinogradImage {
  int64_t n, slice, residue[2];
};
inline WinogradImage winograd_image(int64_t index, int64_t slices, const WinogradCut& cut) {
  const int64_t across = cut.axis[1].spread, slice = index / cut.spread();
  return {slice / slices, slice % slices, {index / across % cut.axis[0].spread, index % across}};
}

// Pixels that a tile reads: pixel (i, j) is at corner + i*line + j*pixel, and is zero unless y + i*step_y lies in
// [0, height) and x + j*step in [0, width).
template <class A>
struct TileSource {
  const A* corner;
  int64_t line, pixel;
  int64_t y, height, step_y, x, width, step;
  int64_t channels;  // of a pixel; those up to a whole vector are zeros

  void advance(int64_t pixels) { corner += pixels * pixel, x += pixels * step; }
  // Some channels of `Pixels` pixels of line i. What the next tile reads beyond them, `Step` pixels on, is asked for:
  // the runs are too short for the processor to foresee it.
  template <int Pixels, int Step>
  CONVLAB_INLINE void load_line(int64_t i, int64_t channel, vec<A>* d) const {
    const A* from = corner + i * line + channel;
    const bool whole = channel + lanes<A> <= channels, outside = y + i * step_y < 0 || y + i * step_y >= height;
    if (whole && !outside && x >= 0 && x + (Pixels - 1) * step < width) {
      CONVLAB_UNROLL for (int j = 0; j < Pixels; ++j) d[j] = load(from + j * pixel);
      CONVLAB_UNROLL for (int j = 0; j < Step; ++j) __builtin_prefetch(from + (Pixels + j) * pixel);
      return;
    }
    CONVLAB_UNROLL for (int j = 0; j < Pixels; ++j) {
      if (outside || x + j * step < 0 || x + j * step >= width)
        d[j] = vec<A>{};
      else
        d[j] = whole ? load(from + j * pixel) : load_partial(from + j * pixel, channels - channel);
    }
  }
};

// How a tensor's channels, parts and segments are cut into runs, in the order [cell along y][run along x][channel].
template <class T>
struct Runs {
  using A = accumulate_t<T>;
  WinogradAxis axis[2];
  int64_t channels;  // of a group
  bool last;         // layout
  bool joined;

  Runs(const WinogradCut& cut, int64_t channels, Layout layout)
      : axis{cut.axis[0], cut.axis[1]},
        channels(channels),
        last(layout == Layout::channels_last),
        joined(cut.joined(channels, lanes<A>)) {}
  int64_t cells() const { return axis[0].cells() * axis[1].cells(); }
  int64_t count() const { return axis[0].cells() * (joined ? 1 : axis[1].cells()); }
  int64_t size() const { return joined ? axis[1].parts * channels : channels; }
  bool read_in_place() const { return std::is_same_v<T, A> && last && !joined; }
  // From pixel to pixel of the strip buffer.
  int64_t strip_stride() const { return joined ? channels : round_up(channels, lanes<A>) + lanes<A>; }
  // Elements of the strip buffer for so many lines and columns of positions; whole vectors are read.
  int64_t strip_size(int64_t lines, int64_t columns) const {
    return read_in_place() ? 0 : axis[0].parts * lines * axis[1].parts * columns * strip_stride() + lanes<A>;
  }
};

// The pixels that a row of tiles reads of one slice, from (y, x) on.
template <class T>
struct TileRow {
  const T* slice;          // of the group's first channel
  int64_t plane, pixel;    // from channel to channel (NCHW), or from pixel to pixel (NHWC)
  int64_t height, width;   // of the slice
  int64_t y, x;            // of the first pixel
  int64_t lines, columns;  // positions, of `parts` pixels
};

// Those of one image of `size` and one group of its channels; y and x count from the first that has their residue.
template <class T>
TileRow<T> tile_row(const T* tensor, const Runs<T>& runs, int64_t groups, int64_t group, const int64_t* size,
                    const WinogradImage& image, int64_t slice, int64_t y, int64_t x, int64_t lines, int64_t columns) {
  const int64_t channels = runs.channels, plane = size[1] * size[2], pixel = channels * groups;
  const T* from = runs.last ? tensor + (image.n * size[0] + slice) * plane * pixel + group * channels
                            : tensor + ((image.n * groups + group) * channels * size[0] + slice) * plane;
  return {from, size[0] * plane, pixel, size[1], size[2], y + image.residue[0], x + image.residue[1], lines, columns};
}

// transpose_matrix of every spread-th column.
template <class T>
void transpose_spread(const T* source, int64_t source_stride, int64_t spread, int64_t rows, int64_t columns,
                      accumulate_t<T>* target, int64_t target_stride) {
  using A = accumulate_t<T>;
  A block[lanes<A> * lanes<A>];
  for (int64_t j = 0; j < columns; j += lanes<A>) {
    const int64_t count = std::min<int64_t>(lanes<A>, columns - j);
    for (int64_t r = 0; r < rows; ++r)
      copy_span<0>(source + r * source_stride + j * spread, spread, count, block + r * lanes<A>);
    transpose_matrix(block, lanes<A>, rows, count, target + j * target_stride, target_stride);
  }
}

// Pixels -> [y][x][channel], zeros outside the slice.
template <class T>
void fill_strip(const TileRow<T>& row, const Runs<T>& runs, accumulate_t<T>* strip) {
  using A = accumulate_t<T>;
  const int64_t channels = runs.channels, stride = runs.strip_stride();
  const int64_t lines = runs.axis[0].parts * row.lines, columns = runs.axis[1].parts * row.columns;
  const int64_t spread = runs.axis[1].spread;
  const int64_t begin = std::clamp<int64_t>(divide_up(std::max<int64_t>(-row.x, 0), spread), 0, columns);
  const int64_t end = std::clamp<int64_t>(divide_up(std::max<int64_t>(row.width - row.x, 0), spread), begin, columns);
  for (int64_t i = 0; i < lines; ++i) {
    A* line = strip + i * columns * stride;
    const int64_t y = row.y + i * runs.axis[0].spread;
    const bool outside = y < 0 || y >= row.height;
    const int64_t from = outside ? columns : begin, to = outside ? columns : end;
    std::fill(line, line + from * stride, A(0));
    std::fill(line + to * stride, line + columns * stride, A(0));
    if (from == to) continue;
    const T* source = row.slice + (y * row.width + row.x + from * spread) * (runs.last ? row.pixel : 1);
    A* target = line + from * stride;
    if (runs.joined && runs.last && row.pixel == channels) {
      copy_span<1>(source, 1, (to - from) * channels, target);
    } else if (runs.joined) {
      const int64_t channel_step = runs.last ? 1 : row.plane, pixel_step = runs.last ? row.pixel : 1;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < to - from; ++x)
          target[x * stride + c] = to_accumulate(source[c * channel_step + x * pixel_step]);
    } else if (runs.last) {
      for (int64_t x = 0; x < to - from; ++x)
        copy_span<1>(source + x * spread * row.pixel, 1, channels, target + x * stride);
    } else {
      for (int64_t c = 0; c < channels; c += lanes<A>) {
        const int64_t planes = std::min<int64_t>(lanes<A>, channels - c);
        if (spread == 1)
          transpose_matrix(source + c * row.plane, row.plane, planes, to - from, target + c, stride);
        else
          transpose_spread(source + c * row.plane, row.plane, spread, planes, to - from, target + c, stride);
      }
    }
  }
}

// visit(number of the run, source of the first tile), for all runs of a row of tiles.
template <class T, class Visit>
void for_each_run(const TileRow<T>& row, const Runs<T>& runs, accumulate_t<T>* strip, const Visit& visit) {
  using A = accumulate_t<T>;
  const auto &along_y = runs.axis[0], &along_x = runs.axis[1];
  if (!runs.read_in_place()) fill_strip(row, runs, strip);
  const int64_t across = runs.joined ? 1 : along_x.cells();
  for (int64_t run = 0; run < runs.count(); ++run) {
    const int64_t y = along_y.offset(run / across), x = along_x.offset(run % across);
    if constexpr (std::is_same_v<T, A>)
      if (runs.read_in_place()) {
        const int64_t line = row.width * row.pixel, step_y = along_y.parts * along_y.spread,
                      step = along_x.parts * along_x.spread;
        const int64_t first_y = row.y + y * along_y.spread, first_x = row.x + x * along_x.spread;
        visit(run, TileSource<A>{row.slice + first_y * line + first_x * row.pixel, step_y * line, step * row.pixel,
                                 first_y, row.height, step_y, first_x, row.width, step, runs.channels});
        continue;
      }
    const int64_t columns = along_x.parts * row.columns, stride = runs.strip_stride();
    visit(run, TileSource<A>{strip + (y * columns + x) * stride, along_y.parts * columns * stride,
                             along_x.parts * stride, y, along_y.parts * row.lines, along_y.parts, x, columns,
                             along_x.parts, round_up(runs.size(), lanes<A>)});
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
