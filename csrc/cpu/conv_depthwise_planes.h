// Depthwise convolution on NC(D)HW tensors, all passes.
//
// Idea: copy a plane of what is read into scratch, padded with zeros and split by residue modulo the stride:
// position stride*i + q of an axis goes to slot i + q/stride of residue q % stride. Then every tap is a shift: flat
// output i is the sum over taps of plane[shift(tap) + i] * weight[tap], whatever the stride, dilation, padding or
// number of dimensions, with no borders to look at; each line ends in a few columns that are computed and thrown away.
// Short lines fill vectors together. The weight gradient is one dot product per tap of the same two planes. Cost: one
// load per multiply-add, and each tensor once through the cache. Memory: per thread a band of a plane of at most
// kBandElements elements (or one line's worth), plus its outputs. Limits: long 1-D kernels (taps in the hundreds) would
// rather use a Fourier transform.
#pragma once
#include "conv_gather.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class DepthwisePlanes {
 public:
  using A = accumulate_t<T>;

  explicit DepthwisePlanes(const ConvArguments<T>& arguments)
      : arguments_(arguments),
        t_(arguments.pass == Pass::backward_weight ? as_forward(arguments) : arguments),
        weight_(arguments.pass == Pass::backward_weight) {}

  ConvPlan plan() const {
    ConvPlan plan;
    plan.run_tasks = weight_ ? t_.geometry.groups : t_.geometry.batch * t_.geometry.groups;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  void run(void* scratch, int64_t task) const {
    Carver carver(scratch);
    const Scratch s = carve(carver);
    if (weight_)
      backward_weight(task, s);
    else
      for (int64_t index = 0; index < t_.phase_count; ++index) convolve(t_.phase(index), task, s);
  }

 private:
  static constexpr int64_t kBandElements = 32 * 1024;  // 128 kB of float
  static constexpr int kVectors = 8;

  // Where the taps of a band of pixels find what they read.
  struct Band {
    Phase phase;                    // restricted to the band's pixels
    int64_t lowest[kMaxSpatial];    // smallest offset of a tap
    int64_t slots[kMaxSpatial];     // per residue
    int64_t residues[kMaxSpatial];  // that any tap reads

    explicit Band(const Phase& p) : phase(p) {
      for (int axis = 0; axis < kMaxSpatial; ++axis) {
        const AxisPhase& a = phase.axis[axis];
        const int64_t one = a.offset(0), other = a.offset(std::max<int64_t>(a.taps, 1) - 1);
        lowest[axis] = std::min(one, other);
        const int64_t reach = std::max(one, other) - lowest[axis];
        slots[axis] = a.count + reach / a.read_step;
        residues[axis] = std::min(a.read_step, reach + 1);
      }
    }
    int64_t plane() const { return slots[0] * slots[1] * slots[2]; }
    int64_t size() const { return plane() * residues[0] * residues[1] * residues[2]; }
    // Flat outputs, up to the last pixel's.
    int64_t length() const {
      return ((phase.axis[0].count - 1) * slots[1] + phase.axis[1].count - 1) * slots[2] + phase.axis[2].count;
    }
    int64_t shift(int64_t jz, int64_t jy, int64_t jx) const {
      const int64_t j[kMaxSpatial] = {jz, jy, jx};
      int64_t residue = 0, slot = 0;
      for (int axis = 0; axis < kMaxSpatial; ++axis) {
        const AxisPhase& a = phase.axis[axis];
        const int64_t q = a.offset(j[axis]) - lowest[axis];
        residue = residue * residues[axis] + q % a.read_step;
        slot = slot * slots[axis] + q / a.read_step;
      }
      return residue * plane() + slot;
    }
  };

  struct Scratch {
    A* plane;
    A* outputs;
    A* weights;  // of the band's taps
    int64_t* shifts;
    double* sums;  // of the kernel's taps
  };

  static ConvArguments<T> as_forward(ConvArguments<T> arguments) {
    arguments.pass = Pass::forward;
    return arguments;
  }

  // The axis whose pixels are cut into bands, and how many of them a band has.
  static int band_axis(const Phase& phase) { return phase.axis[0].count > 1 ? 0 : phase.axis[1].count > 1 ? 1 : 2; }
  static int64_t band_count(const Phase& phase) {
    const int axis = band_axis(phase);
    const int64_t all = phase.axis[axis].count;
    Band whole(phase);
    const int64_t per_pixel = std::max<int64_t>(1, whole.size() / whole.slots[axis]);
    return std::clamp<int64_t>(kBandElements / per_pixel, std::min<int64_t>(all, axis == 2 ? 1024 : 1), all);
  }
  template <class Visit>
  static void for_each_band(const Phase& phase, const Visit& visit) {
    const int axis = band_axis(phase);
    const int64_t count = band_count(phase);
    for (int64_t begin = 0; begin < phase.axis[axis].count; begin += count) {
      Phase part = phase;
      AxisPhase& a = part.axis[axis];
      a.first += begin * a.step;
      a.offset_first += begin * a.read_step;
      a.count = std::min(count, a.count - begin);
      visit(Band(part), axis == 0 ? begin : 0, axis == 1 ? begin : 0, axis == 2 ? begin : 0);
    }
  }

  Scratch carve(Carver& carver) const {
    int64_t plane = 0, outputs = 0;  // no phase is larger than the first in pixels, but may be in taps
    for (int64_t index = 0; index < t_.phase_count; ++index) {
      Phase phase = t_.phase(index);
      if (phase.pixels() == 0) continue;
      const int axis = band_axis(phase);
      phase.axis[axis].count = band_count(phase);
      const Band band(phase);
      plane = std::max(plane, band.size());
      outputs = std::max(outputs, band.length());
    }
    const int64_t slack = (kVectors + 1) * lanes<A>;  // loads and stores of the last vectors
    const int64_t taps = t_.geometry.taps();
    return {carver.take<A>(plane + slack), carver.take<A>(outputs + slack), carver.take<A>(taps),
            carver.take<int64_t>(taps), carver.take<double>(taps)};
  }

  void fill_plane(const Band& band, const T* image, A* plane) const {
    const AxisPhase *az = &band.phase.axis[0], *ay = &band.phase.axis[1], *ax = &band.phase.axis[2];
    A* line = plane;
    for (int64_t rz = 0; rz < band.residues[0]; ++rz)
      for (int64_t ry = 0; ry < band.residues[1]; ++ry)
        for (int64_t rx = 0; rx < band.residues[2]; ++rx) {
          const int64_t x = band.lowest[2] + rx;
          const Inside inside(x, ax->read_step, band.slots[2], t_.read_size[2]);
          for (int64_t sz = 0; sz < band.slots[0]; ++sz)
            for (int64_t sy = 0; sy < band.slots[1]; ++sy, line += band.slots[2]) {
              const int64_t z = band.lowest[0] + sz * az->read_step + rz;
              const int64_t y = band.lowest[1] + sy * ay->read_step + ry;
              if (z < 0 || z >= t_.read_size[0] || y < 0 || y >= t_.read_size[1]) {
                std::fill(line, line + band.slots[2], A(0));
                continue;
              }
              const T* from = image + (z * t_.read_size[1] + y) * t_.read_size[2] + x + inside.begin * ax->read_step;
              for (int64_t i = 0; i < inside.begin; ++i) line[i] = 0;
              const int64_t count = inside.end - inside.begin;
              if (ax->read_step == 1)
                copy_span<1>(from, 1, count, line + inside.begin);
              else if (ax->read_step == 2)
                copy_span<2>(from, 2, count, line + inside.begin);
              else
                copy_span<0>(from, ax->read_step, count, line + inside.begin);
              for (int64_t i = inside.end; i < band.slots[2]; ++i) line[i] = 0;
            }
        }
    std::fill(line, line + (kVectors + 1) * lanes<A>, A(0));
  }

  // Calls visit(index in the kernel, shift in the plane) for the taps of the band.
  template <class Visit>
  void for_each_tap(const Band& band, const Visit& visit) const {
    const AxisPhase* axis = band.phase.axis;
    for (int64_t jz = 0; jz < axis[0].taps; ++jz)
      for (int64_t jy = 0; jy < axis[1].taps; ++jy)
        for (int64_t jx = 0; jx < axis[2].taps; ++jx)
          visit(t_.tap_index(axis[0].tap(jz), axis[1].tap(jy), axis[2].tap(jx)), band.shift(jz, jy, jx));
  }

  // One plane: forward or backward input.
  void convolve(const Phase& phase, int64_t task, const Scratch& s) const {
    const int64_t channel = task % t_.geometry.groups;
    const T* image = t_.read + task * t_.read_pixels();
    const T* weight = arguments_.weight + channel * t_.geometry.taps();
    T* written = t_.written + task * t_.written_pixels();
    const A bias = t_.bias ? to_accumulate(t_.bias[channel]) : A(0);
    if (phase.pixels() == 0) return;
    for_each_band(phase, [&](const Band& band, int64_t, int64_t, int64_t) {
      int64_t taps = 0;
      for_each_tap(band, [&](int64_t index, int64_t shift) {
        s.weights[taps] = to_accumulate(weight[index]);
        s.shifts[taps++] = shift;
      });
      if (taps > 0) fill_plane(band, image, s.plane);
      const int64_t length = band.length();
      int64_t i = 0;
      for (; i + kVectors * lanes<A> <= length; i += kVectors * lanes<A>) sum_taps<kVectors>(s, taps, i, bias);
      for (; i < length; i += 2 * lanes<A>) sum_taps<2>(s, taps, i, bias);
      store_outputs(band, s.outputs, written);
    });
  }

  template <int Vectors>
  static void sum_taps(const Scratch& s, int64_t taps, int64_t i, A bias) {
    vec<A> sum[Vectors];
    CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[v] = broadcast(bias);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const A* from = s.plane + s.shifts[tap] + i;
      const vec<A> weight = broadcast(s.weights[tap]);
      CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[v] = fma(load(from + v * lanes<A>), weight, sum[v]);
    }
    CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) store(s.outputs + i + v * lanes<A>, sum[v]);
  }

  void store_outputs(const Band& band, const A* outputs, T* written) const {
    const AxisPhase* axis = band.phase.axis;
    for (int64_t z = 0; z < axis[0].count; ++z)
      for (int64_t y = 0; y < axis[1].count; ++y) {
        const A* from = outputs + (z * band.slots[1] + y) * band.slots[2];
        T* to = written +
                ((axis[0].first + z * axis[0].step) * t_.written_size[1] + axis[1].first + y * axis[1].step) *
                    t_.written_size[2] +
                axis[2].first;
        if (axis[2].step == 1)
          t_.epilogue.store_row(to, from, axis[2].count);
        else
          for (int64_t x = 0; x < axis[2].count; ++x) t_.epilogue.store_one(to + x * axis[2].step, from[x]);
      }
  }

  // All taps of one channel; the sums of bands and samples are added up in double.
  void backward_weight(int64_t channel, const Scratch& s) const {
    const int64_t taps = t_.geometry.taps();
    const Phase phase = t_.phase(0);
    std::fill(s.sums, s.sums + taps, 0.0);
    for (int64_t n = 0; n < t_.geometry.batch; ++n) {
      const int64_t task = n * t_.geometry.groups + channel;
      const T* image = arguments_.input + task * t_.read_pixels();
      const T* gradient = arguments_.output + task * t_.written_pixels();
      for_each_band(phase, [&](const Band& band, int64_t z, int64_t y, int64_t x) {
        fill_plane(band, image, s.plane);
        spread_gradient(band, gradient, z, y, x, s.outputs);
        for_each_tap(band, [&](int64_t index, int64_t shift) {
          s.sums[index] += dot(s.outputs, s.plane + shift, band.length());
        });
      });
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      arguments_.weight[channel * taps + tap] = from_accumulate<T>(static_cast<A>(s.sums[tap]));
  }

  // The band's grad_output in the plane's pitch, zeros in the columns between lines and behind the last.
  void spread_gradient(const Band& band, const T* gradient, int64_t z0, int64_t y0, int64_t x0, A* target) const {
    const AxisPhase* axis = band.phase.axis;
    std::fill(target, target + band.length() + (kVectors + 1) * lanes<A>, A(0));
    for (int64_t z = 0; z < axis[0].count; ++z)
      for (int64_t y = 0; y < axis[1].count; ++y)
        copy_span<1>(gradient + ((z0 + z) * t_.written_size[1] + y0 + y) * t_.written_size[2] + x0, 1, axis[2].count,
                     target + (z * band.slots[1] + y) * band.slots[2]);
  }

  static A dot(const A* a, const A* b, int64_t count) {
    vec<A> sum[4] = {};
    for (int64_t i = 0; i < count; i += 4 * lanes<A>)  // `a` is zero behind its end
      CONVLAB_UNROLL for (int v = 0; v < 4; ++v) sum[v] =
          fma(load(a + i + v * lanes<A>), load(b + i + v * lanes<A>), sum[v]);
    return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  const ConvArguments<T> arguments_;
  Transfer<T> t_;
  bool weight_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
