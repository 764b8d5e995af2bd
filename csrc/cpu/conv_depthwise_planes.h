// Backward weight of depthwise convolution on NC(D)HW tensors with too few channels to fill a vector.
//
// Idea: on zero-padded planes (conv_planes.h) the gradient of a weight is one dot product: of grad_output, spread in
// the plane's pitch, and the plane shifted by the tap. Bands and samples are added up in double. Cost: two loads per
// multiply-add. Memory: per thread a band of a plane of at most kBandElements elements (or one line's worth), and its
// grad_output. The other passes are those of implicit_gemm (conv_gemm_planes.h).
#pragma once
#include "conv_gemm_planes.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class DepthwiseWeightPlanes {
 public:
  using A = accumulate_t<T>;

  explicit DepthwiseWeightPlanes(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        geometry_(arguments.geometry),
        phase_(phase_at(geometry_, Pass::forward, 0)),
        bands_(phase_, [](const Band& band) { return band.size() <= kBandElements; }) {}

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = geometry_.groups;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // All taps of one channel.
  void run(void* scratch, int64_t channel) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    const int64_t taps = geometry_.taps();
    std::fill(s.sums, s.sums + taps, 0.0);
    for (int64_t n = 0; n < geometry_.batch; ++n) {
      const int64_t plane = n * geometry_.groups + channel;
      const T* image = arguments_.input + plane * geometry_.input_pixels();
      const T* gradient = arguments_.output + plane * geometry_.output_pixels();
      for (int64_t index = 0; index < bands_.number(phase_); ++index) {
        const Band band(bands_.at(phase_, index));
        fill_plane(band, image, geometry_.input, s.plane);
        std::fill(s.plane + band.size(), s.plane + band.size() + kSlack, A(0));
        spread_gradient(band, gradient, s.gradient);
        const AxisPhase* axis = phase_.axis;
        double* sum = s.sums;
        for (int64_t jz = 0; jz < axis[0].taps; ++jz)
          for (int64_t jy = 0; jy < axis[1].taps; ++jy)
            for (int64_t jx = 0; jx < axis[2].taps; ++jx)
              *sum++ += dot(s.gradient, s.plane + band.shift(jz, jy, jx), band.length());
      }
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      arguments_.weight[channel * taps + tap] = from_accumulate<T>(static_cast<A>(s.sums[tap]));
  }

 private:
  static constexpr int64_t kBandElements = 32 * 1024;  // 128 kB of float
  static constexpr int64_t kSlack = 4 * lanes<A>;      // loads of the last vectors

  struct Scratch {
    A* plane;
    A* gradient;
    double* sums;  // of the kernel's taps
  };
  Scratch carve(Carver& carver) const {
    const Band band(bands_.at(phase_, 0));
    return {carver.take<A>(band.size() + kSlack), carver.take<A>(band.length() + kSlack),
            carver.take<double>(geometry_.taps())};
  }

  // The band's grad_output in the plane's pitch, zeros in the columns between lines and behind the last.
  void spread_gradient(const Band& band, const T* gradient, A* target) const {
    const AxisPhase* axis = band.phase.axis;
    std::fill(target, target + band.length() + kSlack, A(0));
    for (int64_t z = 0; z < axis[0].count; ++z)
      for (int64_t y = 0; y < axis[1].count; ++y)
        copy_span<1>(gradient + ((axis[0].first + z) * geometry_.output[1] + axis[1].first + y) * geometry_.output[2] +
                         axis[2].first,
                     1, axis[2].count, target + (z * band.slots[1] + y) * band.slots[2]);
  }

  static A dot(const A* a, const A* b, int64_t count) {
    vec<A> sum[4] = {};
    for (int64_t i = 0; i < count; i += 4 * lanes<A>)  // `a` is zero behind its end
      CONVLAB_UNROLL for (int v = 0; v < 4; ++v) sum[v] =
          fma(load(a + i + v * lanes<A>), load(b + i + v * lanes<A>), sum[v]);
    return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  const ConvArguments<T>& arguments_;
  const ConvGeometry& geometry_;
  Phase phase_;
  Bands bands_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
