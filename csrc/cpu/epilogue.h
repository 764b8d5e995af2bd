// What follows a convolution's sum before it is stored: + residual, then a clamp such as ReLU or a gate such as
// SiLU's. Done in the kernels' last stores, each costs at most a read of the residual instead of two more passes over
// memory.
#pragma once
#include "gate.h"
#include "streaming.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
struct Epilogue {
  using A = accumulate_t<T>;

  const T* written = nullptr;   // the tensor that is written
  const T* residual = nullptr;  // of the same size and layout, or null
  Bounds<A> bounds;
  Gate gate = Gate::none;

  Epilogue() = default;
  Epilogue(const T* written, const T* residual, const Activation& activation)
      : written(written), residual(residual), bounds(activation), gate(activation.gate) {}

  bool needed() const { return residual || bounds.cut || gated(); }
  bool gated() const { return gate != Gate::none; }

  // Without the gate, which comes when all that is in registers has been stored: to open it is a call (gate.h).
  template <bool kPastCaches = false>
  CONVLAB_INLINE void store(T* target, vec<A> value) const {
    if (residual) value += load(residual + (target - written));
    store_whole<kPastCaches>(target, clamped(value));
  }
  CONVLAB_INLINE void store_partial(T* target, vec<A> value, int64_t count) const {
    if (residual) value += load_partial(residual + (target - written), count);
    CONVLAB_ISA::store_partial(target, clamped(value), count);
  }
  CONVLAB_INLINE void open_gate(T* target, int64_t count) const {
    if (gated()) [[unlikely]]
      CONVLAB_ISA::open_gate(target, count, gate);
  }

  // With it.
  CONVLAB_INLINE void store_one(T* target, A value) const {
    if (residual) value += to_accumulate(residual[target - written]);
    *target = from_accumulate<T>(bounds.clamped(value));
    open_gate(target, 1);
  }
  // `count` values in a row.
  void store_row(T* target, const A* values, int64_t count) const {
    int64_t i = 0;
    for (; i + lanes<A> <= count; i += lanes<A>) store(target + i, load(values + i));
    if (i < count) store_partial(target + i, load_partial(values + i, count - i), count - i);
    open_gate(target, count);
  }

 private:
  CONVLAB_INLINE vec<A> clamped(vec<A> value) const {
    return bounds.cut ? VectorBounds<A>(bounds).clamped(value) : value;
  }
};

}  // namespace convlab::cpu::CONVLAB_ISA
