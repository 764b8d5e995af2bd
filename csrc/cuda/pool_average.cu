// Average pooling, forward and backward.
//
// Idea: forward, a thread owns one output and sums its window; backward, a thread owns one input and sums the windows
// that hold it, so there are no atomics and the result is the same every time. Channels last, a thread has 16 bytes of
// neighbouring channels. Large windows get a warp each, whose lanes take every 32nd tap.
// Cost: every tensor once through memory; overlapping windows meet in the L1 and L2 caches. Limits: none.
// Not yet run on a GPU.
#include "pool.h"

namespace convlab::cuda {

namespace {

constexpr int kLargeWindow = 64;  // taps

template <class T, class Int>
CONVLAB_DEVICE accumulate_t<T> divisor_of(const PoolProblem<T, Int>& p, Int oz, Int oy, Int ox) {
  using A = accumulate_t<T>;
  const auto& g = p.geometry;
  return static_cast<A>(g.divisor(0, oz)) * static_cast<A>(g.divisor(1, oy)) * static_cast<A>(g.divisor(2, ox));
}

template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kPoolThreads) average_forward(PoolProblem<T, Int> p, int64_t threads) {
  using A = accumulate_t<T>;
  if (global_thread() >= threads) return;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  const auto place = pool_place(p.layout, element, p.geometry.channels, p.geometry.output);
  A sum[kWidth] = {};
  for_each_tap(p, place, [&](Int, Int at) {
    const auto values = load_vector<kWidth>(p.input, at);
    for (int i = 0; i < kWidth; ++i) sum[i] += to_accumulate(values.value[i]);
  });
  const A divisor = divisor_of(p, place.at[0], place.at[1], place.at[2]);
  Vector<T, kWidth> result;
  for (int i = 0; i < kWidth; ++i) result.value[i] = from_accumulate<T>(sum[i] / divisor);
  store_vector(p.output, element, result);
}

template <class T, class Int>
__global__ void __launch_bounds__(kPoolThreads) average_forward_large(PoolProblem<T, Int> p, int64_t windows) {
  using A = accumulate_t<T>;
  const int64_t window = global_thread() / 32;
  if (window >= windows) return;  // a whole warp
  const auto& g = p.geometry;
  const Int lane = threadIdx.x % 32;
  const auto place = pool_place(p.layout, static_cast<Int>(window), g.channels, g.output);
  const PoolPlane<Int> plane(p.layout, g.channels, g.input, place);
  const auto in_z = g.taps_inside(0, place.at[0]), in_y = g.taps_inside(1, place.at[1]),
             in_x = g.taps_inside(2, place.at[2]);
  const Int z0 = g.start(0, place.at[0]) + in_z.begin, y0 = g.start(1, place.at[1]) + in_y.begin,
            x0 = g.start(2, place.at[2]) + in_x.begin;
  const Int rows = in_y.size(), columns = in_x.size(), taps = in_z.size() * rows * columns;
  A sum = 0;
  for (Int tap = lane; tap < taps; tap += 32)
    sum += to_accumulate(p.input[plane(z0 + tap / (rows * columns), y0 + tap / columns % rows, x0 + tap % columns)]);
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kEveryLane, sum, other);
  const A divisor = divisor_of(p, place.at[0], place.at[1], place.at[2]);
  if (lane == 0) p.output[window] = from_accumulate<T>(sum / divisor);
}

template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kPoolThreads) average_backward(PoolProblem<T, Int> p, int64_t threads) {
  using A = accumulate_t<T>;
  if (global_thread() >= threads) return;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  A sum[kWidth] = {};
  for_each_window(p, pool_place(p.layout, element, p.geometry.channels, p.geometry.input),
                  [&](Int oz, Int oy, Int ox, Int at) {
                    const auto values = load_vector<kWidth>(p.output, at);
                    const A divisor = divisor_of(p, oz, oy, ox);
                    for (int i = 0; i < kWidth; ++i) sum[i] += to_accumulate(values.value[i]) / divisor;
                  });
  Vector<T, kWidth> result;
  for (int i = 0; i < kWidth; ++i) result.value[i] = from_accumulate<T>(sum[i]);
  store_vector(p.input, element, result);
}

}  // namespace

int average_pool(const PoolArguments& a, void* stream) {
  const PoolGeometry& g = a.geometry;
  const int64_t inputs = g.planes() * g.input_pixels(), outputs = g.planes() * g.output_pixels();
  return with_pool_problem(a, [&](const auto& problem) {
    using Problem = std::decay_t<decltype(problem)>;
    using T = typename Problem::Element;
    using Int = typename Problem::Index;
    const bool channels_first = a.layout == Layout::channels_first || g.channels == 1;
    if (a.kernel == PoolKernel::average && channels_first && g.taps() >= kLargeWindow)
      return launch(average_forward_large<T, Int>, grid_of(outputs * 32, kPoolThreads), dim3(kPoolThreads), 0, stream,
                    problem, outputs);
    return with_pool_width<T>(a, [&](auto width) {
      constexpr int w = decltype(width)::value;
      if (a.kernel == PoolKernel::average) return launch_pool(average_forward<T, Int, w>, problem, outputs / w, stream);
      return launch_pool(average_backward<T, Int, w>, problem, inputs / w, stream);
    });
  });
}

}  // namespace convlab::cuda
