// Normalization, forward: statistics of the groups, then clamp(normalized + residual).
//
// Idea: batch, group, instance, layer and RMS norm are one computation (csrc/cpu/norm_kernels.h). In channels_first
// order a group's share of one repeat is a run of neighbours, a plane; channels last, moments are taken for each
// channel and the channels of a group merged. Values are shifted by the first of their plane, so that a large mean
// costs no digits; means and deviations of batches of registers are merged, so that an unlucky shift costs none either.
// Cost: two reads (the second from L2 where the input fits) and one write. Limits: none.
// Not yet run on a GPU.
#include "norm_reduce.h"

namespace convlab::cuda {

namespace {

template <class T>
CONVLAB_DEVICE accumulate_t<T> shift_at(const Global<const T>& input, int64_t first) {
  const accumulate_t<T> value = to_accumulate(input[first]);
  return value - value == accumulate_t<T>(0) ? value : accumulate_t<T>(0);  // 0 for NaN and infinity
}

template <class T>
struct MomentsOperator {
  using A = accumulate_t<T>;
  using Value = A;
  using State = Moments<A>;
  using Key = A;
  Global<const T> input;

  template <class Int>
  CONVLAB_DEVICE Key key(Int first, Int, Int) const {
    return shift_at<T>(input, first);
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load(Key shift, Int at, Int, Int, A* values) const {
    const auto x = load_vector<kWidth>(input, at);
    for (int i = 0; i < kWidth; ++i) values[i] = to_accumulate(x.value[i]) - shift;
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load_columns(const Key (&shift)[kWidth], Int at, Int, Int, A (&values)[kWidth]) const {
    const auto x = load_vector<kWidth>(input, at);
    for (int i = 0; i < kWidth; ++i) values[i] = to_accumulate(x.value[i]) - shift[i];
  }
};

// A warp for each group merges its partial results in double, lanes in turn.
template <class T, class Int>
__global__ void __launch_bounds__(kNormThreads)
    finish_statistics(NormTensors<T> t, NormShape<Int> shape, Partition<Int> p,
                      Global<Moments<accumulate_t<T>>> partial) {
  const int64_t group = global_thread() / 32;
  if (group >= static_cast<int64_t>(shape.samples) * shape.groups) return;
  const Int sample = static_cast<Int>(group) / shape.groups, g = static_cast<Int>(group) % shape.groups;
  const Int planes = p.planes / shape.groups;  // of one group
  Moments<double> all = {};
  for (Int i = threadIdx.x % 32; i < planes * p.splits; i += 32) {
    const Int plane = g * planes + i / p.splits;
    const auto part = partial[p.slot(sample, plane, static_cast<int>(i % p.splits))];
    const double shift = shift_at<T>(t.input, p.first(sample, plane)), count = part.count;
    all.merge({count, part.sum + shift * count, part.squares});
  }
  all = merge_warp(all);
  if (threadIdx.x % 32 != 0) return;
  const double mean = all.sum / all.count, variance = all.squares / all.count;
  if (t.mean) t.mean[group] = static_cast<accumulate_t<T>>(mean);
  t.variance[group] = static_cast<accumulate_t<T>>(t.mean ? variance : variance + mean * mean);
}

// The elements of one thread, and bits of where their gradients end.
template <class T, class Int, int kWidth>
CONVLAB_DEVICE unsigned normalize_vector(const NormTensors<T>& t, const NormShape<Int>& shape, Int element) {
  using A = accumulate_t<T>;
  unsigned stopped = 0;
  NormCursor<Int> cursor(shape, element);
  auto k = t.constants(shape.group(cursor.sample, cursor.channel), cursor.channel);
  const auto x = load_vector<kWidth>(t.input, element);
  Vector<T, kWidth> shortcut, result;
  if (t.residual) shortcut = load_vector<kWidth>(t.residual, element);
  for (int i = 0; i < kWidth; ++i) {
    A value = std::fma(to_accumulate(x.value[i]) - k.mean, k.scale, k.bias);
    if (t.residual) value += to_accumulate(shortcut.value[i]);
    if (t.bits && t.bounds.stops(value)) stopped |= 1u << i;
    if (t.bounds.cut) value = t.bounds.clamped(value);
    result.value[i] = from_accumulate<T>(value);
    if (i + 1 < kWidth && cursor.advance(shape))
      k = t.constants(shape.group(cursor.sample, cursor.channel), cursor.channel);
  }
  store_vector(t.output, element, result);
  return stopped;
}

// Threads whose bits share a byte gather them by shuffles, which is why none leaves early.
template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kNormThreads) normalize(NormTensors<T> t, NormShape<Int> shape) {
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  const bool inside = element < shape.elements;
  unsigned stopped = inside ? normalize_vector<T, Int, kWidth>(t, shape, element) : 0;
  if (!t.bits) return;
  stopped <<= element % 8;
  for (int other = 1; other * kWidth < 8; other *= 2) stopped |= __shfl_xor_sync(kEveryLane, stopped, other);
  if (inside && element % 8 == 0) t.bits[element / 8] = static_cast<uint8_t>(stopped);
}

// Channels last, the columns are channels; else a plane is the group.
template <class Int>
Partition<Int> statistics_partition(const NormArguments& a) {
  if (a.layout == Layout::channels_last) return partition_columns<Int>(a.samples, a.repeats * a.pixels, a.channels());
  return partition_planes<Int>(a.samples, a.repeats, a.groups, a.channels_per_group * a.pixels);
}

int64_t statistics_run(const NormArguments& a) {
  return a.layout == Layout::channels_last ? a.channels() : a.channels_per_group * a.pixels;
}

}  // namespace

int64_t norm_forward_workspace(const NormArguments& a) {
  if (!a.statistics) return 0;
  const int64_t size = a.dtype == Dtype::float64 ? sizeof(Moments<double>) : sizeof(Moments<float>);
  return slots(statistics_partition<int64_t>(a)) * size;
}

int norm_forward(const NormArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return with_index(a.elements(), [&](auto index) {
      using Int = decltype(index);
      const NormTensors<T> tensors(a);
      const NormShape<Int> shape(a);
      if (a.statistics) {
        const int error = with_norm_width<T>(a, statistics_run(a), [&](auto width) {
          constexpr int w = decltype(width)::value;
          const auto p = statistics_partition<Int>(a);
          auto* workspace = static_cast<Moments<accumulate_t<T>>*>(a.workspace);
          const int failed = sum<w>(MomentsOperator<T>{tensors.input}, p, workspace, stream);
          if (failed) return failed;
          const auto partial = global(workspace, slots(p));
          return launch(finish_statistics<T, Int>, grid_of(a.samples * a.groups * 32, kNormThreads), dim3(kNormThreads),
                        0, stream, tensors, shape, p, partial);
        });
        if (error) return error;
      }
      if (!a.output) return 0;
      return with_norm_width<T>(a, a.elements(), [&](auto width) {
        constexpr int w = decltype(width)::value;
        return launch(normalize<T, Int, w>, grid_of(a.elements() / w, kNormThreads), dim3(kNormThreads), 0, stream,
                      tensors, shape);
      });
    });
  });
}

}  // namespace convlab::cuda

extern "C" int convlab_norm(const convlab::cuda::NormArguments* arguments, void* stream) {
  using convlab::cuda::NormPass;
  if (arguments->pass == NormPass::double_backward) return convlab::cuda::norm_double_backward(*arguments, stream);
  if (arguments->pass == NormPass::backward) return convlab::cuda::norm_backward(*arguments, stream);
  return convlab::cuda::norm_forward(*arguments, stream);
}

extern "C" int64_t convlab_norm_workspace(const convlab::cuda::NormArguments* arguments) {
  using convlab::cuda::NormPass;
  if (arguments->pass == NormPass::double_backward) return convlab::cuda::norm_double_backward_workspace(*arguments);
  if (arguments->pass == NormPass::backward) return convlab::cuda::norm_backward_workspace(*arguments);
  return convlab::cuda::norm_forward_workspace(*arguments);
}
