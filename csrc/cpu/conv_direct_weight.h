// Direct convolution, backward weight: see conv_direct.h.
//
// A lane is a filter; each (tap, read channel) has a vector of sums, to which every pixel adds its grad_output times
// the spread input that the tap reads. Sums of a chunk of lines go to the workspace; chunks depend on the geometry
// alone and `finish` adds them in order. Memory: chunks x weights, and per thread some spread lines.
#pragma once
#include "conv_depthwise_weight.h"
#include "conv_direct_lines.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class DirectWeight {
 public:
  using A = accumulate_t<T>;

  explicit DirectWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase_at(geometry_, Pass::forward, 0)) {
    last_ = arguments.layout == Layout::channels_last;
    reads_ = geometry_.in_channels_per_group();
    blocks_ = ChannelBlock<A>::blocks(geometry_.groups, geometry_.out_channels_per_group());
    lines_ = geometry_.batch * geometry_.output[0] * geometry_.output[1];
    chunks_ = std::min(lines_, kChunks);
    segment_ = std::min(geometry_.output[2], kSegment);
    const AxisPhase &rows = phase_.axis[1], &columns = phase_.axis[2];
    slots_ = (segment_ - 1) * columns.read_step + (columns.taps - 1) * columns.offset_step + 1;
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
  static constexpr int64_t kSpreadBytes = int64_t{1} << 18;

  struct Scratch {
    A* lines;     // spread input
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
  int64_t pixel_size() const { return reads_ * lanes<A>; }
  int64_t line_size() const { return slots_ * pixel_size(); }
  A* partial(int64_t chunk, int64_t index) const {
    return static_cast<A*>(arguments_.shared) + (chunk * blocks_ + index) * block_weights();
  }

  // Neighbouring output lines of one plane, pixels x .. x + columns.
  void add_strip(const ChannelBlock<A>& block, int64_t line, int64_t rows, int64_t x, int64_t columns, const Scratch& s,
                 A* sums) const {
    const AxisPhase *az = &phase_.axis[0], *ay = &phase_.axis[1], *ax = &phase_.axis[2];
    const PixelWalk at(phase_, line * geometry_.output[2]);
    const T* image = arguments_.input + at.n * geometry_.input_pixels() * geometry_.in_channels;
    const SpreadLines<T> spreading(arguments_.layout, geometry_.input, geometry_.in_channels, block,
                                   x * ax->read_step + ax->offset_first, slots_);
    const int64_t height = (rows - 1) * ay->read_step + (ay->taps - 1) * ay->offset_step + 1;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t i = 0; i < height; ++i)
        spreading.spread(image, at.z * az->read_step + az->offset(jz), at.y * ay->read_step + ay->offset_first + i,
                         s.buffer, s.lines + (jz * height + i) * line_size());
    for (int64_t row = 0; row < rows; ++row) {
      load_gradient(block, at.n, (at.z * geometry_.output[1] + at.y + row) * geometry_.output[2] + x, columns,
                    s.gradient);
      A* target = sums;
      for (int64_t jz = 0; jz < az->taps; ++jz)
        for (int64_t jy = 0; jy < ay->taps; ++jy) {
          const A* spread = s.lines + (jz * height + row * ay->read_step + jy * ay->offset_step) * line_size();
          int64_t jx = 0;
          for (; jx + 3 <= ax->taps; jx += 3, target += 3 * pixel_size())
            add_taps<3>(spread + jx * ax->offset_step * pixel_size(), columns, s.gradient, target);
          for (; jx < ax->taps; ++jx, target += pixel_size())
            add_taps<1>(spread + jx * ax->offset_step * pixel_size(), columns, s.gradient, target);
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

  template <int Taps>
  void add_taps(const A* spread, int64_t columns, const A* gradient, A* sums) const {
    int64_t j = 0;
    for (; j + 4 <= reads_; j += 4) add<Taps, 4>(spread + j * lanes<A>, columns, gradient, sums + j * lanes<A>);
    for (; j < reads_; ++j) add<Taps, 1>(spread + j * lanes<A>, columns, gradient, sums + j * lanes<A>);
  }

  // Sums of neighbouring taps and read channels over the pixels of a line.
  template <int Taps, int Reads>
  void add(const A* spread, int64_t columns, const A* gradient, A* sums) const {
    const AxisPhase& axis = phase_.axis[2];
    const int64_t step = axis.read_step * pixel_size(), tap_step = axis.offset_step * pixel_size();
    vec<A> sum[Taps][Reads] = {};
    for (int64_t i = 0; i < columns; ++i, spread += step, gradient += lanes<A>) {
      const vec<A> g = load(gradient);
      CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) CONVLAB_UNROLL for (int r = 0; r < Reads; ++r) sum[t][r] =
          fma(load(spread + t * tap_step + r * lanes<A>), g, sum[t][r]);
    }
    CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) CONVLAB_UNROLL for (int r = 0; r < Reads; ++r) {
      A* target = sums + t * pixel_size() + r * lanes<A>;
      store(target, load(target) + sum[t][r]);
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  bool last_;
  int64_t reads_, blocks_, lines_, chunks_, segment_, slots_, strip_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
