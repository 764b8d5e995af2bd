// The register tile under every matrix product of the library, and the packing around it.
//
// Idea: a tile of 6 rows times up to 4 vectors of columns lives in registers while the reduction runs. Per step it
// loads the columns' vectors from a packed panel (contiguous, so one stream for the prefetcher) and broadcasts one
// element per row: 24 multiply-adds of whole vectors for 4 + 6 loads with AVX-512, 12 for 2 + 6 with AVX2.
// What is loaded and multiplied per step is up to the operands' type (operand.h).
// Rows are reached through pointers, one per row and segment of the reduction, so a convolution's patch need not be
// copied: a segment is a kernel tap, and a tap in the padding points to a row of zeros.
// The first tile of a panel may pack it on the way (packing_kernel): waiting for memory and multiplying overlap then.
// Limits: the panel must be packed; sums of one call form one chain, so callers cut long reductions into calls
// that each start from zero (`accumulate`), which also keeps float32 errors low.
#pragma once
#include "epilogue.h"
#include "operand.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int kTileRows = 6;
constexpr int kTileVectors = CONVLAB_VECTOR_BYTES == 64 ? 4 : 2;  // 32 or 16 registers
template <class A>
constexpr int kPanel = kTileVectors * lanes<A>;  // columns of a full panel

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// S: what is multiplied; A: what sums are kept in; T: what the finished sums are stored as.
template <class A, class S = A, class T = A>
struct TileProduct {
  const S* const* rows = nullptr;     // [segments][row_pitch], of which the tile's rows come first
  const S* const* panels = nullptr;   // [segments], each [depth][vectors * lanes][products<S>]
  const S* const* sources = nullptr;  // [depth + kSourcesAhead] for a kernel that packs: where the panel's rows lie
  S* packed = nullptr;                // the panel that it fills
  int64_t row_pitch = 0;              // whatever, with one segment
  int64_t segments = 1, depth = 0;    // depth in steps, of products<S> elements each
  int64_t row_offset = 0;             // added to every row pointer, in elements
  int64_t row_step = 0;               // from one element of a row to the next, where Step is 0
  int64_t panel_offset = 0;           // added to every panel pointer
  A* const* outputs = nullptr;        // [rows of the tile]; sums of this call, or so far
  int64_t output_offset = 0;
  bool accumulate = false;                // add to the outputs instead of overwriting them
  bool past_caches = false;               // the outputs, which are aligned then, are written past the caches
  const A* column_start = nullptr;        // added once per column, or null
  const A* row_start = nullptr;           // added once per row, or null
  const void* ahead = nullptr;            // memory that is wanted soon: a cache line of it is fetched per step of depth
  int64_t ahead_step = 0;                 // from one to the next, in bytes
  const Epilogue<T>* epilogue = nullptr;  // if these are the last of the sums and `written` is where they go
  T* const* written = nullptr;            // [rows of the tile]
  int64_t written_offset = 0;
};

constexpr int kSourcesAhead = 8;           // rows whose lines a packing kernel asks for ahead of time
constexpr int64_t kWorthPrefetching = 48;  // steps of a tile; with fewer, asking for lines costs more than waiting

template <int Rows, int Columns, class T>
CONVLAB_INLINE void prefetch_rows(T* const* rows, int64_t offset) {
  CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int j = 0; j < Columns; j += 64 / sizeof(T))
      __builtin_prefetch(rows[r] + offset + j);
}

// Step: distance in memory of successive reduction elements of a row; 0: it is row_step. Packs: the panel is read from
// where its rows lie, and packed for the tiles that follow.
template <class A, class S, class T, int Rows, int Vectors, int Step, bool Packs = false>
void multiply_tile(const TileProduct<A, S, T>& t) {
  using Operand = CONVLAB_ISA::Operand<S>;
  vec<A> sum[Rows][Vectors];
  CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] = vec<A>{};
  // What comes last must come from memory, too, if there is time for it.
  if (t.segments * t.depth >= kWorthPrefetching) {
    if (t.accumulate || (!t.epilogue && !t.past_caches))
      prefetch_rows<Rows, Vectors * lanes<A>>(t.outputs, t.output_offset);
    if (t.epilogue && !t.past_caches) prefetch_rows<Rows, Vectors * lanes<A>>(t.written, t.written_offset);
  }
  const S* const* rows = t.rows;
  // A load more costs nothing here.
  const auto* ahead = static_cast<const char*>(t.ahead ? t.ahead : Packs ? t.packed : t.panels[0]);
  const int64_t ahead_step = t.ahead ? t.ahead_step : 0;
  for (int64_t segment = 0; segment < t.segments; ++segment, rows += t.row_pitch) {
    const S* row[Rows];
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) row[r] = rows[r] + t.row_offset;
    const S* panel = Packs ? t.packed : t.panels[segment] + t.panel_offset;
    // What is packed might be what these point to, for all the compiler knows.
    const S* const* sources = t.sources;
    S* packed = t.packed;
    const int64_t depth = t.depth, offset = t.panel_offset, step = Step > 0 ? Step * products<S> : t.row_step;
    for (int64_t d = 0; d < depth; ++d, panel += Vectors * lanes<A> * products<S>) {
      __builtin_prefetch(ahead);
      ahead += ahead_step;
      typename Operand::vector column[Vectors];
      if constexpr (Packs) {
        static_assert(products<S> == 1);
        const S *source = sources[d] + offset, *later = sources[d + kSourcesAhead] + offset;
        CONVLAB_UNROLL for (int j = 0; j < Vectors * lanes<A>; j += 64 / sizeof(S)) __builtin_prefetch(later + j);
        CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
          column[v] = Operand::load(source + v * lanes<A>);
          pin(column[v]);
          store(packed + (d * Vectors + v) * lanes<A>, column[v]);
        }
      } else {
        CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) {
          column[v] = Operand::load(panel + v * lanes<A> * products<S>);
          pin(column[v]);
        }
      }
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) {
        typename Operand::vector element = Operand::broadcast(row[r] + d * step);
        pin(element);
        CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] =
            Operand::multiply_add(element, column[v], sum[r][v]);
      }
    }
  }
  // Each of what there may be to add is a loop of its own: one branch instead of one per vector.
  if (t.accumulate)
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] +=
        load(t.outputs[r] + t.output_offset + v * lanes<A>);
  if (t.column_start)
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] +=
        load(t.column_start + v * lanes<A>);
  if (t.row_start)
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] +=
        broadcast(t.row_start[r]);
  if constexpr (std::is_same_v<A, float>)
    if (t.past_caches && !t.epilogue) {
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
          store_streaming(t.outputs[r] + t.output_offset + v * lanes<A>, sum[r][v]);
      return;
    }
  if (!t.epilogue) {
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
        store(t.outputs[r] + t.output_offset + v * lanes<A>, sum[r][v]);
    return;
  }
  if constexpr (std::is_same_v<T, float>)
    if (t.past_caches) {
      CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
          t.epilogue->template store<true>(t.written[r] + t.written_offset + v * lanes<A>, sum[r][v]);
      return;
    }
  if (t.epilogue->needed())
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
        t.epilogue->store(t.written[r] + t.written_offset + v * lanes<A>, sum[r][v]);
  else
    CONVLAB_UNROLL for (int r = 0; r < Rows; ++r) CONVLAB_UNROLL for (int v = 0; v < Vectors; ++v)
        store(t.written[r] + t.written_offset + v * lanes<A>, sum[r][v]);
  if (t.epilogue->gated()) [[unlikely]]
    for (int r = 0; r < Rows; ++r) t.epilogue->open_gate(t.written[r] + t.written_offset, Vectors * lanes<A>);
}

template <class A, class S = A, class T = A>
using TileKernel = void (*)(const TileProduct<A, S, T>&);

template <class A, int Step, int Rows, class S, class T>
TileKernel<A, S, T> tile_kernel_of(int vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return multiply_tile<A, S, T, Rows, 4, Step>;
    if (vectors == 3) return multiply_tile<A, S, T, Rows, 3, Step>;
  }
  return vectors == 2 ? multiply_tile<A, S, T, Rows, 2, Step> : multiply_tile<A, S, T, Rows, 1, Step>;
}

// The kernel for a tile of 1..kTileRows rows and 1..kTileVectors vectors.
template <class A, int Step, class S = A, class T = A>
TileKernel<A, S, T> tile_kernel(int rows, int vectors) {
  switch (rows) {
    case 1:
      return tile_kernel_of<A, Step, 1, S, T>(vectors);
    case 2:
      return tile_kernel_of<A, Step, 2, S, T>(vectors);
    case 3:
      return tile_kernel_of<A, Step, 3, S, T>(vectors);
    case 4:
      return tile_kernel_of<A, Step, 4, S, T>(vectors);
    case 5:
      return tile_kernel_of<A, Step, 5, S, T>(vectors);
    default:
      return tile_kernel_of<A, Step, 6, S, T>(vectors);
  }
}

// A kernel of kTileRows rows that packs the panel.
template <class A, int Step>
TileKernel<A> packing_kernel(int vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return multiply_tile<A, A, A, kTileRows, 4, Step, true>;
    if (vectors == 3) return multiply_tile<A, A, A, kTileRows, 3, Step, true>;
  }
  return vectors == 2 ? multiply_tile<A, A, A, kTileRows, 2, Step, true>
                      : multiply_tile<A, A, A, kTileRows, 1, Step, true>;
}

// Columns of panel `index` of `columns` columns, rounded up to whole vectors.
template <class A>
constexpr int panel_width(int64_t columns, int64_t index) {
  const int64_t left = columns - index * kPanel<A>;
  return static_cast<int>(left >= kPanel<A> ? kPanel<A> : round_up(left, lanes<A>));
}

template <class V, int... Index>
CONVLAB_INLINE V shuffle(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index...);
#else
  using Mask = std::conditional_t<sizeof(a[0]) == 4, vec_mask<float>, vec_mask<double>>;
  return __builtin_shuffle(a, b, Mask{Index...});
#endif
}

template <int Block, bool High, int... Lane>
constexpr auto transpose_indices(std::integer_sequence<int, Lane...>) {
  constexpr int width = sizeof...(Lane);
  return std::integer_sequence<int, (High ? ((Lane & Block) ? width + Lane : Lane + Block)
                                          : ((Lane & Block) ? width + Lane - Block : Lane))...>{};
}

template <int First, int... Lane>
constexpr auto interleaved_indices(std::integer_sequence<int, Lane...>) {
  return std::integer_sequence<int, (First + Lane / 2 + Lane % 2 * static_cast<int>(sizeof...(Lane)))...>{};
}

// a[0], b[0], a[1], b[1], ..
template <class A>
CONVLAB_INLINE void store_interleaved(vec<A> a, vec<A> b, A* target) {
  using Lanes = std::make_integer_sequence<int, lanes<A>>;
  store(target, shuffle(a, b, interleaved_indices<0>(Lanes{})));
  store(target + lanes<A>, shuffle(a, b, interleaved_indices<lanes<A> / 2>(Lanes{})));
}

template <class A, int Block>
CONVLAB_INLINE void transpose_step(vec<A> (&rows)[lanes<A>]) {
  using Lanes = std::make_integer_sequence<int, lanes<A>>;
  CONVLAB_UNROLL for (int i = 0; i < lanes<A>; ++i) {
    if (i & Block) continue;
    const vec<A> low = shuffle(rows[i], rows[i + Block], transpose_indices<Block, false>(Lanes{}));
    rows[i + Block] = shuffle(rows[i], rows[i + Block], transpose_indices<Block, true>(Lanes{}));
    rows[i] = low;
  }
}

// Transposes a square of lanes x lanes elements held in registers.
template <class A>
CONVLAB_INLINE void transpose(vec<A> (&rows)[lanes<A>]) {
  transpose_step<A, 1>(rows);
  if constexpr (lanes<A> > 2) transpose_step<A, 2>(rows);
  if constexpr (lanes<A> > 4) transpose_step<A, 4>(rows);
  if constexpr (lanes<A> > 8) transpose_step<A, 8>(rows);
}

// Lane i, for i < Rows: the sum of the lanes of rows[i]. A third of the work of adding them up one by one.
template <class A, int Rows, int Block = 1>
CONVLAB_INLINE vec<A> sum_lanes_of_each(vec<A> (&rows)[Rows]) {
  using Lanes = std::make_integer_sequence<int, lanes<A>>;
  if constexpr (Block == lanes<A>) {
    return rows[0];
  } else {
    CONVLAB_UNROLL for (int i = 0; i < Rows; i += 2 * Block) {
      const vec<A> other = Block < Rows ? rows[i + Block % Rows] : rows[i];
      rows[i] = shuffle(rows[i], other, transpose_indices<Block, false>(Lanes{})) +
                shuffle(rows[i], other, transpose_indices<Block, true>(Lanes{}));
    }
    return sum_lanes_of_each<A, Rows, 2 * Block>(rows);
  }
}

// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < columns, and zero for the lanes
// rows..round_up(rows, lanes) of the target.
template <class T>
void transpose_matrix(const T* source, int64_t source_stride, int64_t rows, int64_t columns, accumulate_t<T>* target,
                      int64_t target_stride) {
  using A = accumulate_t<T>;
  constexpr int width = lanes<A>;
  for (int64_t i = 0; i < rows; i += width)
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t height = std::min<int64_t>(width, rows - i), length = std::min<int64_t>(width, columns - j);
      vec<A> block[width];
      for (int r = 0; r < width; ++r) {
        const T* row = source + (i + r) * source_stride + j;
        block[r] = r >= height ? vec<A>{} : length == width ? load(row) : load_partial(row, length);
      }
      transpose<A>(block);
      for (int r = 0; r < length; ++r) store(target + (j + r) * target_stride + i, block[r]);
    }
}

// Memory handed out front to back from one block. With no block it only counts, so the same code both plans a
// workspace and carves it.
class Carver {
 public:
  explicit Carver(void* block) : block_(static_cast<char*>(block)) {}
  template <class U>
  U* take(int64_t count) {
    char* start = block_ ? block_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(start);
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace convlab::cpu::CONVLAB_ISA
