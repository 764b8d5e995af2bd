// The tile registers of Intel's AMX: eight matrices of 16 rows of 64 bytes, and sums of products of two of them.
//
// A product multiplies 16 x 32 elements of bfloat16, rows of one tile, with 32 x 16 of another, whose rows hold pairs
// of neighbouring elements of each column, and adds it to 16 x 16 sums in float32: 8192 multiply-adds in 16 cycles, 16
// times as many as two units of AVX-512 float32 make in that time. Elsewhere the same is computed in software, so that
// what is built on it can be tested on every machine; that is no faster than a plain loop. Limits: products take
// subnormal operands and sums (below 2^-126) as zero; in software they do not.
#pragma once
#include "vec.h"

namespace convlab::cpu::CONVLAB_ISA {

constexpr int64_t kTileEdge = 16;   // rows of a tile, and columns of sums
constexpr int64_t kTileDepth = 32;  // elements of bfloat16 in a row
constexpr int64_t kTileRowBytes = 64, kTileBytes = kTileEdge * kTileRowBytes;

#if defined(CONVLAB_AMX)

// The registers of this thread, all eight of full size, as long as the object lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    static_assert(sizeof shape == 64);
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = kTileRowBytes, shape.rows[tile] = kTileEdge;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int Tile>
  CONVLAB_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  // `pitch`: from row to row, in bytes.
  template <int Tile>
  CONVLAB_INLINE void load(const void* first, int64_t pitch) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(pitch), "i"(Tile) : "memory");
  }
  template <int Tile>
  CONVLAB_INLINE void store(float* first, int64_t pitch) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(pitch), "i"(Tile) : "memory");
  }
  template <int Sum, int Rows, int Columns>
  CONVLAB_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Rows), "i"(Columns));
  }
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;

  template <int Tile>
  void zero() {
    std::memset(tile_[Tile], 0, kTileBytes);
  }
  template <int Tile>
  void load(const void* first, int64_t pitch) {
    for (int64_t row = 0; row < kTileEdge; ++row)
      std::memcpy(tile_[Tile] + row * kTileRowBytes, static_cast<const char*>(first) + row * pitch, kTileRowBytes);
  }
  template <int Tile>
  void store(float* first, int64_t pitch) {
    for (int64_t row = 0; row < kTileEdge; ++row)
      std::memcpy(reinterpret_cast<char*>(first) + row * pitch, tile_[Tile] + row * kTileRowBytes, kTileRowBytes);
  }
  // As the instruction does, which adds up the first and the second of all pairs from zero, and both to the sum.
  template <int Sum, int Rows, int Columns>
  void multiply_add() {
    constexpr int64_t width = lanes<float>, vectors = kTileEdge / width, pairs = kTileDepth / 2;
    vec<float> columns[pairs][2][vectors];
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t v = 0; v < vectors; ++v) {
        vec_bits both;
        std::memcpy(&both, tile_[Columns] + pair * kTileRowBytes + v * CONVLAB_VECTOR_BYTES, sizeof both);
        columns[pair][0][v] = (vec<float>)(both << 16);
        columns[pair][1][v] = (vec<float>)(both & 0xffff0000u);
      }
    for (int64_t row = 0; row < kTileEdge; ++row) {
      bfloat16 elements[kTileDepth];
      std::memcpy(elements, tile_[Rows] + row * kTileRowBytes, kTileRowBytes);
      vec<float> part[2][vectors] = {};
      for (int64_t pair = 0; pair < pairs; ++pair) CONVLAB_UNROLL for (int k = 0; k < 2; ++k) {
          const vec<float> element = broadcast(to_accumulate(elements[2 * pair + k]));
          CONVLAB_UNROLL for (int v = 0; v < vectors; ++v) part[k][v] += element * columns[pair][k][v];
        }
      float* sums = reinterpret_cast<float*>(tile_[Sum] + row * kTileRowBytes);
      CONVLAB_UNROLL for (int v = 0; v < vectors; ++v)
          CONVLAB_ISA::store(sums + v * width, CONVLAB_ISA::load(sums + v * width) + (part[0][v] + part[1][v]));
    }
  }

 private:
  alignas(64) char tile_[8][kTileBytes];
};

#endif

}  // namespace convlab::cpu::CONVLAB_ISA
