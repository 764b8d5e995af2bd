// Normalization of channels_first tensors: a group is a few contiguous runs of pixels.
//
// Idea: one group after another, so that the second pass, which normalizes or writes the gradient, finds the group in
// cache. In a batch norm the group is one channel in all samples. While it computes, the second pass fetches the next
// group, so that memory is read and written at the same time.
// Cost: forward one read and one write of memory if a group fits the L2 cache; backward two reads and one write, with
// clamp and residual two and two if the forward pass left the mask's bits. Else three and two: the first pass writes
// the residual's gradient, which is all the second needs of gradient, residual and mask. Limits: parallel over samples
// x groups only, so a batch norm of few channels leaves threads idle.
#pragma once
#include "moments.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct NormRuns {
  using A = accumulate_t<T>;
  using Arguments = NormArguments<T>;

  static NormPlan<T> forward(const Arguments& a) {
    NormPlan<T> plan;
    plan.add(forward_groups, a.samples * a.groups, a.group_elements());
    return plan;
  }

  static NormPlan<T> backward(const Arguments& a) {
    NormPlan<T> plan;
    plan.shared_bytes = a.samples * a.channels() * static_cast<int64_t>(sizeof(ChannelSums));
    plan.add(backward_groups, a.samples * a.groups, 2 * a.group_elements());
    plan.add(backward_channels, a.channels(), 2 * a.samples);
    return plan;
  }

 private:
  // Whether the next group is worth fetching: it is in memory rather than in the last level cache, and two groups of
  // `operands` tensors fit the L2 cache.
  static constexpr int64_t kMemoryBytes = int64_t{8} << 20, kCacheBytes = 900 << 10;
  static bool fetches_next(const Arguments& a, int64_t operands) {
    constexpr int64_t size = sizeof(T);
    return a.statistics && a.elements() * size > kMemoryBytes &&
           2 * operands * a.group_elements() * size <= kCacheBytes;
  }
  // From a run of a group to that of the next group.
  static int64_t next_group(const Arguments& a) { return a.channels_per_group * a.pixels; }

  // Sums over the pixels of one channel of one sample: of the gradient, and of gradient times (x - mean).
  struct ChannelSums {
    double grad, grad_deviation;
  };
  struct Channel {
    A mean, scale, shift;
  };

  static Channel channel(const Arguments& a, int64_t group, int64_t c) {
    const A weight = a.weight ? a.weight[c] : A(1);
    return {a.mean[group], weight * inverse_deviation(a, a.variance[group]), a.bias ? a.bias[c] : A(0)};
  }

  // Offset of channel c (of the whole sample) in the first repeat; the next is repeat_stride further.
  static int64_t offset(const Arguments& a, int64_t sample, int64_t c) {
    return (sample * a.repeats * a.channels() + c) * a.pixels;
  }
  static int64_t repeat_stride(const Arguments& a) { return a.channels() * a.pixels; }

  static uint8_t* stopped_at(const Arguments& a, int64_t at) {
    return a.stopped + at / a.pixels * stopped_bytes(a.pixels, lanes<A>);
  }

  static void forward_groups(const Arguments& a, int64_t begin, int64_t end) {
    const bool fetches = a.output && fetches_next(a, a.residual ? 2 : 1);
    with_streams<T>(streams(a.output, a.elements(), a.pixels, a.elements()), [&](auto stream) {
      with_steps(a, [&](auto steps) {
        for (int64_t group = begin; group < end; ++group)
          if (fetches && group + 1 < end)
            forward_group<steps.value, stream.value, true>(a, group);
          else
            forward_group<steps.value, stream.value, false>(a, group);
      });
    });
  }

  template <Steps S, bool Streams, bool Fetches>
  static void forward_group(const Arguments& a, int64_t group) {
    const int64_t sample = group / a.groups, first = group % a.groups * a.channels_per_group;
    if (a.statistics) {
      const Moments moments = moments_of_runs(a.input + offset(a, sample, first), a.repeats, repeat_stride(a),
                                              a.channels_per_group * a.pixels);
      a.mean[group] = static_cast<A>(moments.mean);
      a.variance[group] = static_cast<A>(moments.variance());
    }
    for (int64_t c = first; a.output && c < first + a.channels_per_group; ++c)
      for (int64_t repeat = a.repeats - 1; repeat >= 0; --repeat)  // backwards: the last is still in cache
        normalize<S, Streams, Fetches>(a, channel(a, group, c), offset(a, sample, c) + repeat * repeat_stride(a));
  }

  template <Steps S, bool Streams, bool Fetches>
  static void normalize(const Arguments& a, Channel channel, int64_t at) {
    const vec<A> mean = broadcast(channel.mean), scale = broadcast(channel.scale), shift = broadcast(channel.shift);
    const T *x = a.input + at, *residual = adds(S) ? a.residual + at : nullptr;
    T* output = a.output + at;
    uint8_t* stopped = S == Steps::add_clamp_mark ? stopped_at(a, at) : nullptr;
    const VectorBounds<A> bounds(a.clamp);
    const int64_t ahead = next_group(a);
    for_each_vector<A>(a.pixels, [&](int64_t i, auto part) {
      if (Fetches) prefetch(x + i + ahead);
      if (Fetches && adds(S)) prefetch(residual + i + ahead);
      vec<A> y = normalized(load(x + i, part), mean, scale, shift);
      if (adds(S)) y += load(residual + i, part);
      if (S == Steps::add_clamp_mark) *bits_at<A>(stopped, i) = bits_of<A>(bounds.stops(y));
      store_output<Streams>(output + i, clamps(S) ? bounds.clamped(y) : y, part);
    });
  }

  static void backward_groups(const Arguments& a, int64_t begin, int64_t end) {
    const bool fetches = fetches_next(a, a.clamp.cuts() && a.residual && !a.stopped ? 3 : 2);
    with_streams<T>(streams(a.output, a.elements(), a.pixels, 2 * a.elements()), [&](auto stream) {
      with_any_mask(a, [&](auto mask) {
        for (int64_t group = begin; group < end; ++group)
          if (fetches && group + 1 < end)
            backward_group<mask.value, stream.value, true>(a, group);
          else
            backward_group<mask.value, stream.value, false>(a, group);
      });
    });
  }

  template <Mask M, bool Streams, bool Fetches>
  static void backward_group(const Arguments& a, int64_t group) {
    const int64_t sample = group / a.groups, first = group % a.groups * a.channels_per_group;
    ChannelSums* sums = static_cast<ChannelSums*>(a.shared) + sample * a.channels();
    double grad = 0, grad_deviation = 0;
    for (int64_t c = first; c < first + a.channels_per_group; ++c) {
      sums[c] = sum_channel<M>(a, channel(a, group, c), offset(a, sample, c));
      const double weight = a.weight ? a.weight[c] : A(1);
      grad += weight * sums[c].grad;
      grad_deviation += weight * sums[c].grad_deviation;
    }
    const GroupGradient<A> through = through_statistics(a, group, grad, grad_deviation);
    for (int64_t c = first; c < first + a.channels_per_group; ++c)
      for (int64_t repeat = a.repeats - 1; repeat >= 0; --repeat) {
        const int64_t at = offset(a, sample, c) + repeat * repeat_stride(a);
        if (M == Mask::clamp_of_sum && a.grad_residual)
          write_gradient<Mask::none, Streams, Fetches>(a, a.grad_residual, channel(a, group, c), through, at);
        else
          write_gradient<M, Streams, Fetches>(a, a.grad_output, channel(a, group, c), through, at);
      }
  }

  template <Mask M>
  static ChannelSums sum_channel(const Arguments& a, Channel channel, int64_t first) {
    const vec<A> mean = broadcast(channel.mean), scale = broadcast(channel.scale), shift = broadcast(channel.shift);
    const VectorBounds<A> bounds(a.clamp);
    ChannelSums total = {0, 0};
    vec<A> sum[kChains] = {}, products[kChains] = {};
    int64_t count = 0;
    for (int64_t repeat = 0; repeat < a.repeats; ++repeat)
      for (int64_t begin = 0; begin < a.pixels; begin += kBlockElements) {
        const int64_t at = first + repeat * repeat_stride(a) + begin;
        const int64_t size = std::min(kBlockElements, a.pixels - begin);
        const T *input = a.input + at, *grads = a.grad_output + at;
        const T* residual = M == Mask::clamp_of_sum ? a.residual + at : nullptr;
        T* grad_residual = M == Mask::clamp_of_sum && a.grad_residual ? a.grad_residual + at : nullptr;
        uint8_t* stopped = M == Mask::stored ? stopped_at(a, first + repeat * repeat_stride(a)) : nullptr;
        for_each_vector_in_chains<A>(size, [&](int64_t i, auto part, int chain) {
          const vec<A> x = load(input + i, part);
          const vec<A> grad =
              gradient<M>(grads + i, residual + i, bits_at<A>(stopped, begin + i), part, x, mean, scale, shift, bounds);
          if (M == Mask::clamp_of_sum && grad_residual) store(grad_residual + i, grad, part);
          sum[chain] += grad;
          products[chain] += zero_rest<A>(grad * (x - mean), part);
        });
        count += size;
        if (count < kBlockElements && (repeat + 1 < a.repeats || begin + size < a.pixels)) continue;
        total.grad += sum_chains<A>(sum);
        total.grad_deviation += sum_chains<A>(products);
        CONVLAB_UNROLL for (int chain = 0; chain < kChains; ++chain) sum[chain] = products[chain] = vec<A>{};
        count = 0;
      }
    return total;
  }

  template <Mask M, bool Streams, bool Fetches>
  static void write_gradient(const Arguments& a, const T* gradients, Channel channel, GroupGradient<A> through,
                             int64_t at) {
    const vec<A> mean = broadcast(channel.mean), scale = broadcast(channel.scale), shift = broadcast(channel.shift);
    const vec<A> slope = broadcast(through.slope), constant = broadcast(through.constant);
    const VectorBounds<A> bounds(a.clamp);
    const vec_mask<A> varies = statistics_mask(a);
    const T *input = a.input + at, *grads = gradients + at;
    const T* residual = M == Mask::clamp_of_sum ? a.residual + at : nullptr;
    T *output = a.output + at, *grad_residual = M == Mask::stored ? a.grad_residual + at : nullptr;
    uint8_t* stopped = M == Mask::stored ? stopped_at(a, at) : nullptr;
    const int64_t ahead = next_group(a);
    for_each_vector<A>(a.pixels, [&](int64_t i, auto part) {
      if (Fetches) {
        prefetch(input + i + ahead);
        prefetch(a.grad_output + at + i + ahead);
        if (M != Mask::stored && a.residual) prefetch(a.residual + at + i + ahead);
      }
      const vec<A> x = load(input + i, part);
      const vec<A> grad =
          gradient<M>(grads + i, residual + i, bits_at<A>(stopped, i), part, x, mean, scale, shift, bounds);
      if (M == Mask::stored) store_output<Streams>(grad_residual + i, grad, part);
      const vec<A> deviation = varies ? x - mean : vec<A>{};
      store_output<Streams>(output + i, fma(deviation, slope, fma(grad, scale, constant)), part);
    });
  }

  static void backward_channels(const Arguments& a, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double weight = 0, bias = 0;
      for (int64_t sample = 0; sample < a.samples; ++sample) {
        const ChannelSums& sums = static_cast<const ChannelSums*>(a.shared)[sample * a.channels() + c];
        const double r = inverse_deviation(a, a.variance[sample * a.groups + c / a.channels_per_group]);
        weight += r * sums.grad_deviation;
        bias += sums.grad;
      }
      if (a.grad_weight) a.grad_weight[c] = static_cast<A>(weight);
      if (a.grad_bias) a.grad_bias[c] = static_cast<A>(bias);
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
