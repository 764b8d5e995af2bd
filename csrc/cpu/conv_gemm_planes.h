// implicit_gemm with few channels, whose patches would cost much to gather or leave lanes idle: forward and backward
// input.
//
// Idea: with few written channels every gathered element meets few multiply-adds, and with few read channels a patch
// is little more than copies of the same pixels. Here the planes of some read channels are copied once, padded
// (conv_planes.h), and a tap is a shift of them: a tile is up to 4 written channels times some vectors of neighbouring
// flat outputs, whose inputs are loaded, mostly unaligned, straight from the planes. The phases of a strided backward
// input read the same planes, and their outputs are brought together before they are stored. Channels last, lines are
// transposed into planes and back. Cost: multiply_adds() for the pixels and a few columns per line. Memory: packed
// weights; per thread the planes of a block of channels and the outputs of a band, about kBandBytes, or kLeast of all
// phases. Limits: bands lose at their borders what they read twice, so kernels should be small against the map; reads
// that meet one or two written channels bound it by loads.
#pragma once
#include "conv_planes.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class GemmPlanes {
 public:
  using A = accumulate_t<T>;

  // Whether gathering patches, or idle lanes, would cost more.
  static bool suits(const ConvArguments<T>& arguments) {
    const ConvGeometry& g = arguments.geometry;
    const int64_t written = arguments.written_channels();
    if (arguments.pass == Pass::backward_weight || !arguments.patches_overlap()) return false;
    if (is_reduced<operand_t<T>>) return written <= 8;  // a matrix product multiplies pairs, twice as fast
    const bool last = arguments.layout == Layout::channels_last;
#if defined(CONVLAB_AVX512)
    return written <= (last ? 16 : g.taps() >= 25 ? 64 : 32);
#else
    const bool short_patches = !last && arguments.read_channels() * g.taps() < 64;
    return written < (g.groups > 1 || !last ? 2 * lanes<A> : kMostLast) || short_patches;
#endif
  }

  explicit GemmPlanes(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    const int64_t taps = t_.geometry.taps();
    last_ = arguments.layout == Layout::channels_last;
    block_ = std::clamp<int64_t>(kChain / taps, 1, t_.read_channels);
    // A vector of channels is transposed at once.
    together_ = last_ && block_ == t_.read_channels
                    ? std::clamp<int64_t>(lanes<A> / t_.read_channels, 1, t_.geometry.groups)
                    : 1;
    group_blocks_ = divide_up(t_.geometry.groups, together_);
    keeps_ = last_ || block_ < t_.read_channels;
    kept_ = keeps_ ? together_ * t_.written_channels : kWritten;
    written_blocks_ = divide_up(t_.written_channels, kWritten);
    const Phase first = t_.phase(0);  // no other has more pixels
    const int64_t parts = divide_up(enough_tasks(arguments.threads), t_.geometry.batch * group_blocks_);
    bands_ = Bands(
        first,
        [&](const Band& band) {
          const int64_t bytes = (together_ * block_ * band.size() + kept_ * t_.phase_count * band.length()) *
                                static_cast<int64_t>(sizeof(A));
          return bytes <= kBandBytes && first.pixels() >= band.phase.pixels() * parts;
        },
        std::max(kLeast, 1024 / t_.phase_count));
    const Band band = band_at(0);
    planes_ = band.size();
    outputs_ = round_up(band.length(), lanes<A>) + kSlack;
    pitch_ = t_.phase_count * outputs_;
    line_ = band.phase.axis[2].count;
    phases_x_ = axis_phases(t_.geometry, t_.pass, 2);
  }

  ConvPlan plan() const {
    const ConvGeometry& g = t_.geometry;
    ConvPlan plan;
    plan.pack_tasks = g.groups * written_blocks_;
    plan.run_tasks = g.batch * group_blocks_ * bands_.number(t_.phase(0));
    plan.packed_bytes = g.groups * written_blocks_ * block_weights() * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // A block of written channels of a group, as [read channel][tap][written channel].
  void pack(int64_t task) const {
    const int64_t group = task / written_blocks_, first = task % written_blocks_ * kWritten;
    const int64_t taps = t_.geometry.taps(), count = std::min<int64_t>(kWritten, t_.written_channels - first);
    A* target = packed(group, task % written_blocks_);
    std::fill(target, target + block_weights(), A(0));
    for (int64_t read = 0; read < t_.read_channels; ++read, target += taps * kWritten)
      for (int64_t w = 0; w < count; ++w) {
        const T* from = arguments_.weight + t_.weight_offset(arguments_, group, read, first + w);
        for (int64_t tap = 0; tap < taps; ++tap)
          target[tap * kWritten + w] = to_accumulate(from[tap * arguments_.weight_stride_tap]);
      }
  }

  // A band of one image and block of groups.
  void run(void* scratch, int64_t task) const {
    const int64_t bands = bands_.number(t_.phase(0)), index = task % bands;
    const int64_t group = task / bands % group_blocks_ * together_, n = task / bands / group_blocks_;
    const int64_t groups = std::min(together_, t_.geometry.groups - group);
    const Band all = band_at(index);
    Carver carver(scratch);
    const Scratch s = carve(carver);
    list_parts(all, index, s);

    Tile tile;
    tile.plane = all.size() + lanes<A>;
    tile.weights_step = t_.geometry.taps() * kWritten;
    tile.pitch = pitch_;
    for (int64_t read = 0; read < t_.read_channels; read += block_) {
      tile.reads = std::min(block_, t_.read_channels - read);
      tile.accumulate = read > 0;
      fill(all, n, group * t_.read_channels + read, groups * tile.reads, tile.plane, s.planes);
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t w = 0; w < t_.written_channels; w += kWritten) {
          const int64_t count = std::min<int64_t>(kWritten, t_.written_channels - w);
          const int64_t first = (group + g) * t_.written_channels + w;
          tile.planes = s.planes + g * tile.reads * tile.plane;
          tile.weights = packed(group + g, w / kWritten) + read * tile.weights_step;
          for (int64_t j = 0; j < count; ++j) tile.start[j] = t_.bias ? to_accumulate(t_.bias[first + j]) : A(0);
          A* outputs = s.outputs + (keeps_ ? (g * t_.written_channels + w) * pitch_ : 0);
          for (int64_t phase = 0; phase < t_.phase_count; ++phase) {
            tile.taps = s.parts[phase].taps;
            tile.count = s.parts[phase].count;
            tile.outputs = outputs + phase * outputs_;
            multiply(tile, count, s.parts[phase].band.length());
          }
          if (!last_ && read + block_ >= t_.read_channels) store_planes(n, first, count, outputs, s);
        }
    }
    if (!last_) return;
    for (int64_t phase = 0; phase < t_.phase_count; ++phase)
      store_pixels(s.parts[phase].band, n, group * t_.written_channels, groups * t_.written_channels,
                   s.outputs + phase * outputs_, s);
  }

 private:
  static constexpr int kWritten = 4;                         // written channels of a tile
  static constexpr int kSums = kTileRows * kTileVectors;     // registers of a tile
  static constexpr int64_t kMostLast = 13;                   // with AVX2, channels last: fewer written channels
  static constexpr int64_t kChain = 160;                     // terms of a chain of additions
  static constexpr int64_t kBandBytes = int64_t{384} << 10;  // of planes and outputs
  static constexpr int64_t kLeast = 64;                      // pixels of a phase's line that are kept together
  static constexpr int64_t kSlack = (kSums + 1) * lanes<A>;  // behind the planes: loads of the last tile

  struct Tap {
    int64_t shift, weight;  // of its plane; in the weights of a read channel
  };
  // What one phase writes of a band.
  struct Part {
    Band band;
    const Tap* taps;
    int64_t count;
  };
  struct Scratch {
    A* planes;   // [read channel][plane]
    A* outputs;  // [written channel][phase][flat output]
    Tap* taps;
    Part* parts;  // of all phases
    A* staged;    // channels last, [pixel of a line][written channel]; else, [pixel of a line of all phases]
  };
  // Some written channels of a band.
  struct Tile {
    const Tap* taps;
    int64_t count, reads, plane;
    const A* weights;  // [read channel][tap][written channel]
    int64_t weights_step;
    const A* planes;
    A* outputs;
    int64_t pitch;
    A start[kWritten];
    bool accumulate;
  };

  Scratch carve(Carver& carver) const {
    const int64_t staged = last_ ? line_ * round_up(kept_, lanes<A>) : phases_x_ * round_up(line_, lanes<A>);
    return {carver.take<A>(together_ * block_ * (planes_ + lanes<A>)+kSlack), carver.take<A>(kept_ * pitch_),
            carver.take<Tap>(t_.geometry.taps()), carver.take<Part>(t_.phase_count), carver.take<A>(staged)};
  }
  // What all phases together read for a band.
  Band band_at(int64_t index) const {
    const Phase first = t_.phase(0);
    Band band(bands_.at(first, index));
    for (int64_t phase = 1; phase < t_.phase_count; ++phase) {
      const Band other(bands_.at(first, t_.phase(phase), index));
      if (other.phase.pixels() > 0 && other.phase.taps() > 0) band.cover(other);
    }
    return band;
  }
  void list_parts(const Band& all, int64_t index, const Scratch& s) const {
    Tap* taps = s.taps;
    for (int64_t phase = 0; phase < t_.phase_count; ++phase) {
      Band band = all;
      band.phase = bands_.at(t_.phase(0), t_.phase(phase), index);
      const AxisPhase* axis = band.phase.axis;
      Part* part = new (s.parts + phase) Part{band, taps, 0};
      if (band.phase.pixels() == 0) continue;
      for (int64_t jz = 0; jz < axis[0].taps; ++jz)
        for (int64_t jy = 0; jy < axis[1].taps; ++jy)
          for (int64_t jx = 0; jx < axis[2].taps; ++jx)
            *taps++ = {band.shift(jz, jy, jx),
                       t_.tap_index(axis[0].tap(jz), axis[1].tap(jy), axis[2].tap(jx)) * kWritten};
      part->count = taps - part->taps;
    }
  }
  int64_t block_weights() const { return t_.read_channels * t_.geometry.taps() * kWritten; }
  A* packed(int64_t group, int64_t block) const {
    return static_cast<A*>(arguments_.packed) + (group * written_blocks_ + block) * block_weights();
  }
  static void multiply(const Tile& tile, int64_t written, int64_t length) {
    switch (written) {
      case 1:
        return multiply_written<1>(tile, length);
      case 2:
        return multiply_written<2>(tile, length);
      case 3:
        return multiply_written<3>(tile, length);
      default:
        return multiply_written<4>(tile, length);
    }
  }
  template <int Written>
  static void multiply_written(const Tile& tile, int64_t length) {
    constexpr int most = kSums / Written < 16 ? kSums / Written : 16, half = most / 2;
    int64_t i = 0;
    // A larger tile that computes a few outputs in vain takes no longer than several smaller ones.
    for (; i + most * 2 / 3 * lanes<A> < length; i += most * lanes<A>) sum_taps<Written, most>(tile, i);
    for (; i + half / 2 * lanes<A> < length; i += half * lanes<A>) sum_taps<Written, half>(tile, i);
    for (; i < length; i += lanes<A>) sum_taps<Written, 1>(tile, i);
  }

  // Flat outputs i .. of the tile's written channels.
  template <int Written, int Vectors>
  static __attribute__((noinline)) void sum_taps(const Tile& tile, int64_t i) {
    vec<A> sum[Written][Vectors];
    CONVLAB_UNROLL for (int w = 0; w < Written; ++w) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[w][v] =
        vec<A>{};
    const A* plane = tile.planes + i;
    const A* weights = tile.weights;
    const int64_t step = tile.weights_step;
    for (int64_t c = 0; c < tile.reads; ++c, plane += tile.plane, weights += step)
      for (const Tap* tap = tile.taps; tap < tile.taps + tile.count; ++tap) {
        // The fewer of weights and inputs stay in registers while the others pass by.
        const A* from = plane + tap->shift;
        const A* weight = weights + tap->weight;
        vec<A> kept[std::min(Written, Vectors)];
        if constexpr (Written > Vectors) {
          CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
            kept[v] = load(from + v * lanes<A>);
            pin(kept[v]);
          }
          CONVLAB_UNROLL for (int w = 0; w < Written; ++w) {
            vec<A> value = broadcast(weight[w]);
            pin(value);
            CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[w][v] = fma(kept[v], value, sum[w][v]);
          }
        } else {
          CONVLAB_UNROLL for (int w = 0; w < Written; ++w) {
            kept[w] = broadcast(weight[w]);
            pin(kept[w]);
          }
          CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
            vec<A> value = load(from + v * lanes<A>);
            pin(value);
            CONVLAB_UNROLL for (int w = 0; w < Written; ++w) sum[w][v] = fma(value, kept[w], sum[w][v]);
          }
        }
      }
    CONVLAB_UNROLL for (int w = 0; w < Written; ++w) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
      A* target = tile.outputs + w * tile.pitch + i + v * lanes<A>;
      store(target, sum[w][v] + (tile.accumulate ? load(target) : broadcast(tile.start[w])));
    }
  }

  // Channels `first` .. of what a band reads of an image.
  void fill(const Band& band, int64_t n, int64_t first, int64_t count, int64_t pitch, A* planes) const {
    const int64_t channels = t_.read_channels * t_.geometry.groups, pixels = t_.read_pixels();
    fill_planes(arguments_.layout, band, t_.read + n * channels * pixels, t_.read_size, first, count, channels, planes,
                pitch);
    std::fill_n(planes + count * pitch, kSlack, A(0));
  }

  // Calls visit(flat output, pixel of the written image) for the first pixel of each line of a band.
  template <class Visit>
  void for_each_written_line(const Band& band, const Visit& visit) const {
    const AxisPhase* axis = band.phase.axis;
    for (int64_t z = 0; z < axis[0].count; ++z)
      for (int64_t y = 0; y < axis[1].count; ++y)
        visit((z * band.slots[1] + y) * band.slots[2],
              ((axis[0].first + z * axis[0].step) * t_.written_size[1] + axis[1].first + y * axis[1].step) *
                      t_.written_size[2] +
                  axis[2].first);
  }

  void store_planes(int64_t n, int64_t first, int64_t count, const A* outputs, const Scratch& s) const {
    T* plane = t_.written + (n * t_.written_channels * t_.geometry.groups + first) * t_.written_pixels();
    for (int64_t c = 0; c < count; ++c, outputs += pitch_, plane += t_.written_pixels())
      for (int64_t phase = 0; phase < t_.phase_count; phase += phases_x_)  // the first of those along x
        for_each_written_line(s.parts[phase].band, [&](int64_t flat, int64_t pixel) {
          const A* line = outputs + phase * outputs_ + flat;
          int64_t width = s.parts[phase].band.phase.axis[2].count;
          if (phases_x_ > 1) width = join_phases(line, s.parts + phase, s.staged), line = s.staged;
          if (std::is_same_v<T, A> && !t_.epilogue.needed())
            std::memcpy(static_cast<void*>(plane + pixel), line, width * sizeof(T));
          else
            t_.epilogue.store_row(plane + pixel, line, width);
        });
  }

  // Puts the pixels of a line's phases, outputs_ apart, in their order; returns how many there are.
  int64_t join_phases(const A* line, const Part* parts, A* joined) const {
    int64_t width = 0;
    for (int64_t phase = 0; phase < phases_x_; ++phase) width += parts[phase].band.phase.axis[2].count;
    if (phases_x_ == 2) {
      for (int64_t x = 0; 2 * x < width; x += lanes<A>)
        store_interleaved(load(line + x), load(line + outputs_ + x), joined + 2 * x);
      return width;
    }
    for (int64_t phase = 0; phase < phases_x_; ++phase, line += outputs_)
      for (int64_t x = 0; x < parts[phase].band.phase.axis[2].count; ++x) joined[x * phases_x_ + phase] = line[x];
    return width;
  }

  void store_pixels(const Band& band, int64_t n, int64_t first, int64_t count, const A* outputs,
                    const Scratch& s) const {
    const AxisPhase& axis = band.phase.axis[2];
    const int64_t channels = t_.written_channels * t_.geometry.groups, pitch = round_up(count, lanes<A>);
    T* image = t_.written + n * channels * t_.written_pixels() + first;
    for_each_written_line(band, [&](int64_t flat, int64_t pixel) {
      transpose_matrix(outputs + flat, pitch_, count, axis.count, s.staged, pitch);
      T* target = image + pixel * channels;
      for (int64_t x = 0; x < axis.count; ++x, target += axis.step * channels)
        t_.epilogue.store_row(target, s.staged + x * pitch, count);
    });
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool last_, keeps_;  // the outputs of all written channels until they are stored
  int64_t block_, together_, group_blocks_, kept_, written_blocks_;
  Bands bands_;
  int64_t planes_, line_;
  int64_t outputs_, pitch_;  // from one phase's outputs to the next, from one written channel's
  int64_t phases_x_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
