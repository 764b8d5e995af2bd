// Normalization of groups that are one contiguous row with a weight and a bias per element: layer norm, RMS norm, and
// group norm of N x C.
//
// Idea: a row stays in cache between its statistics and its output. The gradients of weight and bias are summed over
// blocks of rows whose size depends on the geometry alone, and the blocks merged in double in a fixed order.
// Cost: forward one read and one write, backward two reads and one write. Limits: no clamp, no residual, no given
// statistics; those belong to batch norm, whose groups are never such rows.
#pragma once
#include "moments.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct NormRows {
  using A = accumulate_t<T>;
  using Arguments = NormArguments<T>;

  static NormPlan<T> forward(const Arguments& a) {
    NormPlan<T> plan;
    plan.add(forward_samples, a.samples, a.channels());
    return plan;
  }

  static NormPlan<T> backward(const Arguments& a) {
    NormPlan<T> plan;
    plan.shared_bytes = blocks(a) * 2 * a.channels() * static_cast<int64_t>(sizeof(A));
    plan.add(backward_blocks, blocks(a), 2 * kBlockSamples * a.channels());
    if (a.grad_weight || a.grad_bias) plan.add(merge_blocks, chunks(a), blocks(a) * kChunk);
    return plan;
  }

 private:
  static constexpr int64_t kBlockSamples = 32;
  static constexpr int64_t kChunk = 64;  // channels of one merging task

  static int64_t blocks(const Arguments& a) { return (a.samples + kBlockSamples - 1) / kBlockSamples; }
  static int64_t chunks(const Arguments& a) { return (a.channels() + kChunk - 1) / kChunk; }

  static void forward_samples(const Arguments& a, int64_t begin, int64_t end) {
    with_flags(a.weight != nullptr, a.bias != nullptr, [&](auto weighted, auto biased) {
      for (int64_t group = begin * a.groups; group < end * a.groups; ++group) {
        const int64_t length = a.channels_per_group, first = group % a.groups * length;
        const T* x = a.input + group * length;
        T* y = a.output + group * length;
        const Moments moments = moments_of_runs(x, 1, 0, length);
        if (a.centered) a.mean[group] = static_cast<A>(moments.mean);
        a.variance[group] = static_cast<A>(a.centered ? moments.variance() : moments.mean_of_squares());
        const vec<A> mean = broadcast(a.centered ? a.mean[group] : A(0)),
                     r = broadcast(inverse_deviation(a, a.variance[group]));
        for_each_vector<A>(length, [&](int64_t i, auto part) {
          vec<A> value = (load(x + i, part) - mean) * r;
          if (weighted.value) value *= load(a.weight + first + i, part);
          if (biased.value) value += load(a.bias + first + i, part);
          store(y + i, value, part);
        });
      }
    });
  }

  static void backward_blocks(const Arguments& a, int64_t begin, int64_t end) {
    with_flags(a.weight != nullptr, a.grad_weight || a.grad_bias, [&](auto weighted, auto summed) {
      for (int64_t block = begin; block < end; ++block) {
        A* weight_sums = static_cast<A*>(a.shared) + block * 2 * a.channels();
        A* bias_sums = weight_sums + a.channels();
        std::fill(weight_sums, weight_sums + 2 * a.channels(), A(0));
        const int64_t last = std::min(a.samples, (block + 1) * kBlockSamples);
        for (int64_t group = block * kBlockSamples * a.groups; group < last * a.groups; ++group) {
          const int64_t first = group % a.groups * a.channels_per_group;
          backward_row<weighted.value, summed.value>(a, group, first, weight_sums + first, bias_sums + first);
        }
      }
    });
  }

  // dx = r * (G - M(G) - x^ * M(G x^)) with G = weight * gradient, x^ = (x - mean) * r, M the mean over the row;
  // without M(G) if the row is not centered.
  template <bool Weighted, bool Summed>
  static void backward_row(const Arguments& a, int64_t group, int64_t first, A* weight_sums, A* bias_sums) {
    const int64_t length = a.channels_per_group;
    const T* x = a.input + group * length;
    const T* grad = a.grad_output + group * length;
    T* dx = a.output + group * length;
    const A deviation = inverse_deviation(a, a.variance[group]);
    const vec<A> mean = broadcast(a.centered ? a.mean[group] : A(0)), r = broadcast(deviation);
    vec<A> sum[kChains] = {}, products[kChains] = {};
    double total = 0, total_products = 0;
    for (int64_t start = 0; start < length; start += kBlockElements) {
      for_each_vector_in_chains<A>(std::min(kBlockElements, length - start), [&](int64_t offset, auto part, int chain) {
        const int64_t i = start + offset;
        const vec<A> g = load(grad + i, part), unit = zero_rest<A>((load(x + i, part) - mean) * r, part);
        if (Summed) {
          store(weight_sums + i, fma(g, unit, load(weight_sums + i, part)), part);
          store(bias_sums + i, g + load(bias_sums + i, part), part);
        }
        const vec<A> weighted = Weighted ? g * load(a.weight + first + i, part) : g;
        sum[chain] += weighted;
        products[chain] = fma(weighted, unit, products[chain]);
      });
      total += sum_chains<A>(sum);
      total_products += sum_chains<A>(products);
      CONVLAB_UNROLL for (int chain = 0; chain < kChains; ++chain) sum[chain] = products[chain] = vec<A>{};
    }
    const double scale = -static_cast<double>(deviation) / static_cast<double>(length);
    const vec<A> constant = broadcast(static_cast<A>(a.centered ? scale * total : 0));
    const vec<A> slope = broadcast(static_cast<A>(scale * total_products));
    for_each_vector<A>(length, [&](int64_t i, auto part) {
      const vec<A> g = load(grad + i, part), unit = (load(x + i, part) - mean) * r;
      const vec<A> weighted = Weighted ? g * load(a.weight + first + i, part) : g;
      store(dx + i, fma(unit, slope, fma(weighted, r, constant)), part);
    });
  }

  static void merge_blocks(const Arguments& a, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, a.channels() - first);
      for (int which = 0; which < 2; ++which) {
        A* result = which == 0 ? a.grad_weight : a.grad_bias;
        if (!result) continue;
        double total[kChunk] = {};
        for (int64_t block = 0; block < blocks(a); ++block) {
          const A* sums = static_cast<const A*>(a.shared) + (block * 2 + which) * a.channels() + first;
          for (int64_t c = 0; c < count; ++c) total[c] += sums[c];
        }
        for (int64_t c = 0; c < count; ++c) result[first + c] = static_cast<A>(total[c]);
      }
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
