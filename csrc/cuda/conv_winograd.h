// How Winograd's kernels cut a convolution: into tiles, chunks of tiles, and a product for each point.
#pragma once
#include "../winograd_matrices.h"
#include "conv.h"

namespace convlab::cuda {

constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;  // F(4x4, 3x3)

// One of the two tensors of pixels, and its tiles: [tile of the chunk][point][group][channel], the channels of a group
// filled up with zeros so that chunks of 16 bytes are whole.
struct TiledTensor {
  Global<float> pixels, tiles;
  DenseStrides strides;
  int size[2], start[2];       // height and width; the first pixel of the first tile, negative in the padding
  int channels, padded;        // of a group
  int slots;                   // groups x padded
  int tiles_y, tiles_x;        // of one sample
  int first_tile, tile_count;  // of the chunk

  struct Corner {
    int sample, y, x;
  };
  CONVLAB_DEVICE Corner corner(int tile) const {
    const int index = first_tile + tile, row = index / tiles_x;
    return {row / tiles_y, row % tiles_y * kTile + start[0], (index - row * tiles_x) * kTile + start[1]};
  }
  // The channel in `slot`; -1 if none.
  CONVLAB_DEVICE int channel(int slot) const {
    const int group = slot / padded, c = slot - group * padded;
    return slot < slots && c < channels ? group * channels + c : -1;
  }
  CONVLAB_DEVICE bool inside(int y, int x) const { return y >= 0 && y < size[0] && x >= 0 && x < size[1]; }
  CONVLAB_DEVICE int64_t pixel(const Corner& at, int y, int x, int channel) const {
    return at.sample * strides.sample + channel * strides.channel + y * strides.axis[1] + x * strides.axis[2];
  }
  CONVLAB_DEVICE int64_t point(int tile, int point, int slot) const {
    return (static_cast<int64_t>(tile) * kPoints + point) * slots + slot;
  }
};

// The weight, and its points: [point][group][filter][channel], filters and channels filled up with zeros.
struct TiledWeight {
  ConvTensors<float> t;
  Global<float> points;
  int64_t count;  // of one point
  int filters, padded_filters, channels, padded_channels;

  // Where the weights of filter and channel number `i` of a point begin; -1 if it is none.
  CONVLAB_DEVICE int64_t at(int64_t i) const {
    const int64_t channel = i % padded_channels, row = i / padded_channels, filter = row % padded_filters;
    if (filter >= filters || channel >= channels) return -1;
    return (row / padded_filters * filters + filter) * t.weight_filter + channel * t.weight_channel;
  }
};

// What a problem is cut into, by the geometry alone, and where the parts lie in the workspace.
struct WinogradPlan {
  int64_t in_padded, out_padded;                   // channels of a group, filled up
  int64_t tiles_y, tiles_x, chunk;                 // tiles of a sample, and those that are in the workspace at once
  int64_t weights, input, output, partial, bytes;  // offsets

  explicit WinogradPlan(const ConvArguments& a) {
    // Written by one kernel and read by the next, a chunk of this size stays in the L2 cache, and its products still
    // fill a GPU: about 1000 blocks for any number of channels.
    constexpr int64_t chunk_bytes = 32 << 20, gemm_tile = 64;
    const ConvGeometry& g = a.geometry;
    const bool to_input = a.pass == Pass::backward_input;
    in_padded = ceil_divide<int64_t>(g.in_channels_per_group(), 4) * 4;
    out_padded = ceil_divide<int64_t>(g.out_channels_per_group(), 4) * 4;
    tiles_y = ceil_divide<int64_t>(to_input ? g.input[1] : g.output[1], kTile);
    tiles_x = ceil_divide<int64_t>(to_input ? g.input[2] : g.output[2], kTile);
    const int64_t per_slot = kPoints * static_cast<int64_t>(sizeof(float));
    const int64_t weight_bytes = per_slot * g.groups * in_padded * out_padded;
    const int64_t per_tile = per_slot * g.groups * (in_padded + out_padded);
    // Each chunk of backward weight adds to the transformed weights, which should not outweigh it.
    const int64_t wanted =
        a.pass == Pass::backward_weight && 4 * weight_bytes > chunk_bytes ? 4 * weight_bytes : chunk_bytes;
    chunk = wanted / per_tile / gemm_tile * gemm_tile;
    if (chunk < gemm_tile) chunk = gemm_tile;
    if (chunk > g.batch * tiles_y * tiles_x) chunk = g.batch * tiles_y * tiles_x;
    const auto place = [this](int64_t size) {
      const int64_t at = bytes;
      bytes += ceil_divide<int64_t>(size, 256) * 256;
      return at;
    };
    bytes = 0;
    weights = place(weight_bytes);
    input = place(chunk * per_slot * g.groups * in_padded);
    output = place(chunk * per_slot * g.groups * out_padded);
    partial = place(implicit_gemm_workspace(products(a, chunk)));
  }

  float* at(const ConvArguments& a, int64_t offset) const {
    return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + offset);
  }

  // The products of `tiles` tiles: a pointwise convolution, channels last, with a group for each point and group, of
  // whose operands the pass writes the same one.
  ConvArguments products(const ConvArguments& a, int64_t tiles) const {
    ConvArguments p;
    p.geometry.batch = 1;
    p.geometry.groups = kPoints * a.geometry.groups;
    p.geometry.in_channels = p.geometry.groups * in_padded;
    p.geometry.out_channels = p.geometry.groups * out_padded;
    p.geometry.input[2] = p.geometry.output[2] = tiles;
    p.pass = a.pass;
    p.layout = Layout::channels_last;
    p.algorithm = Algorithm::implicit_gemm;
    p.input = at(a, input);
    p.weight = at(a, weights);
    p.output = at(a, output);
    p.weight_stride_channel = 1;
    p.weight_stride_tap = in_padded;
    p.workspace = at(a, partial);
    return p;
  }

  // The tiles of the tensor that the forward pass writes, or of the one that it reads, as the pass sees them.
  TiledTensor tensor(const ConvArguments& a, bool is_output) const {
    const ConvGeometry& g = a.geometry;
    const bool to_input = a.pass == Pass::backward_input;
    const int64_t padded = is_output ? out_padded : in_padded, slots = g.groups * padded;
    const ConvTensors<float> t(a);
    TiledTensor p;
    p.pixels = is_output ? t.output : t.input;
    p.tiles = global(at(a, is_output ? output : input), chunk * kPoints * slots);
    p.strides = is_output ? t.out : t.in;
    p.channels = static_cast<int>(is_output ? g.out_channels_per_group() : g.in_channels_per_group());
    p.padded = static_cast<int>(padded);
    p.slots = static_cast<int>(slots);
    p.tiles_y = static_cast<int>(tiles_y);
    p.tiles_x = static_cast<int>(tiles_x);
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t padding = g.padding[axis + 1];
      p.size[axis] = static_cast<int>(is_output ? g.output[axis + 1] : g.input[axis + 1]);
      p.start[axis] = 0;  // of what is written in whole tiles
      if (!to_input && !is_output) p.start[axis] = static_cast<int>(-padding);
      if (to_input && is_output) p.start[axis] = static_cast<int>(padding - 2);
    }
    p.first_tile = p.tile_count = 0;
    return p;
  }

  TiledWeight weight(const ConvArguments& a) const {
    const ConvGeometry& g = a.geometry;
    const int64_t count = g.groups * in_padded * out_padded;
    return {ConvTensors<float>(a),
            global(at(a, weights), kPoints * count),
            count,
            static_cast<int>(g.out_channels_per_group()),
            static_cast<int>(out_padded),
            static_cast<int>(g.in_channels_per_group()),
            static_cast<int>(in_padded)};
  }
};

}  // namespace convlab::cuda
