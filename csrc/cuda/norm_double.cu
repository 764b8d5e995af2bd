// Second derivative of batch norm in training: gradients of <v, dx> + <v_weight, dw> + <v_bias, db> + <v_residual, dr>,
// where dx, dw, db and dr are what the first backward pass gives.
//
// Idea: as csrc/cpu/norm_double.h. With g the gradient below the clamp, d the distance from the mean and M the mean
// over the channel, both results are lines in g, v and d whose coefficients, one set for each channel, are made of
// M(g), M(v), M(g d), M(v d) and M(g v). So one kernel sums (norm_reduce.h), a warp for each channel makes the
// coefficients in double, and one kernel writes. Cost: three reads, with a clamped residual four, then as many and two
// writes. Limits: none. Not yet run on a GPU.
#include "norm_reduce.h"

namespace convlab::cuda {

namespace {

template <class A>
struct Triple {
  A g, v, d;
};

template <class A>
struct DoubleSums {
  A g, v, gd, vd, gv;

  template <int N>
  CONVLAB_DEVICE void add(const Triple<A> (&of)[N], int valid) {
    for (int i = 0; i < N; ++i)
      if (i < valid) {
        g += of[i].g;
        v += of[i].v;
        gd = std::fma(of[i].g, of[i].d, gd);
        vd = std::fma(of[i].v, of[i].d, vd);
        gv = std::fma(of[i].g, of[i].v, gv);
      }
  }
  CONVLAB_DEVICE void merge(const DoubleSums& other) {
    g += other.g;
    v += other.v;
    gd += other.gd;
    vd += other.vd;
    gv += other.gv;
  }
  CONVLAB_DEVICE DoubleSums lane(int other) const {
    return {__shfl_xor_sync(kEveryLane, g, other), __shfl_xor_sync(kEveryLane, v, other),
            __shfl_xor_sync(kEveryLane, gd, other), __shfl_xor_sync(kEveryLane, vd, other),
            __shfl_xor_sync(kEveryLane, gv, other)};
  }
};

// Gradient of grad_output: scale v + g_slope d + g_constant; of the input: x_g g + x_v v + x_slope d + x_constant.
template <class A>
struct DoubleCoefficients {
  A g_slope, g_constant, x_g, x_v, x_slope, x_constant;
};

// What the first backward pass does not know.
template <class T>
struct DoubleTensors {
  using A = accumulate_t<T>;
  Global<const T> v, v_residual;
  Global<const A> v_weight, v_bias;
  Global<T> grad_grad_output;

  explicit DoubleTensors(const NormArguments& a) {
    const bool added = a.clamp.cuts() && a.residual;  // the gradient of the residual is one of the results
    v = global(static_cast<const T*>(a.v), a.elements());
    v_residual = global(static_cast<const T*>(added ? a.v_residual : nullptr), a.elements());
    v_weight = global(static_cast<const A*>(a.v_weight), a.channels());
    v_bias = global(static_cast<const A*>(a.v_bias), a.channels());
    grad_grad_output = global(static_cast<T*>(a.grad_grad_output), a.elements());
  }
};

template <class T>
struct DoubleOperator {
  using A = accumulate_t<T>;
  using Value = Triple<A>;
  using State = DoubleSums<A>;
  using Key = NormConstants<A>;
  NormTensors<T> t;
  Global<const T> v;

  template <class Int>
  CONVLAB_DEVICE Key key(Int, Int, Int channel) const {
    return t.constants(channel, channel);
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load(const Key& k, Int at, Int, Int, Value* values) const {
    load_of_one_key<kWidth>(*this, k, at, values);
  }
  template <int kWidth, class Int>
  CONVLAB_DEVICE void load_columns(const Key (&k)[kWidth], Int at, Int, Int, Value (&values)[kWidth]) const {
    const auto x = load_vector<kWidth>(t.input, at);
    const auto grad = load_vector<kWidth>(t.grad_output, at);
    const auto along = load_vector<kWidth>(v, at);
    const auto stops = t.template load_stops<kWidth>(at);
    for (int i = 0; i < kWidth; ++i) {
      const A value = to_accumulate(x.value[i]);
      values[i].g = t.stopped(stops, i, value, k[i]) ? A(0) : to_accumulate(grad.value[i]);
      values[i].v = to_accumulate(along.value[i]);
      values[i].d = value - k[i].mean;
    }
  }
};

// A warp for each channel: its coefficients, and the gradient of its weight. As combine() of the CPU.
template <class T, class Int>
__global__ void __launch_bounds__(kNormThreads)
    finish_double(NormTensors<T> t, DoubleTensors<T> second, Partition<Int> p,
                  Global<DoubleSums<accumulate_t<T>>> partial,
                  Global<DoubleCoefficients<accumulate_t<T>>> coefficients) {
  using A = accumulate_t<T>;
  const int64_t channel = global_thread() / 32;
  if (channel >= p.planes) return;
  DoubleSums<double> all = {};
  for (int i = static_cast<int>(threadIdx.x % 32); i < p.splits; i += 32) {
    const auto part = partial[p.slot(0, static_cast<Int>(channel), i)];
    all.merge({part.g, part.v, part.gd, part.vd, part.gv});
  }
  all = merge_warp(all);
  if (threadIdx.x % 32 != 0) return;
  const double count = static_cast<double>(p.repeats) * static_cast<double>(p.length);
  const double r = 1.0 / std::sqrt(static_cast<double>(t.variance[channel]) + static_cast<double>(t.eps));
  const double scale = t.weight ? r * static_cast<double>(t.weight[channel]) : r;
  const double along_weight = second.v_weight ? static_cast<double>(second.v_weight[channel]) : 0.0;
  const double along_bias = second.v_bias ? static_cast<double>(second.v_bias[channel]) : 0.0;
  const double g = all.g / count, v = all.v / count, gn = r * all.gd / count, vn = r * all.vd / count;
  const double covariance = all.gv / count - v * g - vn * gn;
  const double through_g = r * (along_weight - scale * vn), through_v = -r * scale * gn;
  const double x_slope = -r * (through_g * gn + through_v * vn + r * scale * covariance);
  coefficients[channel] = {static_cast<A>(through_g), static_cast<A>(along_bias - scale * v),
                           static_cast<A>(through_g), static_cast<A>(through_v),
                           static_cast<A>(x_slope),   static_cast<A>(-through_g * g - through_v * v)};
  if (t.grad_weight) t.grad_weight[channel] = static_cast<A>(count * r * covariance);
}

template <class T, class Int, int kWidth>
__global__ void __launch_bounds__(kNormThreads)
    write_double(NormTensors<T> t, DoubleTensors<T> second, NormShape<Int> shape,
                 Global<DoubleCoefficients<accumulate_t<T>>> coefficients) {
  using A = accumulate_t<T>;
  if (global_thread() * kWidth >= shape.elements) return;
  const Int element = static_cast<Int>(global_thread()) * kWidth;
  NormCursor<Int> cursor(shape, element);
  const auto x = load_vector<kWidth>(t.input, element);
  const auto grad = load_vector<kWidth>(t.grad_output, element);
  const auto along = load_vector<kWidth>(second.v, element);
  const auto stops = t.template load_stops<kWidth>(element);
  Vector<T, kWidth> added, grad_grad, grad_input;
  if (second.v_residual) added = load_vector<kWidth>(second.v_residual, element);
  NormConstants<A> k;
  DoubleCoefficients<A> c;
  bool other = true;
  for (int i = 0; i < kWidth; ++i) {
    if (other) {
      k = t.constants(cursor.channel, cursor.channel);
      c = coefficients[cursor.channel];
    }
    const A value = to_accumulate(x.value[i]), v = to_accumulate(along.value[i]), d = value - k.mean;
    const bool stopped = t.stopped(stops, i, value, k);
    const A g = stopped ? A(0) : to_accumulate(grad.value[i]);
    A above = std::fma(k.scale, v, std::fma(c.g_slope, d, c.g_constant));  // the gradient of g
    if (second.v_residual) above += to_accumulate(added.value[i]);
    grad_grad.value[i] = from_accumulate<T>(stopped ? A(0) : above);
    grad_input.value[i] =
        from_accumulate<T>(std::fma(c.x_g, g, std::fma(c.x_v, v, std::fma(c.x_slope, d, c.x_constant))));
    if (i + 1 < kWidth) other = cursor.advance(shape);
  }
  store_vector(second.grad_grad_output, element, grad_grad);
  store_vector(t.output, element, grad_input);
}

// The workspace holds the coefficients of the channels, then the sums.
template <class T, class Int>
int run_double(const NormArguments& a, void* stream) {
  using A = accumulate_t<T>;
  const NormTensors<T> t(a);
  const DoubleTensors<T> second(a);
  const auto p = partition_channels<Int>(a);
  auto* coefficients = static_cast<DoubleCoefficients<A>*>(a.workspace);
  auto* sums = reinterpret_cast<DoubleSums<A>*>(coefficients + a.channels());
  const auto of_channels = global(coefficients, a.channels());
  int error = with_norm_width<T>(a, run_of_channels(a), [&](auto width) {
    return sum<decltype(width)::value>(DoubleOperator<T>{t, second.v}, p, sums, stream);
  });
  if (error) return error;
  error = launch(finish_double<T, Int>, grid_of(a.channels() * 32, kNormThreads), dim3(kNormThreads), 0, stream, t,
                 second, p, global(sums, slots(p)), of_channels);
  if (error) return error;
  return with_norm_width<T>(a, a.elements(), [&](auto width) {
    constexpr int w = decltype(width)::value;
    return launch(write_double<T, Int, w>, grid_of(a.elements() / w, kNormThreads), dim3(kNormThreads), 0, stream, t,
                  second, NormShape<Int>(a), of_channels);
  });
}

}  // namespace

int64_t norm_double_backward_workspace(const NormArguments& a) {
  const bool wide = a.dtype == Dtype::float64;
  const int64_t coefficients = wide ? sizeof(DoubleCoefficients<double>) : sizeof(DoubleCoefficients<float>);
  const int64_t sums = wide ? sizeof(DoubleSums<double>) : sizeof(DoubleSums<float>);
  return a.channels() * coefficients + slots(partition_channels<int64_t>(a)) * sums;
}

int norm_double_backward(const NormArguments& a, void* stream) {
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return with_index(a.elements(), [&](auto index) { return run_double<T, decltype(index)>(a, stream); });
  });
}

}  // namespace convlab::cuda
