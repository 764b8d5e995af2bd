// Second derivative of batch norm in training: gradients of <v, dx> + <v_weight, dw> + <v_bias, db> + <v_residual, dr>,
// where dx, dw, db and dr are what the first backward pass gives.
//
// Idea: with g the gradient below the clamp, d = x - mean and M the mean over the channel, both results are lines in
// g, v and d whose coefficients, one per channel, are made of M(g), M(v), M(g d), M(v d) and M(g v). So a pass sums and
// a pass writes, as in the first backward: channels_first channel by channel, the second time from cache, channels_last
// by blocks of rows, whose sums are merged in order.
// Cost: three reads, then three reads and two writes, less what the caches hold. Limits: as norm_runs.h,
// norm_columns.h.
#pragma once
#include "norm_columns.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct NormDouble {
  using A = accumulate_t<T>;
  using Arguments = NormArguments<T>;

  static NormPlan<T> plan(const Arguments& a) {
    NormPlan<T> plan;
    plan.shared_bytes = Workspace(a).bytes();
    plan.add(prepare, a.groups, 8);
    if (a.layout == Layout::channels_first) {
      plan.add(channels, a.groups, 3 * a.group_elements());
    } else {
      const Workspace w(a);
      plan.add(block_sums, w.blocks, 3 * w.block_rows * a.groups);
      plan.add(merge_sums, w.chunks, w.blocks * kMergedChannels);
      plan.add(write_blocks, w.blocks, 3 * w.block_rows * a.groups);
    }
    return plan;
  }

 private:
  enum Sum { kG, kV, kGD, kVD, kGV, kSums };
  // mean, scale and bias give the output and with it the clamp's mask; then dg = scale*v + g_slope*d + g_constant and
  // dx = x_g*g + x_v*v + x_slope*d + x_constant.
  enum Coefficient { kMean, kScale, kBias, kGSlope, kGConstant, kXG, kXV, kXSlope, kXConstant, kCoefficients };

  // In the shared memory: coefficients of every channel, then sums of every block and channel.
  struct Workspace {
    int64_t channels, block_rows, blocks, chunks;
    A* coefficients;

    explicit Workspace(const Arguments& a) {
      channels = a.groups;
      block_rows = std::clamp<int64_t>(32768 / channels, 32, 256);
      blocks = a.layout == Layout::channels_first ? 0 : (a.rows() + block_rows - 1) / block_rows;
      chunks = (channels + kMergedChannels - 1) / kMergedChannels;
      coefficients = static_cast<A*>(a.shared);
    }
    int64_t bytes() const { return (kCoefficients + blocks * kSums) * channels * static_cast<int64_t>(sizeof(A)); }
    A* coefficient(int which) const { return coefficients + which * channels; }
    A* partial(int64_t block, int which) const {
      return coefficients + (kCoefficients + block * kSums + which) * channels;
    }
  };

  static void prepare(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    for (int64_t c = begin; c < end; ++c) {
      w.coefficient(kMean)[c] = a.mean[c];
      w.coefficient(kScale)[c] = (a.weight ? a.weight[c] : A(1)) * inverse_deviation(a, a.variance[c]);
      w.coefficient(kBias)[c] = a.bias ? a.bias[c] : A(0);
    }
  }

  // The coefficients of channel c and the gradient of its weight, from sums over the channel.
  static void combine(const Arguments& a, const Workspace& w, int64_t c, const double (&sum)[kSums]) {
    const double count = static_cast<double>(a.group_elements()), r = inverse_deviation(a, a.variance[c]);
    const double scale = r * (a.weight ? a.weight[c] : A(1));
    const double g = sum[kG] / count, v = sum[kV] / count, gn = r * sum[kGD] / count, vn = r * sum[kVD] / count;
    const double covariance = sum[kGV] / count - v * g - vn * gn;
    const double along_weight = a.v_weight ? a.v_weight[c] : A(0), along_bias = a.v_bias ? a.v_bias[c] : A(0);
    const double through_g = r * (along_weight - scale * vn), through_v = -r * scale * gn;
    const auto set = [&](int which, double value) { w.coefficient(which)[c] = static_cast<A>(value); };
    set(kGSlope, r * (along_weight - scale * vn));
    set(kGConstant, along_bias - scale * v);
    set(kXG, through_g);
    set(kXV, through_v);
    set(kXSlope, -r * (through_g * gn + through_v * vn + r * scale * covariance));
    set(kXConstant, -through_g * g - through_v * v);
    if (a.grad_weight) a.grad_weight[c] = static_cast<A>(count * r * covariance);
  }

  // A copy of the pointers: stores may alias the arguments, which would be read again for every vector.
  struct Pointers {
    const T *input, *grad_output, *residual, *v, *v_residual;
    T *grad_grad_output, *grad_input;
    VectorBounds<A> bounds;
    explicit Pointers(const Arguments& a)
        : input(a.input),
          grad_output(a.grad_output),
          residual(a.residual),
          v(a.v),
          v_residual(a.v_residual),
          grad_grad_output(a.grad_grad_output),
          grad_input(a.output),
          bounds(a.clamp) {}
  };
  // The operands of some elements; `take(which)` gives coefficients of their channels. `stops`: where the clamp does.
  struct Operands {
    vec<A> d, g, v;
    vec_mask<A> stops;
  };
  template <Mask M, class Part, class Take>
  static CONVLAB_INLINE Operands read(const Pointers& p, int64_t at, Part part, const Take& take) {
    const vec<A> x = load(p.input + at, part), mean = take(kMean), v = load(p.v + at, part);
    vec<A> g = load(p.grad_output + at, part);
    vec_mask<A> stops = {};
    if (M != Mask::none) {
      pin(g);  // as in gradient()
      vec<A> y = normalized(x, mean, take(kScale), take(kBias));
      if (M == Mask::clamp_of_sum) y += load(p.residual + at, part);
      stops = p.bounds.stops(y);
      g = stops ? vec<A>{} : g;
    }
    return {zero_rest<A>(x - mean, part), g, v, stops};
  }
  static CONVLAB_INLINE void accumulate(vec<A> (&sum)[kSums], const Operands& o) {
    sum[kG] += o.g;
    sum[kV] += o.v;
    sum[kGD] = fma(o.g, o.d, sum[kGD]);
    sum[kVD] = fma(o.v, o.d, sum[kVD]);
    sum[kGV] = fma(o.g, o.v, sum[kGV]);
  }
  template <Mask M, bool Streams, class Part, class Take>
  static CONVLAB_INLINE void write(const Pointers& p, int64_t at, Part part, const Take& take) {
    const Operands o = read<M>(p, at, part, take);
    vec<A> grad = fma(take(kScale), o.v, fma(take(kGSlope), o.d, take(kGConstant)));
    if (M == Mask::clamp_of_sum && p.v_residual) grad += load(p.v_residual + at, part);
    if (M != Mask::none) grad = o.stops ? vec<A>{} : grad;  // from g to the gradient above the clamp
    const vec<A> line = fma(take(kXV), o.v, fma(take(kXSlope), o.d, take(kXConstant)));
    store_output<Streams>(p.grad_grad_output + at, grad, part);
    store_output<Streams>(p.grad_input + at, fma(take(kXG), o.g, line), part);
  }

  static bool streamed(const Arguments& a, int64_t run) {
    const int64_t elements = a.elements(), read = 4 * elements;  // with the other output
    return streams(a.output, elements, run, read) && streams(a.grad_grad_output, elements, run, read);
  }

  // ---- channels_first: one channel after another.

  static void channels(const Arguments& a, int64_t begin, int64_t end) {
    with_streams<T>(streamed(a, a.pixels), [&](auto stream) {
      with_mask(a, [&](auto mask) {
        for (int64_t c = begin; c < end; ++c) channel<mask.value, stream.value>(a, c);
      });
    });
  }

  template <Mask M, bool Streams>
  static void channel(const Arguments& a, int64_t c) {
    const Workspace w(a);
    const Pointers p(a);
    vec<A> coefficients[kCoefficients];
    const auto known = [&](int which) { return coefficients[which]; };
    for (int which : {kMean, kScale, kBias}) coefficients[which] = broadcast(w.coefficient(which)[c]);
    double total[kSums] = {};
    for (int64_t repeat = 0; repeat < a.repeats; ++repeat)
      for (int64_t begin = 0; begin < a.pixels; begin += kBlockElements) {
        const int64_t at = (repeat * a.groups + c) * a.pixels + begin;
        vec<A> sum[2][kSums] = {};  // more chains would need more registers than there are
        for_each_vector_in_chains<A>(std::min(kBlockElements, a.pixels - begin), [&](int64_t i, auto part, int chain) {
          accumulate(sum[chain % 2], read<M>(p, at + i, part, known));
        });
        for (int s = 0; s < kSums; ++s) total[s] += sum_lanes<A>(sum[0][s] + sum[1][s]);
      }
    combine(a, w, c, total);
    for (int which = 0; which < kCoefficients; ++which) coefficients[which] = broadcast(w.coefficient(which)[c]);
    for (int64_t repeat = a.repeats - 1; repeat >= 0; --repeat) {  // backwards: the last is still in cache
      const int64_t at = (repeat * a.groups + c) * a.pixels;
      for_each_vector<A>(a.pixels, [&](int64_t i, auto part) { write<M, Streams>(p, at + i, part, known); });
    }
  }

  // ---- channels_last: blocks of rows.

  static void block_sums(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    const Pointers p(a);
    with_mask(a, [&](auto mask) {
      for (int64_t block = begin; block < end; ++block) {
        A* sums = w.partial(block, 0);
        std::fill(sums, sums + kSums * w.channels, A(0));
        const int64_t first = block * w.block_rows, rows = std::min(w.block_rows, a.rows() - first);
        for_each_tile<A, kNormRows>(rows, w.channels, [&](int64_t row, int64_t c, auto height, auto part) {
          vec<A> sum[kSums] = {};
          const auto take = [&](int which) { return load(w.coefficient(which) + c, part); };
          CONVLAB_UNROLL for (int r = 0; r < height.value; ++r)
              accumulate(sum, read<mask.value>(p, (first + row + r) * w.channels + c, part, take));
          CONVLAB_UNROLL for (int s = 0; s < kSums; ++s) {
            A* to = sums + s * w.channels + c;
            store(to, load(to, part) + sum[s], part);
          }
        });
      }
    });
  }

  static void merge_sums(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kMergedChannels, count = std::min(kMergedChannels, w.channels - first);
      double total[kMergedChannels][kSums] = {};
      for (int64_t block = 0; block < w.blocks; ++block)
        for (int s = 0; s < kSums; ++s)
          for (int64_t c = 0; c < count; ++c) total[c][s] += w.partial(block, s)[first + c];
      for (int64_t c = 0; c < count; ++c) combine(a, w, first + c, total[c]);
    }
  }

  static void write_blocks(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    const Pointers p(a);
    with_streams<T>(streamed(a, a.groups), [&](auto stream) {
      with_mask(a, [&](auto mask) {
        for (int64_t block = end - 1; block >= begin; --block) {  // backwards: the last is still in cache
          const int64_t first = block * w.block_rows, rows = std::min(w.block_rows, a.rows() - first);
          for_each_tile<A, kNormRows>(rows, w.channels, [&](int64_t row, int64_t c, auto height, auto part) {
            const auto take = [&](int which) { return load(w.coefficient(which) + c, part); };
            CONVLAB_UNROLL for (int r = 0; r < height.value; ++r)
                write<mask.value, stream.value>(p, (first + row + r) * w.channels + c, part, take);
          });
        }
      });
    });
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
