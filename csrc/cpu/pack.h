// Packing of weights into what the tiles of gemm.h read: panels of columns.
#pragma once
#include "gemm.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class S, class T>
CONVLAB_INLINE S to_operand(T value) {
  if constexpr (std::is_same_v<S, T>)
    return value;
  else
    return to_accumulate(value);
}

// The weights of one tap, between all read channels and some written ones.
template <class T>
struct WeightBlock {
  const T* source;
  int64_t read_stride, written_stride;
  int64_t read, written;  // channels
};

// Fills rows begin..end of a panel, [step][column of width][products], with the block's read channels and then zeros.
// Several blocks may share a step: only elements of rows begin..end are touched.
template <class T>
void pack_columns(const WeightBlock<T>& block, int64_t begin, int64_t end, int width, operand_t<T>* panel) {
  using S = operand_t<T>;
  using A = accumulate_t<T>;
  constexpr int64_t pair = products<S>;
  const bool whole_steps = begin % pair == 0 && end % pair == 0;
  S* target = panel + begin * width;
  if (block.read_stride == 1 && whole_steps && block.read % pair == 0 && block.written_stride % pair == 0) {
    // Pairs are transposed as if they were floats.
    using Element = std::conditional_t<pair == 2, A, T>;
    for (int64_t lane = 0; lane < width; lane += lanes<A>)
      transpose_matrix(reinterpret_cast<const Element*>(block.source + lane * block.written_stride),
                       block.written_stride / pair, std::min<int64_t>(lanes<A>, block.written - lane),
                       block.read / pair, reinterpret_cast<A*>(target) + lane, width);
    return;
  }
  if constexpr (pair == 2) {
    if (block.written_stride == 1 && whole_steps) {
      for (int64_t channel = 0; channel < block.read; channel += 2, target += 2 * width) {
        const T* from = block.source + channel * block.read_stride;
        interleave<1>(from, channel + 1 < block.read ? from + block.read_stride : nullptr, 1, block.written, target);
        std::fill(target + 2 * block.written, target + 2 * width, S{});
      }
      return;
    }
  }
  constexpr int64_t rows_ahead = 16, line = 64 / sizeof(T);  // rows lie pages apart: the hardware expects none of them
  for (int64_t row = begin; row < end; ++row) {
    S* to = panel + row / pair * pair * width + row % pair;
    const T* from = block.source + (row - begin) * block.read_stride;
    const int64_t columns = row - begin < block.read ? block.written : 0;
    int64_t j = 0;
    if constexpr (pair == 1)
      if (block.written_stride == 1) {
        for (int64_t i = 0; i < columns; i += line) __builtin_prefetch(from + rows_ahead * block.read_stride + i);
        for (; j + lanes<A> <= columns; j += lanes<A>) store(to + j, load(from + j));
      }
    for (; j < columns; ++j) to[j * pair] = to_operand<S>(from[j * block.written_stride]);
    for (; j < width; ++j) to[j * pair] = S{};
  }
}

}  // namespace convlab::cpu::CONVLAB_ISA
