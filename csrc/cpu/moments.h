// Mean and variance without losing digits to a large mean, and the formulas every normalization shares.
//
// Idea: sums of d and d*d with d = x - shift are taken in float over blocks of a few thousand elements and merged in
// double. The shift is the mean of k elements of the block itself, so for a block of n elements
//   sum d*d = M2 + n*(shift - mean)^2 <= M2 * (1 + n/k),
// because those k elements alone contribute k*(shift - mean)^2 to M2, the sum of squared deviations. Cancellation is
// bounded whatever the data is; one pass over memory.
// Cost: one read. Limits: |x - shift| beyond 1e19 overflows in float.
#pragma once
#include "norm_kernels.h"
#include "streaming.h"

namespace convlab::cpu::CONVLAB_ISA {

// Which lanes of a vector are meant: all, or the first few at the end of a run.
struct Whole {};
struct First {
  int64_t count;
};
template <class T>
CONVLAB_INLINE vec<accumulate_t<T>> load(const T* p, Whole) {
  return load(p);
}
template <class T>
CONVLAB_INLINE vec<accumulate_t<T>> load(const T* p, First first) {
  return load_partial(p, first.count);
}
template <class T>
CONVLAB_INLINE void store(T* p, vec<accumulate_t<T>> v, Whole) {
  store(p, v);
}
template <class T>
CONVLAB_INLINE void store(T* p, vec<accumulate_t<T>> v, First first) {
  store_partial(p, v, first.count);
}
template <class A>
CONVLAB_INLINE vec<A> zero_rest(vec<A> v, Whole) {
  return v;
}
template <class A>
CONVLAB_INLINE vec<A> zero_rest(vec<A> v, First first) {
  vec_mask<A> lane;
  CONVLAB_UNROLL for (int i = 0; i < lanes<A>; ++i) lane[i] = i;
  const auto count = static_cast<std::remove_reference_t<decltype(lane[0])>>(first.count);
  return lane < count ? v : vec<A>{};
}

template <bool Streams, class T, class Part>
CONVLAB_INLINE void store_output(T* p, vec<accumulate_t<T>> v, Part part) {
  if constexpr (Streams && std::is_same_v<T, float> && std::is_same_v<Part, Whole>)
    store_streaming(p, v);
  else
    store(p, v, part);
}

// Calls body(offset, part) for the vectors of a run.
template <class A, class Body>
CONVLAB_INLINE void for_each_vector(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<A> <= length; i += lanes<A>) body(i, Whole{});
  if (i < length) body(i, First{length - i});
}

// Calls body(offset, part, chain), to accumulate in kChains independent chains.
constexpr int kChains = 4;
template <class A, class Body>
CONVLAB_INLINE void for_each_vector_in_chains(int64_t length, const Body& body) {
  constexpr int64_t width = lanes<A>;
  int64_t i = 0;
  for (; i + kChains * width <= length; i += kChains * width)
    CONVLAB_UNROLL for (int chain = 0; chain < kChains; ++chain) body(i + chain * width, Whole{}, chain);
  CONVLAB_UNROLL for (int chain = 0; chain < kChains - 1; ++chain) {
    if (i + width > length) break;
    body(i, Whole{}, chain);
    i += width;
  }
  if (i < length) body(i, First{length - i}, kChains - 1);
}

template <class A>
CONVLAB_INLINE A sum_chains(const vec<A> (&chain)[kChains]) {
  return sum_lanes<A>((chain[0] + chain[1]) + (chain[2] + chain[3]));
}

// Calls the body with flags known at compile time.
template <class Body>
CONVLAB_INLINE void with_flags(bool first, bool second, const Body& body) {
  if (first && second) return body(std::true_type{}, std::true_type{});
  if (first) return body(std::true_type{}, std::false_type{});
  if (second) return body(std::false_type{}, std::true_type{});
  return body(std::false_type{}, std::false_type{});
}

// What follows the normalization in the forward pass; `mark`: leave the bits of where the gradient ends.
enum class Steps { none, clamp, add, add_clamp, add_clamp_mark };
constexpr bool adds(Steps steps) { return steps >= Steps::add; }
constexpr bool clamps(Steps steps) { return steps != Steps::none && steps != Steps::add; }
template <class T, class Body>
CONVLAB_INLINE void with_steps(const NormArguments<T>& a, const Body& body) {
  if (!a.residual && !a.clamp.cuts()) return body(std::integral_constant<Steps, Steps::none>{});
  if (!a.residual) return body(std::integral_constant<Steps, Steps::clamp>{});
  if (!a.clamp.cuts()) return body(std::integral_constant<Steps, Steps::add>{});
  if (!a.stopped) return body(std::integral_constant<Steps, Steps::add_clamp>{});
  return body(std::integral_constant<Steps, Steps::add_clamp_mark>{});
}

// Into the L2 cache.
CONVLAB_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// How the gradient below the clamp is found: the residual matters only to the clamp's mask. `stored`: from bits that
// the forward pass left.
enum class Mask { none, clamp, clamp_of_sum, stored };
template <class T, class Body>
CONVLAB_INLINE void with_mask(const NormArguments<T>& a, const Body& body) {
  if (!a.clamp.cuts()) return body(std::integral_constant<Mask, Mask::none>{});
  if (!a.residual) return body(std::integral_constant<Mask, Mask::clamp>{});
  return body(std::integral_constant<Mask, Mask::clamp_of_sum>{});
}

template <class T, class Body>
CONVLAB_INLINE void with_any_mask(const NormArguments<T>& a, const Body& body) {
  if (a.stopped) return body(std::integral_constant<Mask, Mask::stored>{});
  with_mask(a, body);
}

// The bits of the vector at element i of a run.
template <class A>
CONVLAB_INLINE lane_bits<A>* bits_at(uint8_t* run, int64_t i) {
  return reinterpret_cast<lane_bits<A>*>(run) + i / lanes<A>;
}

// Moments of everything merged so far: count, mean, sum of squared deviations from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Adds n values given by the sums of (x - shift) and (x - shift)^2.
  void merge(double n, double shift, double sum, double sum_of_squares) {
    const double merged = count + n, added_mean = shift + sum / n;
    const double added_squares = sum_of_squares - sum * sum / n;
    const double distance = added_mean - mean;
    squares += (added_squares < 0 ? 0 : added_squares) + distance * distance * (count * n / merged);
    mean = (mean * count + added_mean * n) / merged;
    count = merged;
  }
  double variance() const { return squares / count; }
  double mean_of_squares() const { return squares / count + mean * mean; }
};

constexpr int64_t kBlockElements = 4096;  // 16 KiB of float: chains stay short and the block stays in cache
constexpr int64_t kSampleElements = 64;

template <class T>
CONVLAB_INLINE accumulate_t<T> sample_mean(const T* data, int64_t length) {
  using A = accumulate_t<T>;
  const int64_t count = std::min(length, kSampleElements);
  vec<A> sum[kChains] = {};
  for_each_vector_in_chains<A>(count, [&](int64_t i, auto part, int chain) { sum[chain] += load(data + i, part); });
  const A mean = sum_chains<A>(sum) / static_cast<A>(count);
  return mean - mean == 0 ? mean : A(0);  // Inf and NaN would hide which of the two the data holds
}

// Moments of `runs` runs of `length` contiguous elements, `stride` apart.
template <class T>
Moments moments_of_runs(const T* data, int64_t runs, int64_t stride, int64_t length) {
  using A = accumulate_t<T>;
  Moments total;
  vec<A> sum[kChains] = {}, squares[kChains] = {};
  A shift = 0;
  int64_t count = 0;
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t begin = 0; begin < length; begin += kBlockElements) {
      const T* block = data + run * stride + begin;
      const int64_t size = std::min(kBlockElements, length - begin);
      if (count == 0) shift = sample_mean(block, size);
      const vec<A> shifts = broadcast(shift);
      for_each_vector_in_chains<A>(size, [&](int64_t i, auto part, int chain) {
        const vec<A> d = zero_rest<A>(load(block + i, part) - shifts, part);
        sum[chain] += d;
        squares[chain] = fma(d, d, squares[chain]);
      });
      count += size;
      if (count < kBlockElements && (run + 1 < runs || begin + size < length)) continue;
      total.merge(static_cast<double>(count), shift, sum_chains<A>(sum), sum_chains<A>(squares));
      CONVLAB_UNROLL for (int chain = 0; chain < kChains; ++chain) sum[chain] = squares[chain] = vec<A>{};
      count = 0;
    }
  return total;
}

template <class T>
accumulate_t<T> inverse_deviation(const NormArguments<T>& a, accumulate_t<T> variance) {
  return 1 / std::sqrt(variance + static_cast<accumulate_t<T>>(a.eps));
}

// The one expression for the output before residual and clamp. The backward pass finds the clamp's mask by computing
// it again, so it must be the same to the bit.
template <class V>
CONVLAB_INLINE V normalized(V x, V mean, V scale, V shift) {
  return fma(x - mean, scale, shift);
}
// The gradient of what is normalized, below clamp and residual; NaN passes the clamp, as in torch's ReLU. Takes
// pointers, not the arguments: stores may alias those, which would then be read again for every vector.
template <Mask M, class T, class Part, class V, class A = accumulate_t<T>>
CONVLAB_INLINE V gradient(const T* grad_output, const T* residual, const lane_bits<A>* stopped, Part part, V x, V mean,
                          V scale, V shift, const VectorBounds<A>& bounds) {
  V grad = load(grad_output, part);
  if (M == Mask::none) return grad;
  pin(grad);  // else gcc makes it a masked load, which waits for the mask: half the speed from memory
  if (M == Mask::stored) return mask_of<A>(*stopped) ? V{} : grad;
  V y = normalized(x, mean, scale, shift);
  if (M == Mask::clamp_of_sum) y += load(residual, part);
  return bounds.stops(y) ? V{} : grad;
}

// What the gradient of the input owes to the statistics of its group. With G = weight * gradient,
// x^ = (x - mean) * r and M the mean over the group: dx = r * (G - M(G) - x^ * M(G x^)), computed as
// scale * gradient + slope * (x - mean) + constant.
template <class A>
struct GroupGradient {
  A slope, constant;
};
template <class T>
GroupGradient<accumulate_t<T>> through_statistics(const NormArguments<T>& a, int64_t group, double sum_g,
                                                  double sum_g_deviation) {
  using A = accumulate_t<T>;
  if (!a.statistics) return {0, 0};
  const double r = inverse_deviation(a, a.variance[group]), count = static_cast<double>(a.group_elements());
  return {static_cast<A>(-r * r * r * sum_g_deviation / count), static_cast<A>(-r * sum_g / count)};
}
// All ones if the statistics depend on the input; else the deviation, which may be infinite, takes no part.
template <class T>
CONVLAB_INLINE vec_mask<accumulate_t<T>> statistics_mask(const NormArguments<T>& a) {
  return vec_mask<accumulate_t<T>>{} - (a.statistics ? 1 : 0);
}

}  // namespace convlab::cpu::CONVLAB_ISA
