// Weights as the columns of tile_sums.h: [group][panel of 32 written channels][step of 32 read ones][tap][part][tile].
#pragma once
#include "conv_phase.h"
#include "conv_spans.h"
#include "pack.h"
#include "tile_sums.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class TileWeights {
 public:
  static constexpr int kParts = bfloat16_parts<T>;
  static constexpr int64_t kTapBytes = kParts * kTilesWide * kTileBytes;

  TileWeights(const ConvArguments<T>& arguments, const Transfer<T>& transfer, const KernelSpans& spans)
      : arguments_(arguments),
        t_(transfer),
        spans_(spans),
        steps_(divide_up(transfer.read_channels, kTileDepth)),
        panels_(divide_up(transfer.written_channels, kSumEdge)) {}

  int64_t steps() const { return steps_; }
  int64_t panels() const { return panels_; }
  int64_t step_bytes() const { return t_.geometry.taps() * kTapBytes; }  // of one panel
  int64_t panel_bytes() const { return steps_ * step_bytes(); }
  int64_t tasks() const { return t_.geometry.groups * panels_ * steps_; }
  int64_t bytes() const { return t_.geometry.groups * panels_ * panel_bytes(); }

  const char* at(int64_t group, int64_t panel, int64_t step) const {
    return static_cast<const char*>(arguments_.packed) + ((group * panels_ + panel) * steps_ + step) * step_bytes();
  }

  // All taps of a step of a panel.
  void pack(int64_t task) const {
    const int64_t step = task % steps_, panel = task / steps_ % panels_, group = task / steps_ / panels_;
    char* target = const_cast<char*>(at(group, panel, step));
    Block block;
    block.written_stride = t_.weight_offset(arguments_, 0, 0, 1);
    block.read = std::min(kTileDepth, t_.read_channels - step * kTileDepth);
    block.written = std::min(kSumEdge, t_.written_channels - panel * kSumEdge);
    const int64_t stride = t_.weight_offset(arguments_, 0, 1, 0);
    block.follow = spans_.weights_follow(stride, arguments_.weight_stride_tap);
    for (int64_t k = 0; k < block.read; ++k)
      block.offset[k] = spans_.weight_offset(step * kTileDepth + k, stride, arguments_.weight_stride_tap);
    const T* source = arguments_.weight + t_.weight_offset(arguments_, group, 0, panel * kSumEdge);
    for (int64_t tap = 0; tap < t_.geometry.taps(); ++tap, target += kTapBytes)
      pack_tap(block, source + tap * spans_.taps() * arguments_.weight_stride_tap, target);
  }

 private:
  struct Block {
    int64_t offset[kTileDepth];  // of the read channels
    bool follow;                 // each other
    int64_t written_stride;
    int64_t read, written;  // channels
  };

  static void pack_tap(const Block& b, const T* source, char* target) {
    for (int64_t column = 0; column < kSumEdge; column += lanes<float>) {
      vec<float> row[kTileDepth];  // [read channel]
      load_columns(b, source + column * b.written_stride, b.written - column, row);
      store_columns<kParts>(row, column, target);
    }
  }

  // A vector of written channels, of which there are `written`, for every read one; zeros beyond them.
  static void load_columns(const Block& b, const T* source, int64_t written, vec<float> (&row)[kTileDepth]) {
    if (!b.follow) {
      for (int64_t k = 0; k < kTileDepth; ++k)
        row[k] = k < b.read ? load_strided(source + b.offset[k], b.written_stride, written) : vec<float>{};
      return;
    }
    for (int64_t k = 0; k < kTileDepth; k += lanes<float>) {
      vec<float> square[lanes<float>];
      for (int64_t lane = 0; lane < lanes<float>; ++lane)
        square[lane] = load_some(source + b.offset[0] + lane * b.written_stride + k, lane < written ? b.read - k : 0);
      transpose<float>(square);
      for (int64_t i = 0; i < lanes<float>; ++i) row[k + i] = square[i];
    }
  }

  const ConvArguments<T>& arguments_;
  const Transfer<T>& t_;
  const KernelSpans& spans_;
  int64_t steps_, panels_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
