// Normalization of channels_last tensors, N x C included: a sample is a matrix of rows x channels.
//
// Idea: rows are read in memory order in blocks whose size depends on the geometry alone. Every block leaves sums per
// channel; merging them in a fixed order gives the same bits for every number of threads. The second pass goes
// through each thread's blocks backwards, starting with those still in cache.
// A backward under clamp and residual reads the mask's bits that the forward pass left; without them, its first pass
// writes the residual's gradient, which is all the second needs of gradient, residual and mask. Cost: two reads and one
// write forward, four and one (with a residual two) backward, less what the caches hold. Limits: below a vector's width
// of channels most lanes are idle.
#pragma once
#include "moments.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int kNormRows = 4;             // more would need more pointers than there are registers
constexpr int kMomentRows = 8;           // of one tensor
constexpr int64_t kNarrowBytes = 4096;   // of a row: what is kept per channel, up to five values, stays in L1
constexpr int64_t kMergedChannels = 16;  // of one merging task

// Calls body(row, column, std::integral_constant<int, rows>, part) for tiles of a few rows and one vector of columns.
template <class A, int Rows, class Body>
CONVLAB_INLINE void for_each_tile(int64_t rows, int64_t columns, const Body& body) {
  const int64_t whole = columns / lanes<A> * lanes<A>;
  const auto across = [&](int64_t row, auto height) {
    for (int64_t column = 0; column < whole; column += lanes<A>) body(row, column, height, Whole{});
    if (whole == columns) return;
    for (int64_t r = row; r < row + height.value; ++r)
      body(r, whole, std::integral_constant<int, 1>{}, First{columns - whole});
  };
  int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) across(row, std::integral_constant<int, Rows>{});
  for (; row < rows; ++row) across(row, std::integral_constant<int, 1>{});
}

// Calls body(std::integral_constant<int, rows>) for passes over several tensors: they come faster a row at a time, in
// memory order, than several rows side by side, unless what is kept per channel does not stay in L1 from row to row.
template <class A, class Body>
CONVLAB_INLINE void with_rows(int64_t channels, const Body& body) {
  if (channels * static_cast<int64_t>(sizeof(A)) <= kNarrowBytes) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, kNormRows>{});
}

template <class T>
struct NormColumns {
  using A = accumulate_t<T>;
  using Arguments = NormArguments<T>;

  static NormPlan<T> forward(const Arguments& a) {
    const Workspace w(a);
    NormPlan<T> plan;
    plan.shared_bytes = w.bytes();
    if (a.statistics) {
      plan.add(block_moments, a.samples * w.blocks, w.block_rows * a.channels());
      plan.add(merge_moments, a.samples * w.chunks, w.blocks * kMergedChannels);
      plan.add(group_statistics, a.samples * a.groups, a.channels_per_group);
    } else {
      plan.add(scales, a.samples * a.groups, a.channels_per_group);
    }
    if (a.output) plan.add(forward_blocks, a.samples * w.blocks, w.block_rows * a.channels());
    return plan;
  }

  static NormPlan<T> backward(const Arguments& a) {
    const Workspace w(a);
    NormPlan<T> plan;
    plan.shared_bytes = w.bytes();
    plan.add(scales, a.samples * a.groups, a.channels_per_group);
    plan.add(block_sums, a.samples * w.blocks, 2 * w.block_rows * a.channels());
    plan.add(merge_sums, a.samples * w.chunks, w.blocks * kMergedChannels);
    plan.add(group_slopes, a.samples * a.groups, a.channels_per_group);
    plan.add(backward_blocks, a.samples * w.blocks, 2 * w.block_rows * a.channels());
    plan.add(backward_channels, a.channels(), a.samples);
    return plan;
  }

 private:
  // Where things are in the shared memory. Per sample and channel: two totals in double (mean and sum of squared
  // deviations, or sums of gradient and of gradient times deviation) and five coefficients; per block and channel:
  // three partial sums.
  struct Workspace {
    int64_t channels, block_rows, blocks, chunks, samples;
    void* shared;

    explicit Workspace(const Arguments& a) {
      channels = a.channels();
      samples = a.samples;
      block_rows = std::clamp<int64_t>(32768 / channels, 32, 256);
      blocks = (a.rows() + block_rows - 1) / block_rows;
      chunks = (channels + kMergedChannels - 1) / kMergedChannels;
      shared = a.shared;
    }
    int64_t bytes() const {
      const int64_t doubles = samples * 2 * channels, values = samples * (5 + 3 * blocks) * channels;
      return doubles * static_cast<int64_t>(sizeof(double)) + values * static_cast<int64_t>(sizeof(A));
    }
    double* total(int64_t sample, int which) const {
      return static_cast<double*>(shared) + (sample * 2 + which) * channels;
    }
    A* mean(int64_t sample) const { return reinterpret_cast<A*>(total(samples, 0)) + sample * 5 * channels; }
    A* scale(int64_t sample) const { return mean(sample) + channels; }
    A* shift(int64_t sample) const { return mean(sample) + 2 * channels; }
    A* slope(int64_t sample) const { return mean(sample) + 3 * channels; }
    A* constant(int64_t sample) const { return mean(sample) + 4 * channels; }
    A* partial(int64_t sample, int64_t block, int which) const {
      return mean(samples) + ((sample * blocks + block) * 3 + which) * channels;
    }
  };

  // The rows of one block; `at` is the offset of its first element.
  struct Block {
    int64_t sample, index, at, rows;
    Block(const Arguments& a, const Workspace& w, int64_t task) {
      sample = task / w.blocks;
      index = task % w.blocks;
      at = (sample * a.rows() + index * w.block_rows) * w.channels;
      rows = std::min(w.block_rows, a.rows() - index * w.block_rows);
    }
    uint8_t* stopped(const Arguments& a) const {
      return a.stopped + at / a.channels() * stopped_bytes(a.channels(), lanes<A>);
    }
  };

  static void block_moments(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    for (int64_t task = begin; task < end; ++task) {
      const Block block(a, w, task);
      A* shifts = w.partial(block.sample, block.index, 0);
      A* sums = w.partial(block.sample, block.index, 1);
      A* squares = w.partial(block.sample, block.index, 2);
      const T* x = a.input + block.at;
      const int64_t channels = w.channels;
      sample_means(x, std::min<int64_t>(block.rows, 8), channels, shifts);
      std::fill(sums, sums + channels, A(0));
      std::fill(squares, squares + channels, A(0));
      for_each_tile<A, kMomentRows>(block.rows, channels, [&](int64_t row, int64_t c, auto height, auto part) {
        const vec<A> shift = load(shifts + c, part);
        vec<A> sum = {}, square = {};
        CONVLAB_UNROLL for (int r = 0; r < height.value; ++r) {
          const vec<A> d = load(x + (row + r) * channels + c, part) - shift;
          sum += d;
          square = fma(d, d, square);
        }
        store(sums + c, load(sums + c, part) + sum, part);
        store(squares + c, load(squares + c, part) + square, part);
      });
    }
  }

  static void sample_means(const T* x, int64_t rows, int64_t channels, A* means) {
    const vec<A> count = broadcast(static_cast<A>(rows));
    for_each_vector<A>(channels, [&](int64_t c, auto part) {
      vec<A> sum = {};
      for (int64_t row = 0; row < rows; ++row) sum += load(x + row * channels + c, part);
      const vec<A> mean = sum / count;
      store(means + c, mean - mean == 0 ? mean : vec<A>{}, part);  // Inf and NaN would hide which of the two it is
    });
  }

  // Channel by channel over the blocks; first the mean, then the squared deviations from it.
  static void merge_moments(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / w.chunks, first = task % w.chunks * kMergedChannels;
      const int64_t count = std::min(kMergedChannels, w.channels - first);
      double* mean = w.total(sample, 0) + first;
      double* squares = w.total(sample, 1) + first;
      std::fill(mean, mean + count, 0.0);
      std::fill(squares, squares + count, 0.0);
      for (int64_t block = 0; block < w.blocks; ++block) {
        const double rows = static_cast<double>(std::min(w.block_rows, a.rows() - block * w.block_rows));
        const A* shift = w.partial(sample, block, 0) + first;
        const A* sum = w.partial(sample, block, 1) + first;
        CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) mean[c] += rows * shift[c] + sum[c];
      }
      for (int64_t c = 0; c < count; ++c) mean[c] /= static_cast<double>(a.rows());
      for (int64_t block = 0; block < w.blocks; ++block) {
        const double rows = static_cast<double>(std::min(w.block_rows, a.rows() - block * w.block_rows));
        const A* shift = w.partial(sample, block, 0) + first;
        const A* sum = w.partial(sample, block, 1) + first;
        const A* square = w.partial(sample, block, 2) + first;
        CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) {
          const double distance = mean[c] - shift[c];
          squares[c] += square[c] - 2 * distance * sum[c] + rows * distance * distance;
        }
      }
    }
  }

  // Calls body(sample, first, count) for the groups from `begin` to `end`, each a channel, sample by sample.
  template <class Body>
  static CONVLAB_INLINE void for_each_sample(const Arguments& a, int64_t begin, int64_t end, const Body& body) {
    for (int64_t group = begin; group < end;) {
      const int64_t sample = group / a.groups, first = group % a.groups;
      const int64_t count = std::min(end - group, a.groups - first);
      body(sample, first, count);
      group += count;
    }
  }

  static void group_statistics(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    if (a.channels_per_group == 1) {
      const double rows = static_cast<double>(a.rows());
      for_each_sample(a, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
        const double *means = w.total(sample, 0) + first, *squares = w.total(sample, 1) + first;
        A *mean = a.mean + sample * a.groups + first, *variance = a.variance + sample * a.groups + first;
        CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) {
          mean[c] = static_cast<A>(means[c]);
          variance[c] = static_cast<A>((squares[c] < 0 ? 0 : squares[c]) / rows);
        }
      });
      return scales(a, begin, end);
    }
    for (int64_t group = begin; group < end; ++group) {
      const int64_t sample = group / a.groups, first = group % a.groups * a.channels_per_group;
      const double* means = w.total(sample, 0) + first;
      const double* squares = w.total(sample, 1) + first;
      double mean = 0, square = 0;
      for (int64_t c = 0; c < a.channels_per_group; ++c) mean += means[c];
      mean /= static_cast<double>(a.channels_per_group);
      for (int64_t c = 0; c < a.channels_per_group; ++c) {
        const double distance = means[c] - mean;
        square += squares[c] + static_cast<double>(a.rows()) * distance * distance;
      }
      a.mean[group] = static_cast<A>(mean);
      a.variance[group] = static_cast<A>((square < 0 ? 0 : square) / static_cast<double>(a.group_elements()));
    }
    scales(a, begin, end);
  }

  // Spreads the statistics of groups over their channels, as the row loops want them.
  static void scales(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    if (a.channels_per_group == 1)
      return for_each_sample(a, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
        const A *given = a.mean + sample * a.groups + first, *variance = a.variance + sample * a.groups + first;
        A *mean = w.mean(sample) + first, *scale = w.scale(sample) + first, *shift = w.shift(sample) + first;
        CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) {
          mean[c] = given[c];
          scale[c] = inverse_deviation(a, variance[c]);
        }
        if (a.weight) CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) scale[c] *= a.weight[first + c];
        if (a.bias)
          std::copy_n(a.bias + first, count, shift);
        else
          std::fill(shift, shift + count, A(0));
      });
    for (int64_t group = begin; group < end; ++group) {
      const int64_t sample = group / a.groups, first = group % a.groups * a.channels_per_group;
      const A r = inverse_deviation(a, a.variance[group]);
      for (int64_t c = first; c < first + a.channels_per_group; ++c) {
        w.mean(sample)[c] = a.mean[group];
        w.scale(sample)[c] = (a.weight ? a.weight[c] : A(1)) * r;
        w.shift(sample)[c] = a.bias ? a.bias[c] : A(0);
      }
    }
  }

  static void forward_blocks(const Arguments& a, int64_t begin, int64_t end) {
    with_streams<T>(streams(a.output, a.elements(), a.channels(), a.elements()), [&](auto stream) {
      with_steps(a, [&](auto steps) {
        for (int64_t task = end - 1; task >= begin; --task) normalize<steps.value, stream.value>(a, task);
      });
    });
  }

  template <Steps S, bool Streams>
  static void normalize(const Arguments& a, int64_t task) {
    const Workspace w(a);
    const Block block(a, w, task);
    const A *means = w.mean(block.sample), *scales = w.scale(block.sample), *shifts = w.shift(block.sample);
    const T *x = a.input + block.at, *residual = adds(S) ? a.residual + block.at : nullptr;
    T* output = a.output + block.at;
    uint8_t* stopped = S == Steps::add_clamp_mark ? block.stopped(a) : nullptr;
    const VectorBounds<A> bounds(a.clamp);
    const int64_t channels = w.channels, pitch = stopped_bytes(channels, lanes<A>);
    with_rows<A>(channels, [&](auto tile) {
      for_each_tile<A, tile.value>(block.rows, channels, [&](int64_t row, int64_t c, auto height, auto part) {
        const vec<A> mean = load(means + c, part), scale = load(scales + c, part), shift = load(shifts + c, part);
        CONVLAB_UNROLL for (int r = 0; r < height.value; ++r) {
          const int64_t at = (row + r) * channels + c;
          vec<A> y = normalized(load(x + at, part), mean, scale, shift);
          if (adds(S)) y += load(residual + at, part);
          if (S == Steps::add_clamp_mark) *bits_at<A>(stopped + (row + r) * pitch, c) = bits_of<A>(bounds.stops(y));
          store_output<Streams>(output + at, clamps(S) ? bounds.clamped(y) : y, part);
        }
      });
    });
  }

  static void block_sums(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    const VectorBounds<A> bounds(a.clamp);
    with_any_mask(a, [&](auto mask) {
      constexpr Mask M = mask.value;
      for (int64_t task = begin; task < end; ++task) {
        const Block block(a, w, task);
        const A *means = w.mean(block.sample), *scales = w.scale(block.sample), *shifts = w.shift(block.sample);
        A* grads = w.partial(block.sample, block.index, 0);
        A* products = w.partial(block.sample, block.index, 1);
        const T *input = a.input + block.at, *grad_output = a.grad_output + block.at;
        const T* residual = M == Mask::clamp_of_sum ? a.residual + block.at : nullptr;
        T* grad_residual = M == Mask::clamp_of_sum && a.grad_residual ? a.grad_residual + block.at : nullptr;
        uint8_t* stopped = M == Mask::stored ? block.stopped(a) : nullptr;
        const int64_t channels = w.channels, pitch = stopped_bytes(channels, lanes<A>);
        std::fill(grads, grads + channels, A(0));
        std::fill(products, products + channels, A(0));
        with_rows<A>(channels, [&](auto tile) {
          for_each_tile<A, tile.value>(block.rows, channels, [&](int64_t row, int64_t c, auto height, auto part) {
            const vec<A> mean = load(means + c, part), scale = load(scales + c, part), shift = load(shifts + c, part);
            vec<A> sum = {}, product = {};
            CONVLAB_UNROLL for (int r = 0; r < height.value; ++r) {
              const int64_t at = (row + r) * channels + c;
              const vec<A> x = load(input + at, part);
              const vec<A> grad =
                  gradient<M>(grad_output + at, residual + at, bits_at<A>(stopped + (row + r) * pitch, c), part, x,
                              mean, scale, shift, bounds);
              if (M == Mask::clamp_of_sum && grad_residual) store(grad_residual + at, grad, part);
              sum += grad;
              product = fma(grad, x - mean, product);
            }
            store(grads + c, load(grads + c, part) + sum, part);
            store(products + c, load(products + c, part) + product, part);
          });
        });
      }
    });
  }

  static void merge_sums(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / w.chunks, first = task % w.chunks * kMergedChannels;
      const int64_t count = std::min(kMergedChannels, w.channels - first);
      for (int which = 0; which < 2; ++which) {
        double* total = w.total(sample, which) + first;
        std::fill(total, total + count, 0.0);
        for (int64_t block = 0; block < w.blocks; ++block) {
          const A* partial = w.partial(sample, block, which) + first;
          CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) total[c] += partial[c];
        }
      }
    }
  }

  static void group_slopes(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    if (a.channels_per_group == 1)
      return for_each_sample(a, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
        const double *grad = w.total(sample, 0) + first, *grad_deviation = w.total(sample, 1) + first;
        A *slope = w.slope(sample) + first, *constant = w.constant(sample) + first;
        CONVLAB_IVDEP for (int64_t c = 0; c < count; ++c) {
          const double weight = a.weight ? a.weight[first + c] : A(1);
          const GroupGradient<A> through =
              through_statistics(a, sample * a.groups + first + c, weight * grad[c], weight * grad_deviation[c]);
          slope[c] = through.slope;
          constant[c] = through.constant;
        }
      });
    for (int64_t group = begin; group < end; ++group) {
      const int64_t sample = group / a.groups, first = group % a.groups * a.channels_per_group;
      double grad = 0, grad_deviation = 0;
      for (int64_t c = first; c < first + a.channels_per_group; ++c) {
        const double weight = a.weight ? a.weight[c] : A(1);
        grad += weight * w.total(sample, 0)[c];
        grad_deviation += weight * w.total(sample, 1)[c];
      }
      const GroupGradient<A> through = through_statistics(a, group, grad, grad_deviation);
      std::fill(w.slope(sample) + first, w.slope(sample) + first + a.channels_per_group, through.slope);
      std::fill(w.constant(sample) + first, w.constant(sample) + first + a.channels_per_group, through.constant);
    }
  }

  static void backward_blocks(const Arguments& a, int64_t begin, int64_t end) {
    with_streams<T>(streams(a.output, a.elements(), a.channels(), 2 * a.elements()), [&](auto stream) {
      if (a.clamp.cuts() && a.grad_residual && !a.stopped)
        return write_gradient<Mask::none, stream.value>(a, a.grad_residual, begin, end);
      with_any_mask(a, [&](auto mask) { write_gradient<mask.value, stream.value>(a, a.grad_output, begin, end); });
    });
  }

  template <Mask M, bool Streams>
  static void write_gradient(const Arguments& a, const T* gradients, int64_t begin, int64_t end) {
    const Workspace w(a);
    const VectorBounds<A> bounds(a.clamp);
    const vec_mask<A> varies = statistics_mask(a);
    for (int64_t task = end - 1; task >= begin; --task) {
      const Block block(a, w, task);
      const A *means = w.mean(block.sample), *scales = w.scale(block.sample), *shifts = w.shift(block.sample);
      const A *slopes = w.slope(block.sample), *constants = w.constant(block.sample);
      const T *input = a.input + block.at, *grad_output = gradients + block.at;
      const T* residual = M == Mask::clamp_of_sum ? a.residual + block.at : nullptr;
      T *output = a.output + block.at, *grad_residual = M == Mask::stored ? a.grad_residual + block.at : nullptr;
      uint8_t* stopped = M == Mask::stored ? block.stopped(a) : nullptr;
      const int64_t channels = w.channels, pitch = stopped_bytes(channels, lanes<A>);
      with_rows<A>(channels, [&](auto tile) {
        for_each_tile<A, tile.value>(block.rows, channels, [&](int64_t row, int64_t c, auto height, auto part) {
          const vec<A> mean = load(means + c, part), scale = load(scales + c, part), shift = load(shifts + c, part);
          const vec<A> slope = load(slopes + c, part), constant = load(constants + c, part);
          CONVLAB_UNROLL for (int r = 0; r < height.value; ++r) {
            const int64_t at = (row + r) * channels + c;
            const vec<A> x = load(input + at, part);
            const vec<A> grad = gradient<M>(grad_output + at, residual + at, bits_at<A>(stopped + (row + r) * pitch, c),
                                            part, x, mean, scale, shift, bounds);
            if (M == Mask::stored) store_output<Streams>(grad_residual + at, grad, part);
            const vec<A> deviation = varies ? x - mean : vec<A>{};
            store_output<Streams>(output + at, fma(deviation, slope, fma(grad, scale, constant)), part);
          }
        });
      });
    }
  }

  static void backward_channels(const Arguments& a, int64_t begin, int64_t end) {
    const Workspace w(a);
    if (a.channels_per_group == 1 && a.samples == 1) {
      const double *grad = w.total(0, 0), *grad_deviation = w.total(0, 1);
      const A* variance = a.variance;
      if (a.grad_weight)
        CONVLAB_IVDEP for (int64_t c = begin; c < end; ++c) a.grad_weight[c] =
            static_cast<A>(double{inverse_deviation(a, variance[c])} * grad_deviation[c]);
      if (a.grad_bias) CONVLAB_IVDEP for (int64_t c = begin; c < end; ++c) a.grad_bias[c] = static_cast<A>(grad[c]);
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      double weight = 0, bias = 0;
      for (int64_t sample = 0; sample < a.samples; ++sample) {
        const double r = inverse_deviation(a, a.variance[sample * a.groups + c / a.channels_per_group]);
        weight += r * w.total(sample, 1)[c];
        bias += w.total(sample, 0)[c];
      }
      if (a.grad_weight) a.grad_weight[c] = static_cast<A>(weight);
      if (a.grad_bias) a.grad_bias[c] = static_cast<A>(bias);
    }
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
