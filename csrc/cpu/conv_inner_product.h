// inner_product: pointwise convolutions of few pixels, and fully connected layers of few rows. All passes.
//
// Idea: with few pixels a weight is used only a few times, and copying it into panels costs more than the product
// itself. Here weights are read where they lie: forward, an output is the inner product of a pixel and a filter, both
// contiguous, several filters at a time, whose lanes are added up together; backward input, a pixel is the sum of
// filters times numbers; the weight gradient is a sum of outer products. Cost: multiply_adds(), and the weights once
// per three pixels (two backward), from cache after the first time. Limits: no kernel but 1x1 (one as large as the map
// becomes that before, ops/convolution_cpu.h); from some 16 pixels on
// implicit_gemm, which multiplies 6 rows per load, is faster.
#pragma once
#include "conv_phase.h"
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class InnerProduct {
 public:
  using A = accumulate_t<T>;

  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    return body(InnerProduct(arguments));
  }

  explicit InnerProduct(const ConvArguments<T>& arguments) : arguments_(arguments) {
    const ConvGeometry& g = arguments.geometry;
    pixels_ = g.batch * g.input_pixels();
    scattered_ = arguments.layout == Layout::channels_first && g.input_pixels() > 1;
    columns_ = arguments.pass == Pass::forward ? g.out_channels_per_group() : g.in_channels_per_group();
    blocks_ = arguments.pass == Pass::backward_weight ? divide_up(g.out_channels_per_group(), kFilters)
                                                      : divide_up(columns_, block_columns());
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = arguments_.geometry.groups * blocks_;
    if (scattered_) {
      plan.prepare_tasks = pixels_;
      plan.shared_bytes = carve(nullptr).bytes;
    }
    return plan;
  }

  // The channels of one pixel, where they do not lie together.
  void prepare(void*, int64_t pixel) const {
    const Rows rows = carve(arguments_.shared);
    const ConvGeometry& g = arguments_.geometry;
    const auto gather = [&](const T* tensor, int64_t channels, T* target) {
      for (int64_t c = 0; c < channels; ++c) target[pixel * channels + c] = tensor[element(pixel, c, channels)];
    };
    if (arguments_.pass != Pass::backward_input) gather(arguments_.input, g.in_channels, rows.gathered_input);
    if (arguments_.pass != Pass::forward) gather(arguments_.output, g.out_channels, rows.gathered_output);
  }

  // One block of the written channels (of the filters in backward_weight) of one group.
  void run(void*, int64_t task) const {
    const Rows rows = carve(arguments_.shared);
    const int64_t group = task / blocks_, block = task % blocks_;
    switch (arguments_.pass) {
      case Pass::forward:
        return forward(rows.input, group, block * kProducts);
      case Pass::backward_input:
        return backward_input(rows.output, group, block * block_columns());
      case Pass::backward_weight:
        return backward_weight(rows, group, block * kFilters);
    }
  }

 private:
  static constexpr int kVectors = 2 * kTileVectors, kFilters = 4;
  static constexpr int kProducts = std::min(lanes<A>, 2 * kTileVectors);  // filters that meet up to 3 pixels at a time
  static constexpr int64_t kChain = 512;  // longest sum in float before it is added to the others

  // The tensors as [pixel][channel]; those that do not lie that way are gathered.
  struct Rows {
    const T *input, *output;
    T *gathered_input = nullptr, *gathered_output = nullptr;
    int64_t bytes = 0;
  };
  Rows carve(void* shared) const {
    Rows rows{arguments_.input, arguments_.output};
    if (!scattered_) return rows;
    Carver carver(shared);
    if (arguments_.pass != Pass::backward_input)
      rows.input = rows.gathered_input = carver.template take<T>(pixels_ * arguments_.geometry.in_channels);
    if (arguments_.pass != Pass::forward)
      rows.output = rows.gathered_output = carver.template take<T>(pixels_ * arguments_.geometry.out_channels);
    rows.bytes = carver.used();
    return rows;
  }

  int64_t block_columns() const { return arguments_.pass == Pass::forward ? kProducts : kVectors * lanes<A>; }
  int64_t element(int64_t pixel, int64_t channel, int64_t channels) const {
    if (!scattered_) return pixel * channels + channel;
    const int64_t size = arguments_.geometry.input_pixels();
    return (pixel / size * channels + channel) * size + pixel % size;
  }

  // + bias, epilogue and store of the `count` values of a pixel that start at `channel` (of all groups).
  void finish_row(T* written, int64_t pixel, int64_t channel, int64_t channels, vec<A> value, int64_t count) const {
    if (arguments_.bias) value += load_partial(arguments_.bias + channel, count);
    const Epilogue<T> epilogue{written, arguments_.residual, arguments_.activation};
    T* target = written + element(pixel, channel, channels);
    if (!scattered_) {
      if (count == lanes<A>)
        epilogue.store(target, value);
      else
        epilogue.store_partial(target, value, count);
      epilogue.open_gate(target, count);
      return;
    }
    A values[lanes<A>];
    store(values, value);
    for (int64_t i = 0; i < count; ++i) epilogue.store_one(target + i * arguments_.geometry.input_pixels(), values[i]);
  }

  void forward(const T* input, int64_t group, int64_t first) const {
    int64_t pixel = 0;
    for (; pixel + 3 <= pixels_; pixel += 3) inner_products<3>(input, group, first, pixel);
    for (; pixel < pixels_; ++pixel) inner_products<1>(input, group, first, pixel);
  }

  template <int Pixels>
  void inner_products(const T* input, int64_t group, int64_t first, int64_t pixel) const {
    const ConvGeometry& g = arguments_.geometry;
    const int64_t depth = g.in_channels_per_group(), count = std::min<int64_t>(kProducts, columns_ - first);
    const int64_t channel = group * columns_ + first;
    const T *filter[kProducts], *row[Pixels];
    for (int64_t f = 0; f < kProducts; ++f) filter[f] = arguments_.weight + (channel + std::min(f, count - 1)) * depth;
    for (int p = 0; p < Pixels; ++p) row[p] = input + (pixel + p) * g.in_channels + group * depth;
    vec<A> sum[Pixels][kProducts];
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int f = 0; f < kProducts; ++f) sum[p][f] =
        vec<A>{};
    int64_t d = 0;
    for (; d + lanes<A> <= depth; d += lanes<A>) add_products<Pixels, true>(row, filter, d, 0, sum);
    if (d < depth) add_products<Pixels, false>(row, filter, d, depth - d, sum);
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) finish_row(arguments_.output, pixel + p, channel, g.out_channels,
                                                               sum_lanes_of_each<A, kProducts>(sum[p]), count);
  }

  // One vector of the channels from `d` on, or `count` of them.
  template <int Pixels, bool Whole>
  static CONVLAB_INLINE void add_products(const T* const (&row)[Pixels], const T* const (&filter)[kProducts], int64_t d,
                                          int64_t count, vec<A> (&sum)[Pixels][kProducts]) {
    vec<A> value[Pixels];
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) {
      value[p] = Whole ? load(row[p] + d) : load_partial(row[p] + d, count);
      pin(value[p]);
    }
    CONVLAB_UNROLL for (int f = 0; f < kProducts; ++f) {
      const vec<A> weight = Whole ? load(filter[f] + d) : load_partial(filter[f] + d, count);
      CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) sum[p][f] = fma(value[p], weight, sum[p][f]);
    }
  }

  void backward_input(const T* output, int64_t group, int64_t first) const {
    int64_t pixel = 0;
    const int64_t left = columns_ - first;
    const auto vectors = [&](auto pixels) {
      constexpr int P = decltype(pixels)::value;
      if (left >= kVectors * lanes<A>)
        sum_of_filters<P, kVectors, true>(output, group, first, pixel);
      else
        for (int64_t at = first; at < columns_; at += lanes<A>) sum_of_filters<P, 1, false>(output, group, at, pixel);
      pixel += P;
    };
    while (pixel + 2 <= pixels_) vectors(std::integral_constant<int, 2>{});
    if (pixel < pixels_) vectors(std::integral_constant<int, 1>{});
  }

  template <int Pixels, int Vectors, bool Whole>
  void sum_of_filters(const T* output, int64_t group, int64_t first, int64_t pixel) const {
    const ConvGeometry& g = arguments_.geometry;
    const int64_t depth = g.out_channels_per_group(), width = g.in_channels_per_group();
    const int64_t count = std::min<int64_t>(lanes<A>, columns_ - first);
    const T* weight = arguments_.weight + group * depth * width + first;
    const T* row[Pixels];
    for (int p = 0; p < Pixels; ++p) row[p] = output + (pixel + p) * g.out_channels + group * depth;
    vec<A> total[Pixels][Vectors] = {};
    for (int64_t begin = 0; begin < depth; begin += kChain) {
      vec<A> sum[Pixels][Vectors];
      CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] =
          vec<A>{};
      for (int64_t f = begin; f < std::min(depth, begin + kChain); ++f) {
        vec<A> filter[Vectors];
        CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
          const T* from = weight + f * width + v * lanes<A>;
          filter[v] = Whole ? load(from) : load_partial(from, count);
          pin(filter[v]);
        }
        CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) {
          const vec<A> number = broadcast(to_accumulate(row[p][f]));
          CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] = fma(number, filter[v], sum[p][v]);
        }
      }
      CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) total[p][v] +=
          sum[p][v];
    }
    CONVLAB_UNROLL for (int p = 0; p < Pixels; ++p) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
        finish_row(arguments_.input, pixel + p, group * width + first + v * lanes<A>, g.in_channels, total[p][v],
                   Whole ? lanes<A> : count);
  }

  void backward_weight(const Rows& rows, int64_t group, int64_t first) const {
    const ConvGeometry& g = arguments_.geometry;
    const int64_t filters = g.out_channels_per_group(), width = g.in_channels_per_group();
    const int64_t count = std::min<int64_t>(kFilters, filters - first);
    T* weight = arguments_.weight + (group * filters + first) * width;
    for (int64_t c = 0; c < width; c += lanes<A>) {
      const int64_t left = std::min<int64_t>(lanes<A>, width - c);
      const T* input = rows.input + group * width + c;
      const T* output[kFilters];
      for (int64_t f = 0; f < kFilters; ++f) output[f] = rows.output + group * filters + first + std::min(f, count - 1);
      vec<A> total[kFilters] = {};
      for (int64_t begin = 0; begin < pixels_; begin += kChain) {
        vec<A> sum[kFilters] = {};
        for (int64_t p = begin; p < std::min(pixels_, begin + kChain); ++p) {
          const T* from = input + p * g.in_channels;
          vec<A> value = left == lanes<A> ? load(from) : load_partial(from, left);
          pin(value);
          CONVLAB_UNROLL for (int f = 0; f < kFilters; ++f) sum[f] =
              fma(broadcast(to_accumulate(output[f][p * g.out_channels])), value, sum[f]);
        }
        CONVLAB_UNROLL for (int f = 0; f < kFilters; ++f) total[f] += sum[f];
      }
      for (int64_t f = 0; f < count; ++f) {
        if (left == lanes<A>)
          store(weight + f * width + c, total[f]);
        else
          store_partial(weight + f * width + c, total[f], left);
      }
    }
  }

  ConvArguments<T> arguments_;
  int64_t pixels_, columns_, blocks_;  // columns: written channels per group
  bool scattered_;                     // a pixel's channels do not lie together
};

}  // namespace convlab::cpu::CONVLAB_ISA
