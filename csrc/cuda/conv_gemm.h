// A convolution as a matrix product whose matrices exist nowhere: the problem, and the five ways to find an operand.
//
//   pass             rows           columns          summed over        left operand      right operand
//   forward          output pixels  filters          taps x channels    PixelRows         WeightRows
//   backward input   input pixels   channels         taps x filters     PixelRows         WeightColumns
//   backward weight  filters        taps x channels  output pixels      GradColumns       PatchColumns
//
// A loader serves one thread. The tile of an operand in shared memory is made of chunks of 16 bytes: of `Rows`, a chunk
// runs along the sum; of `Columns`, along the rows or columns of the product. place(chunk, e) says where element e of
// one of the thread's chunks lies, if anywhere; advance() goes on by one slice of the sum. All of it per group.
#pragma once
#include "conv_phase.h"

namespace convlab::cuda {

constexpr int kGemmThreads = 256;
constexpr int kSliceBytes = 64;  // of the sum, in shared memory at once

template <class T>
constexpr int kChunk = 16 / sizeof(T);
template <class T>
constexpr int kSlice = kSliceBytes / sizeof(T);

template <class T>
struct GemmProblem {
  ConvTensors<T> t;
  Phase phase;
  Global<const T> left, right;
  Global<T> written;
  Global<float> partial;     // of backward weight: splits x groups x rows x columns
  DenseStrides read, write;  // of the tensor of pixels that is read, and of the other one
  int read_size[kMaxSpatial], kernel[kMaxSpatial];
  int read_channels, write_channels;  // per group
  int rows, columns, depth, chunk;    // chunk: of the sum, for one split
  int groups;
  int64_t weight_read, weight_write, weight_group;  // what one channel read, or written, or a group moves in the weight

  CONVLAB_DEVICE int64_t weight_tap(const Walk& walk) const {
    const int z = phase.first_tap[0] + walk.tap[0] * phase.tap_stride[0];
    const int y = phase.first_tap[1] + walk.tap[1] * phase.tap_stride[1];
    const int x = phase.first_tap[2] + walk.tap[2] * phase.tap_stride[2];
    return static_cast<int64_t>((z * kernel[1] + y) * kernel[2] + x) * t.weight_tap;
  }
  // Offset of what `pixel` reads through the tap of `walk`, without the channel; false if that is padding.
  CONVLAB_DEVICE bool reads(const Pixel& pixel, const Walk& walk, int64_t& offset) const {
    offset = pixel.sample * read.sample;
    for (int axis = 0; axis < kMaxSpatial; ++axis) {
      const int at = pixel.at[axis] + walk.tap[axis] * phase.tap_step[axis];
      if (at < 0 || at >= read_size[axis]) return false;
      offset += at * read.axis[axis];
    }
    return true;
  }
  // The pixel's place in the tensor read, before any tap.
  CONVLAB_DEVICE Pixel reader(int m) const {
    Pixel pixel = pixel_of(phase.count, m);
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      pixel.at[axis] = phase.start[axis] + pixel.at[axis] * phase.step[axis];
    return pixel;
  }
  CONVLAB_DEVICE int64_t writes(int m) const {
    const Pixel pixel = pixel_of(phase.count, m);
    int64_t offset = pixel.sample * write.sample;
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      offset += (phase.write_start[axis] + pixel.at[axis] * phase.write_step[axis]) * write.axis[axis];
    return offset;
  }
};

template <class T>
GemmProblem<T> gemm_problem(const ConvArguments& a, const Phase& phase) {
  const ConvGeometry& g = a.geometry;
  const bool to_input = a.pass == Pass::backward_input;
  const ConvTensors<T> t(a);
  GemmProblem<T> p{t};
  p.phase = phase;
  p.read = to_input ? t.out : t.in;
  p.write = to_input ? t.in : t.out;
  p.groups = static_cast<int>(g.groups);
  p.read_channels = static_cast<int>(to_input ? g.out_channels_per_group() : g.in_channels_per_group());
  p.write_channels = static_cast<int>(to_input ? g.in_channels_per_group() : g.out_channels_per_group());
  p.weight_read = to_input ? t.weight_filter : t.weight_channel;
  p.weight_write = to_input ? t.weight_channel : t.weight_filter;
  p.weight_group = g.out_channels_per_group() * t.weight_filter;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    p.read_size[axis] = static_cast<int>(to_input ? g.output[axis] : g.input[axis]);
    p.kernel[axis] = static_cast<int>(g.kernel[axis]);
  }
  const int pixels = static_cast<int>(g.batch) * phase.pixels(), patch = phase.tap_count() * p.read_channels;
  const bool to_weight = a.pass == Pass::backward_weight;
  p.left = to_weight ? t.output : to_input ? t.output : t.input;
  p.right = to_weight ? t.input : t.weight;
  p.written = to_input ? t.input : t.output;
  p.rows = to_weight ? p.write_channels : pixels;
  p.columns = to_weight ? patch : p.write_channels;
  p.depth = p.chunk = to_weight ? pixels : patch;
  return p;
}

// kTile rows or columns of the product; the thread's chunk number j.
template <class T, int kTile>
struct AlongSum {
  static constexpr bool kAlongSum = true;
  static constexpr int kChunks = kTile * (kSliceBytes / 16) / kGemmThreads;
  static CONVLAB_DEVICE int row(int j) { return (static_cast<int>(threadIdx.x) + j * kGemmThreads) / 4; }
  static CONVLAB_DEVICE int column() { return static_cast<int>(threadIdx.x) % 4; }  // chunk of the slice
};
template <class T, int kTile>
struct AcrossSum {
  static constexpr bool kAlongSum = false;
  static constexpr int kChunks = kTile * (kSliceBytes / 16) / kGemmThreads;
  static constexpr int kPerRow = kTile / kChunk<T>;
  static CONVLAB_DEVICE int row(int j) { return (static_cast<int>(threadIdx.x) + j * kGemmThreads) / kPerRow; }
  static CONVLAB_DEVICE int column() { return static_cast<int>(threadIdx.x) % kPerRow; }
};

template <class T, int kTile>
struct PixelRows : AlongSum<T, kTile> {
  using Base = AlongSum<T, kTile>;
  Walk walk;
  Pixel pixel[Base::kChunks];
  int64_t first;

  CONVLAB_DEVICE void begin(const GemmProblem<T>& p, int tile, int group, int) {
    walk.begin(Base::column() * kChunk<T>, p.read_channels, p.phase);
#pragma unroll
    for (int j = 0; j < Base::kChunks; ++j) {
      const int m = tile + Base::row(j);
      pixel[j] = p.reader(m < p.rows ? m : 0);
      if (m >= p.rows) pixel[j].at[0] = -(1 << 30);  // reads padding, whatever the tap
    }
    first = static_cast<int64_t>(group) * p.read_channels * p.read.channel;
  }
  CONVLAB_DEVICE bool place(const GemmProblem<T>& p, int j, int e, int64_t& offset) const {
    Walk at = walk;
    if (e) at.advance(e, p.read_channels, p.phase);
    if (at.ended(p.phase) || !p.reads(pixel[j], at, offset)) return false;
    offset += first + at.channel * p.read.channel;
    return true;
  }
  CONVLAB_DEVICE void advance(const GemmProblem<T>& p) { walk.advance(kSlice<T>, p.read_channels, p.phase); }
};

template <class T, int kTile>
struct WeightRows : AlongSum<T, kTile> {
  using Base = AlongSum<T, kTile>;
  Walk walk;
  int tile;
  int64_t first;

  CONVLAB_DEVICE void begin(const GemmProblem<T>& p, int at, int group, int) {
    walk.begin(Base::column() * kChunk<T>, p.read_channels, p.phase);
    tile = at;
    first = group * p.weight_group;
  }
  CONVLAB_DEVICE bool place(const GemmProblem<T>& p, int j, int e, int64_t& offset) const {
    Walk at = walk;
    if (e) at.advance(e, p.read_channels, p.phase);
    if (at.ended(p.phase) || tile + Base::row(j) >= p.columns) return false;
    offset = first + (tile + Base::row(j)) * p.weight_write + p.weight_tap(at) + at.channel * p.weight_read;
    return true;
  }
  CONVLAB_DEVICE void advance(const GemmProblem<T>& p) { walk.advance(kSlice<T>, p.read_channels, p.phase); }
};

template <class T, int kTile>
struct WeightColumns : AcrossSum<T, kTile> {
  using Base = AcrossSum<T, kTile>;
  Walk walk[Base::kChunks];
  int tile;
  int64_t first;

  CONVLAB_DEVICE void begin(const GemmProblem<T>& p, int at, int group, int) {
#pragma unroll
    for (int j = 0; j < Base::kChunks; ++j) walk[j].begin(Base::row(j), p.read_channels, p.phase);
    tile = at;
    first = group * p.weight_group;
  }
  CONVLAB_DEVICE bool place(const GemmProblem<T>& p, int j, int e, int64_t& offset) const {
    const int column = tile + Base::column() * kChunk<T> + e;
    if (walk[j].ended(p.phase) || column >= p.columns) return false;
    offset = first + walk[j].channel * p.weight_read + p.weight_tap(walk[j]) + column * p.weight_write;
    return true;
  }
  CONVLAB_DEVICE void advance(const GemmProblem<T>& p) {
#pragma unroll
    for (int j = 0; j < Base::kChunks; ++j) walk[j].advance(kSlice<T>, p.read_channels, p.phase);
  }
};

template <class T, int kTile>
struct GradColumns : AcrossSum<T, kTile> {
  using Base = AcrossSum<T, kTile>;
  int tile, slice, end;
  int64_t first;

  CONVLAB_DEVICE void begin(const GemmProblem<T>& p, int at, int group, int begin) {
    tile = at;
    slice = begin;
    end = begin + p.chunk < p.depth ? begin + p.chunk : p.depth;
    first = static_cast<int64_t>(group) * p.rows * p.write.channel;
  }
  CONVLAB_DEVICE bool place(const GemmProblem<T>& p, int j, int e, int64_t& offset) const {
    const int m = slice + Base::row(j), row = tile + Base::column() * kChunk<T> + e;
    if (m >= end || row >= p.rows) return false;
    offset = first + p.writes(m) + row * p.write.channel;
    return true;
  }
  CONVLAB_DEVICE void advance(const GemmProblem<T>&) { slice += kSlice<T>; }
};

template <class T, int kTile>
struct PatchColumns : AcrossSum<T, kTile> {
  using Base = AcrossSum<T, kTile>;
  Walk walk;  // of the thread's column, which stays
  int slice, end;
  int64_t first;

  CONVLAB_DEVICE void begin(const GemmProblem<T>& p, int tile, int group, int begin) {
    walk.begin(tile + Base::column() * kChunk<T>, p.read_channels, p.phase);
    slice = begin;
    end = begin + p.chunk < p.depth ? begin + p.chunk : p.depth;
    first = static_cast<int64_t>(group) * p.read_channels * p.read.channel;
  }
  CONVLAB_DEVICE bool place(const GemmProblem<T>& p, int j, int e, int64_t& offset) const {
    const int m = slice + Base::row(j);
    Walk at = walk;
    if (e) at.advance(e, p.read_channels, p.phase);
    if (m >= end || at.ended(p.phase) || !p.reads(p.reader(m), at, offset)) return false;
    offset += first + at.channel * p.read.channel;
    return true;
  }
  CONVLAB_DEVICE void advance(const GemmProblem<T>&) { slice += kSlice<T>; }
};

}  // namespace convlab::cuda
