// What the pooling kernels share: which elements a thread has, and where a pixel lies.
#pragma once
#include "dispatch.h"
#include "launchers.h"
#include "simt.h"

namespace convlab::cuda {

constexpr int kPoolThreads = 256;

// A pixel of one sample and `width` channels from `channel` on. Threads count elements in memory order, so that
// neighbours read and write neighbours in both layouts.
template <class Int>
struct PoolPlace {
  Int sample, channel, at[kMaxSpatial];
};

template <class Int>
CONVLAB_DEVICE PoolPlace<Int> pool_place(Layout layout, Int element, Int channels, const Int (&size)[kMaxSpatial]) {
  PoolPlace<Int> place;
  if (layout == Layout::channels_last) {
    place.channel = element % channels;
    element /= channels;
  }
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    place.at[axis] = size[axis] == 1 ? 0 : element % size[axis];
    if (size[axis] != 1) element /= size[axis];
  }
  if (layout == Layout::channels_first) {
    place.channel = element % channels;
    element /= channels;
  }
  place.sample = element;
  return place;
}

// Offsets in a tensor whose spatial axes have `size`, for one sample and channel.
template <class Int>
struct PoolPlane {
  Int first, step[kMaxSpatial];

  CONVLAB_DEVICE PoolPlane(Layout layout, Int channels, const Int (&size)[kMaxSpatial], const PoolPlace<Int>& place) {
    const Int pixels = size[0] * size[1] * size[2];
    step[2] = layout == Layout::channels_last ? channels : 1;
    step[1] = step[2] * size[2];
    step[0] = step[1] * size[1];
    first = place.sample * channels * pixels + place.channel * (layout == Layout::channels_last ? 1 : pixels);
  }
  CONVLAB_DEVICE Int operator()(Int z, Int y, Int x) const { return first + z * step[0] + y * step[1] + x * step[2]; }
};

template <class T, class Int>
struct PoolProblem {
  using Element = T;
  using Index = Int;
  PoolGeometryOf<Int> geometry;
  Layout layout;
  Global<T> input, output;
  Global<uint8_t> narrow_taps;  // one of the two is null
  Global<int64_t> wide_taps;
  Global<int64_t> indices;

  CONVLAB_DEVICE Int tap(Int at) const {
    if (!narrow_taps) return static_cast<Int>(wide_taps[at]);
    const int tap = narrow_taps[at];
    return tap == kNarrowTaps ? Int(-1) : Int(tap);
  }
  CONVLAB_DEVICE void set_tap(Int at, Int tap) const {
    if (narrow_taps)
      narrow_taps[at] = static_cast<uint8_t>(tap);  // -1 becomes 255
    else if (wide_taps)
      wide_taps[at] = tap;
  }
};

// Calls visit(tap, offset in the input) for every tap inside the input of the window at `place`, in order.
template <class T, class Int, class Visit>
CONVLAB_DEVICE void for_each_tap(const PoolProblem<T, Int>& p, const PoolPlace<Int>& place, const Visit& visit) {
  const auto& g = p.geometry;
  const PoolPlane<Int> plane(p.layout, g.channels, g.input, place);
  const auto in_z = g.taps_inside(0, place.at[0]), in_y = g.taps_inside(1, place.at[1]),
             in_x = g.taps_inside(2, place.at[2]);
  const Int z0 = g.start(0, place.at[0]), y0 = g.start(1, place.at[1]), x0 = g.start(2, place.at[2]);
  for (Int tz = in_z.begin; tz < in_z.end; ++tz)
    for (Int ty = in_y.begin; ty < in_y.end; ++ty)
      for (Int tx = in_x.begin; tx < in_x.end; ++tx)
        visit((tz * g.kernel[1] + ty) * g.kernel[2] + tx,
              plane(z0 + tz * g.dilation[0], y0 + ty * g.dilation[1], x0 + tx * g.dilation[2]));
}

// Calls visit(oz, oy, ox, offset in the output) for every window that may hold the input at `place`, in order.
template <class T, class Int, class Visit>
CONVLAB_DEVICE void for_each_window(const PoolProblem<T, Int>& p, const PoolPlace<Int>& place, const Visit& visit) {
  const auto& g = p.geometry;
  const PoolPlane<Int> plane(p.layout, g.channels, g.output, place);
  const auto over_z = g.windows_over(0, place.at[0]), over_y = g.windows_over(1, place.at[1]),
             over_x = g.windows_over(2, place.at[2]);
  for (Int oz = over_z.begin; oz < over_z.end; ++oz)
    for (Int oy = over_y.begin; oy < over_y.end; ++oy)
      for (Int ox = over_x.begin; ox < over_x.end; ++ox) visit(oz, oy, ox, plane(oz, oy, ox));
}

template <class Int>
PoolGeometryOf<Int> pool_geometry_in(const PoolGeometry& g) {
  PoolGeometryOf<Int> result;
  result.batch = static_cast<Int>(g.batch);
  result.channels = static_cast<Int>(g.channels);
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    result.input[axis] = static_cast<Int>(g.input[axis]);
    result.kernel[axis] = static_cast<Int>(g.kernel[axis]);
    result.stride[axis] = static_cast<Int>(g.stride[axis]);
    result.padding[axis] = static_cast<Int>(g.padding[axis]);
    result.dilation[axis] = static_cast<Int>(g.dilation[axis]);
    result.output[axis] = static_cast<Int>(g.output[axis]);
  }
  result.adaptive = g.adaptive;
  result.count_include_pad = g.count_include_pad;
  result.divisor_override = static_cast<Int>(g.divisor_override);
  return result;
}

// No number that a kernel computes for this geometry is larger.
inline int64_t largest_index(const PoolGeometry& g) {
  int64_t largest = g.divisor_override < 0 ? -g.divisor_override : g.divisor_override;
  const auto consider = [&](int64_t value) { largest = value > largest ? value : largest; };
  consider(g.planes() * g.input_pixels() + g.channels);
  consider(g.planes() * g.output_pixels() + g.channels);
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    if (g.adaptive) consider((g.output[axis] + 1) * (g.input[axis] + 1));
    consider((g.output[axis] + 1) * g.stride[axis] + g.span(axis) + g.input[axis] + g.padding[axis]);
  }
  consider(g.taps());
  return largest;
}

template <class T, class Int>
PoolProblem<T, Int> pool_problem(const PoolArguments& a) {
  const PoolGeometry& g = a.geometry;
  const int64_t inputs = g.planes() * g.input_pixels(), outputs = g.planes() * g.output_pixels();
  PoolProblem<T, Int> problem;
  problem.geometry = pool_geometry_in<Int>(g);
  problem.layout = a.layout;
  problem.input = global(static_cast<T*>(a.input), inputs);
  problem.output = global(static_cast<T*>(a.output), outputs);
  const bool narrow = g.taps() <= kNarrowTaps;
  problem.narrow_taps = global(narrow ? static_cast<uint8_t*>(a.taps) : nullptr, outputs);
  problem.wide_taps = global(narrow ? nullptr : static_cast<int64_t*>(a.taps), outputs);
  problem.indices = global(a.indices, outputs);
  return problem;
}

// body(width): 16 bytes of channels where the layout and the alignment allow it, else single elements.
template <class T, class Body>
int with_pool_width(const PoolArguments& a, const Body& body) {
  constexpr int wide = 16 / sizeof(T);
  const bool fits = a.layout == Layout::channels_last && a.geometry.channels % wide == 0 && aligned(a.input, 16) &&
                    aligned(a.output, 16);
  if (fits) return body(Width<wide>{});
  return body(Width<1>{});
}

// body(problem), with indices of 32 bits where they are enough.
template <class Body>
int with_pool_problem(const PoolArguments& a, const Body& body) {
  return with_dtype(a.dtype, [&](auto type) {
    return with_index(largest_index(a.geometry),
                      [&](auto index) { return body(pool_problem<decltype(type), decltype(index)>(a)); });
  });
}

// Launches kernel(problem, count) with a thread for each of `count`.
template <class Kernel, class Problem>
int launch_pool(Kernel kernel, const Problem& problem, int64_t count, void* stream) {
  return launch(kernel, grid_of(count, kPoolThreads), dim3(kPoolThreads), 0, stream, problem, count);
}

int max_pool(const PoolArguments& a, void* stream);
int average_pool(const PoolArguments& a, void* stream);

}  // namespace convlab::cuda
