// How a kernel's taps along the last two axes are cut for Winograd on the CPU, F(m, R) with m + R = 7.
//
// Along an axis, k taps with stride s are s interleaved parts of ceil(k / s) taps each, and these are cut into segments
// of R taps, the last ones perhaps zero. Output o reads pixel s*(o + R*segment + t) + part - padding, t < R. Parts and
// segments are summed over, as if they were channels. An axis with one tap per stride is not transformed.
#pragma once
#include "geometry.h"

namespace convlab {

struct WinogradCut {
  static constexpr int64_t kMostParts = 4, kMostSegments = 3;

  bool halves = false;  // 3x3 with stride 2, F(4x4, 2x2) of the outer taps
  // Of the axes y and x; the taps of a segment are 0 where there is no cut.
  int64_t taps[2] = {0, 0}, parts[2] = {1, 1}, segments[2] = {1, 1};
  int64_t spread[2] = {1, 1};  // from pixel to pixel: the dilation

  int64_t outputs(int axis) const { return taps[axis] == 1 ? 1 : halves ? 4 : 7 - taps[axis]; }  // of a tile
  int64_t points(int axis) const { return taps[axis] == 1 ? 1 : 6; }
  int64_t cells() const { return parts[0] * parts[1] * segments[0] * segments[1]; }
};

// The cut with the fewest multiplications, then the fewest segments.
inline WinogradCut winograd_cut(const ConvGeometry& g) {
  WinogradCut cut;
  if (g.kernel[1] == 3 && g.kernel[2] == 3 && g.stride[1] == 2 && g.stride[2] == 2) {
    cut.halves = true;
    cut.taps[0] = cut.taps[1] = 2;
    return cut;
  }
  int64_t per_stride[2];
  for (int axis = 0; axis < 2; ++axis) {
    cut.parts[axis] = g.stride[axis + 1];
    cut.spread[axis] = g.kernel[axis + 1] == 1 ? 1 : g.dilation[axis + 1];
    per_stride[axis] = ceil_divide(g.kernel[axis + 1], g.stride[axis + 1]);
  }
  const bool plane = per_stride[0] > 1 && per_stride[1] > 1;  // kernels of a line of taps come in two sizes
  double best = 0;
  for (int64_t taps = plane ? 5 : 4; taps >= (plane ? 2 : 3); --taps) {
    double products = 1;
    int64_t segments[2];
    for (int axis = 0; axis < 2; ++axis) {
      segments[axis] = per_stride[axis] == 1 ? 1 : ceil_divide(per_stride[axis], taps);
      if (per_stride[axis] > 1) products *= 6 * static_cast<double>(segments[axis]) / static_cast<double>(7 - taps);
    }
    if (segments[0] > cut.kMostSegments || segments[1] > cut.kMostSegments || (best > 0 && products >= best)) continue;
    best = products;
    for (int axis = 0; axis < 2; ++axis) {
      cut.taps[axis] = per_stride[axis] == 1 ? 1 : taps;
      cut.segments[axis] = segments[axis];
    }
  }
  return cut;
}

}  // namespace convlab
