// Direct convolution, backward weight: see conv_direct.h.
//
// A lane is a filter; each (tap, read channel) has a vector of sums, to which every pixel adds its grad_output times
// the input that the tap reads: spread over the lanes, or broadcast where all filters of a vector are of one group.
// Sums of a chunk of lines go to the workspace; chunks depend on the geometry alone and `finish` adds them in order.
// Memory: chunks x weights, and per thread some lines.
#pragma once
#include "conv_depthwise_weight.h"
#include "conv_direct_lines.h"
#include "conv_strips.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class DirectWeight {
 public:
  using A = accumulate_t<T>;

  explicit DirectWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase_at(geometry_, Pass::forward, 0)) {
    last_ = arguments.layout == Layout::channels_last;
    reads_ = geometry_.in_channels_per_group();
    broadcasts_ = geometry_.out_channels_per_group() >= lanes<A>;
    blocks_ = ChannelBlock<A>::blocks(geometry_.groups, geometry_.out_channels_per_group());
    lines_ = geometry_.batch * geometry_.output[0] * geometry_.output[1];
    chunks_ = std::min(lines_, kChunks);
    segment_ = std::min(geometry_.output[2], kSegment);
    const AxisPhase &rows = phase_.axis[1], &columns = phase_.axis[2];
    slots_ = (segment_ - 1) * columns.read_step + (columns.taps - 1) * columns.offset_step + 1;
    pixel_size_ = broadcasts_ ? round_up(reads_, lanes<A>) : reads_ * lanes<A>;
    const int64_t bytes = phase_.axis[0].taps * line_size() * static_cast<int64_t>(sizeof(A));
    const int64_t reach = (rows.taps - 1) * rows.offset_step + 1;
    strip_ = std::clamp<int64_t>((kSpreadBytes / bytes - reach) / rows.read_step + 1, 1, kStrip);
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_ * blocks_;
    plan.finish_tasks = blocks_;
    plan.shared_bytes = chunks_ * blocks_ * block_weights() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One chunk of lines for one block of filters.
  void run(void* scratch, int64_t task) const {
    const int64_t chunk = task / blocks_, index = task % blocks_;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    A* sums = partial(chunk, index);
    std::fill(sums, sums + block_weights(), A(0));
    const int64_t end = lines_ * (chunk + 1) / chunks_, height = geometry_.output[1];
    for (int64_t line = lines_ * chunk / chunks_; line < end;) {
      const int64_t rows = std::min({end - line, height - line % height, strip_});
      for (int64_t x = 0; x < geometry_.output[2]; x += segment_)
        add_strip(channel_block(index), line, rows, x, std::min(segment_, geometry_.output[2] - x), s, sums);
      line += rows;
    }
  }

  // Adds the chunks of one block of filters and writes its weights.
  void finish(int64_t index) const {
    const ChannelBlock<A> block = channel_block(index);
    for (int64_t tap = 0; tap < geometry_.taps(); ++tap)
      for (int64_t j = 0; j < reads_; ++j) {
        vec<A> sum{};
        for (int64_t chunk = 0; chunk < chunks_; ++chunk)
          sum += load(partial(chunk, index) + (tap * reads_ + j) * lanes<A>);
        A values[lanes<A>];
        store(values, sum);
        T* target = arguments_.weight + block.first * arguments_.weight_stride_filter() +
                    j * arguments_.weight_stride_channel + tap * arguments_.weight_stride_tap;
        for (int64_t lane = 0; lane < block.count; ++lane, target += arguments_.weight_stride_filter())
          *target = from_accumulate<T>(values[lane]);
      }
  }

 private:
  static constexpr int64_t kChunks = 16;
  static constexpr int64_t kSegment = 128;
  static constexpr int64_t kStrip = 16;
  static constexpr int64_t kSpreadBytes = int64_t{1} << 18;  // of a strip's lines

  struct Scratch {
    A* lines;     // of the input, [slot][read channel] or, spread, [slot][read channel][lane]
    A* buffer;    // for spreading
    A* gradient;  // [pixel][lane] of one line
  };
  Scratch carve(Carver& carver) const {
    const AxisPhase& rows = phase_.axis[1];
    const int64_t height = (strip_ - 1) * rows.read_step + (rows.taps - 1) * rows.offset_step + 1;
    return {carver.take<A>(phase_.axis[0].taps * height * line_size()), carver.take<A>(slots_ * lanes<A>),
            carver.take<A>(segment_ * lanes<A>)};
  }

  ChannelBlock<A> channel_block(int64_t index) const {
    return ChannelBlock<A>(index, geometry_.groups, reads_, geometry_.out_channels_per_group());
  }
  int64_t block_weights() const { return geometry_.taps() * reads_ * lanes<A>; }
  int64_t line_size() const { return slots_ * pixel_size_; }
  A* partial(int64_t chunk, int64_t index) const {
    return static_cast<A*>(arguments_.shared) + (chunk * blocks_ + index) * block_weights();
  }

  // Neighbouring output lines of one plane, pixels x .. x + columns.
  void add_strip(const ChannelBlock<A>& block, int64_t line, int64_t rows, int64_t x, int64_t columns, const Scratch& s,
                 A* sums) const {
    const AxisPhase *az = &phase_.axis[0], *ay = &phase_.axis[1], *ax = &phase_.axis[2];
    const PixelWalk at(phase_, line * geometry_.output[2]);
    const T* image = arguments_.input + at.n * geometry_.input_pixels() * geometry_.in_channels;
    const int64_t first = x * ax->read_step + ax->offset_first;
    const SpreadLines<T> spreading(arguments_.layout, geometry_.input, geometry_.in_channels, block, first, slots_);
    const StripLines<T> copying{
        arguments_.layout, geometry_.input, geometry_.in_channels, block.first_read, reads_, first, slots_,
        pixel_size_};
    const int64_t height = (rows - 1) * ay->read_step + (ay->taps - 1) * ay->offset_step + 1;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t i = 0; i < height; ++i) {
        const int64_t z = at.z * az->read_step + az->offset(jz), y = at.y * ay->read_step + ay->offset_first + i;
        A* to = s.lines + (jz * height + i) * line_size();
        if (broadcasts_)
          copying.copy(image, z, y, to);
        else
          spreading.spread(image, z, y, s.buffer, to);
      }
    for (int64_t row = 0; row < rows; ++row) {
      load_gradient(block, at.n, (at.z * geometry_.output[1] + at.y + row) * geometry_.output[2] + x, columns,
                    s.gradient);
      A* target = sums;
      const int64_t tap_line = ay->offset_step * line_size();
      for (int64_t jz = 0; jz < az->taps; ++jz) {
        const Line line{s.lines + (jz * height + row * ay->read_step) * line_size(), s.gradient, columns};
        if (reads_ == 1 && !broadcasts_ && ay->taps == 3 && three_neighbours(*ax)) {
          ax->read_step == 1 ? add_products<1, 3, 3>(line, tap_line, target)
                             : add_products<2, 3, 3>(line, tap_line, target);
          target += ay->taps * ax->taps * lanes<A>;
          continue;
        }
        for (int64_t jy = 0; jy < ay->taps; ++jy)
          for (int64_t jx = 0; jx < ax->taps;) {
            const Line from{line.input + jy * tap_line + jx * ax->offset_step * pixel_size_, s.gradient, columns};
            const int64_t taps = add_some_taps(from, ax->taps - jx, target);
            jx += taps, target += taps * reads_ * lanes<A>;
          }
      }
    }
  }

  void load_gradient(const ChannelBlock<A>& block, int64_t n, int64_t pixel, int64_t columns, A* gradient) const {
    const int64_t channels = geometry_.out_channels, plane = geometry_.output_pixels();
    if (last_) {
      const T* from = arguments_.output + (n * plane + pixel) * channels + block.first;
      for (int64_t i = 0; i < columns; ++i, from += channels)
        store(gradient + i * lanes<A>, block.count == lanes<A> ? load(from) : load_partial(from, block.count));
    } else {
      transpose_matrix(arguments_.output + (n * channels + block.first) * plane + pixel, plane, block.count, columns,
                       gradient, lanes<A>);
    }
  }

  struct Line {
    const A *input, *gradient;
    int64_t columns;
  };

  // Neighbouring taps of one line, as many of `left` as a kernel takes; returns how many.
  int64_t add_some_taps(const Line& line, int64_t left, A* sums) const {
    if (broadcasts_) return left >= 3 ? add_taps<3, true>(line, sums) : add_taps<1, true>(line, sums);
    if (reads_ > 1) return left >= 3 ? add_taps<3, false>(line, sums) : add_taps<1, false>(line, sums);
    const AxisPhase& axis = phase_.axis[2];
    const bool follow = axis.offset_step == 1 && axis.read_step == 1;
    if (left >= 7) return follow ? add_products<1, 1, 7>(line, 0, sums) : add_products<0, 1, 7>(line, 0, sums);
    if (left >= 5) return follow ? add_products<1, 1, 5>(line, 0, sums) : add_products<0, 1, 5>(line, 0, sums);
    if (left >= 3) return follow ? add_products<1, 1, 3>(line, 0, sums) : add_products<0, 1, 3>(line, 0, sums);
    return add_products<0, 1, 1>(line, 0, sums);
  }

  // One read channel: sums[row of taps][tap][lane], of lines of the input that are `tap_line` apart.
  template <int Step, int Rows, int Taps>
  int64_t add_products(const Line& line, int64_t tap_line, A* sums) const {
    const AxisPhase& axis = phase_.axis[2];
    ProductRun<A, LinePixels<A>, Rows> run{line.gradient, lanes<A>, lanes<A>, {}};
    vec<A> sum[Rows][Taps];
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) {
      run.input[r] = {line.input + r * tap_line, axis.offset_step * pixel_size_, axis.read_step * pixel_size_};
      CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) sum[r][t] = vec<A>{};
    }
    CONVLAB_ISA::add_products<Step, true>(run, line.columns, sum);
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
      A* target = sums + (r * Taps + t) * lanes<A>;
      store(target, load(target) + sum[r][t]);
    }
    return Taps;
  }

  // sums[tap][read channel][lane] of neighbouring taps.
  template <int Taps, bool Broadcasts>
  int64_t add_taps(const Line& line, A* sums) const {
    constexpr int together = 4;
    int64_t j = 0;
    for (; j + together <= reads_; j += together) add<Taps, together, Broadcasts>(line, j, sums);
    for (; j < reads_; ++j) add<Taps, 1, Broadcasts>(line, j, sums);
    return Taps;
  }

  // Read channels from number j on, over the pixels of a line.
  template <int Taps, int Reads, bool Broadcasts>
  void add(const Line& line, int64_t j, A* sums) const {
    constexpr int apart = Broadcasts ? 1 : lanes<A>;
    const AxisPhase& axis = phase_.axis[2];
    const int64_t step = axis.read_step * pixel_size_, tap_step = axis.offset_step * pixel_size_;
    const A *input = line.input + j * apart, *gradient = line.gradient;
    vec<A> sum[Taps][Reads] = {};
    for (int64_t i = 0; i < line.columns; ++i, input += step, gradient += lanes<A>) {
      const vec<A> g = load(gradient);
      CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) CONVLAB_UNROLL for (int r = 0; r < Reads; ++r) {
        const A* at = input + t * tap_step + r * apart;
        vec<A> x = Broadcasts ? broadcast(*at) : load(at);
        if (Broadcasts) pin(x);
        sum[t][r] = fma(x, g, sum[t][r]);
      }
    }
    CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) CONVLAB_UNROLL for (int r = 0; r < Reads; ++r) {
      A* target = sums + (t * reads_ + j + r) * lanes<A>;
      store(target, load(target) + sum[t][r]);
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  bool last_, broadcasts_;
  int64_t reads_, pixel_size_, blocks_, lines_, chunks_, segment_, slots_, strip_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
