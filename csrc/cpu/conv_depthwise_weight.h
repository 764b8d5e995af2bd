// Depthwise convolution, backward weight, on N(D)HWC.
//
// Idea: lanes are channels. Along a piece of a line the sums of neighbouring taps stay in registers, and what is loaded
// of the input meets all the taps of four pixels that read it. Short lines are read through a list of pixels, with
// zeros around them; with many taps lines are copied first (conv_depthwise_copied.h). A task sums a chunk of output
// lines for some channels; chunks depend on the geometry alone and are added in order. Cost: multiply_adds(), and about
// two loads for each pixel, vector of channels and run of taps. Memory: chunks x weights, and per thread a list or
// copies of some lines, about 256 KB (a few MB with the largest kernels). Limits: taps are taken one by one near the
// borders of longer lines; of dilated kernels and strides beyond 2, three taps share the gradient's load alone.
#pragma once
#include "conv_depthwise.h"
#include "conv_depthwise_copied.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class DepthwiseWeightChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseWeightChannelsLast(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        geometry_(arguments.geometry),
        phase_(phase_at(geometry_, Pass::forward, 0)),
        copied_lines_(arguments, phase_) {
    channels_ = geometry_.groups;
    pitch_ = round_up(channels_, lanes<A>);
    const AxisPhase& axis = phase_.axis[2];
    slots_ = (axis.count - 1) * axis.read_step + axis.taps;
    lists_ = axis.offset_step == 1 && axis.read_step <= 2 && axis.taps >= 3 && axis.count <= kListedColumns;
    lines_ = geometry_.batch * geometry_.output[0] * geometry_.output[1];
    const int64_t columns = geometry_.output[2];
    pieces_ = std::max<int64_t>(1, divide_up(columns, kPiece));
    // What a chunk leaves to add up is little against its own sums. Where that makes few tasks, they have fewer
    // channels each, and only then fewer pixels.
    const int64_t pixels = lines_ * columns;
    chunks_ = std::clamp<int64_t>(pixels / kChunkPixels, 1, kChunks);
    block_ = kChannels;
    while (block_ > kFewestChannels && chunks_ * divide_up(channels_, block_) < kTasks) block_ /= 2;
    channel_blocks_ = divide_up(channels_, block_);
    const int64_t wanted = divide_up(kTasks, std::max<int64_t>(1, channel_blocks_));
    chunks_ = std::min(lines_, std::max(chunks_, std::min({wanted, kChunks, pixels / kFewestPixels})));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_ * channel_blocks_;
    plan.finish_tasks = channel_blocks_;
    plan.shared_bytes = chunks_ * geometry_.taps() * pitch_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    copied_lines_.carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void run(void* scratch, int64_t task) const {
    const int64_t chunk = task / channel_blocks_, first = task % channel_blocks_ * block_;
    const int64_t end = std::min(channels_, first + block_), taps = geometry_.taps();
    Carver carver(scratch);
    const Scratch s = carve(carver);
    std::fill(s.zeros, s.zeros + kChannels, T{});
    const auto copies = copied_lines_.carve(carver);
    const AxisPhase *az = &phase_.axis[0], *ay = &phase_.axis[1], *ax = &phase_.axis[2];
    for (int64_t j = 0; j < ax->taps; ++j)
      s.inside[j] = Inside(ax->offset(j), ax->read_step, ax->count, geometry_.input[2]);
    for (int64_t tap = 0; tap < taps; ++tap)
      std::fill(partial(chunk, tap) + first, partial(chunk, tap) + std::min(pitch_, first + block_), A(0));
    const int64_t begin = lines_ * chunk / chunks_, stop = lines_ * (chunk + 1) / chunks_;
    int64_t channel = first;  // the first that is not done
    if (copied_lines_.suits(geometry_)) {
      channel = end - (end - first) % lanes<A>;
      copied_lines_.add(begin, stop, first, channel, partial(chunk, 0), pitch_, copies);
      if (channel == end) return;
    }
    const int64_t columns = geometry_.output[2];
    const Kernels line_kernels{kernel<true>(), kernel<false>()};
    const Kernels rows_kernels{rows_kernel<true>(), rows_kernel<false>()};
    const bool in_rows = three_neighbours(*ax) && ay->taps == kRows;
    for (int64_t line = begin; line < stop; ++line) {
      const PixelWalk pixel(phase_, line * columns);
      const T* image = arguments_.input + pixel.n * geometry_.input_pixels() * channels_;
      const auto line_at = [&](int64_t jz, int64_t jy) -> const T* {
        const int64_t z = pixel.z * az->read_step + az->offset(jz), y = pixel.y * ay->read_step + ay->offset(jy);
        const bool outside = z < 0 || z >= geometry_.input[0] || y < 0 || y >= geometry_.input[1];
        return outside ? nullptr : image + (z * geometry_.input[1] + y) * geometry_.input[2] * channels_;
      };
      Lines lines{arguments_.output + line * columns * channels_, {}, s.inside, s.listed};
      for (int64_t jz = 0; jz < az->taps; ++jz)
        for (int64_t jy = 0; jy < ay->taps; ++jy) {
          A* sums = partial(chunk, (jz * ay->taps + jy) * ax->taps);
          lines.input[0] = line_at(jz, jy);
          if (!lines.input[0]) continue;
          if (in_rows && jy == 0 && line_at(jz, kRows - 1)) {
            for (int64_t row = 1; row < kRows; ++row) lines.input[row] = line_at(jz, row);
            if (lists_) list_pixels(lines, kRows, channel, s);
            add_lines(rows_kernels, lines, channel, end, sums);
            break;
          }
          if (lists_) list_pixels(lines, 1, channel, s);
          add_lines(line_kernels, lines, channel, end, sums);
        }
    }
  }

  void finish(int64_t task) const {
    const int64_t taps = geometry_.taps(), end = std::min(channels_, (task + 1) * block_);
    for (int64_t c = task * block_; c < end; c += lanes<A>)
      for (int64_t tap = 0; tap < taps; ++tap) {
        vec<A> sum{};
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += load(partial(chunk, tap) + c);
        A values[lanes<A>];
        store(values, sum);
        for (int64_t lane = 0; lane < std::min<int64_t>(lanes<A>, end - c); ++lane)
          arguments_.weight[(c + lane) * taps + tap] = from_accumulate<T>(values[lane]);
      }
  }

 private:
  static constexpr int64_t kChannels = 512 / static_cast<int64_t>(sizeof(A));  // of a task: memory is read in order
  static constexpr int64_t kFewestChannels = kChannels / 2, kFewestPixels = 64;
  static constexpr int64_t kChunks = 16, kChunkPixels = 256, kTasks = 16;
  static constexpr int64_t kPiece = 64;  // pixels of a line that several runs of taps find in cache
  static constexpr int64_t kListedColumns = 32;
  static constexpr int kRows = 3;  // of taps whose sums are in registers together, if each has three

  struct Lines {
    const T *gradient, *input[kRows];  // from their first pixel and channel on; of the input, those that are summed
    const Inside* inside;              // pixels for which each tap has something to read
    const T* const* listed;            // or by line of the input, what all taps read
  };

  struct Scratch {
    Inside* inside;
    const T** listed;
    T* zeros;
  };
  Scratch carve(Carver& carver) const {
    return {carver.take<Inside>(geometry_.kernel[2]), carver.take<const T*>(lists_ ? kRows * slots_ : 0),
            carver.take<T>(kChannels)};
  }

  // Short lines have more borders than they are worth: a list of pixels has zeros there.
  void list_pixels(const Lines& lines, int64_t rows, int64_t first, const Scratch& s) const {
    const int64_t left = -phase_.axis[2].offset(0), width = geometry_.input[2];
    const int64_t begin = std::clamp<int64_t>(left, 0, slots_), end = std::clamp(width + left, begin, slots_);
    for (int64_t row = 0; row < rows; ++row) {
      const T** list = s.listed + row * slots_;
      std::fill(list, list + begin, s.zeros);
      for (int64_t slot = begin; slot < end; ++slot) list[slot] = lines.input[row] + (slot - left) * channels_ + first;
      std::fill(list + end, list + slots_, s.zeros);
    }
  }

  A* partial(int64_t chunk, int64_t tap) const {
    return static_cast<A*>(arguments_.shared) + (chunk * geometry_.taps() + tap) * pitch_;
  }

  // Some neighbouring pixels of a line, and a vector of channels.
  struct Piece {
    int64_t begin, end, channel, left;
    int64_t listed_channel;  // from the first listed on
  };
  using Kernel = void (DepthwiseWeightChannelsLast::*)(const Lines& lines, const Piece& piece, A* sums) const;

  struct Kernels {
    Kernel whole, part;  // for vectors of channels all of which are there, and not
  };

  template <int Step, int Rows, int Taps, bool Whole>
  Kernel piece_kernel() const {
    if constexpr (Step > 0 && Whole)
      if (lists_) return &DepthwiseWeightChannelsLast::add_piece<Step, Rows, Taps, Whole, true>;
    return &DepthwiseWeightChannelsLast::add_piece<Step, Rows, Taps, Whole, false>;
  }
  // For three lines of three neighbouring taps.
  template <bool Whole>
  Kernel rows_kernel() const {
    return phase_.axis[2].read_step == 1 ? piece_kernel<1, kRows, 3, Whole>() : piece_kernel<2, kRows, 3, Whole>();
  }
  // For one line of taps.
  template <bool Whole>
  Kernel kernel() const {
    const AxisPhase& axis = phase_.axis[2];
    if (axis.offset_step != 1 || axis.read_step > 2)
      return axis.taps >= 3 ? piece_kernel<0, 1, 3, Whole>() : piece_kernel<0, 1, 1, Whole>();
    if (axis.read_step == 2) {
      if (axis.taps >= 5) return piece_kernel<2, 1, 5, Whole>();
      return axis.taps >= 3 ? piece_kernel<2, 1, 3, Whole>() : piece_kernel<0, 1, 1, Whole>();
    }
    if (axis.taps % 5 == 0) return piece_kernel<1, 1, 5, Whole>();
    if (axis.taps >= 6) return piece_kernel<1, 1, 7, Whole>();
    if (axis.taps == 4) return piece_kernel<1, 1, 4, Whole>();
    return axis.taps == 3 ? piece_kernel<1, 1, 3, Whole>() : piece_kernel<0, 1, 1, Whole>();
  }

  // What a line of outputs adds to sums[row of taps][tap][channel].
  void add_lines(const Kernels& kernels, const Lines& lines, int64_t first, int64_t end, A* sums) const {
    const int64_t columns = geometry_.output[2];
    for (int64_t piece = 0; piece < pieces_; ++piece)
      for (int64_t c = first; c < end; c += lanes<A>)
        (this->*(end - c >= lanes<A> ? kernels.whole : kernels.part))(
            lines, {columns * piece / pieces_, columns * (piece + 1) / pieces_, c, end - c, c - first}, sums + c);
  }

  template <int Step, int Rows, int Taps, bool Whole, bool Listed>
  void add_piece(const Lines& lines, const Piece& piece, A* sums) const {
    const int64_t taps = geometry_.kernel[2];
    int64_t j = 0;
    for (; j + Taps <= taps; j += Taps) add_taps<Step, Rows, Taps, Whole, Listed>(lines, piece, j, sums);
    if constexpr (Taps > 4)
      for (; j + 3 <= taps; j += 3) add_taps<Step, Rows, 3, Whole, Listed>(lines, piece, j, sums);
    if constexpr (Rows == 1)
      for (; j < taps; ++j) add_taps<0, Rows, 1, Whole, Listed>(lines, piece, j, sums);
  }

  // Taps from number j on.
  template <int Step, int Rows, int Taps, bool Whole, bool Listed>
  CONVLAB_INLINE void add_taps(const Lines& lines, const Piece& piece, int64_t j, A* sums) const {
    // Each piece starts from zero: chains of additions stay short.
    vec<A> sum[Rows][Taps];
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) sum[r][t] = vec<A>{};
    if constexpr (Listed) {
      ProductRun<T, ListedLine<T>, Rows> run{lines.gradient + piece.channel, channels_, piece.left, {}};
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r)
          run.input[r] = {lines.listed + r * slots_ + j, piece.listed_channel, phase_.axis[2].read_step};
      add_products<Step, Whole>(run, piece.end, sum);
    } else {
      sum_line<Step, Rows, Taps, Whole>(lines, piece, j, sum);
    }
    A* target = sums + j * pitch_;
    const int64_t row_pitch = phase_.axis[2].taps * pitch_;
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
      A* at = target + r * row_pitch + t * pitch_;
      store(at, load(at) + sum[r][t]);
    }
  }

  // All taps together where all read inside the line, one by one where only some do.
  template <int Step, int Rows, int Taps, bool Whole>
  CONVLAB_INLINE void sum_line(const Lines& lines, const Piece& piece, int64_t j, vec<A> (&sum)[Rows][Taps]) const {
    const AxisPhase& axis = phase_.axis[2];
    const Inside *first = lines.inside + j, *last = first + Taps - 1;
    // Taps from `tap` on, from a pixel on.
    const auto run = [&](int64_t pixel, int64_t tap) {
      ProductRun<T, LinePixels<T>, Rows> run{
          lines.gradient + pixel * channels_ + piece.channel, channels_, piece.left, {}};
      const int64_t offset = (pixel * axis.read_step + axis.offset(tap)) * channels_ + piece.channel;
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r)
          run.input[r] = {lines.input[r] + offset, axis.offset_step * channels_, axis.read_step * channels_};
      return run;
    };
    int64_t from = std::max({piece.begin, first->begin, last->begin}),
            to = std::min({piece.end, first->end, last->end});
    if (from < to)
      add_products<Step, Whole>(run(from, j), to - from, sum);
    else
      from = to = piece.begin;
    if constexpr (Taps > 1)
      if (from > piece.begin || to < piece.end) {
        CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
          const auto add = [&](int64_t pixel, int64_t stop) {
            for (; pixel < stop; ++pixel) {
              const auto one = run(pixel, j + t);
              const vec<A> gradient = one.template value<Whole>(one.gradient);
              CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) sum[r][t] =
                  fma(one.template value<Whole>(one.input[r].at(0)), gradient, sum[r][t]);
            }
          };
          add(std::max(piece.begin, first[t].begin), std::min(from, first[t].end));
          add(std::max(to, first[t].begin), std::min(piece.end, first[t].end));
        }
      }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  CopiedLines<T> copied_lines_;
  bool lists_;
  int64_t slots_;
  int64_t channels_, pitch_, block_, channel_blocks_, lines_, pieces_, chunks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
