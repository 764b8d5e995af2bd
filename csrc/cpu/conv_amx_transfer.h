// amx: forward and backward input.
//
// Idea: what a block of pixels reads is copied, as parts of bfloat16 (bfloat16_parts.h) and in an order in which
// every tap is a shift (conv_positions.h). Then 16 neighbouring positions are a tile for every tap and 32 read
// channels, whatever the geometry, and 32 positions times 32 written channels are one block of sums (tile_sums.h).
// Weights are packed as tiles, once per call. With many read channels a copy holds a part of them, and sums wait in
// scratch. While one copy is multiplied, the next one is made on the side (position_copy.h), and while a block of sums
// is multiplied, the one before is stored: the tile unit, the vector units and memory are busy at the same time. Cost:
// multiply_adds() of a tile (tiles.h) times the products of the parts, with channels in whole tiles, and positions
// between lines; a copy of what is read per block. Memory: the packed weight, in parts; per thread two copies and,
// with many channels, the sums of a block. Limits: a product has 32 read channels whether there are as many or not.
#pragma once
#include "pixel_sources.h"
#include "position_copy.h"
#include "tile_weights.h"

namespace convlab::cpu::CONVLAB_ISA {

static_assert(kSumEdge == PositionMap::kWhole);

template <class T>
class AmxTransfer {
 public:
  static constexpr int kParts = bfloat16_parts<T>;

  explicit AmxTransfer(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        t_(arguments),
        spans_(t_.geometry, t_.pass, arguments.layout),
        weights_(arguments_, seen_as_spans(t_, spans_), spans_) {
    t_.geometry = with_images_joined(t_.geometry, arguments.layout);
    last_ = arguments.layout == Layout::channels_last;
    channels_ = t_.read_channels * t_.geometry.groups, written_channels_ = t_.written_channels * t_.geometry.groups;
    // Pixels of bfloat16 that follow each other are rows of tiles as they are.
    in_place_ = kParts == 1 && last_ && !spans_.used() && t_.geometry.taps() == 1 && t_.phase_count == 1 &&
                t_.geometry.batch == 1 && t_.read_pixels() == t_.read_size[2] &&
                t_.written_pixels() == t_.read_pixels() && t_.read_channels % kTileDepth == 0;
    cut_into_blocks();
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = weights_.tasks();
    plan.packed_bytes = weights_.bytes();
    plan.packs_in_place = column_blocks_ >= arguments_.threads;
    plan.run_tasks = t_.phase_count * t_.geometry.groups * row_tasks() * column_blocks_;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void pack(int64_t task) const { weights_.pack(task); }

  // Some blocks of pixels of one phase and group, times some panels.
  void run(void* scratch, int64_t task) const {
    Task now;
    now.phase = ascending(t_.phase(task % t_.phase_count));  // fastest: phases differ in work
    task /= t_.phase_count;
    const int64_t row_task = task % row_tasks(), column_block = task / row_tasks() % column_blocks_;
    now.group = task / row_tasks() / column_blocks_;
    now.panels = {weights_.panels() * column_block / column_blocks_,
                  weights_.panels() * (column_block + 1) / column_blocks_};
    now.end = std::min(blocks_.count(), (row_task + 1) * task_blocks_);
    int64_t block = next_block(now, row_task * task_blocks_);
    if (block == now.end) return;

    Carver carver(scratch);
    const Scratch s = carve(carver);
    PositionMap map = map_of(now, block);
    point_at_read(map, now.group, s);
    copy(map, now.group, 0, s, 0).finish();
    const PixelTargets<T> targets(t_.written, t_.written_size, written_channels_, arguments_.layout);
    Tiles tiles;
    for (int turn = 0; block < now.end;) {
      block = next_block(now, block + 1);
      now.positions = map.count();
      now.first = s.sources[0];
      now.taps = list_taps(map, now.phase, s);
      targets.point(map, now.phase, now.group * t_.written_channels, s.outputs);
      for (now.chunk = 0; now.chunk < chunks_; ++now.chunk, turn = 1 - turn) {
        PositionCopy<T> later;
        if (now.chunk + 1 < chunks_) {
          later = copy(map, now.group, now.chunk + 1, s, 1 - turn);
        } else if (block < now.end) {
          map = map_of(now, block);
          point_at_read(map, now.group, s);
          later = copy(map, now.group, 0, s, 1 - turn);
        }
        multiply_chunk(tiles, now, s.copies[turn], later, s);
        later.finish();
      }
    }
  }

 private:
  static constexpr int64_t kCopyBytes = int64_t{384} << 10;    // of a block
  static constexpr int64_t kSumBytes = int64_t{512} << 10;     // of a block, if it takes several copies
  static constexpr int64_t kWeightBytes = int64_t{768} << 10;  // that pass over a block at a time
  static constexpr int64_t kEnoughPositions = 256;             // of a block: weights come from far only so often

  struct Task {
    Phase phase;
    Range panels;
    int64_t group, end;              // the last block, excluded
    int64_t taps, chunk, positions;  // of the current block
    const T* first;                  // that is read, in place
  };
  // The block of sums that is finished, but not stored.
  struct Waiting {
    int64_t position, panel = -1;
    const float* sums;
  };

  struct Scratch {
    char* copies[2];    // [position][part][read channel of a chunk]
    const T** sources;  // [position], null for zeros
    T* borders;         // spans of pixels at the border
    T** outputs;        // [position], null between lines
    int64_t *row_offset, *column_offset;
    float* sums;  // [block]: two in turn or, with several chunks, all of them
    float* chain;
    float* bias;
  };
  Scratch carve(Carver& carver) const {
    const int64_t positions = most_positions(), taps = t_.geometry.taps();
    const int64_t blocks = chunks_ == 1 ? 2 : divide_up(positions, kSumEdge) * block_panels();
    return {{carver.take<char>(positions * pitch_), carver.take<char>(positions * pitch_)},
            carver.take<const T*>(last_ ? positions + PositionCopy<T>::kAhead : 1),
            carver.take<T>(pixels().border_elements(positions)),
            carver.take<T*>(positions + kSumEdge),
            carver.take<int64_t>(taps),
            carver.take<int64_t>(taps),
            carver.take<float>(blocks * kSumBlock),
            carver.take<float>(kSumBlock),
            carver.take<float>(kSumEdge)};
  }
  static int64_t whole_blocks(int64_t positions) { return positions / kSumEdge * kSumEdge; }

  static const Transfer<T>& seen_as_spans(Transfer<T>& transfer, const KernelSpans& spans) {
    transfer.geometry = spans.apply(transfer.geometry);
    if (spans.used()) transfer.read_channels = spans.elements();
    return transfer;
  }
  static Phase ascending(Phase phase) {
    for (AxisPhase& axis : phase.axis) axis = axis.ascending();
    return phase;
  }

  // ---- blocks

  // As few copies of the read channels as there is room for, unless blocks would be small.
  void cut_into_blocks() {
    const Phase phase = t_.phase(0);  // no other has more pixels
    const int64_t wanted = enough_tasks(arguments_.threads), pixels = t_.rows();
    const int64_t share = divide_up(pixels * t_.phase_count * t_.geometry.groups, wanted);
    const int64_t least = weights_.bytes() > kWeightBytes ? kEnoughPositions : kEnoughPositions / 2;
    const int64_t most = std::max(round_up(share / 2, kTileEdge), least);
    const auto fits = [&](int64_t slabs, int64_t lines, int64_t columns) {
      return slabs * lines * columns <= most && most_positions(slabs, lines, columns) * pitch_ <= kCopyBytes;
    };
    for (int64_t copies = 1;; ++copies) {
      // Whole chains of additions: how copies are cut follows the number of threads, which no sum may.
      chunk_steps_ = std::min(weights_.steps(), round_up(divide_up(weights_.steps(), copies), chain_steps()));
      pitch_ = (chunk_steps_ * kParts | 1) * kTileRowBytes;
      blocks_ = BlockCut(phase, t_.geometry.batch, kTileEdge, fits);
      if (chunk_steps_ <= chain_steps() || blocks_.pixels() >= std::min({most, pixels, kEnoughPositions}) / 2) break;
    }
    chunks_ = divide_up(weights_.steps(), chunk_steps_);
    // Tasks of several blocks copy on the side; with few blocks, they are fewer for that.
    const int64_t others = t_.phase_count * t_.geometry.groups, blocks = blocks_.count() * others;
    task_blocks_ = blocks / wanted > 1 ? blocks / wanted : std::max<int64_t>(1, 2 * blocks / wanted);
    task_blocks_ = std::min(task_blocks_, blocks_.count());
    column_blocks_ = divide_up(wanted / 2, row_tasks() * others);
    if (chunks_ > 1) {
      const int64_t sums = divide_up(most_positions(), kSumEdge) * kSumBlock * static_cast<int64_t>(sizeof(float));
      column_blocks_ = std::max(column_blocks_, divide_up(sums * weights_.panels(), kSumBytes));
    }
    column_blocks_ = std::clamp<int64_t>(column_blocks_, 1, weights_.panels());
  }
  int64_t most_positions(int64_t slabs, int64_t lines, int64_t columns) const {
    return PositionMap::most(t_.geometry, t_.pass, slabs, lines, columns);
  }
  int64_t most_positions() const { return most_positions(blocks_.slabs(), blocks_.lines(), blocks_.columns()); }
  int64_t block_panels() const { return divide_up(weights_.panels(), column_blocks_); }
  int64_t row_tasks() const { return divide_up(blocks_.count(), task_blocks_); }
  PixelBlock block_at(const Task& now, int64_t index) const { return blocks_.at(index, now.phase, t_.geometry.batch); }
  PositionMap map_of(const Task& now, int64_t block) const {
    return PositionMap(now.phase, t_.read_size, block_at(now, block));
  }
  // The first block from here on that is not empty.
  int64_t next_block(const Task& now, int64_t index) const {
    while (index < now.end && block_at(now, index).empty()) ++index;
    return std::min(index, now.end);
  }
  Range steps_of(int64_t chunk) const {
    return {chunk * chunk_steps_, std::min(weights_.steps(), (chunk + 1) * chunk_steps_)};
  }

  // ---- what is read

  // The copy of a chunk of the read channels, to be made; channels first, it is made at once.
  PositionCopy<T> copy(const PositionMap& map, int64_t group, int64_t chunk, const Scratch& s, int turn) const {
    const Range steps = steps_of(chunk);
    const int64_t first = steps.begin * kTileDepth;
    const int64_t count = std::min(steps.size() * kTileDepth, t_.read_channels - first);
    char* target = s.copies[turn];
    if (in_place_) {  // all but what is left beside whole blocks, where tiles would read on
      const int64_t whole = whole_blocks(map.count());
      return {s.sources + whole, map.count() - whole, first, count, 0, pitch_, target + whole * pitch_};
    }
    if (last_) return {s.sources, map.total(), first, count, chunk_steps_ * kTileRowBytes, pitch_, target};
    const int64_t plane = t_.read_pixels(), step = map.x_step();
    map.for_each_run([&](int64_t position, int64_t length, int64_t pixel, int64_t image) {
      char* to = target + position * pitch_;
      if (pixel < 0) {
        std::memset(to, 0, static_cast<size_t>(length * pitch_));
        return;
      }
      const T* source = t_.read + (image * channels_ + group * t_.read_channels + first) * plane + pixel;
      for (int64_t i = 0; i < length; i += lanes<float>, to += lanes<float> * pitch_)
        copy_planes(source + i * step, step, std::min<int64_t>(lanes<float>, length - i), count, to);
    });
    return {};
  }

  void point_at_read(const PositionMap& map, int64_t group, const Scratch& s) const {
    if (!last_) return;
    pixels().point(map, group * t_.read_channels, s.sources, s.borders);
    std::fill_n(s.sources + map.total(), PositionCopy<T>::kAhead, nullptr);
  }
  PixelSources<T> pixels() const { return {t_.read, t_.read_size, channels_, spans_}; }

  // Some neighbouring pixels (`step` apart), a vector at most, of `count` planes.
  void copy_planes(const T* source, int64_t step, int64_t pixels, int64_t count, char* target) const {
    const int64_t plane = t_.read_pixels();
    for (int64_t c = 0; c < round_up(count, kTileDepth); c += lanes<float>) {
      vec<float> block[lanes<float>];
      for (int64_t j = 0; j < lanes<float>; ++j)
        block[j] = load_strided(source + (c + j) * plane, step, c + j < count ? pixels : 0);
      transpose<float>(block);
      for (int64_t i = 0; i < pixels; ++i) {
        vec_bits parts[kParts];
        split(block[i], parts);
        for (int part = 0; part < kParts; ++part)
          store_upper_halves(parts[part], target + i * pitch_ + part * chunk_steps_ * kTileRowBytes + c * 2);
      }
    }
  }

  // ---- products

  int64_t list_taps(const PositionMap& map, const Phase& phase, const Scratch& s) const {
    const AxisPhase *az = &phase.axis[0], *ay = &phase.axis[1], *ax = &phase.axis[2];
    int64_t tap = 0;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy)
        for (int64_t jx = 0; jx < ax->taps; ++jx, ++tap) {
          s.row_offset[tap] = map.shift(jz, jy, jx) * pitch_;
          s.column_offset[tap] = t_.tap_index(az->tap(jz), ay->tap(jy), ax->tap(jx)) * TileWeights<T>::kTapBytes;
        }
    return tap;
  }

  // Some panels, whose weights stay in L2, pass over all positions.
  void multiply_chunk(Tiles& tiles, const Task& now, const char* rows, PositionCopy<T>& later, const Scratch& s) const {
    const Range steps = steps_of(now.chunk);
    const int64_t together =
        std::clamp<int64_t>(kWeightBytes / (steps.size() * weights_.step_bytes()), 1, now.panels.size());
    const int64_t blocks = divide_up(now.positions, kSumEdge) * now.panels.size();
    const int64_t lines = divide_up(later.lines_left(), blocks * steps.size() * std::max<int64_t>(1, now.taps));
    const char* in_place = reinterpret_cast<const char*>(now.first) + steps.begin * kTileRowBytes;
    const int64_t in_place_pitch = channels_ * static_cast<int64_t>(sizeof(T));
    const char* ahead = nullptr;  // the pixels of the next block of sums
    const int64_t ahead_lines = in_place_ && t_.geometry.groups == 1 ? divide_up(kSumEdge, together) : 0;
    Waiting waiting;
    int64_t turn = 0;
    for (int64_t begin = now.panels.begin; begin < now.panels.end; begin += together)
      for (int64_t position = 0; position < now.positions; position += kSumEdge)
        for (int64_t panel = begin; panel < std::min(now.panels.end, begin + together); ++panel) {
          const int64_t slot =
              chunks_ == 1 ? turn++ % 2 : position / kSumEdge * now.panels.size() + panel - now.panels.begin;
          if (panel == begin) ahead = in_place + (position + kSumEdge) * in_place_pitch;
          const bool copied = !in_place_ || position >= whole_blocks(now.positions);
          const TileSum sum{copied ? rows + position * pitch_ : in_place + position * in_place_pitch,
                            copied ? pitch_ : in_place_pitch,
                            chunk_steps_ * kTileRowBytes,
                            weights_.at(now.group, panel, steps.begin),
                            weights_.step_bytes(),
                            steps.size(),
                            now.taps,
                            s.row_offset,
                            s.column_offset,
                            s.sums + slot * kSumBlock,
                            now.chunk > 0};
          sum_chains(tiles, now.positions - position > kTileEdge, t_.written_channels - panel * kSumEdge > kTileEdge,
                     sum, s.chain, [&] {
                       later.advance(lines);
                       for (int64_t i = 0; i < ahead_lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 1);
                     });
          if (now.chunk + 1 < chunks_) continue;
          store(now, waiting, s);
          waiting = {position, panel, sum.sums};
        }
    store(now, waiting, s);
  }

  // In float32 a long reduction is cut into chains of additions that start from zero, each of so many steps.
  int64_t chain_steps() const {
    constexpr int64_t longest = 16;  // products of 32 terms
    return kParts < 3 ? 1 : std::max<int64_t>(1, longest / t_.geometry.taps());
  }
  template <class Aside>
  CONVLAB_INLINE void sum_chains(Tiles& tiles, bool both_rows, bool both_columns, TileSum t, float* chain,
                                 Aside&& aside) const {
    const int64_t steps = t.steps, together = chain_steps();
    if (kParts < 3 || (steps <= together && !t.accumulate))
      return sum_tiles<kParts>(tiles, both_rows, both_columns, t, aside);
    float* sums = t.sums;
    for (int64_t done = 0; done < steps; done += t.steps) {
      t.steps = std::min(together, steps - done);
      t.sums = t.accumulate ? chain : sums;
      const bool adds = std::exchange(t.accumulate, false);
      sum_tiles<kParts>(tiles, both_rows, both_columns, t, aside);
      if (adds) add_block(chain, sums);
      t.accumulate = true;
      t.rows += t.steps * kTileRowBytes, t.columns += t.steps * t.step_columns;
    }
  }

  // ---- what is written

  void store(const Task& now, const Waiting& waiting, const Scratch& s) const {
    if (waiting.panel < 0) return;
    const int64_t first = waiting.panel * kSumEdge, columns = std::min(kSumEdge, t_.written_channels - first);
    const int64_t rows = std::min(kSumEdge, now.positions - waiting.position);
    T* const* outputs = s.outputs + waiting.position;
    t_.load_bias(now.group, first, kSumEdge, s.bias);
    if (!last_) return store_planes(outputs, first, rows, columns, waiting.sums, s.bias);
    for (int64_t r = 0; r < rows; ++r) {
      if (!outputs[r]) continue;
      T* target = outputs[r] + first;
      const float* values = waiting.sums + r * kSumEdge;
      int64_t j = 0;
      for (; j + lanes<float> <= columns; j += lanes<float>)
        t_.epilogue.store(target + j, load(values + j) + load(s.bias + j));
      if (j < columns) t_.epilogue.store_partial(target + j, load(values + j) + load(s.bias + j), columns - j);
      t_.epilogue.open_gate(target, columns);
    }
  }

  // Sixteen pixels, or a vector of them, at a time; those that are neighbours in the planes are stored together.
  void store_planes(T* const* outputs, int64_t first, int64_t rows, int64_t columns, const float* sums,
                    const float* bias) const {
    const int64_t plane = t_.written_pixels();
    for (int64_t r = 0; r < rows; r += lanes<float>) {
      const int64_t count = std::min<int64_t>(lanes<float>, rows - r);
      for (int64_t k = 0; k < columns; k += lanes<float>) {
        vec<float> block[lanes<float>];
        for (int64_t i = 0; i < lanes<float>; ++i) block[i] = load(sums + (r + i) * kSumEdge + k) + load(bias + k);
        transpose<float>(block);
        for (int64_t j = 0; j < std::min<int64_t>(lanes<float>, columns - k); ++j)
          store_line(outputs + r, (first + k + j) * plane, block[j], count);
      }
    }
  }

  void store_line(T* const* outputs, int64_t offset, vec<float> values, int64_t count) const {
    for (int64_t i = 0, length; i < count; i += length) {
      length = 1;
      if (!outputs[i]) continue;
      while (i + length < count && outputs[i + length] == outputs[i] + length) ++length;
      if (length == lanes<float>) {
        t_.epilogue.store(outputs[0] + offset, values);
        return t_.epilogue.open_gate(outputs[0] + offset, length);
      }
      if (length == 1) {
        t_.epilogue.store_one(outputs[i] + offset, values[i]);
      } else {
        float line[2 * lanes<float>];
        CONVLAB_ISA::store(line, values);
        t_.epilogue.store_row(outputs[i] + offset, line + i, length);
      }
    }
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  KernelSpans spans_;
  TileWeights<T> weights_;
  BlockCut blocks_;
  bool last_, in_place_;
  int64_t channels_, written_channels_;  // of all groups
  int64_t chunks_, chunk_steps_;         // copies of the read channels, and steps of one
  int64_t pitch_;                        // of a position
  int64_t task_blocks_, column_blocks_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
