// Backward weight of layers that read few channels, depthwise ones of very few channels among them.
//
// Idea: on zero-padded planes (conv_planes.h) the gradient of a weight is one dot product: of a filter's grad_output,
// spread in the plane's pitch, and a plane shifted by the tap. Lanes are neighbouring pixels; a tile of 3 filters times
// 4 taps meets 7 loads with 12 multiply-adds, and no patch is gathered. Channels last, both are transposed into planes.
// A task sums a chunk of the batch's bands for some filters; chunks depend on the geometry alone and are added in
// order. Cost: multiply_adds() for the pixels and a few columns per line, and copying both tensors once. Memory: chunks
// x weights; per thread a band of the planes and of some filters, about kBandBytes. Limits: zeros between the lines
// meet pixels of the input, so that an infinite one makes NaN of gradients that it has no part in; with many read
// channels there are more products per pixel than the planes are worth.
#pragma once
#include "conv_planes.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class PlanesWeight {
 public:
  using A = accumulate_t<T>;

  // Whether a product of matrices would spend too much on gathering patches.
  static bool suits(const ConvArguments<T>& arguments) {
    const ConvGeometry& g = arguments.geometry;
    const int64_t reads = g.in_channels_per_group(), filters = g.out_channels_per_group();
    if (is_reduced<operand_t<T>> || reads > 16 || g.strided()) return false;
    const bool first = arguments.layout == Layout::channels_first;
    return reads * g.taps() < (filters <= 32 ? 256 : first ? 64 : 0);
  }

  explicit PlanesWeight(const ConvArguments<T>& arguments)
      : arguments_(arguments), geometry_(arguments.geometry), phase_(phase_at(geometry_, Pass::forward, 0)) {
    last_ = arguments.layout == Layout::channels_last;
    reads_ = geometry_.in_channels_per_group();
    filters_ = geometry_.out_channels_per_group();
    products_ = reads_ * geometry_.taps();
    together_ = std::min(filters_, kTogether);
    const int64_t most = std::max<int64_t>(1, divide_up(kTasks, geometry_.groups));
    bands_ = Bands(phase_, [&](const Band& band) {
      const int64_t elements = reads_ * (band.size() + lanes<A>)+together_ * band.length();
      return elements * static_cast<int64_t>(sizeof(A)) <= kBandBytes;
    });
    units_ = geometry_.batch * bands_.number(phase_);
    chunks_ = std::max<int64_t>(1, std::min(units_, most));
    parts_ = std::clamp<int64_t>(most / chunks_, 1, divide_up(filters_, kTogether));
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = geometry_.groups * chunks_ * parts_;
    plan.finish_tasks = geometry_.out_channels;
    plan.shared_bytes = chunks_ * geometry_.out_channels * products_ * static_cast<int64_t>(sizeof(A));
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // A chunk of images' bands, and some filters of a group.
  void run(void* scratch, int64_t task) const {
    const int64_t part = task % parts_, chunk = task / parts_ % chunks_, group = task / parts_ / chunks_;
    const int64_t first = group * filters_ + filters_ * part / parts_,
                  end = group * filters_ + filters_ * (part + 1) / parts_;
    Carver carver(scratch);
    const Scratch s = carve(carver);
    std::fill(partial(chunk, first), partial(chunk, end), A(0));
    const int64_t bands = bands_.number(phase_);
    for (int64_t unit = units_ * chunk / chunks_; unit < units_ * (chunk + 1) / chunks_; ++unit) {
      const int64_t n = unit / bands;
      const Band band(bands_.at(phase_, unit % bands));
      fill(band, n, group * reads_, s.planes);
      list_products(band, s);
      for (int64_t filter = first; filter < end; filter += kTogether) {
        const int64_t count = std::min(kTogether, end - filter);
        spread_gradient(band, n, filter, count, s.gradient);
        const int64_t length = band.length(), pieces = divide_up(length, kPiece);
        const int64_t size = round_up(divide_up(length, pieces), lanes<A>);
        for (int64_t begin = 0; begin < length; begin += size)
          add_piece({s.gradient, gradient_pitch(band), begin, std::min(size, length - begin), s.inputs}, count,
                    partial(chunk, filter));
      }
    }
  }

  // Adds the chunks of one filter.
  void finish(int64_t filter) const {
    const int64_t taps = geometry_.taps();
    for (int64_t j = 0; j < products_; ++j) {
      A sum = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial(chunk, filter)[j];
      arguments_.weight[filter * arguments_.weight_stride_filter() + j / taps * arguments_.weight_stride_channel +
                        j % taps * arguments_.weight_stride_tap] = from_accumulate<T>(sum);
    }
  }

 private:
  static constexpr int64_t kTogether = 12;  // filters whose gradients are spread at a time
  static constexpr int64_t kTasks = 16;
  static constexpr int64_t kPiece = 1280;  // flat outputs whose products are added up in one chain
  static constexpr int64_t kBandBytes = int64_t{256} << 10;
  static constexpr int64_t kMostTaps = 8, kSlack = lanes<A>;

  struct Scratch {
    A* planes;         // [read channel][plane]
    A* gradient;       // [filter][flat output], zeros in the columns between lines and behind the last
    const A** inputs;  // of each product, where the first flat output reads; the last is repeated
  };
  Scratch carve(Carver& carver) const {
    const Band band(bands_.at(phase_, 0));
    return {carver.take<A>(reads_ * plane_pitch(band) + kSlack),
            carver.take<A>(together_ * gradient_pitch(band) + kSlack), carver.take<const A*>(products_ + kMostTaps)};
  }
  static int64_t plane_pitch(const Band& band) { return band.size() + lanes<A>; }
  static int64_t gradient_pitch(const Band& band) { return round_up(band.length(), lanes<A>) + lanes<A>; }

  // Sums of a filter, as [read channel][tap].
  A* partial(int64_t chunk, int64_t filter) const {
    return static_cast<A*>(arguments_.shared) + (chunk * geometry_.out_channels + filter) * products_;
  }

  void fill(const Band& band, int64_t n, int64_t first, A* planes) const {
    const int64_t pixels = geometry_.input_pixels(), pitch = plane_pitch(band);
    fill_planes(arguments_.layout, band, arguments_.input + n * geometry_.in_channels * pixels, geometry_.input, first,
                reads_, geometry_.in_channels, planes, pitch);
    for (int64_t c = 0; c < reads_; ++c) std::fill_n(planes + c * pitch + band.size(), lanes<A>, A(0));
    std::fill_n(planes + reads_ * pitch, kSlack, A(0));
  }

  void list_products(const Band& band, const Scratch& s) const {
    const A** input = list_taps<A>(band, s.planes, reads_, plane_pitch(band), s.inputs);
    std::fill_n(input, kMostTaps, input[-1]);
  }

  void spread_gradient(const Band& band, int64_t n, int64_t first, int64_t count, A* target) const {
    const AxisPhase* axis = band.phase.axis;
    const int64_t pixels = geometry_.output_pixels(), filters = geometry_.out_channels, pitch = gradient_pitch(band);
    std::fill_n(target, count * pitch + kSlack, A(0));
    for (int64_t z = 0; z < axis[0].count; ++z)
      for (int64_t y = 0; y < axis[1].count; ++y) {
        const int64_t pixel = first_pixel(band, z, y, geometry_.output);
        A* to = target + (z * band.slots[1] + y) * band.slots[2];
        if (last_)  // writes whole vectors, so lines come in order
          transpose_matrix(arguments_.output + (n * pixels + pixel) * filters + first, filters, axis[2].count, count,
                           to, pitch);
        else
          for (int64_t k = 0; k < count; ++k)
            copy_span<1>(arguments_.output + (n * filters + first + k) * pixels + pixel, 1, axis[2].count,
                         to + k * pitch);
      }
  }

  // The products of some flat outputs with the gradients of some filters.
  struct Piece {
    const A* gradient;
    int64_t pitch, begin, length;
    const A* const* inputs;
  };

  void add_piece(const Piece& piece, int64_t filters, A* sums) const {
    constexpr int rows = 3;
    if (filters == 1) return add_rows<1, kMostTaps>(piece, 0, sums);
    int64_t k = 0;
    for (; k + rows <= filters; k += rows) add_rows<rows, 4>(piece, k, sums);
    if (k + 2 == filters) add_rows<2, 4>(piece, k, sums);
    if (k + 1 == filters) add_rows<1, kMostTaps>(piece, k, sums);
  }

  template <int Filters, int Taps>
  void add_rows(const Piece& piece, int64_t filter, A* sums) const {
    for (int64_t j = 0; j < products_; j += Taps)
      add_tile<Filters, Taps>(piece, filter, piece.inputs + j, std::min<int64_t>(Taps, products_ - j),
                              sums + filter * products_ + j);
  }

  template <int Filters, int Taps>
  __attribute__((noinline)) void add_tile(const Piece& piece, int64_t filter, const A* const* inputs, int64_t taps,
                                          A* sums) const {
    const A *gradient[Filters], *input[Taps];
    CONVLAB_UNROLL for (int f = 0; f < Filters; ++f) gradient[f] =
        piece.gradient + (filter + f) * piece.pitch + piece.begin;
    CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) input[t] = inputs[t] + piece.begin;
    vec<A> sum[Filters][Taps];
    CONVLAB_UNROLL for (int f = 0; f < Filters; ++f) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) sum[f][t] = vec<A>{};
    for (int64_t i = 0; i < piece.length; i += lanes<A>) {
      vec<A> g[Filters];
      CONVLAB_UNROLL for (int f = 0; f < Filters; ++f) {
        g[f] = load(gradient[f] + i);
        pin(g[f]);
      }
      CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) {
        vec<A> x = load(input[t] + i);
        pin(x);
        CONVLAB_UNROLL for (int f = 0; f < Filters; ++f) sum[f][t] = fma(g[f], x, sum[f][t]);
      }
    }
    A total[Filters][Taps];
    CONVLAB_UNROLL for (int f = 0; f < Filters; ++f) CONVLAB_UNROLL for (int t = 0; t < Taps; ++t) total[f][t] =
        sum_lanes<A>(sum[f][t]);
    for (int f = 0; f < Filters; ++f)
      for (int t = 0; t < taps; ++t) sums[f * products_ + t] += total[f][t];
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  bool last_;
  int64_t reads_, filters_, products_, together_, units_, chunks_, parts_;
  Bands bands_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
