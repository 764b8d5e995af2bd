// Zero-padded planes, in which every tap of a convolution is a shift.
//
// A band of pixels reads part of a plane; it is copied into scratch, padded with zeros and split by residue modulo the
// stride: position stride*i + q of an axis goes to slot i + q/stride of residue q % stride. Then flat output i is the
// sum over taps of plane[shift(tap) + i] * weight[tap], whatever the stride, dilation, padding or number of dimensions,
// with no borders to look at; each line ends in a few columns that are computed and thrown away. Short lines fill
// vectors together.
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

// Where the taps of a band of pixels find what they read.
struct Band {
  Phase phase;                    // restricted to the band's pixels
  int64_t lowest[kMaxSpatial];    // smallest offset of a tap
  int64_t slots[kMaxSpatial];     // per residue
  int64_t residues[kMaxSpatial];  // that any tap reads

  explicit Band(const Phase& p) : phase(p) {
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      const AxisPhase& a = phase.axis[axis];
      const int64_t one = a.offset(0), other = a.offset(std::max<int64_t>(a.taps, 1) - 1);
      lowest[axis] = std::min(one, other);
      const int64_t reach = std::max(one, other) - lowest[axis];
      slots[axis] = a.count + reach / a.read_step;
      residues[axis] = std::min(a.read_step, reach + 1);
    }
  }
  // Makes room for what the same band of another phase reads, of those that write between each other's pixels.
  void cover(const Band& other) {
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      const int64_t end = std::max(lowest[axis] + slots[axis], other.lowest[axis] + other.slots[axis]);
      lowest[axis] = std::min(lowest[axis], other.lowest[axis]);
      slots[axis] = end - lowest[axis];
    }
  }
  int64_t plane() const { return slots[0] * slots[1] * slots[2]; }
  int64_t size() const { return plane() * residues[0] * residues[1] * residues[2]; }
  // Flat outputs, up to the last pixel's.
  int64_t length() const {
    return ((phase.axis[0].count - 1) * slots[1] + phase.axis[1].count - 1) * slots[2] + phase.axis[2].count;
  }
  int64_t shift(int64_t jz, int64_t jy, int64_t jx) const {
    const int64_t j[kMaxSpatial] = {jz, jy, jx};
    int64_t residue = 0, slot = 0;
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      const AxisPhase& a = phase.axis[axis];
      const int64_t q = a.offset(j[axis]) - lowest[axis];
      residue = residue * residues[axis] + q % a.read_step;
      slot = slot * slots[axis] + q / a.read_step;
    }
    return residue * plane() + slot;
  }
};

// The pixels of a phase, cut into bands of at most `count` along each axis.
struct Bands {
  int64_t count[kMaxSpatial] = {1, 1, 1};

  Bands() = default;
  // As large as `fits` allows; the first axes are cut first, lines into no less than so many pixels.
  template <class Fits>
  Bands(const Phase& phase, const Fits& fits, int64_t least_of_line = 1024) {
    const int64_t least[kMaxSpatial] = {1, 1, least_of_line};
    for (int axis = 0; axis < kMaxSpatial; ++axis) count[axis] = std::max<int64_t>(1, phase.axis[axis].count);
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      const int64_t all = count[axis];
      for (int64_t parts = 2; count[axis] > least[axis] && !fits(Band(at(phase, 0))); ++parts)
        count[axis] = divide_up(all, parts);
    }
  }
  int64_t along(const Phase& phase, int axis) const { return divide_up(phase.axis[axis].count, count[axis]); }
  int64_t number(const Phase& phase) const { return along(phase, 0) * along(phase, 1) * along(phase, 2); }
  Phase at(const Phase& phase, int64_t index) const { return at(phase, phase, index); }
  // The part of a phase that belongs to band `index` of the first one, which has as many pixels or more.
  Phase at(const Phase& first, const Phase& phase, int64_t index) const {
    Phase part = phase;
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      const int64_t parts = std::max<int64_t>(1, along(first, axis)), begin = index % parts * count[axis];
      index /= parts;
      AxisPhase& a = part.axis[axis];
      a.first += begin * a.step;
      a.offset_first += begin * a.read_step;
      a.count = std::clamp<int64_t>(a.count - begin, 0, count[axis]);
    }
    return part;
  }
};

// A line of a band's planes: slots begin..end hold pixels of the image, the others zeros.
struct PlaneLine {
  int64_t offset;      // of its first slot in a plane
  int64_t begin, end;  // equal if it lies outside
  int64_t pixel;       // of the image, that slot `begin` holds
};

template <class Visit>
CONVLAB_INLINE void for_each_line(const Band& band, const int64_t* size, const Visit& visit) {
  const AxisPhase *az = &band.phase.axis[0], *ay = &band.phase.axis[1], *ax = &band.phase.axis[2];
  int64_t offset = 0;
  for (int64_t rz = 0; rz < band.residues[0]; ++rz)
    for (int64_t ry = 0; ry < band.residues[1]; ++ry)
      for (int64_t rx = 0; rx < band.residues[2]; ++rx) {
        const int64_t x = band.lowest[2] + rx;
        const Inside inside(x, ax->read_step, band.slots[2], size[2]);
        for (int64_t sz = 0; sz < band.slots[0]; ++sz)
          for (int64_t sy = 0; sy < band.slots[1]; ++sy, offset += band.slots[2]) {
            const int64_t z = band.lowest[0] + sz * az->read_step + rz;
            const int64_t y = band.lowest[1] + sy * ay->read_step + ry;
            const bool outside = z < 0 || z >= size[0] || y < 0 || y >= size[1];
            const int64_t pixel = (z * size[1] + y) * size[2] + x + inside.begin * ax->read_step;
            visit(PlaneLine{offset, outside ? 0 : inside.begin, outside ? 0 : inside.end, outside ? 0 : pixel});
          }
      }
}

// Copies what a band reads of one channel of an NC(D)HW image of `size`.
template <class T>
void fill_plane(const Band& band, const T* image, const int64_t* size, accumulate_t<T>* plane) {
  using A = accumulate_t<T>;
  const int64_t step = band.phase.axis[2].read_step, slots = band.slots[2];
  for_each_line(band, size, [&](const PlaneLine& at) {
    A* line = plane + at.offset;
    for (int64_t i = 0; i < at.begin; ++i) line[i] = 0;
    const int64_t count = at.end - at.begin;
    if (step == 1)
      copy_span<1>(image + at.pixel, 1, count, line + at.begin);
    else if (step == 2)
      copy_span<2>(image + at.pixel, 2, count, line + at.begin);
    else
      copy_span<0>(image + at.pixel, step, count, line + at.begin);
    for (int64_t i = at.end; i < slots; ++i) line[i] = 0;
  });
}

// The same for neighbouring channels of an N(D)HWC image of `all_channels`, from the first one wanted. Planes are
// `pitch` apart, of which the last `lanes` are written too.
template <class T>
void fill_planes_channels_last(const Band& band, const T* image, const int64_t* size, int64_t channels,
                               int64_t all_channels, accumulate_t<T>* planes, int64_t pitch) {
  using A = accumulate_t<T>;
  const int64_t step = band.phase.axis[2].read_step * all_channels, slots = band.slots[2];
  for_each_line(band, size, [&](const PlaneLine& at) {
    // Writes whole vectors, so lines come in order of their offsets.
    transpose_matrix(image + at.pixel * all_channels, step, at.end - at.begin, channels, planes + at.offset + at.begin,
                     pitch);
    A* line = planes + at.offset;
    for (int64_t c = 0; c < channels; ++c, line += pitch) {
      for (int64_t i = 0; i < at.begin; ++i) line[i] = 0;
      for (int64_t i = at.end; i < slots; ++i) line[i] = 0;
    }
  });
}

// Either of them: `channels` from channel `first` on of an image of `all_channels`. What lies between the planes is
// read along, for nothing; zeros, because what else is there may be subnormal numbers, which slow down some CPUs.
template <class T>
void fill_planes(Layout layout, const Band& band, const T* image, const int64_t* size, int64_t first, int64_t channels,
                 int64_t all_channels, accumulate_t<T>* planes, int64_t pitch) {
  const int64_t pixels = size[0] * size[1] * size[2], filled = band.size();
  if (layout == Layout::channels_last)
    fill_planes_channels_last(band, image + first, size, channels, all_channels, planes, pitch);
  for (int64_t c = 0; c < channels; ++c, planes += pitch) {
    if (layout == Layout::channels_first) fill_plane(band, image + (first + c) * pixels, size, planes);
    std::fill(planes + filled, planes + pitch, accumulate_t<T>(0));
  }
}

// Where each tap of each channel reads for the first flat output, [channel][tap]; returns the end.
template <class A>
const A** list_taps(const Band& band, const A* planes, int64_t channels, int64_t pitch, const A** target) {
  const AxisPhase* axis = band.phase.axis;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t jz = 0; jz < axis[0].taps; ++jz)
      for (int64_t jy = 0; jy < axis[1].taps; ++jy)
        for (int64_t jx = 0; jx < axis[2].taps; ++jx) *target++ = planes + c * pitch + band.shift(jz, jy, jx);
  return target;
}

// The first pixel of line (z, y) of a forward pass's band, in the output of `size`.
inline int64_t first_pixel(const Band& band, int64_t z, int64_t y, const int64_t* size) {
  const AxisPhase* axis = band.phase.axis;
  return ((axis[0].first + z) * size[1] + axis[1].first + y) * size[2] + axis[2].first;
}

}  // namespace convlab::cpu::CONVLAB_ISA
