// Depthwise convolution, backward weight, on N(D)HWC.
//
// Idea: lanes are channels. Along a piece of a line the sums of neighbouring taps stay in registers, and what is loaded
// of the input meets all the taps of four pixels that read it. A task sums a chunk of output lines for some channels;
// chunks depend on the geometry alone and are added in order. Cost: multiply_adds(), and about two loads for each
// pixel, vector of channels and run of taps. Memory: chunks x weights. Limits: taps are taken one by one near the
// borders; of dilated kernels and strides beyond 2, three taps share the gradient's load alone.
#pragma once
#include "conv_depthwise.h"

namespace convlab::cpu::CONVLAB_ISA {

// A run of pixels: pixel i has its gradient at gradient + i * gradient_pitch, and tap j of a row of taps reads
// input[row] + i * step + j * tap_step; of each vector, `left` lanes are there.
template <class T, int Rows>
struct ProductRun {
  const T *gradient, *input[Rows];
  int64_t gradient_pitch, step, tap_step, left;

  template <bool Whole>
  CONVLAB_INLINE vec<accumulate_t<T>> value(const T* p) const {
    return Whole ? load(p) : load_partial(p, left);
  }
};

// sum[row][j] += the products of tap j over `count` pixels. Step: pixels are so many taps apart (0: any, and no input
// is read twice by neighbouring pixels).
template <int Step, bool Whole, class T, int Rows, int Taps>
CONVLAB_INLINE void add_products(ProductRun<T, Rows> run, int64_t count, vec<accumulate_t<T>> (&sum)[Rows][Taps]) {
  using A = accumulate_t<T>;
  constexpr int pixels = 4, chains = Rows * Taps > 4 ? 1 : Rows * Taps > 1 ? 2 : 4;
  const auto value = [&](const T* p) { return run.template value<Whole>(p); };
  vec<A> chain[chains][Rows][Taps];
  CONVLAB_UNROLL for (int c = 0; c < chains; ++c) CONVLAB_UNROLL for (int r = 0; r < Rows; ++r)
      CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) chain[c][r][j] = c == 0 ? sum[r][j] : vec<A>{};
  for (; count >= pixels; count -= pixels) {
    vec<A> gradient[pixels];
    CONVLAB_UNROLL for (int p = 0; p < pixels; ++p) {
      gradient[p] = value(run.gradient);
      run.gradient += run.gradient_pitch;
    }
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) {
      const T* from = run.input[r];
      if constexpr (Step > 0) {
        CONVLAB_UNROLL for (int q = 0; q < (pixels - 1) * Step + Taps; ++q) {
          vec<A> x = value(from);
          pin(x);
          from += run.tap_step;
          pin_pointer(from);  // counted up: multiples of the distance would not fit into registers
          CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
            const int p = (q - j) / Step;
            if (q >= j && (q - j) % Step == 0 && p < pixels)
              chain[p % chains][r][j] = fma(x, gradient[p], chain[p % chains][r][j]);
          }
        }
      } else {
        CONVLAB_UNROLL for (int p = 0; p < pixels; ++p, from += run.step) CONVLAB_UNROLL for (int j = 0; j < Taps; ++j)
            chain[p % chains][r][j] = fma(value(from + j * run.tap_step), gradient[p], chain[p % chains][r][j]);
      }
      run.input[r] += pixels * run.step;
    }
  }
  for (; count > 0; --count, run.gradient += run.gradient_pitch) {
    const vec<A> gradient = value(run.gradient);
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) {
      CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) chain[0][r][j] =
          fma(value(run.input[r] + j * run.tap_step), gradient, chain[0][r][j]);
      run.input[r] += run.step;
    }
  }
  CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int j = 0; j < Taps; ++j) {
    sum[r][j] = chain[0][r][j];
    CONVLAB_UNROLL for (int c = 1; c < chains; ++c) sum[r][j] += chain[c][r][j];
  }
}

// Whether a line of taps is what three rows of nine sums are made for.
inline bool three_neighbours(const AxisPhase& axis) {
  return axis.taps == 3 && axis.offset_step == 1 && axis.read_step <= 2;
}

template <class T>
class DepthwiseWeightChannelsLast {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseWeightChannelsLast(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase_at(geometry_, Pass::forward, 0)) {
    channels_ = geometry_.groups;
    pitch_ = round_up(channels_, lanes<A>);
    channel_blocks_ = divide_up(channels_, kChannels);
    lines_ = geometry_.batch * geometry_.output[0] * geometry_.output[1];
    const int64_t columns = geometry_.output[2];
    pieces_ = std::max<int64_t>(1, divide_up(columns, kPiece));
    // What a chunk leaves to add up is little against its own sums, unless tasks would be too few.
    const int64_t enough = divide_up(kTasks, std::max<int64_t>(1, channel_blocks_));
    chunks_ = std::min(lines_, std::clamp(lines_ * columns / kChunkPixels, std::min(enough, kChunks), kChunks));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_ * channel_blocks_;
    plan.finish_tasks = channel_blocks_;
    plan.shared_bytes = chunks_ * geometry_.taps() * pitch_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void run(void* scratch, int64_t task) const {
    const int64_t chunk = task / channel_blocks_, first = task % channel_blocks_ * kChannels;
    const int64_t end = std::min(channels_, first + kChannels), taps = geometry_.taps();
    Carver carver(scratch);
    Inside* inside = carve(carver);
    const AxisPhase *az = &phase_.axis[0], *ay = &phase_.axis[1], *ax = &phase_.axis[2];
    for (int64_t j = 0; j < ax->taps; ++j)
      inside[j] = Inside(ax->offset(j), ax->read_step, ax->count, geometry_.input[2]);
    for (int64_t tap = 0; tap < taps; ++tap)
      std::fill(partial(chunk, tap) + first, partial(chunk, tap) + std::min(pitch_, first + kChannels), A(0));
    const int64_t columns = geometry_.output[2];
    const Kernels line_kernels{kernel<true>(), kernel<false>()};
    const Kernels rows_kernels{rows_kernel<true>(), rows_kernel<false>()};
    const bool in_rows = three_neighbours(*ax) && ay->taps == kRows;
    for (int64_t line = lines_ * chunk / chunks_; line < lines_ * (chunk + 1) / chunks_; ++line) {
      const PixelWalk pixel(phase_, line * columns);
      const T* image = arguments_.input + pixel.n * geometry_.input_pixels() * channels_;
      const auto line_at = [&](int64_t jz, int64_t jy) -> const T* {
        const int64_t z = pixel.z * az->read_step + az->offset(jz), y = pixel.y * ay->read_step + ay->offset(jy);
        const bool outside = z < 0 || z >= geometry_.input[0] || y < 0 || y >= geometry_.input[1];
        return outside ? nullptr : image + (z * geometry_.input[1] + y) * geometry_.input[2] * channels_;
      };
      Lines lines{arguments_.output + line * columns * channels_, {}, inside};
      for (int64_t jz = 0; jz < az->taps; ++jz)
        for (int64_t jy = 0; jy < ay->taps; ++jy) {
          A* sums = partial(chunk, (jz * ay->taps + jy) * ax->taps);
          lines.input[0] = line_at(jz, jy);
          if (!lines.input[0]) continue;
          if (in_rows && jy == 0 && line_at(jz, kRows - 1)) {
            for (int64_t row = 1; row < kRows; ++row) lines.input[row] = line_at(jz, row);
            add_lines(rows_kernels, lines, first, end, sums);
            break;
          }
          add_lines(line_kernels, lines, first, end, sums);
        }
    }
  }

  void finish(int64_t task) const {
    const int64_t taps = geometry_.taps(), end = std::min(channels_, (task + 1) * kChannels);
    for (int64_t c = task * kChannels; c < end; c += lanes<A>)
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
  static constexpr int64_t kChunks = 16, kChunkPixels = 512, kTasks = 32;
  static constexpr int64_t kPiece = 64;  // pixels of a line that several runs of taps find in cache
  static constexpr int kRows = 3;        // of taps whose sums are in registers together, if each has three

  struct Lines {
    const T *gradient, *input[kRows];  // from their first pixel and channel on; of the input, those that are summed
    const Inside* inside;              // pixels for which each tap has something to read
  };

  Inside* carve(Carver& carver) const { return carver.take<Inside>(geometry_.kernel[2]); }

  A* partial(int64_t chunk, int64_t tap) const {
    return static_cast<A*>(arguments_.shared) + (chunk * geometry_.taps() + tap) * pitch_;
  }

  // Some neighbouring pixels of a line, and a vector of channels.
  struct Piece {
    int64_t begin, end, channel, left;
  };
  using Kernel = void (DepthwiseWeightChannelsLast::*)(const Lines& lines, const Piece& piece, A* sums) const;

  struct Kernels {
    Kernel whole, part;  // for vectors of channels all of which are there, and not
  };

  // For three lines of three neighbouring taps.
  template <bool Whole>
  Kernel rows_kernel() const {
    using Self = DepthwiseWeightChannelsLast;
    return phase_.axis[2].read_step == 1 ? &Self::add_piece<1, kRows, 3, Whole> : &Self::add_piece<2, kRows, 3, Whole>;
  }
  // For one line of taps.
  template <bool Whole>
  Kernel kernel() const {
    using Self = DepthwiseWeightChannelsLast;
    const AxisPhase& axis = phase_.axis[2];
    if (axis.offset_step != 1 || axis.read_step > 2)
      return axis.taps >= 3 ? &Self::add_piece<0, 1, 3, Whole> : &Self::add_piece<0, 1, 1, Whole>;
    if (axis.read_step == 2) {
      if (axis.taps >= 5) return &Self::add_piece<2, 1, 5, Whole>;
      return axis.taps >= 3 ? &Self::add_piece<2, 1, 3, Whole> : &Self::add_piece<0, 1, 1, Whole>;
    }
    if (axis.taps % 5 == 0) return &Self::add_piece<1, 1, 5, Whole>;
    if (axis.taps >= 6) return &Self::add_piece<1, 1, 7, Whole>;
    if (axis.taps == 4) return &Self::add_piece<1, 1, 4, Whole>;
    return axis.taps == 3 ? &Self::add_piece<1, 1, 3, Whole> : &Self::add_piece<0, 1, 1, Whole>;
  }

  // What a line of outputs adds to sums[row of taps][tap][channel].
  void add_lines(const Kernels& kernels, const Lines& lines, int64_t first, int64_t end, A* sums) const {
    const int64_t columns = geometry_.output[2];
    for (int64_t piece = 0; piece < pieces_; ++piece)
      for (int64_t c = first; c < end; c += lanes<A>)
        (this->*(end - c >= lanes<A> ? kernels.whole : kernels.part))(
            lines, {columns * piece / pieces_, columns * (piece + 1) / pieces_, c, end - c}, sums + c);
  }

  template <int Step, int Rows, int Taps, bool Whole>
  void add_piece(const Lines& lines, const Piece& piece, A* sums) const {
    const int64_t taps = geometry_.kernel[2];
    int64_t j = 0;
    for (; j + Taps <= taps; j += Taps) add_taps<Step, Rows, Taps, Whole>(lines, piece, j, sums);
    if constexpr (Taps > 4)
      for (; j + 3 <= taps; j += 3) add_taps<Step, Rows, 3, Whole>(lines, piece, j, sums);
    if constexpr (Rows == 1)
      for (; j < taps; ++j) add_taps<0, Rows, 1, Whole>(lines, piece, j, sums);
  }

  // Taps from number j on.
  template <int Step, int Rows, int Taps, bool Whole>
  CONVLAB_INLINE void add_taps(const Lines& lines, const Piece& piece, int64_t j, A* sums) const {
    const AxisPhase& axis = phase_.axis[2];
    const Inside *first = lines.inside + j, *last = first + Taps - 1;
    // Taps from `tap` on, from a pixel on.
    const auto run = [&](int64_t pixel, int64_t tap) {
      ProductRun<T, Rows> run{lines.gradient + pixel * channels_ + piece.channel,
                              {},
                              channels_,
                              axis.read_step * channels_,
                              axis.offset_step * channels_,
                              piece.left};
      const int64_t offset = (pixel * axis.read_step + axis.offset(tap)) * channels_ + piece.channel;
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) run.input[r] = lines.input[r] + offset;
      return run;
    };
    vec<A> sum[Rows][Taps];
    A* target = sums + j * pitch_;
    const int64_t row_pitch = axis.taps * pitch_;
    // Each piece starts from zero: chains of additions stay short.
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) sum[r][t] = vec<A>{};
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
                  fma(one.template value<Whole>(one.input[r]), gradient, sum[r][t]);
            }
          };
          add(std::max(piece.begin, first[t].begin), std::min(from, first[t].end));
          add(std::max(to, first[t].begin), std::min(piece.end, first[t].end));
        }
      }
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
      A* at = target + r * row_pitch + t * pitch_;
      store(at, load(at) + sum[r][t]);
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  int64_t channels_, pitch_, channel_blocks_, lines_, pieces_, chunks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
