// Backward weight of layers that read few channels, such as a network's first.
//
// Idea: a product of matrices whose reduction runs along lines of pixels. Rows are channels and taps: where the lines
// that a band of pixels reads are copied and padded with zeros, what a tap reads along a line lies at a constant shift
// and a constant step, so that rows are pointers into them and no patch is gathered. Channels last, lines keep their
// order (conv_strips.h), and a line of grad_output is a panel as it lies; channels first, each channel has its plane
// (conv_planes.h), and grad_output is transposed. Columns are filters. A task sums a chunk of the batch's bands of
// lines; chunks depend on the geometry alone and are added in order: the same bits for every number of threads. Cost:
// multiply_adds(), copying the input once, and reading and writing the sums once per piece of some lines. Memory:
// chunks x weights; per thread a band, about kBandBytes. Limits: one group, a panel of filters; each chain of additions
// covers at most kPiece pixels.
#pragma once
#include "conv_planes.h"
#include "conv_strips.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class LinesWeight {
 public:
  using A = accumulate_t<T>;

  // Wider panels would leave the sums no room in cache; where lanes are pixels, few filters are better off.
  static bool suits(const ConvArguments<T>& arguments) {
    const ConvGeometry& g = arguments.geometry;
    constexpr int64_t most_reads = 64, fewest_chunks = 8;
    const bool last = arguments.layout == Layout::channels_last;
    const int64_t weight = g.in_channels * g.taps() * round_up(g.out_channels, lanes<A>);
    if (weight * static_cast<int64_t>(sizeof(A)) > kSumsBytes / fewest_chunks) return false;
    // Patches that lie apart are copied as they are, and those of few pixels leave many sums with little to add.
    const bool few_pixels = g.batch * g.output_pixels() < kPiece;
    if (g.in_channels >= lanes<A> && (few_pixels || !arguments.patches_overlap())) return false;
    return CONVLAB_VECTOR_BYTES == 64 && !is_reduced<operand_t<T>> && g.groups == 1 && g.taps() > 1 &&
           g.in_channels <= most_reads && g.out_channels <= kPanel<A> &&
           (last ? g.out_channels % lanes<A> == 0 : g.out_channels > 2 * lanes<A>);
  }

  explicit LinesWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase_at(geometry_, Pass::forward, 0)) {
    last_ = arguments.layout == Layout::channels_last;
    filters_ = geometry_.out_channels;
    rows_ = geometry_.in_channels * geometry_.taps();
    pitch_ = round_up(filters_, lanes<A>);
    packs_ = !std::is_same_v<T, A> || !last_;
    const int64_t channels = geometry_.in_channels;
    slot_ = channels <= StripLines<T>::kFew ? StripLines<T>::kFew : round_up(channels, lanes<A>);
    bands_ = Bands(phase_,
                   [&](const Band& band) { return band_size(band) * static_cast<int64_t>(sizeof(A)) <= kBandBytes; });
    step_ = last_ ? phase_.axis[2].read_step * slot_ : 1;
    piece_ = step_ < lanes<A> ? kPiece : kPiece / 2;  // a cache line for each pixel
    // Short lines make up one chain of additions.
    together_ = std::max<int64_t>(1, piece_ / bands_.count[2]);
    units_ = geometry_.batch * bands_.number(phase_);
    const int64_t most = std::min(kTasks, kSumsBytes / (rows_ * pitch_ * static_cast<int64_t>(sizeof(A))));
    chunks_ = std::max<int64_t>(1, std::min(units_, most));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = chunks_;
    plan.finish_tasks = rows_;
    plan.shared_bytes = chunks_ * rows_ * pitch_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // A chunk of images' bands.
  void run(void* scratch, int64_t chunk) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    std::fill_n(sums(chunk), rows_ * pitch_, A(0));
    const int64_t bands = bands_.number(phase_);
    for (int64_t unit = units_ * chunk / chunks_; unit < units_ * (chunk + 1) / chunks_; ++unit) {
      const Band band(bands_.at(phase_, unit % bands));
      fill(band, unit / bands, s);
      const int64_t lines = band.phase.axis[0].count * band.phase.axis[1].count;
      for (int64_t first = 0; first < lines; first += together_)
        add_lines(band, unit / bands, first, std::min(together_, lines - first), sums(chunk), s);
    }
  }

  // Adds the chunks of one row.
  void finish(int64_t row) const {
    const int64_t taps = geometry_.taps(), stride = arguments_.weight_stride_filter();
    const int64_t channels = geometry_.in_channels;
    const int64_t channel = last_ ? row % channels : row / taps, tap = last_ ? row / channels : row % taps;
    T* target = arguments_.weight + channel * arguments_.weight_stride_channel + tap * arguments_.weight_stride_tap;
    for (int64_t filter = 0; filter < filters_; filter += lanes<A>) {
      vec<A> sum{};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += load(sums(chunk) + row * pitch_ + filter);
      A values[lanes<A>];
      store(values, sum);
      for (int64_t k = 0; k < std::min<int64_t>(lanes<A>, filters_ - filter); ++k)
        target[(filter + k) * stride] = from_accumulate<T>(values[k]);
    }
  }

 private:
  static constexpr int64_t kTasks = 32, kSumsBytes = int64_t{8} << 20;
  static constexpr int64_t kPiece = 256;  // at most
  static constexpr int64_t kBandBytes = int64_t{128} << 10;

  struct Scratch {
    A* band;              // [line][pixel][channel]; [channel][plane]
    A* gradient;          // [line][pixel][filter] of some lines
    const A** first;      // where each row's line 0 begins
    const A** rows;       // [line][row]
    const A** gradients;  // of the lines
    A** outputs;
  };
  static int64_t plane_pitch(const Band& band) { return band.size() + lanes<A>; }
  // What a band reads, channels last: lines in their order, whole along x.
  static int64_t slots(const Band& band, int axis) {
    return slots_of(band.phase.axis[axis], band.phase.axis[axis].count);
  }
  int64_t line_size(const Band& band) const { return slots(band, 2) * slot_; }
  // And a vector behind it.
  int64_t band_size(const Band& band) const {
    return last_ ? slots(band, 0) * slots(band, 1) * line_size(band) + lanes<A>
                 : geometry_.in_channels * plane_pitch(band) + lanes<A>;
  }
  Scratch carve(Carver& carver) const {
    const Band band(bands_.at(phase_, 0));
    return {carver.take<A>(band_size(band)),  carver.take<A>(packs_ ? together_ * bands_.count[2] * pitch_ : 0),
            carver.take<const A*>(rows_),     carver.take<const A*>(together_ * rows_),
            carver.take<const A*>(together_), carver.take<A*>(kTileRows)};
  }

  // [row][filter]
  A* sums(int64_t chunk) const { return static_cast<A*>(arguments_.shared) + chunk * rows_ * pitch_; }

  void fill(const Band& band, int64_t n, const Scratch& s) const {
    const int64_t channels = geometry_.in_channels, pixels = geometry_.input_pixels();
    const T* image = arguments_.input + n * channels * pixels;
    if (last_) return fill_lines(band, image, s);
    const int64_t pitch = plane_pitch(band);
    fill_planes(arguments_.layout, band, image, geometry_.input, 0, channels, channels, s.band, pitch);
    list_taps<A>(band, s.band, channels, pitch, s.first);
  }

  void fill_lines(const Band& band, const T* image, const Scratch& s) const {
    const AxisPhase *az = &band.phase.axis[0], *ay = &band.phase.axis[1], *ax = &band.phase.axis[2];
    const int64_t channels = geometry_.in_channels, height = slots(band, 1), line = line_size(band);
    const StripLines<T> copying{arguments_.layout, geometry_.input,  channels,       0,
                                channels,          ax->offset_first, slots(band, 2), slot_};
    for (int64_t z = 0; z < slots(band, 0); ++z)
      for (int64_t y = 0; y < height; ++y)
        if (z % az->read_step < az->reach() && y % ay->read_step < ay->reach())
          copying.copy(image, az->offset_first + z, ay->offset_first + y, s.band + (z * height + y) * line);
    const A** target = s.first;
    for (int64_t jz = 0; jz < az->taps; ++jz)
      for (int64_t jy = 0; jy < ay->taps; ++jy)
        for (int64_t jx = 0; jx < ax->taps; ++jx) {
          const A* from = s.band + (jz * az->offset_step * height + jy * ay->offset_step) * line;
          for (int64_t c = 0; c < channels; ++c) *target++ = from + jx * ax->offset_step * slot_ + c;
        }
  }

  const A* gradient_line(int64_t n, int64_t pixel, int64_t count, A* packed) const {
    const int64_t pixels = geometry_.output_pixels();
    const T* from = arguments_.output + (last_ ? (n * pixels + pixel) * filters_ : n * filters_ * pixels + pixel);
    if constexpr (std::is_same_v<T, A>)
      if (!packs_) return from;
    if (last_)
      for (int64_t i = 0; i < count * filters_; i += lanes<A>) store(packed + i, load(from + i));
    else
      transpose_matrix(from, pixels, filters_, count, packed, pitch_);
    return packed;
  }

  // What some lines of a band, counted through its planes, add to the sums.
  void add_lines(const Band& band, int64_t n, int64_t first, int64_t lines, A* sums, const Scratch& s) const {
    const AxisPhase* axis = band.phase.axis;
    const int64_t count = axis[2].count;
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t z = (first + i) / axis[1].count, y = (first + i) % axis[1].count;
      s.gradients[i] =
          gradient_line(n, first_pixel(band, z, y, geometry_.output), count, s.gradient + i * count * pitch_);
      const int64_t offset = last_ ? (z * axis[0].read_step * slots(band, 1) + y * axis[1].read_step) * line_size(band)
                                   : (z * band.slots[1] + y) * band.slots[2];
      for (int64_t row = 0; row < rows_; ++row) s.rows[i * rows_ + row] = s.first[row] + offset;
    }
    TileProduct<A> product;
    product.outputs = s.outputs;
    product.accumulate = true;
    product.panels = s.gradients;
    product.segments = lines;
    product.row_pitch = rows_;
    product.row_step = step_;
    const int64_t tiles = divide_up(rows_, kTileRows), pieces = divide_up(count, piece_);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t x = count * piece / pieces;
      product.row_offset = x * step_;
      product.panel_offset = x * pitch_;
      product.depth = count * (piece + 1) / pieces - x;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows_ * tile / tiles, height = rows_ * (tile + 1) / tiles - row;
        product.rows = s.rows + row;
        for (int64_t r = 0; r < height; ++r) s.outputs[r] = sums + (row + r) * pitch_;
        tile_kernel<A, 0>(static_cast<int>(height), static_cast<int>(pitch_ / lanes<A>))(product);
      }
    }
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  bool last_, packs_;    // grad_output is packed
  int64_t slot_, step_;  // from one pixel of a band to the next; from one element of a row to the next
  int64_t piece_;        // pixels of one chain of additions
  int64_t filters_, rows_, pitch_, units_, chunks_, together_;
  Bands bands_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
