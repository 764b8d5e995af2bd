// Direct convolution, forward and backward input, of groups whose written channels fill vectors; both memory formats.
//
// Idea: all lanes of a vector belong to one group and so read the same channels: an element that is read is broadcast,
// and multiplies a vector of weights. Lines of some groups are copied side by side into a strip whose pixels are a
// constant apart, so that a tile of 12 pixels (AVX2) needs one pointer instead of one per pixel and tap, and has no
// borders to look at. Cost: multiply_adds(), one load more than multiply-adds per vector of weights, and copying the
// lines. Memory: per thread a strip of at most kStripBytes or a kernel's height. Limits: at most kMostReads channels
// per group are read; a last vector that is not full leaves lanes idle.
#pragma once
#include "conv_gather.h"
#include "conv_lines.h"
#include "conv_panels.h"
#include "conv_strips.h"

namespace convlab::cpu::CONVLAB_ISA {

// Where a tap finds its first pixel in the strip, and its weights in a panel, in rows.
struct StripTap {
  int64_t source, row;
};

// A tile of sums: out[pixel * out_pitch + column] = start[column] + what the taps add.
template <class A>
struct StripSum {
  const A* line;  // of the strip, where tap 0 of an undilated kernel reads the first pixel
  const StripTap* taps;
  int64_t tap_count, reads;
  const A* weights;  // a panel
  int64_t step;      // from pixel to pixel, in pixels of the strip
  const A* start;
  A* out;
  int64_t out_pitch;
  bool past_caches;  // `out`, which is aligned then, is written past the caches
};

template <class A>
struct GroupStrip {
  static constexpr int64_t kMostReads = 64;
  // From pixel to pixel: wide ones off a power of two. Few channels stand close, at the usual steps.
  static constexpr int64_t kPitch = kMostReads + lanes<A>, kNarrowPitch = lanes<A>, kFewPitch = StripLines<A>::kFew;
  static int64_t pitch_for(int64_t channels, int64_t step) {
    if (channels <= kFewPitch && step <= 2) return kFewPitch;
    return channels <= kNarrowPitch ? kNarrowPitch : kPitch;
  }
  static constexpr int kSums = kTileRows * kTileVectors;

  // Step: t.step, or 0 for any.
  template <int Pixels, int Vectors, int Step, int64_t Pitch>
  static void sum_tile(const StripSum<A>& t) {
    vec<A> sum[Pixels][Vectors];
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] =
        load(t.start + v * lanes<A>);
    const int64_t pitch = (Step ? Step : t.step) * Pitch, reads = t.reads;
    for (const StripTap* tap = t.taps; tap < t.taps + t.tap_count; ++tap) {
      const A* source = t.line + tap->source;
      const A* weight = t.weights + tap->row * Vectors * lanes<A>;
      for (int64_t c = 0; c < reads; ++c, weight += Vectors * lanes<A>) {
        vec<A> column[Vectors];
        CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
          column[v] = load(weight + v * lanes<A>);
          pin(column[v]);
        }
        CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) {
          vec<A> element = broadcast(source[p * pitch + c]);
          pin(element);
          CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] = fma(element, column[v], sum[p][v]);
        }
      }
    }
    if constexpr (std::is_same_v<A, float>)
      if (t.past_caches) {
        CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
            store_streaming(t.out + p * t.out_pitch + v * lanes<A>, sum[p][v]);
        return;
      }
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
        store(t.out + p * t.out_pitch + v * lanes<A>, sum[p][v]);
  }

  struct Tile {
    int pixels;
    void (*kernel)(const StripSum<A>&);
  };

  template <int Pixels, int Vectors, int64_t Pitch>
  static Tile tile_of(int64_t step) {
    if (step == 1) return {Pixels, sum_tile<Pixels, Vectors, 1, Pitch>};
    if (step == 2) return {Pixels, sum_tile<Pixels, Vectors, 2, Pitch>};
    return {Pixels, sum_tile<Pixels, Vectors, 0, Pitch>};
  }
  template <int Pixels, int Vectors>
  static Tile few_tile_of(int64_t step) {
    if (step == 1) return {Pixels, sum_tile<Pixels, Vectors, 1, kFewPitch>};
    return {Pixels, sum_tile<Pixels, Vectors, 2, kFewPitch>};
  }
  // The tile for a line of `columns` pixels: what takes longest of its multiply-adds and loads, few pixels too many.
  template <int Vectors>
  static Tile best_tile(int64_t columns, int64_t step, int64_t pitch) {
    Tile best{};
    int64_t least = INT64_MAX;
    const auto consider = [&](auto size) {
      constexpr int pixels = size();
      if constexpr (pixels * Vectors <= kSums) {
        const int64_t cost = divide_up(columns, pixels) *
                             std::max({pixels * Vectors, pixels + Vectors, 8});  // or the latency of eight sums
        if (cost >= least) return;
        least = cost;
        best = pitch == kPitch         ? tile_of<pixels, Vectors, kPitch>(step)
               : pitch == kNarrowPitch ? tile_of<pixels, Vectors, kNarrowPitch>(step)
                                       : few_tile_of<pixels, Vectors>(step);
      }
    };
    [&]<int... Size>(std::integer_sequence<int, Size...>) {
      (consider(std::integral_constant<int, Size>{}), ...);
    }(std::integer_sequence<int, 14, 12, 10, 8, 7, 6, 5, 4>{});
    return best;
  }
  static Tile best_tile(int vectors, int64_t columns, int64_t step, int64_t pitch) {
    if constexpr (kTileVectors == 4) {
      if (vectors == 4) return best_tile<4>(columns, step, pitch);
      if (vectors == 3) return best_tile<3>(columns, step, pitch);
    }
    return vectors == 2 ? best_tile<2>(columns, step, pitch) : best_tile<1>(columns, step, pitch);
  }
};

template <class T>
class DirectGroups {
 public:
  using A = accumulate_t<T>;
  using Strip = GroupStrip<A>;

  static constexpr bool kPossible = products<operand_t<T>> == 1;  // bfloat16 in pairs is the matrix product's
  static bool suits(const ConvArguments<T>& arguments) {
    return arguments.written_channels() >= lanes<A> && arguments.read_channels() <= Strip::kMostReads;
  }

  explicit DirectGroups(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const ConvGeometry& g = t_.geometry;
    last_ = arguments.layout == Layout::channels_last;
    reads_ = t_.read_channels;
    // Channels first, few planes are read at a time, many lines of each.
    const int64_t wanted = last_ ? Strip::kMostReads : lanes<A>;
    together_ = std::clamp<int64_t>(wanted / std::max<int64_t>(1, reads_), 1, g.groups);
    const Phase phase = t_.phase(0);  // no other has more pixels
    pitch_ = Strip::pitch_for(together_ * reads_, phase.axis[2].read_step);
    const int64_t used_pitch = std::min(pitch_, round_up(together_ * reads_, 16));
    blocks_ = divide_up(g.groups, together_);
    weights_ = WeightPanels<T>(arguments_, t_, reads_, false);
    const int64_t columns = std::max<int64_t>(1, phase.axis[2].count), rows = std::max<int64_t>(1, phase.axis[1].count);
    segments_ = divide_up(columns, pitch_ == Strip::kFewPitch ? kFewSegment : kSegment);
    segment_ = divide_up(columns, segments_);
    reach_ = StripReach(t_, segment_ + kMostPixels);
    planes_ = std::max<int64_t>(1, phase.axis[0].count);
    const int64_t others = t_.phase_count * g.batch * blocks_ * planes_ * segments_;
    strip_ = strip_rows(std::min(rows, kStrip), [&](int64_t strip) {
      return strip_pixels(strip) * used_pitch * static_cast<int64_t>(sizeof(A)) > kStripBytes ||
             others * divide_up(rows, strip) < enough_tasks(arguments.threads);
    });
    strips_ = divide_up(rows, strip_);
    past_caches_ = last_ && t_.past_caches();
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = weights_.tasks();
    plan.packed_bytes = weights_.bytes();
    plan.run_tasks = t_.phase_count * t_.geometry.batch * blocks_ * planes_ * strips_ * segments_;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void pack(int64_t task) const { weights_.pack(task); }

  // A strip of lines of one phase, image and block of groups.
  void run(void* scratch, int64_t task) const {
    Phase phase = t_.phase(task % t_.phase_count);  // fastest: phases differ in work
    for (AxisPhase& axis : phase.axis) axis = axis.ascending();
    task /= t_.phase_count;
    PixelWalk pixel(phase, 0);
    pixel.x = task % segments_ * segment_, pixel.y = task / segments_ % strips_ * strip_;
    task /= segments_ * strips_;
    pixel.z = task % planes_, pixel.n = task / planes_ / blocks_;
    const int64_t first_group = task / planes_ % blocks_ * together_;
    const int64_t groups = std::min(together_, t_.geometry.groups - first_group);
    const int64_t rows = std::min(strip_, phase.axis[1].count - pixel.y);
    const int64_t columns = std::min(segment_, phase.axis[2].count - pixel.x);
    if (pixel.z >= phase.axis[0].count || rows <= 0 || columns <= 0) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    copy_lines(pixel, first_group, groups, rows, s.lines);
    const int64_t taps = list_taps(phase, s.taps), step = phase.axis[2].read_step;
    const auto tile_for = [&](int64_t panel) {
      return Strip::best_tile(panel_width<A>(t_.written_channels, panel) / lanes<A>, columns, step, pitch_);
    };
    const auto full = tile_for(0), last = tile_for(weights_.count() - 1);
    for (int64_t row = 0; row < rows; ++row, ++pixel.y) {
      const A* line = s.lines + row * phase.axis[1].read_step * line_size();
      for (int64_t group = first_group; group < first_group + groups; ++group, line += reads_)
        for (int64_t panel = 0; panel < weights_.count(); ++panel) {
          const auto& tile = panel + 1 < weights_.count() ? full : last;
          const Target target = target_of(pixel, group, panel);
          t_.load_bias(group, panel * kPanel<A>, kPanel<A>, s.bias);
          const auto sum = [&](int64_t x, A* out, int64_t out_pitch, bool past_caches) {
            tile.kernel({line + x * step * pitch_, s.taps, taps, reads_, weights_.at(group, panel), step, s.bias, out,
                         out_pitch, past_caches});
          };
          int64_t x = 0;  // whole tiles go where they belong at once, if nothing else is to be done
          if constexpr (std::is_same_v<T, A>)
            if (last_ && !t_.epilogue.needed() && target.channels % lanes<A> == 0)
              for (; x + tile.pixels <= columns; x += tile.pixels)
                sum(x, target.first + x * target.step, target.step, past_caches_);
          const int64_t step_stored = last_ ? tile.pixels : columns;  // planes are written a whole line at a time
          for (int64_t begin = x; begin < columns; begin = x) {
            for (; x < std::min(begin + step_stored, columns); x += tile.pixels)
              sum(x, s.sums + (x - begin) * kPanel<A>, kPanel<A>, false);
            store_line(target, begin, std::min(x, columns), s.sums);
          }
        }
    }
    if (past_caches_) store_fence();
  }

 private:
  static constexpr int64_t kMostPixels = 14;                  // of a tile
  static constexpr int64_t kSegment = 64, kFewSegment = 256;  // pixels of a line
  static constexpr int64_t kStrip = 16;                       // lines
  static constexpr int64_t kStripBytes = int64_t{192} << 10;

  struct Scratch {
    A* lines;  // [tap along z][line][slot][channel of the block's groups]
    A* sums;   // [pixel][column] of a line and a panel
    A* bias;
    StripTap* taps;
  };
  Scratch carve(Carver& carver) const {
    return {carver.take<A>(strip_pixels(strip_) * pitch_ + lanes<A>),
            carver.take<A>((segment_ + kMostPixels) * kPanel<A>), carver.take<A>(kPanel<A>),
            carver.take<StripTap>(t_.geometry.taps())};
  }

  int64_t line_size() const { return reach_.slots * pitch_; }
  int64_t strip_pixels(int64_t rows) const { return reach_.planes * reach_.lines_of(rows) * reach_.slots; }

  int64_t list_taps(const Phase& phase, StripTap* taps) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    StripTap* tap = taps;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy)
        for (int64_t jx = 0; jx < ax->taps; ++jx)
          *tap++ = {(jz * reach_.lines_of(strip_) + jy * ay->offset_step) * line_size() + jx * ax->offset_step * pitch_,
                    t_.tap_index(az->tap(jz), ay->tap(jy), ax->tap(jx)) * reads_};
    return tap - taps;
  }

  // What the strip reads, from its first written pixel on; zeros outside the tensor.
  void copy_lines(const PixelWalk& pixel, int64_t first_group, int64_t groups, int64_t rows, A* lines) const {
    const AxisPhase *az = &pixel.phase.axis[0], *ay = &pixel.phase.axis[1], *ax = &pixel.phase.axis[2];
    const int64_t channels = reads_ * t_.geometry.groups;
    const StripLines<T> strip{arguments_.layout,    t_.read_size,    channels,
                              first_group * reads_, groups * reads_, pixel.x * ax->read_step + ax->offset_first,
                              reach_.slots,         pitch_};
    const T* image = t_.read + pixel.n * t_.read_pixels() * channels;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t line = 0; line < (rows - 1) * ay->read_step + ay->reach(); ++line)
        strip.copy(image, pixel.z * az->read_step + az->offset(jz), pixel.y * ay->read_step + ay->offset_first + line,
                   lines + (jz * reach_.lines_of(strip_) + line) * line_size());
  }

  // Where a line of a panel goes.
  struct Target {
    T* first;
    int64_t step, channels;  // from pixel to pixel; how many
  };
  Target target_of(const PixelWalk& pixel, int64_t group, int64_t panel) const {
    const int64_t first = panel * kPanel<A>, count = std::min<int64_t>(kPanel<A>, t_.written_channels - first);
    const int64_t channels = t_.written_channels * t_.geometry.groups, plane = t_.written_pixels();
    const int64_t channel = group * t_.written_channels + first, at = pixel.written_pixel(t_.written_size);
    const int64_t step = pixel.phase.axis[2].step;
    if (last_) return {t_.written + (pixel.n * plane + at) * channels + channel, step * channels, count};
    return {t_.written + (pixel.n * channels + channel) * plane + at, step, count};
  }

  void store_line(const Target& target, int64_t begin, int64_t end, const A* sums) const {
    T* to = target.first + begin * target.step;
    if (!last_)
      return store_lines(t_.epilogue, sums, end - begin, target.channels, to, t_.written_pixels(), target.step);
    for (int64_t i = begin; i < end; ++i, to += target.step, sums += kPanel<A>)
      t_.epilogue.store_row(to, sums, target.channels);
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_, past_caches_;
  int64_t reads_, together_, blocks_;  // channels of a group, groups of a block
  int64_t pitch_;                      // of the strip
  int64_t segment_, segments_, strip_, strips_, planes_;
  StripReach reach_;
  WeightPanels<T> weights_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
