// Weights as the columns of a product whose rows are pixels: packed panels, and where each tap lies in them.
#pragma once
#include "conv_phase.h"
#include "pack.h"

namespace convlab::cpu::CONVLAB_ISA {

// [group][panel][tap][read channel][column]. A tap takes up `tap_depth` rows, and the last one what is left up to whole
// steps. With `lines` a kernel line is one segment of the reduction, and its taps come in the order in which they are
// read.
template <class T>
class WeightPanels {
 public:
  using A = accumulate_t<T>;
  using S = operand_t<T>;

  WeightPanels() = default;
  WeightPanels(const ConvArguments<T>& arguments, const Transfer<T>& transfer, int64_t tap_depth, bool lines)
      : arguments_(&arguments),
        t_(&transfer),
        count_(divide_up(transfer.written_channels, kPanel<A>)),
        tap_depth_(tap_depth),
        depth_(round_up(transfer.geometry.taps() * tap_depth, products<S>)),
        lines_(lines) {}

  int64_t count() const { return count_; }
  int64_t depth() const { return depth_; }  // rows of a panel
  // Into how many blocks to cut the panels for enough tasks with the `others` there are.
  int64_t blocks(int64_t others) const {
    const int threads = arguments_->threads;
    const int64_t wanted = divide_up(enough_tasks(threads), others);
    return std::min(count_, t_->weight_is_larger() ? round_up(wanted, threads) : wanted);
  }

  int64_t tasks() const { return t_->geometry.groups * count_ * t_->geometry.taps(); }
  int64_t bytes() const { return t_->geometry.groups * group_size() * static_cast<int64_t>(sizeof(S)); }

  // One tap of one panel or, where the taps of a weight lie together, as large a share of its read channels.
  void pack(int64_t task) const {
    const int64_t taps = t_->geometry.taps(), read = t_->read_channels;
    const int64_t tap = task % taps, panel = task / taps % count_, group = task / taps / count_;
    const int width = panel_width<A>(t_->written_channels, panel);
    const int64_t first = panel * kPanel<A>, columns = std::min<int64_t>(width, t_->written_channels - first);
    const T* source = arguments_->weight + t_->weight_offset(*arguments_, group, 0, first);
    const int64_t read_stride = t_->weight_offset(*arguments_, 0, 1, 0);
    const int64_t written_stride = t_->weight_offset(*arguments_, 0, 0, 1);
    WeightBlock<T> block{source, read_stride, written_stride, read, columns};
    if constexpr (products<S> == 1)
      if (taps > 1 && arguments_->weight_stride_tap == 1 && tap_depth_ == read)
        return pack_channels(block, read * tap / taps, read * (tap + 1) / taps, width, at(group, panel));
    block.source += tap * arguments_->weight_stride_tap;
    const int64_t place = place_of(tap), begin = place * tap_depth_;
    const int64_t end = place + 1 == taps ? depth_ : begin + tap_depth_;
    pack_columns(block, begin, end, width, at(group, panel));
  }

  S* at(int64_t group, int64_t panel) const {
    return static_cast<S*>(arguments_->packed) + group * group_size() + panel * kPanel<A> * depth_;
  }

  // The panel's rows of each segment of a phase.
  void point_at_segments(const Phase& phase, int64_t group, int64_t panel, const S** segments) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const S* first = at(group, panel);
    const int64_t step = tap_depth_ * panel_width<A>(t_->written_channels, panel);
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy)
        for (int64_t jx = 0; jx < (lines_ ? 1 : ax->taps); ++jx)
          *segments++ = first + t_->tap_index(az->tap(jz), ay->tap(jy), lines_ ? 0 : ax->tap(jx)) * step;
  }

 private:
  int64_t group_size() const { return round_up(t_->written_channels, lanes<A>) * depth_; }

  bool reversed() const { return lines_ && t_->phase(0).axis[2].offset_step <= 0; }
  int64_t place_of(int64_t tap) const {
    if (!reversed()) return tap;
    const int64_t x = tap % t_->geometry.kernel[2];
    return tap - x + t_->geometry.kernel[2] - 1 - x;
  }

  // The read channels begin..end of a panel, all taps, which lie together: lanes are brought there by transposition.
  void pack_channels(const WeightBlock<T>& block, int64_t begin, int64_t end, int width, S* panel) const {
    const int64_t taps = t_->geometry.taps();
    const bool follow = block.read_stride == taps;  // forward: so do the channels
    for (int64_t lane = 0; lane < width; lane += lanes<A>) {
      const int64_t count = std::min<int64_t>(lanes<A>, block.written - lane);
      const T* from = block.source + begin * block.read_stride + lane * block.written_stride;
      if (follow) {
        scatter_taps(from, block.written_stride, count, begin, end, width, panel + lane);
        continue;
      }
      for (int64_t channel = begin; channel < end; ++channel, from += block.read_stride) {
        scatter_taps(from, block.written_stride, count, channel, channel + 1, width, panel + lane);
        constexpr int64_t ahead = 16, line = 64 / static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0; i < count * block.written_stride; i += line)
          __builtin_prefetch(from + ahead * block.read_stride + i);
      }
    }
  }

  // `count` rows of the taps of the read channels first..last become lanes of the panel's rows.
  void scatter_taps(const T* source, int64_t stride, int64_t count, int64_t first, int64_t last, int width,
                    S* panel) const {
    const int64_t taps = t_->geometry.taps(), line = t_->geometry.kernel[2], columns = (last - first) * taps;
    const bool reversed = this->reversed();
    int64_t channel = first, tap = 0, x = 0;
    for (int64_t j = 0; j < columns; j += lanes<A>) {
      const int64_t length = std::min<int64_t>(lanes<A>, columns - j);
      vec<A> block[lanes<A>];
      for (int r = 0; r < lanes<A>; ++r) {
        const T* row = source + r * stride + j;
        block[r] = r >= count ? vec<A>{} : length == lanes<A> ? load(row) : load_partial(row, length);
      }
      transpose<A>(block);
      for (int64_t r = 0; r < length; ++r) {
        const int64_t place = reversed ? tap + line - 1 - 2 * x : tap;
        store(panel + (place * tap_depth_ + channel) * width, block[r]);
        if (++x == line) x = 0;
        if (++tap == taps) tap = 0, ++channel;
      }
    }
  }

  const ConvArguments<T>* arguments_ = nullptr;
  const Transfer<T>* t_ = nullptr;
  int64_t count_ = 0, tap_depth_ = 0, depth_ = 0;
  bool lines_ = false;
};

}  // namespace convlab::cpu::CONVLAB_ISA
