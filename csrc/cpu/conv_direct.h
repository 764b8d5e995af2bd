// Direct convolution for few channels per group, all passes, both memory formats.
//
// Idea: lanes are written channels, those of several small groups together, and neighbouring pixels of a line are
// summed in registers, as in depthwise convolution. What each lane reads differs by group, so lines are first spread
// over the lanes (conv_direct_lines.h); after that an input vector meets its taps by plain multiply-adds, with no lane
// wasted. Cost: multiply_adds(), plus a permutation per pixel, lane vector and read channel of a group. Memory: per
// thread some spread lines, at most kSpreadBytes or a kernel's height of them. Limits: every read channel of a group is
// a permutation and a load for each 16 written channels: with many channels per group a matrix product does better.
#pragma once
#include "conv_direct_groups.h"
#include "conv_direct_weight.h"
#include "conv_strips.h"

namespace convlab::cpu::CONVLAB_ISA {

// Forward and backward input.
template <class T>
class DirectTransfer {
 public:
  using A = accumulate_t<T>;

  explicit DirectTransfer(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    last_ = arguments.layout == Layout::channels_last;
    blocks_ = ChannelBlock<A>::blocks(t_.geometry.groups, t_.written_channels);
    const Phase phase = t_.phase(0);  // no other has more pixels
    const int64_t columns = phase.axis[2].count, rows = phase.axis[1].count;
    segment_ = std::min(round_up(columns, kWindowPixels), kSegment);
    segments_ = std::max<int64_t>(1, divide_up(columns, segment_));
    reach_ = StripReach(t_, segment_);
    planes_ = phase.axis[0].count;
    line_size_ = reach_.slots * pixel_size();
    const int64_t others = t_.geometry.batch * blocks_ * phase.axis[0].count * segments_ * t_.phase_count;
    strip_ = strip_rows(std::clamp<int64_t>(rows, 1, kStrip), [&](int64_t strip) {
      return spread_size(strip) * static_cast<int64_t>(sizeof(A)) > kSpreadBytes ||
             others * divide_up(rows, strip) < enough_tasks(arguments.threads);
    });
    strips_ = std::max<int64_t>(1, divide_up(rows, strip_));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = blocks_;
    plan.run_tasks = t_.phase_count * t_.geometry.batch * blocks_ * planes_ * strips_ * segments_;
    plan.packed_bytes = blocks_ * block_weights() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // The weights of a block as [tap][read channel][lane].
  void pack(int64_t task) const {
    const ChannelBlock<A> block = channel_block(task);
    A* target = static_cast<A*>(arguments_.packed) + task * block_weights();
    for (int64_t tap = 0; tap < t_.geometry.taps(); ++tap)
      for (int64_t j = 0; j < t_.read_channels; ++j, target += lanes<A>)
        for (int64_t lane = 0; lane < lanes<A>; ++lane) {
          const int64_t written = block.first + lane, group = written / t_.written_channels;
          target[lane] =
              lane >= block.count
                  ? A(0)
                  : to_accumulate(
                        arguments_.weight[t_.weight_offset(arguments_, group, j, written % t_.written_channels) +
                                          tap * arguments_.weight_stride_tap]);
        }
  }

  // A strip of lines of one phase, image and block of channels.
  void run(void* scratch, int64_t task) const {
    const Phase phase = ascending(t_.phase(task % t_.phase_count));  // fastest: phases differ in work
    task /= t_.phase_count;
    const int64_t segment = task % segments_, strip = task / segments_ % strips_;
    task /= segments_ * strips_;
    const int64_t z = task % planes_, index = task / planes_ % blocks_, n = task / planes_ / blocks_;
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t x = segment * segment_, y = strip * strip_;
    if (z >= az->count || y >= ay->count || x >= ax->count) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    const ChannelBlock<A> block = channel_block(index);
    const int64_t columns = std::min(segment_, ax->count - x), rows = std::min(strip_, ay->count - y);
    const int64_t read_channels = t_.read_channels * t_.geometry.groups;
    const T* image = t_.read + n * t_.read_pixels() * read_channels;
    const SpreadLines<T> spreading(arguments_.layout, t_.read_size, read_channels, block,
                                   x * ax->read_step + ax->offset_first, slots_of(*ax, segment_));
    const int64_t height = (rows - 1) * ay->read_step + ay->reach();
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t line = 0; line < height; ++line)
        spreading.spread(image, z * az->read_step + az->offset(jz), y * ay->read_step + ay->offset_first + line,
                         s.buffer, s.lines + (jz * height + line) * line_size_);

    vec<A> start{};
    if (t_.bias) start = load_partial(t_.bias + block.first, block.count);
    const A* weights = static_cast<const A*>(arguments_.packed) + index * block_weights();
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; column += kWindowPixels) {
        vec<A> sum[kWindowPixels];
        CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) sum[p] = start;
        const A* lines = s.lines + row * ay->read_step * line_size_ + column * ax->read_step * pixel_size();
        if (ax->read_step == 1)
          add_usual<1>(phase, lines, height, weights, sum);
        else if (ax->read_step == 2)
          add_usual<2>(phase, lines, height, weights, sum);
        else
          add<0, 1>(phase, lines, height, weights, sum);
        const int64_t pixels = std::min<int64_t>(kWindowPixels, columns - column);
        for (int64_t p = 0; p < pixels; ++p) store(s.staged + (column + p) * lanes<A>, sum[p]);
      }
      PixelWalk pixel(phase, 0);
      pixel.z = z, pixel.y = y + row, pixel.x = x;
      store_line(block, n, pixel.written_pixel(t_.written_size), ax->step, columns, s);
    }
  }

 private:
  static constexpr int64_t kSegment = 128;                   // pixels of a line
  static constexpr int64_t kStrip = 16;                      // lines
  static constexpr int64_t kSpreadBytes = int64_t{1} << 18;  // of a strip's lines

  struct Scratch {
    A* lines;   // spread
    A* buffer;  // for spreading
    A* staged;  // [pixel][lane] of one line, then transposed
  };
  Scratch carve(Carver& carver) const {
    return {carver.take<A>(spread_size(strip_)), carver.take<A>(reach_.slots * lanes<A>),
            carver.take<A>(2 * round_up(segment_, lanes<A>) * lanes<A>)};
  }

  ChannelBlock<A> channel_block(int64_t index) const {
    return ChannelBlock<A>(index, t_.geometry.groups, t_.read_channels, t_.written_channels);
  }
  int64_t block_weights() const { return t_.geometry.taps() * t_.read_channels * lanes<A>; }

  static Phase ascending(Phase phase) {
    for (AxisPhase& axis : phase.axis) axis = axis.ascending();
    return phase;
  }
  int64_t pixel_size() const { return t_.read_channels * lanes<A>; }
  // Of the spread lines of a strip of so many rows, in elements.
  int64_t spread_size(int64_t rows) const { return reach_.planes * reach_.lines_of(rows) * line_size_; }

  // The usual numbers of neighbouring taps are unrolled.
  template <int Step>
  void add_usual(const Phase& phase, const A* lines, int64_t height, const A* weights,
                 vec<A> (&sum)[kWindowPixels]) const {
    const AxisPhase& axis = phase.axis[2];
    const int64_t taps = axis.offset_step == 1 ? axis.taps : 1;
    if (taps == 3) return add<Step, 3>(phase, lines, height, weights, sum);
    if (taps == 5) return add<Step, 5>(phase, lines, height, weights, sum);
    if (taps == 7) return add<Step, 7>(phase, lines, height, weights, sum);
    add<Step, 1>(phase, lines, height, weights, sum);
  }

  // A window's sums over all taps and read channels.
  template <int Step, int Taps>
  void add(const Phase& phase, const A* lines, int64_t height, const A* weights, vec<A> (&sum)[kWindowPixels]) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    const int64_t line_size = line_size_, pixel_size = this->pixel_size(), reads = t_.read_channels;
    PitchedPixels<A> source{nullptr, pixel_size};
    vec<A> local[kWindowPixels];  // registers; the loads below might alias `sum`
    CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) local[p] = sum[p];
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy) {
        const A* line = lines + (jz * height + jy * ay->offset_step) * line_size;
        for (int64_t jx = 0; jx < ax->taps; jx += Taps) {
          const A* weight = weights + t_.tap_index(az->tap(jz), ay->tap(jy), ax->tap(jx)) * pixel_size;
          source.from = line + jx * ax->offset_step * pixel_size;
          for (int64_t j = 0; j < reads; ++j, source.from += lanes<A>, weight += lanes<A>)
            add_window<Step, Taps>(source, ax->read_step, weight, ax->tap_step * pixel_size, local);
        }
      }
    CONVLAB_UNROLL for (int p = 0; p < kWindowPixels; ++p) sum[p] = local[p];
  }

  // The staged line -> the written tensor, whose first pixel of it is `pixel`.
  void store_line(const ChannelBlock<A>& block, int64_t n, int64_t pixel, int64_t step, int64_t columns,
                  const Scratch& s) const {
    const int64_t channels = t_.written_channels * t_.geometry.groups, plane = t_.written_pixels();
    if (last_) {
      T* target = t_.written + (n * plane + pixel) * channels + block.first;
      for (int64_t i = 0; i < columns; ++i, target += step * channels)
        t_.epilogue.store_row(target, s.staged + i * lanes<A>, block.count);
      return;
    }
    const int64_t pitch = round_up(segment_, lanes<A>);
    A* transposed = s.staged + pitch * lanes<A>;
    transpose_matrix(s.staged, lanes<A>, columns, lanes<A>, transposed, pitch);
    T* target = t_.written + (n * channels + block.first) * plane + pixel;
    for (int64_t lane = 0; lane < block.count; ++lane, target += plane, transposed += pitch)
      if (step == 1)
        t_.epilogue.store_row(target, transposed, columns);
      else
        for (int64_t i = 0; i < columns; ++i) t_.epilogue.store_one(target + i * step, transposed[i]);
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_;
  int64_t blocks_, segment_, segments_, strip_, strips_, planes_, line_size_ = 0;
  StripReach reach_;
};

template <class T>
struct Direct {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    if (arguments.pass == Pass::backward_weight) return body(DirectWeight<T>(arguments));
    if constexpr (DirectGroups<T>::kPossible)
      if (DirectGroups<T>::suits(arguments)) return body(DirectGroups<T>(arguments));
    return body(DirectTransfer<T>(arguments));
  }
};

// With too few channels to fill half a vector, lanes are pixels of zero-padded planes. Else, channels first and for the
// weights of large kernels that CopiedLines does not take, depthwise convolution is the direct one with a channel per
// group.
template <class T>
struct Depthwise {
  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    const bool weight = arguments.pass == Pass::backward_weight;
    if (arguments.geometry.groups < lanes<accumulate_t<T>> / 2)
      return weight ? body(PlanesWeight<T>(arguments)) : body(GemmPlanes<T>(arguments));
    if (arguments.layout == Layout::channels_last) {
      if (!weight) return body(DepthwiseChannelsLast<T>(arguments));
      const ConvGeometry& g = arguments.geometry;
      if (often_read(g) && !CopiedLines<T>::suits(g)) return body(DirectWeight<T>(arguments));
      return body(DepthwiseWeightChannelsLast<T>(arguments));
    }
    return Direct<T>::with(arguments, body);
  }

  // Whether so many taps meet an element of the input that it pays to copy lines to where they lie together.
  static bool often_read(const ConvGeometry& g) { return g.taps() >= (g.taps() > g.kernel[2] ? 25 : 48); }
};

}  // namespace convlab::cpu::CONVLAB_ISA
