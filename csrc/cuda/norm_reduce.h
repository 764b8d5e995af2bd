// Sums over parts of a tensor, in an order that the geometry alone decides.
//
// Idea: a block sums a chunk of a plane (runs of neighbouring elements), or of 32 vectors of columns (channels last),
// in registers, across the warp by shuffles, across warps through shared memory. Every block leaves one partial result
// for each plane or column; a second kernel merges these in double. What is summed is an Operator:
//
//   Value                           what is summed of one element
//   State                           the sums, with add(values, count) and merge(State)
//   Key key(first, sample, channel) constants of one plane or column, whose first element has that offset
//   load<W>(key, at, inside, sample, values), load_columns<W>(keys, at, column, row, values)
//
// Cost: one read. Limits: none.
// Not yet run on a GPU.
#pragma once
#include "norm.h"

namespace convlab::cuda {

// Vectors that a thread has in flight. Loops over them are unrolled, or the values would lie in local memory.
constexpr int kBatch = 4;
constexpr int kColumnThreads = 32;  // across columns
constexpr int kRowThreads = kNormThreads / kColumnThreads;

// Planes of `repeats` runs of `length` elements, or rows x columns, each cut into `splits` chunks.
template <class Int>
struct Partition {
  Int samples, planes, length, repeats, chunk;  // planes (or columns): of one sample; chunk: of elements (or rows)
  int splits;
  bool columns;

  CONVLAB_DEVICE Int stride() const { return planes * length; }  // of repeats
  // Where the partial result of a chunk of a plane is kept.
  CONVLAB_DEVICE int64_t slot(Int sample, Int plane, int split) const {
    return columns ? (static_cast<int64_t>(sample) * splits + split) * planes + plane
                   : (static_cast<int64_t>(sample) * planes + plane) * splits + split;
  }
  // Offset of the first element of a plane or column.
  CONVLAB_DEVICE Int first(Int sample, Int plane) const {
    return sample * repeats * stride() + plane * (columns ? 1 : length);
  }
};

constexpr int64_t kWantedBlocks = 1024;  // several for each multiprocessor of the largest GPUs

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
inline int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }

// The planes of `samples` x `repeats` x `planes` x `length` elements, summed over repeats and length.
template <class Int>
Partition<Int> partition_planes(int64_t samples, int64_t repeats, int64_t planes, int64_t length) {
  constexpr int64_t smallest = 4096;
  const int64_t total = repeats * length;
  const int64_t wanted = ceil_divide<int64_t>(kWantedBlocks, samples * planes);
  const int64_t splits = at_least(1, at_most(wanted, total / smallest));
  const int64_t chunk = ceil_divide<int64_t>(ceil_divide<int64_t>(total, splits), 16) * 16;  // whole vectors
  return {static_cast<Int>(samples),
          static_cast<Int>(planes),
          static_cast<Int>(length),
          static_cast<Int>(repeats),
          static_cast<Int>(chunk),
          static_cast<int>(ceil_divide(total, chunk)),
          false};
}

// The columns of `samples` x `rows` x `columns` elements, summed over rows.
template <class Int>
Partition<Int> partition_columns(int64_t samples, int64_t rows, int64_t columns) {
  constexpr int64_t smallest = kRowThreads * kBatch * 2;
  const int64_t blocks = samples * ceil_divide<int64_t>(columns, 4 * kColumnThreads);
  const int64_t splits =
      at_least(1, at_most(ceil_divide<int64_t>(kWantedBlocks, blocks), ceil_divide<int64_t>(rows, smallest)));
  const int64_t chunk = ceil_divide<int64_t>(rows, splits);
  return {static_cast<Int>(samples),
          static_cast<Int>(columns),
          1,
          static_cast<Int>(rows),
          static_cast<Int>(chunk),
          static_cast<int>(ceil_divide(rows, chunk)),
          true};
}

// Moments of values that were shifted by one of them: count, sum, and squared distance from their mean.
template <class A>
struct Moments {
  A count, sum, squares;

  template <int N>
  CONVLAB_DEVICE void add(const A (&value)[N], int valid) {
    Moments other = {};
    for (int i = 0; i < N; ++i)
      if (i < valid) other.sum += value[i];
    const A mean = other.sum / static_cast<A>(valid);
    for (int i = 0; i < N; ++i)
      if (i < valid) other.squares = std::fma(value[i] - mean, value[i] - mean, other.squares);
    other.count = static_cast<A>(valid);
    merge(other);
  }
  CONVLAB_DEVICE void merge(const Moments& other) {
    if (other.count == A(0)) return;
    if (count == A(0)) {
      *this = other;
      return;
    }
    const A distance = other.sum / other.count - sum / count;
    squares += other.squares + distance * distance * (count * other.count / (count + other.count));
    sum += other.sum;
    count += other.count;
  }
  CONVLAB_DEVICE Moments lane(int other) const {
    return {__shfl_xor_sync(kEveryLane, count, other), __shfl_xor_sync(kEveryLane, sum, other),
            __shfl_xor_sync(kEveryLane, squares, other)};
  }
};

// Sums of the first values, and of the products of the first and the second.
template <class A>
struct Pair {
  A first, second;
};
template <class A>
struct Sums {
  A first, products;

  template <int N>
  CONVLAB_DEVICE void add(const Pair<A> (&pair)[N], int valid) {
    for (int i = 0; i < N; ++i)
      if (i < valid) {
        first += pair[i].first;
        products = std::fma(pair[i].first, pair[i].second, products);
      }
  }
  CONVLAB_DEVICE void merge(const Sums& other) {
    first += other.first;
    products += other.products;
  }
  CONVLAB_DEVICE Sums lane(int other) const {
    return {__shfl_xor_sync(kEveryLane, first, other), __shfl_xor_sync(kEveryLane, products, other)};
  }
};

// How many partial results a partition leaves.
template <class Int>
int64_t slots(const Partition<Int>& p) {
  return static_cast<int64_t>(p.samples) * p.planes * p.splits;
}

template <class State>
CONVLAB_DEVICE State merge_warp(State state) {
  for (int other = 16; other > 0; other /= 2) state.merge(state.lane(other));
  return state;
}

// One block for each chunk of each plane.
template <class Operator, class Int, int kWidth>
__global__ void __launch_bounds__(kNormThreads)
    reduce_planes(Operator op, Partition<Int> p, Global<typename Operator::State> partial) {
  using State = typename Operator::State;
  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  const Int index = static_cast<Int>(blockIdx.x / static_cast<unsigned>(p.splits));
  const Int sample = index / p.planes, plane = index % p.planes, first = p.first(sample, plane);
  const auto key = op.key(first, sample, plane);
  const Int total = p.repeats * p.length, begin = split * p.chunk;
  const Int end = begin + p.chunk < total ? begin + p.chunk : total;
  const Int step = static_cast<Int>(blockDim.x) * kWidth;
  State state = {};
  for (Int e = begin + static_cast<Int>(threadIdx.x) * kWidth; e < end; e += step * kBatch) {
    typename Operator::Value values[kBatch * kWidth];
    int valid = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Int at = e + i * step;
      if (at >= end) break;
      const Int run = p.repeats == 1 ? 0 : at / p.length, inside = at - run * p.length;
      op.template load<kWidth>(key, first + run * p.stride() + inside, inside, sample, values + i * kWidth);
      valid += kWidth;
    }
    state.add(values, valid);
  }
  state = merge_warp(state);
  CONVLAB_SHARED(State, warps, [kNormThreads / 32]);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) state.merge(warps[warp]);
  partial[p.slot(sample, plane, split)] = state;
}

// One block for each chunk of rows of kColumnThreads * kWidth columns.
template <class Operator, class Int, int kWidth>
__global__ void __launch_bounds__(kNormThreads)
    reduce_columns(Operator op, Partition<Int> p, Global<typename Operator::State> partial) {
  using State = typename Operator::State;
  using Value = typename Operator::Value;
  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  const Int sample = static_cast<Int>(blockIdx.x / static_cast<unsigned>(p.splits));
  const Int column = (static_cast<Int>(blockIdx.y) * kColumnThreads + static_cast<Int>(threadIdx.x)) * kWidth;
  const bool inside = column < p.planes;
  const Int begin = split * p.chunk, end = begin + p.chunk < p.repeats ? begin + p.chunk : p.repeats;
  State state[kWidth] = {};
  if (inside) {
    typename Operator::Key key[kWidth];
    for (int i = 0; i < kWidth; ++i) key[i] = op.key(p.first(sample, column + i), sample, column + i);
    for (Int row = begin + static_cast<Int>(threadIdx.y); row < end; row += kRowThreads * kBatch) {
      Value values[kBatch][kWidth];
      int valid = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Int at = row + i * kRowThreads;
        if (at >= end) break;
        op.template load_columns<kWidth>(key, p.first(sample, column) + at * p.planes, column, at, values[i]);
        ++valid;
      }
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        Value of_column[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) of_column[i] = values[i][c];
        state[c].add(of_column, valid);
      }
    }
  }
  CONVLAB_SHARED(State, rows, [kRowThreads][kColumnThreads]);
  for (int c = 0; c < kWidth; ++c) {
    __syncthreads();
    rows[threadIdx.y][threadIdx.x] = state[c];
    __syncthreads();
    if (threadIdx.y != 0 || !inside) continue;
    State sum = state[c];
    for (int row = 1; row < kRowThreads; ++row) sum.merge(rows[row][threadIdx.x]);
    partial[p.slot(sample, column + c, split)] = sum;
  }
}

template <int kWidth, class Operator, class Int>
int sum_planes(const Operator& op, const Partition<Int>& p, typename Operator::State* workspace, void* stream) {
  const int threads = p.chunk >= kNormThreads * kWidth * 2 ? kNormThreads : p.chunk >= 64 * kWidth * 2 ? 64 : 32;
  return launch(reduce_planes<Operator, Int, kWidth>, dim3(static_cast<unsigned>(slots(p))),
                dim3(static_cast<unsigned>(threads)), 0, stream, op, p, global(workspace, slots(p)));
}

template <int kWidth, class Operator, class Int>
int sum_columns(const Operator& op, const Partition<Int>& p, typename Operator::State* workspace, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.samples * p.splits),
                  static_cast<unsigned>(ceil_divide<int64_t>(p.planes, kColumnThreads * kWidth)));
  return launch(reduce_columns<Operator, Int, kWidth>, grid, dim3(kColumnThreads, kRowThreads), 0, stream, op, p,
                global(workspace, slots(p)));
}

// load() of an operator whose elements differ by their key alone.
template <int kWidth, class Operator, class Int>
CONVLAB_DEVICE void load_of_one_key(const Operator& op, const typename Operator::Key& key, Int at,
                                    typename Operator::Value* values) {
  typename Operator::Key keys[kWidth];
  for (int i = 0; i < kWidth; ++i) keys[i] = key;
  op.template load_columns<kWidth>(keys, at, at, at, reinterpret_cast<typename Operator::Value(&)[kWidth]>(*values));
}

// The channels of a sample, summed over everything that shares one.
template <class Int>
Partition<Int> partition_channels(const NormArguments& a) {
  if (a.layout == Layout::channels_last) return partition_columns<Int>(a.samples, a.repeats * a.pixels, a.channels());
  return partition_planes<Int>(a.samples, a.repeats, a.channels(), a.pixels);
}
// How many neighbours lie in one plane or row of it.
inline int64_t run_of_channels(const NormArguments& a) {
  return a.layout == Layout::channels_last ? a.channels() : a.pixels;
}

// For operators that know both.
template <int kWidth, class Operator, class Int>
int sum(const Operator& op, const Partition<Int>& p, typename Operator::State* workspace, void* stream) {
  return p.columns ? sum_columns<kWidth>(op, p, workspace, stream) : sum_planes<kWidth>(op, p, workspace, stream);
}

}  // namespace convlab::cuda
