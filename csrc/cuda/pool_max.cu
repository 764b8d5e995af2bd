// Max pooling: forward with the winners' taps, backward, gather (the adjoint of backward) and torch's indices.
//
// Idea: forward, a thread owns one window and keeps the best value and its tap; backward, a thread owns one input and
// sums the gradients of the windows that chose it, found by comparing taps, so there are no atomics. Channels last, a
// thread has 16 bytes of neighbouring channels. As in torch the first of equal values wins, and the last NaN.
// Cost: every tensor once through memory, taps included (one byte each where torch keeps eight). Limits: none.
// Not yet run on a GPU.
#include "pool.h"

namespace convlab::cuda {

namespace {

template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kPoolThreads) max_forward(PoolProblem<T, Int> p, int64_t threads) {
  using A = accumulate_t<T>;
  if (global_thread() >= threads) return;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  A best[kWidth];
  Int best_tap[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    best[i] = static_cast<A>(-INFINITY);
    best_tap[i] = -1;
  }
  for_each_tap(p, pool_place(p.layout, element, p.geometry.channels, p.geometry.output), [&](Int tap, Int at) {
    const auto values = load_vector<kWidth>(p.input, at);
    for (int i = 0; i < kWidth; ++i) {
      const A value = to_accumulate(values.value[i]);
      const bool better = value > best[i] || value != value;
      best[i] = better ? value : best[i];
      best_tap[i] = better || best_tap[i] < 0 ? tap : best_tap[i];
    }
  });
  Vector<T, kWidth> result;
  for (int i = 0; i < kWidth; ++i) {
    result.value[i] = from_accumulate<T>(best[i]);
    p.set_tap(element + i, best_tap[i]);
  }
  store_vector(p.output, element, result);
}

template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kPoolThreads) max_backward(PoolProblem<T, Int> p, int64_t threads) {
  using A = accumulate_t<T>;
  if (global_thread() >= threads) return;
  const auto& g = p.geometry;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  const auto place = pool_place(p.layout, element, g.channels, g.input);
  A sum[kWidth] = {};
  for_each_window(p, place, [&](Int oz, Int oy, Int ox, Int at) {
    const Int tz = g.tap_at(0, oz, place.at[0]), ty = g.tap_at(1, oy, place.at[1]), tx = g.tap_at(2, ox, place.at[2]);
    if (tz < 0 || ty < 0 || tx < 0) return;
    const Int tap = (tz * g.kernel[1] + ty) * g.kernel[2] + tx;
    const auto grads = load_vector<kWidth>(p.output, at);
    for (int i = 0; i < kWidth; ++i)
      if (p.tap(at + i) == tap) sum[i] += to_accumulate(grads.value[i]);
  });
  Vector<T, kWidth> result;
  for (int i = 0; i < kWidth; ++i) result.value[i] = from_accumulate<T>(sum[i]);
  store_vector(p.input, element, result);
}

// The winner of the window at `place`, as an offset from the first element of its plane; -1 if it has none.
template <class T, class Int>
CONVLAB_DEVICE Int winner(const PoolProblem<T, Int>& p, const PoolPlace<Int>& place, Int tap, Int row, Int plane) {
  const auto& g = p.geometry;
  if (tap < 0) return -1;
  const Int tx = tap % g.kernel[2], ty = tap / g.kernel[2] % g.kernel[1], tz = tap / g.kernel[2] / g.kernel[1];
  return (g.start(0, place.at[0]) + tz * g.dilation[0]) * plane + (g.start(1, place.at[1]) + ty * g.dilation[1]) * row +
         g.start(2, place.at[2]) + tx * g.dilation[2];
}

template <class T, class Int>
__global__ void __launch_bounds__(kPoolThreads) max_gather(PoolProblem<T, Int> p, int64_t threads) {
  if (global_thread() >= threads) return;
  const auto& g = p.geometry;
  const Int element = static_cast<Int>(global_thread());
  const auto place = pool_place(p.layout, element, g.channels, g.output);
  const Int at = winner(p, place, p.tap(element), g.input[2], g.input[1] * g.input[2]);
  if (p.indices) {
    p.indices[element] = at;
    return;
  }
  const PoolPlane<Int> plane(p.layout, g.channels, g.input, place);
  p.output[element] = at < 0 ? from_accumulate<T>(0) : p.input[plane.first + at * plane.step[2]];
}

}  // namespace

int max_pool(const PoolArguments& a, void* stream) {
  const PoolGeometry& g = a.geometry;
  const int64_t inputs = g.planes() * g.input_pixels(), outputs = g.planes() * g.output_pixels();
  return with_pool_problem(a, [&](const auto& problem) {
    using Problem = std::decay_t<decltype(problem)>;
    using T = typename Problem::Element;
    using Int = typename Problem::Index;
    if (a.kernel == PoolKernel::max_gather || a.kernel == PoolKernel::max_indices)
      return launch_pool(max_gather<T, Int>, problem, outputs, stream);
    return with_pool_width<T>(a, [&](auto width) {
      constexpr int w = decltype(width)::value;
      if (a.kernel == PoolKernel::max) return launch_pool(max_forward<T, Int, w>, problem, outputs / w, stream);
      return launch_pool(max_backward<T, Int, w>, problem, inputs / w, stream);
    });
  });
}

}  // namespace convlab::cuda

extern "C" int convlab_pool(const convlab::cuda::PoolArguments* arguments, void* stream) {
  using convlab::cuda::PoolKernel;
  const bool average = arguments->kernel == PoolKernel::average || arguments->kernel == PoolKernel::average_backward;
  return average ? convlab::cuda::average_pool(*arguments, stream) : convlab::cuda::max_pool(*arguments, stream);
}
