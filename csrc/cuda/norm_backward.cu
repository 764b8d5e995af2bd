// Normalization, backward: the gradients of input, residual, weight and bias.
//
// Idea: with G the gradient behind the clamp, X the distance from the mean, r the inverse deviation and n the size of a
// group, grad_input = r w G - r^3 X M(w G X) - r M(w G), where M is the mean over the group; grad_bias sums G and
// grad_weight r G X over everything that shares a channel. The clamp's mask is computed again, bit for bit as forward
// did, or, where there is a residual, read as the bits that forward left. So one read sums G and G X for each sample
// and channel, small kernels turn them into one slope and one constant for each group and into the gradients of the
// parameters, and a last one writes grad_input. Where a group is a row with a weight for each of its elements (layer
// norm), sums over rows and sums over columns are taken apart. Cost: two reads of input and grad_output (three for rows
// with parameters), one write. Limits: none. Not yet run on a GPU.
#include "norm_reduce.h"

namespace convlab::cuda {

namespace {

// G and X of each sample and channel.
template <class T>
struct ChannelSums {
  using A = accumulate_t<T>;
  using Value = Pair<A>;
  using State = Sums<A>;
  using Key = NormConstants<A>;
  NormTensors<T> t;
  int64_t groups, channels_per_group;

  template <class Int>
  CONVLAB_DEVICE Key key(Int, Int sample, Int channel) const {
    return t.constants(sample * groups + channel / channels_per_group, static_cast<int64_t>(channel));
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load(const Key& k, Int at, Int, Int, Value* values) const {
    load_of_one_key<kWidth>(*this, k, at, values);
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load_columns(const Key (&k)[kWidth], Int at, Int, Int, Value (&values)[kWidth]) const {
    const auto x = load_vector<kWidth>(t.input, at);
    const auto grad = load_vector<kWidth>(t.grad_output, at);
    const auto stops = t.template load_stops<kWidth>(at);
    for (int i = 0; i < kWidth; ++i) {
      const A value = to_accumulate(x.value[i]);
      values[i].first = t.stopped(stops, i, value, k[i]) ? A(0) : to_accumulate(grad.value[i]);
      values[i].second = value - k[i].mean;
    }
  }
};

// w G and X of rows: a plane is a row, its elements have weights of their own. There is no clamp here.
template <class T>
struct RowSums {
  using A = accumulate_t<T>;
  using Value = Pair<A>;
  using State = Sums<A>;
  struct Key {
    A mean;
    int64_t first;  // channel
  };
  NormTensors<T> t;
  int64_t groups, channels_per_group;

  template <class Int>
  CONVLAB_DEVICE Key key(Int, Int sample, Int group) const {
    return {t.mean_of(sample * groups + group), group * channels_per_group};
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load(const Key& k, Int at, Int inside, Int, Value* values) const {
    const auto x = load_vector<kWidth>(t.input, at);
    const auto grad = load_vector<kWidth>(t.grad_output, at);
    for (int i = 0; i < kWidth; ++i) {
      values[i].first = to_accumulate(grad.value[i]) * (t.weight ? t.weight[k.first + inside + i] : A(1));
      values[i].second = to_accumulate(x.value[i]) - k.mean;
    }
  }
};

// G and r X of the columns of rows that have statistics of their own.
template <class T>
struct ParameterSums {
  using A = accumulate_t<T>;
  using Value = Pair<A>;
  using State = Sums<A>;
  using Key = int64_t;  // the group of a row that the column lies in
  NormTensors<T> t;
  int64_t groups, channels_per_group;

  template <class Int>
  CONVLAB_DEVICE Key key(Int, Int, Int column) const {
    return column / channels_per_group;
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load_columns(const Key (&k)[kWidth], Int at, Int, Int row, Value (&values)[kWidth]) const {
    const auto x = load_vector<kWidth>(t.input, at);
    const auto grad = load_vector<kWidth>(t.grad_output, at);
    for (int i = 0; i < kWidth; ++i) {
      const int64_t group = row * groups + k[i];
      values[i].first = to_accumulate(grad.value[i]);
      values[i].second = (to_accumulate(x.value[i]) - t.mean_of(group)) / std::sqrt(t.variance[group] + t.eps);
    }
  }
};

template <class A>
struct Coefficients {
  A slope, constant;  // of X, and added
};

// A warp for each group. `weighted`: the sums hold the weights already.
template <class T, class Int>
__global__ void __launch_bounds__(kNormThreads)
    finish_groups(NormTensors<T> t, NormShape<Int> shape, Partition<Int> p, Global<Sums<accumulate_t<T>>> partial,
                  Global<Coefficients<accumulate_t<T>>> coefficients, bool weighted, int64_t group_elements) {
  const int64_t group = global_thread() / 32;
  if (group >= static_cast<int64_t>(shape.samples) * shape.groups) return;
  const Int sample = static_cast<Int>(group) / shape.groups, g = static_cast<Int>(group) % shape.groups;
  const Int planes = p.planes / shape.groups;  // of one group
  Sums<double> all = {};
  for (Int i = threadIdx.x % 32; i < planes * p.splits; i += 32) {
    const Int plane = g * planes + i / p.splits;
    const auto part = partial[p.slot(sample, plane, static_cast<int>(i % p.splits))];
    const double weight = weighted || !t.weight ? 1.0 : static_cast<double>(t.weight[plane]);
    all.merge({weight * part.first, weight * part.products});
  }
  all = merge_warp(all);
  if (threadIdx.x % 32 != 0) return;
  const double r = 1.0 / std::sqrt(static_cast<double>(t.variance[group]) + static_cast<double>(t.eps));
  const double n = static_cast<double>(group_elements);
  coefficients[group] = {static_cast<accumulate_t<T>>(-r * r * r * all.products / n),
                         static_cast<accumulate_t<T>>(t.mean ? -r * all.first / n : 0.0)};
}

// A warp for each channel. `scaled`: the products hold the inverse deviations already.
template <class T, class Int>
__global__ void __launch_bounds__(kNormThreads)
    finish_channels(NormTensors<T> t, NormShape<Int> shape, Partition<Int> p, Global<Sums<accumulate_t<T>>> partial,
                    bool scaled) {
  const int64_t channel = global_thread() / 32;
  if (channel >= shape.channels) return;
  Sums<double> all = {};
  for (Int i = threadIdx.x % 32; i < p.samples * p.splits; i += 32) {
    const Int sample = i / p.splits;
    const auto part = partial[p.slot(sample, static_cast<Int>(channel), static_cast<int>(i % p.splits))];
    double r = 1;
    if (!scaled) r = t.constants(shape.group(sample, static_cast<Int>(channel)), static_cast<Int>(channel)).deviation;
    all.merge({static_cast<double>(part.first), r * part.products});
  }
  all = merge_warp(all);
  if (threadIdx.x % 32 != 0) return;
  if (t.grad_weight) t.grad_weight[channel] = static_cast<accumulate_t<T>>(all.products);
  if (t.grad_bias) t.grad_bias[channel] = static_cast<accumulate_t<T>>(all.first);
}

// Without coefficients the statistics are constants.
template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kNormThreads)
    write_gradients(NormTensors<T> t, NormShape<Int> shape, Global<Coefficients<accumulate_t<T>>> coefficients) {
  using A = accumulate_t<T>;
  if (global_thread() * kWidth >= shape.elements) return;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  NormCursor<Int> cursor(shape, element);
  const auto x = load_vector<kWidth>(t.input, element);
  const auto grad = load_vector<kWidth>(t.grad_output, element);
  const auto stops = t.template load_stops<kWidth>(element);
  Vector<T, kWidth> grad_input, grad_residual;
  NormConstants<A> k;
  Coefficients<A> c = {};
  bool other = true;
  for (int i = 0; i < kWidth; ++i) {
    if (other) {
      const Int group = shape.group(cursor.sample, cursor.channel);
      k = t.constants(group, cursor.channel);
      if (coefficients) c = coefficients[group];
    }
    const A value = to_accumulate(x.value[i]);
    const A g = t.stopped(stops, i, value, k) ? A(0) : to_accumulate(grad.value[i]);
    grad_residual.value[i] = from_accumulate<T>(g);
    // The deviation, which may be infinite, takes no part where the statistics are constants.
    const A through = coefficients ? std::fma(c.slope, value - k.mean, c.constant) : A(0);
    grad_input.value[i] = from_accumulate<T>(std::fma(k.scale, g, through));
    if (i + 1 < kWidth) other = cursor.advance(shape);
  }
  store_vector(t.output, element, grad_input);
  if (t.grad_residual) store_vector(t.grad_residual, element, grad_residual);
}

// Whether groups are rows: runs of neighbours, each element with a weight of its own.
bool groups_are_rows(const NormArguments& a) {
  return a.layout == Layout::channels_first && a.pixels == 1 && a.repeats == 1;
}
bool wants_parameters(const NormArguments& a) { return a.grad_weight || a.grad_bias; }

template <class Int>
Partition<Int> channel_partition(const NormArguments& a) {
  if (groups_are_rows(a)) return partition_columns<Int>(1, a.samples, a.channels());
  return partition_channels<Int>(a);
}

template <class Int>
Partition<Int> row_partition(const NormArguments& a) {
  return partition_planes<Int>(a.samples, 1, a.groups, a.channels_per_group);
}

// The workspace holds the coefficients, the sums of channels, and the sums of rows. Sizes in pairs of numbers.
struct Workspace {
  int64_t coefficients, channels, rows;

  explicit Workspace(const NormArguments& a)
      : coefficients(a.samples * a.groups),
        channels(slots(channel_partition<int64_t>(a))),
        rows(groups_are_rows(a) ? slots(row_partition<int64_t>(a)) : 0) {}
  int64_t pairs() const { return coefficients + channels + rows; }
};

template <class T, class Int>
struct Backward {
  using A = accumulate_t<T>;
  const NormArguments& a;
  void* stream;
  NormTensors<T> tensors;
  NormShape<Int> shape;
  Coefficients<A>* coefficients;
  Sums<A>*channel_sums, *row_sums;

  Backward(const NormArguments& a, void* stream) : a(a), stream(stream), tensors(a), shape(a) {
    const Workspace sizes(a);
    coefficients = static_cast<Coefficients<A>*>(a.workspace);
    channel_sums = reinterpret_cast<Sums<A>*>(coefficients + sizes.coefficients);
    row_sums = channel_sums + sizes.channels;
  }

  int finish_all_groups(const Partition<Int>& p, Sums<A>* sums, bool weighted) {
    return launch(finish_groups<T, Int>, grid_of(a.samples * a.groups * 32, kNormThreads), dim3(kNormThreads), 0,
                  stream, tensors, shape, p, global(sums, slots(p)), global(coefficients, a.samples * a.groups),
                  weighted, a.elements() / (a.samples * a.groups));
  }
  int finish_all_channels(const Partition<Int>& p, bool scaled) {
    return launch(finish_channels<T, Int>, grid_of(a.channels() * 32, kNormThreads), dim3(kNormThreads), 0, stream,
                  tensors, shape, p, global(channel_sums, slots(p)), scaled);
  }

  template <int kWidth>
  int sum_rows() {
    const auto rows = row_partition<Int>(a);
    const RowSums<T> row_op{tensors, a.groups, a.channels_per_group};
    if (const int error = sum_planes<kWidth>(row_op, rows, row_sums, stream)) return error;
    if (const int error = finish_all_groups(rows, row_sums, true)) return error;
    if (!wants_parameters(a)) return 0;
    const auto p = channel_partition<Int>(a);
    const ParameterSums<T> op{tensors, a.groups, a.channels_per_group};
    if (const int error = sum_columns<kWidth>(op, p, channel_sums, stream)) return error;
    return finish_all_channels(p, true);
  }
  template <int kWidth>
  int sum_channels() {
    const auto p = channel_partition<Int>(a);
    const ChannelSums<T> op{tensors, a.groups, a.channels_per_group};
    if (const int error = sum<kWidth>(op, p, channel_sums, stream)) return error;
    if (a.statistics)
      if (const int error = finish_all_groups(p, channel_sums, false)) return error;
    return wants_parameters(a) ? finish_all_channels(p, false) : 0;
  }

  int run() {
    const bool rows = groups_are_rows(a);
    const int64_t run = rows ? a.channels_per_group : run_of_channels(a);
    if (a.statistics || wants_parameters(a)) {
      const int error = with_norm_width<T>(a, run, [&](auto width) {
        constexpr int w = decltype(width)::value;
        return rows ? sum_rows<w>() : sum_channels<w>();
      });
      if (error) return error;
    }
    return with_norm_width<T>(a, a.elements(), [&](auto width) {
      constexpr int w = decltype(width)::value;
      return launch(write_gradients<T, Int, w>, grid_of(a.elements() / w, kNormThreads), dim3(kNormThreads), 0, stream,
                    tensors, shape, global(a.statistics ? coefficients : nullptr, a.samples * a.groups));
    });
  }
};

}  // namespace

int64_t norm_backward_workspace(const NormArguments& a) {
  return Workspace(a).pairs() * (a.dtype == Dtype::float64 ? sizeof(Sums<double>) : sizeof(Sums<float>));
}

int norm_backward(const NormArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return with_index(a.elements(), [&](auto index) { return Backward<T, decltype(index)>(a, stream).run(); });
  });
}

}  // namespace convlab::cuda
