// How a kernel's taps along the last two axes are cut for Winograd on the CPU, F(m, R) with m + R = 7.
//
// Along an axis, k taps with stride s are s interleaved parts of ceil(k / s) taps each, and these are cut into segments
// of R taps, the last ones perhaps zero. Output o reads pixel s*(o + R*segment + t) + part - padding, t < R. Parts and
// segments are summed over, as if they were channels. An axis with one tap per stride is not transformed.
#pragma once
#include "geometry.h"

namespace convlab {

struct WinogradAxis {
  int64_t taps = 1, parts = 1, segments = 1;  // taps: of a segment
  int64_t spread = 1;                         // from pixel to pixel: the dilation

  // Of F(7 - R, R).
  int64_t outputs() const { return taps == 1 ? 1 : 7 - taps; }
  int64_t points() const { return taps == 1 ? 1 : 6; }
  // Pairs of a part and a segment.
  int64_t cells() const { return parts * segments; }
  // Where a cell's first pixel is, counted from the tile's.
  int64_t offset(int64_t cell) const { return cell / parts * taps * parts + cell % parts; }
  // Positions, of `parts` pixels, that so many outputs read.
  int64_t positions(int64_t outputs) const { return outputs + taps * segments - 1; }
};

struct WinogradCut {
  static constexpr int64_t kMostParts = 4, kMostSegments = 3;

  bool possible = false;
  bool halves = false;   // 3x3 with stride 2, F(4x4, 2x2) of the outer taps
  WinogradAxis axis[2];  // y, x

  int64_t parts() const { return axis[0].parts * axis[1].parts; }
  int64_t spread() const { return axis[0].spread * axis[1].spread; }
  int64_t cells() const { return axis[0].cells() * axis[1].cells(); }
  // Whether the parts along x lie together as one run: those of few channels.
  bool joined(int64_t channels, int64_t lanes) const {
    return axis[1].parts > 1 && axis[1].segments == 1 && channels < lanes;
  }
  // Of grad_output, which has no parts.
  WinogradCut without_parts() const {
    WinogradCut cut = *this;
    for (WinogradAxis& each : cut.axis) each.parts = 1;
    return cut;
  }
};

// The cut with the fewest multiplications, then the fewest segments.
inline WinogradCut winograd_cut(const ConvGeometry& g) {
  WinogradCut cut;
  if (g.kernel[1] == 3 && g.kernel[2] == 3 && g.stride[1] == 2 && g.stride[2] == 2) {
    cut.possible = cut.halves = true;
    cut.axis[0].taps = cut.axis[1].taps = 2;
    return cut;
  }
  int64_t per_stride[2];
  for (int i = 0; i < 2; ++i) {
    cut.axis[i].parts = g.stride[i + 1];
    cut.axis[i].spread = g.kernel[i + 1] == 1 ? 1 : g.dilation[i + 1];
    per_stride[i] = ceil_divide(g.kernel[i + 1], g.stride[i + 1]);
  }
  const bool plane = per_stride[0] > 1 && per_stride[1] > 1;  // kernels of a line of taps come in two sizes
  double best = 0;
  for (int64_t taps = plane ? 5 : 4; taps >= (plane ? 2 : 3); --taps) {
    WinogradCut other = cut;
    double products = 1;
    bool few = true;
    for (int i = 0; i < 2; ++i) {
      WinogradAxis& axis = other.axis[i];
      axis.taps = per_stride[i] == 1 ? 1 : taps;
      axis.segments = ceil_divide(per_stride[i], axis.taps);
      few &= axis.segments <= cut.kMostSegments;
      products *= static_cast<double>(axis.segments * axis.points()) / static_cast<double>(axis.outputs());
    }
    if (!few || (cut.possible && products >= best)) continue;
    best = products;
    cut = other;
    cut.possible = true;
  }
  return cut;
}

}  // namespace convlab
