// amx: backward weight.
//
// Idea: a product whose reduction runs over positions (conv_positions.h). What a block of pixels reads is copied by
// channels, as parts of bfloat16: rows of a tile are channels, 32 positions long, and a tap is a shift along them.
// grad_output becomes the columns, pairs of positions of 16 filters, with zeros between the lines. Every tap, 32
// channels and 32 filters are a block of sums (tile_sums.h), added up over blocks of pixels in the workspace, which
// holds one set of sums per chunk of the batch. Chunks depend on the geometry alone, and `finish` adds them in order:
// the same bits for every number of threads. Cost: multiply_adds() of a tile times the products of the parts, with
// channels and filters in whole tiles, and positions between lines; both tensors are copied once per 128 channels of
// the other. Memory: chunks x weights in whole blocks, at most max(one chunk, kMostPartialBytes); per thread both
// copies of a block. Limits: a NaN or an infinity reaches further taps where positions between the lines read it.
#pragma once
#include "pixel_sources.h"
#include "tile_weights.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class AmxWeight {
 public:
  static constexpr int kParts = bfloat16_parts<T>;

  explicit AmxWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        spans_(arguments.geometry, arguments.pass, arguments.layout),
        geometry_(with_images_joined(without_needless_axes(spans_.apply(arguments.geometry)), arguments.layout)),
        phase_(phase_at(geometry_, Pass::forward, 0)) {
    last_ = arguments.layout == Layout::channels_last;
    channels_ = geometry_.in_channels_per_group(), filters_ = geometry_.out_channels_per_group();
    rows_ = divide_up(channels_, kSumEdge), columns_ = divide_up(filters_, kSumEdge);
    part_rows_ = std::min(rows_, kPart), part_columns_ = std::min(columns_, kPart);
    // Where there are few pixels to divide, blocks are smaller and then, if tasks are still few, parts of the weight.
    int64_t bytes = kCopyBytes;
    for (cut_into_tasks(bytes); tasks() < kEnoughTasks && bytes > kCopyBytes / 4;) cut_into_tasks(bytes /= 2);
    while (tasks() < kFewTasks && std::max(part_rows_, part_columns_) > 1) {
      int64_t& larger = part_columns_ >= part_rows_ ? part_columns_ : part_rows_;
      larger = divide_up(larger, 2);
      cut_into_tasks(bytes);
    }
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = tasks();
    plan.finish_tasks = geometry_.groups * rows_ * columns_;
    plan.shared_bytes = chunks_ * geometry_.groups * blocks_of_sums() * kSumBlock * static_cast<int64_t>(sizeof(float));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // One chunk of pixels, some channels and some filters.
  void run(void* scratch, int64_t task) const {
    Task now;
    const int64_t row_part = task % row_parts(), column_part = task / row_parts() % column_parts();
    task /= row_parts() * column_parts();
    now.group = task % geometry_.groups, now.chunk = task / geometry_.groups;
    now.rows = {row_part * part_rows_, std::min(rows_, (row_part + 1) * part_rows_)};
    now.columns = {column_part * part_columns_, std::min(columns_, (column_part + 1) * part_columns_)};
    Carver carver(scratch);
    const Scratch s = carve(carver);
    Tiles tiles;
    const int64_t first = cut_.count() * now.chunk / chunks_, end = cut_.count() * (now.chunk + 1) / chunks_;
    for (int64_t index = first; index < end; ++index) {
      const PixelBlock block = cut_.at(index, phase_, geometry_.batch);
      const PositionMap map(phase_, geometry_.input, block);
      copy_read(map, now, s);
      copy_gradient(map, now, s);
      multiply(tiles, map, now, index > first, s);
    }
  }

  // Adds the chunks of a block of all taps and writes it into the weight.
  void finish(int64_t task) const {
    const int64_t column = task % columns_, row = task / columns_ % rows_, group = task / columns_ / rows_;
    const int64_t channels = std::min(kSumEdge, channels_ - row * kSumEdge);
    const int64_t filters = std::min(kSumEdge, filters_ - column * kSumEdge);
    T* target = arguments_.weight + (group * filters_ + column * kSumEdge) * arguments_.weight_stride_filter();
    for (int64_t tap = 0; tap < geometry_.taps(); ++tap, target += spans_.taps() * arguments_.weight_stride_tap)
      for (int64_t c = 0; c < channels; c += lanes<float>)
        for (int64_t k = 0; k < filters; k += lanes<float>) {
          vec<float> sum[lanes<float>];
          for (int64_t i = 0; i < lanes<float>; ++i) {
            const int64_t at = (c + i) * kSumEdge + k;
            sum[i] = load(sums_at(0, group, row, column, tap) + at);
            for (int64_t chunk = 1; chunk < chunks_; ++chunk)
              sum[i] += load(sums_at(chunk, group, row, column, tap) + at);
          }
          transpose<float>(sum);
          for (int64_t j = 0; j < std::min<int64_t>(lanes<float>, filters - k); ++j)
            store_channels(target + (k + j) * arguments_.weight_stride_filter(), row * kSumEdge + c, sum[j],
                           std::min<int64_t>(lanes<float>, channels - c));
        }
  }

 private:
  static constexpr int64_t kPart = 4;                        // blocks of channels, or filters, of a task
  static constexpr int64_t kCopyBytes = int64_t{896} << 10;  // of both tensors
  static constexpr int64_t kMostPartialBytes = int64_t{32} << 20;
  static constexpr int64_t kEnoughTasks = 16, kFewTasks = 6;
  static constexpr int64_t kSlack = kTileRowBytes;  // a line is stored by 32 positions

  int64_t tasks() const { return chunks_ * geometry_.groups * row_parts() * column_parts(); }
  void cut_into_tasks(int64_t most_bytes) {
    const auto fits = [&](int64_t slabs, int64_t lines, int64_t columns) {
      return copy_bytes(most_positions(slabs, lines, columns)) + gradient_bytes(slabs * lines * columns * 5 / 4) <=
             most_bytes;
    };
    cut_ = BlockCut(phase_, geometry_.batch, kTileDepth, fits);
    const int64_t partial_bytes = geometry_.groups * blocks_of_sums() * kSumBlock * static_cast<int64_t>(sizeof(float));
    chunks_ = std::min(cut_.count(), divide_up(kEnoughTasks, geometry_.groups * row_parts() * column_parts()));
    chunks_ = std::max<int64_t>(1, std::min(chunks_, kMostPartialBytes / partial_bytes));
  }

  struct Task {
    int64_t group, chunk;
    Range rows, columns;  // blocks of channels and of filters
  };
  struct Scratch {
    char* copy;                 // [part][channel][position]
    char* gradient;             // [32 positions][block of filters][part][tile]
    const T **read, **sources;  // [position], of the input and of grad_output; null for zeros
    T* borders;                 // spans of pixels at the border
    float* sums;                // of this block of pixels: chains of additions stay short
  };
  Scratch carve(Carver& carver) const {
    const int64_t positions = most_positions(cut_.slabs(), cut_.lines(), cut_.columns());
    return {carver.take<char>(copy_bytes(positions)),
            carver.take<char>(gradient_bytes(positions)),
            carver.take<const T*>(positions + kTileDepth),
            carver.take<const T*>(positions + kTileDepth),
            carver.take<T>(pixels().border_elements(positions)),
            carver.take<float>(kSumBlock)};
  }
  int64_t most_positions(int64_t slabs, int64_t lines, int64_t columns) const {
    return PositionMap::most(geometry_, Pass::forward, slabs, lines, columns);
  }
  // Of a channel's positions, an odd number of cache lines.
  static int64_t pitch_of(int64_t positions) { return (divide_up(2 * positions + kSlack, 64) | 1) * 64; }
  int64_t copy_bytes(int64_t positions) const { return kParts * part_rows_ * kSumEdge * pitch_of(positions); }
  int64_t gradient_bytes(int64_t positions) const { return divide_up(positions, kTileDepth) * group_bytes(); }
  int64_t group_bytes() const { return part_columns_ * kParts * kTilesWide * kTileBytes; }  // of 32 positions

  int64_t row_parts() const { return divide_up(rows_, part_rows_); }
  int64_t column_parts() const { return divide_up(columns_, part_columns_); }
  int64_t blocks_of_sums() const { return rows_ * columns_ * geometry_.taps(); }
  float* sums_at(int64_t chunk, int64_t group, int64_t row, int64_t column, int64_t tap) const {
    const int64_t block = ((row * columns_) + column) * geometry_.taps() + tap;
    return static_cast<float*>(arguments_.shared) +
           ((chunk * geometry_.groups + group) * blocks_of_sums() + block) * kSumBlock;
  }

  // ---- what is read, by channels

  void copy_read(const PositionMap& map, const Task& now, const Scratch& s) const {
    const int64_t pitch = pitch_of(map.total()), part_pitch = part_rows_ * kSumEdge * pitch;
    const int64_t first = now.rows.begin * kSumEdge, count = std::min(now.rows.size() * kSumEdge, channels_ - first);
    if (last_) {
      pixels().point(map, now.group * channels_, s.read, s.borders);
      std::fill_n(s.read + map.total(), kTileDepth, nullptr);
      for (int64_t position = 0; position < map.total(); position += kTileDepth)
        for (int64_t c = 0; c < count; c += lanes<float>)
          turn_pixels(s.read + position, first + c, count - c, s.copy + c * pitch + 2 * position, pitch, part_pitch);
      return;
    }
    const int64_t plane = geometry_.input_pixels();
    std::memset(s.copy, 0, static_cast<size_t>(kParts * part_pitch));
    map.for_each_run([&](int64_t position, int64_t length, int64_t pixel, int64_t image) {
      if (pixel < 0) return;
      char* target = s.copy + 2 * position;
      const T* source =
          arguments_.input + (image * geometry_.in_channels + now.group * channels_ + first) * plane + pixel;
      for (int64_t c = 0; c < count; ++c, source += plane, target += pitch)
        copy_line(source, map.x_step(), length, target, part_pitch);
    });
  }
  PixelSources<T> pixels() const { return {arguments_.input, geometry_.input, geometry_.in_channels, spans_}; }

  // 32 positions of a vector of channels at most, to lines of channels.
  static void turn_pixels(const T* const* sources, int64_t first, int64_t channels, char* target, int64_t pitch,
                          int64_t part_pitch) {
    constexpr int64_t pairs = kTileDepth / 2;
    vec_bits row[pairs][kParts];
    const auto take = [&](int64_t i) { return sources[i] ? load_some(sources[i] + first, channels) : vec<float>{}; };
    for (int64_t pair = 0; pair < pairs; ++pair) split_pair(take(2 * pair), take(2 * pair + 1), row[pair]);
    for (int64_t part = 0; part < kParts; ++part, target += part_pitch)
      for (int64_t begin = 0; begin < pairs; begin += lanes<float>) {
        vec<float> square[lanes<float>];
        for (int64_t i = 0; i < lanes<float>; ++i) square[i] = (vec<float>)row[begin + i][part];
        transpose<float>(square);
        for (int64_t c = 0; c < std::min<int64_t>(lanes<float>, channels); ++c)
          store(reinterpret_cast<float*>(target + c * pitch) + begin, square[c]);
      }
  }

  // Zeros follow a line of a plane, which what comes next replaces.
  static void copy_line(const T* source, int64_t step, int64_t length, char* target, int64_t part_pitch) {
    for (int64_t i = 0; i < length; i += 2 * lanes<float>, target += 4 * lanes<float>) {
      vec_bits low[kParts], high[kParts];
      split(load_strided(source + i * step, step, length - i), low);
      split(load_strided(source + (i + lanes<float>)*step, step, length - i - lanes<float>), high);
      for (int part = 0; part < kParts; ++part) store_upper_halves(low[part], high[part], target + part * part_pitch);
    }
  }

  // ---- grad_output, as columns

  void copy_gradient(const PositionMap& map, const Task& now, const Scratch& s) const {
    const int64_t groups = divide_up(map.count(), kTileDepth);
    PixelTargets<const T>(arguments_.output, geometry_.output, geometry_.out_channels, arguments_.layout)
        .point(map, phase_, now.group * filters_ + now.columns.begin * kSumEdge, s.sources);
    const int64_t step = last_ ? 1 : geometry_.output_pixels();
    const int64_t count = std::min(now.columns.size() * kSumEdge, filters_ - now.columns.begin * kSumEdge);
    for (int64_t group = 0; group < groups; ++group) {
      const T* const* sources = s.sources + group * kTileDepth;
      for (int64_t k = 0; k < count; k += lanes<float>) {
        vec<float> row[kTileDepth];
        for (int64_t i = 0; i < kTileDepth; i += lanes<float>) load_square(sources + i, k, step, count - k, row + i);
        char* block = s.gradient + group * group_bytes() + k / kSumEdge * kParts * kTilesWide * kTileBytes;
        store_columns<kParts>(row, k % kSumEdge, block);
      }
    }
  }

  // row[i]: a vector of filters, k and on, of the position i.
  static void load_square(const T* const* sources, int64_t k, int64_t step, int64_t filters, vec<float>* row) {
    bool neighbours = step != 1 && sources[0];
    for (int64_t i = 1; i < lanes<float> && neighbours; ++i) neighbours = sources[i] == sources[0] + i;
    if (!neighbours) {
      for (int64_t i = 0; i < lanes<float>; ++i)
        row[i] = load_strided(sources[i] ? sources[i] + k * step : nullptr, step, sources[i] ? filters : 0);
      return;
    }
    vec<float> square[lanes<float>];
    for (int64_t j = 0; j < lanes<float>; ++j)
      square[j] = j < filters ? load(sources[0] + (k + j) * step) : vec<float>{};
    transpose<float>(square);
    for (int64_t i = 0; i < lanes<float>; ++i) row[i] = square[i];
  }

  // ---- products

  void multiply(Tiles& tiles, const PositionMap& map, const Task& now, bool accumulate, const Scratch& s) const {
    const int64_t pitch = pitch_of(map.total());
    const AxisPhase* axis = phase_.axis;
    constexpr int64_t no_offset = 0;
    TileSum sum{nullptr, pitch,         part_rows_ * kSumEdge * pitch,
                nullptr, group_bytes(), divide_up(map.count(), kTileDepth),
                1,       &no_offset,    &no_offset,
                nullptr, false};
    for (int64_t row = now.rows.begin; row < now.rows.end; ++row)
      for (int64_t column = now.columns.begin; column < now.columns.end; ++column) {
        sum.columns = s.gradient + (column - now.columns.begin) * kParts * kTilesWide * kTileBytes;
        for (int64_t jz = 0, tap = 0; jz < axis[0].taps; ++jz)
          for (int64_t jy = 0; jy < axis[1].taps; ++jy)
            for (int64_t jx = 0; jx < axis[2].taps; ++jx, ++tap) {
              sum.rows = s.copy + (row - now.rows.begin) * kSumEdge * pitch + 2 * map.shift(jz, jy, jx);
              float* sums = sums_at(now.chunk, now.group, row, column, tap);
              sum.sums = accumulate ? s.sums : sums;
              sum_tiles<kParts>(tiles, channels_ - row * kSumEdge > kTileEdge, filters_ - column * kSumEdge > kTileEdge,
                                sum, [] {});
              if (accumulate) add_block(s.sums, sums);
            }
      }
  }

  // Neighbouring channels of a filter.
  void store_channels(T* target, int64_t first, vec<float> sum, int64_t count) const {
    const int64_t step = arguments_.weight_stride_channel, tap = arguments_.weight_stride_tap;
    if (spans_.weights_follow(step, tap))
      return count == lanes<float> ? store(target + first, sum) : store_partial(target + first, sum, count);
    for (int64_t i = 0; i < count; ++i) target[spans_.weight_offset(first + i, step, tap)] = from_accumulate<T>(sum[i]);
  }

  const ConvArguments<T>& arguments_;
  KernelSpans spans_;
  ConvGeometry geometry_;
  Phase phase_;
  BlockCut cut_;
  bool last_;
  int64_t channels_, filters_;        // of a group
  int64_t rows_, columns_;            // blocks of 32 of them
  int64_t part_rows_, part_columns_;  // of a task
  int64_t chunks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
