// The product of two tiles on tensor cores, slice by slice of the sum. One mainloop for every pass and loader.
//
// Idea: kStages slices of both tiles are in shared memory or on their way there, by cp.async where 16 bytes at a time
// can be copied, else through registers. Eight warps, two by four, each multiply a part of the tile by mma.sync.
// Chunks of 16 bytes are swizzled so that neither the copies nor the reads of fragments meet in a bank.
// float32 has two ways: operands rounded to tf32, or each split into two tf32 numbers and three of the four products
// taken (the fourth is below float32's last bit), which keeps float32's digits.
// Cost: per slice and warp 2 * kMi * kNi mma for 16-bit types, as many for tf32, thrice for split float32.
// Limits: sm_80 and newer. Not yet run on a GPU.
#pragma once
#include "conv_gemm.h"

namespace convlab::cuda {

constexpr int kStages = 4;

enum class Math : int { native, split };  // split: float32 as pairs of tf32

// An operand's slice in shared memory, kTile rows or columns of the product wide.
template <class T, int kTile, bool kRows>
struct SharedTile {
  static constexpr bool kAlongSum = kRows;
  static constexpr int kElements = kTile * kSlice<T>;

  // Offset of chunk `column` of row `row`.
  static CONVLAB_DEVICE int at(int row, int column) {
    if constexpr (kAlongSum) return row * kSlice<T> + (column ^ (row / 2 % 4)) * kChunk<T>;
    return row * kTile + (column ^ (sizeof(T) == 2 ? row % 8 : row % 4 * 2)) * kChunk<T>;
  }
  // Offset of the element of index `i` of the tile and `k` of the slice.
  static CONVLAB_DEVICE int element(int i, int k) {
    if constexpr (kAlongSum) return at(i, k / kChunk<T>) + k % kChunk<T>;
    return at(k, i / kChunk<T>) + i % kChunk<T>;
  }
};

// Brings one operand's slices into shared memory. What fetch() starts is there after store() and a wait.
template <class T, class Loader, bool kVector, int kTile>
struct Filler {
  using Tile = SharedTile<T, kTile, Loader::kAlongSum>;
  Loader loader;
  Vector<T, kChunk<T>> held[kVector ? 1 : Loader::kChunks];

  CONVLAB_DEVICE void fetch(const GemmProblem<T>& p, const Global<const T>& from, const Shared<T>& to) {
#pragma unroll
    for (int j = 0; j < Loader::kChunks; ++j) {
      int64_t offset = 0;
      if constexpr (kVector) {
        const bool valid = loader.place(p, j, 0, offset);
        copy_async<T>(to + Tile::at(loader.row(j), loader.column()), from + (valid ? offset : 0), valid);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e)
          held[j].value[e] = loader.place(p, j, e, offset) ? from[offset] : from_accumulate<T>(0);
      }
    }
    loader.advance(p);
  }
  CONVLAB_DEVICE void store(const Shared<T>& to) {
    if constexpr (!kVector)
#pragma unroll
      for (int j = 0; j < Loader::kChunks; ++j) store_vector(to, Tile::at(loader.row(j), loader.column()), held[j]);
  }
};

// Fragments of kMi x 16 rows and kNi x 8 columns, multiplied and added up: the part of a warp.
template <class T, Math kMath, class Left, class Right, int kMi, int kNi>
struct WarpProduct {
  float sum[kMi][kNi][4];

  CONVLAB_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int j = 0; j < kNi; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
  }

  CONVLAB_DEVICE void add_slice(const Shared<T>& left, const Shared<T>& right, int row, int column) {
    if constexpr (sizeof(T) == 2)
      add_16_bit(left, right, row, column);
    else
      add_float(left, right, row, column);
  }

  CONVLAB_DEVICE void add_16_bit(const Shared<T>& left, const Shared<T>& right, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32, l8 = lane % 8, b3 = lane / 8 % 2, b4 = lane / 16;
#pragma unroll
    for (int k = 0; k < kSlice<T>; k += 16) {
      uint32_t a[kMi][4], b[kNi / 2][4];
#pragma unroll
      for (int i = 0; i < kMi; ++i) {
        if constexpr (Left::kAlongSum)
          load_matrices(a[i], left + Left::at(row + i * 16 + lane % 16, k / 8 + b4));
        else
          load_matrices_transposed(a[i], left + Left::at(k + l8 + b4 * 8, (row + i * 16) / 8 + b3));
      }
#pragma unroll
      for (int j = 0; j < kNi / 2; ++j) {
        if constexpr (Right::kAlongSum)
          load_matrices(b[j], right + Right::at(column + j * 16 + l8 + b4 * 8, k / 8 + b3));
        else
          load_matrices_transposed(b[j], right + Right::at(k + l8 + b3 * 8, (column + j * 16) / 8 + b4));
      }
#pragma unroll
      for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int j = 0; j < kNi; ++j) mma(T{}, sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  CONVLAB_DEVICE void add_float(const Shared<T>& left, const Shared<T>& right, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kSlice<T>; k += 8) {
      Part b[kNi][2];
#pragma unroll
      for (int j = 0; j < kNi; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) b[j][e] = part(right[Right::element(column + j * 8 + g, k + t + e * 4)]);
#pragma unroll
      for (int i = 0; i < kMi; ++i) {
        uint32_t high[4], rest[4], finite[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Part a = part(left[Left::element(row + i * 16 + g + e % 2 * 8, k + t + e / 2 * 4)]);
          high[e] = a.high;
          rest[e] = a.rest;
          finite[e] = a.finite;
        }
#pragma unroll
        for (int j = 0; j < kNi; ++j) {
          if constexpr (kMath == Math::split) {  // the small terms first
            mma(float{}, sum[i][j], rest, b[j][0].finite, b[j][1].finite);
            mma(float{}, sum[i][j], finite, b[j][0].rest, b[j][1].rest);
          }
          mma(float{}, sum[i][j], high, b[j][0].high, b[j][1].high);
        }
      }
    }
  }

  // A float as tf32: high + rest to 22 bits. An infinity or NaN counts once, in the product of the high parts, or
  // its products with the rests would have signs of their own.
  struct Part {
    uint32_t high, rest, finite;
  };
  static CONVLAB_DEVICE Part part(float value) {
    Part p = {to_tf32(value), 0u, 0u};
    if constexpr (kMath == Math::split) {
      const float high = bits_to_float(p.high);
      const bool is_finite = high - high == 0.0f;
      p.finite = is_finite ? p.high : 0u;
      p.rest = is_finite ? to_tf32(value - high) : 0u;
    }
    return p;
  }
};

// sum += left * right over slices [0, slices) of the loaders, which are at their beginnings.
template <class T, class Left, class Right, class Product>
CONVLAB_DEVICE void mainloop(const GemmProblem<T>& p, Left& left, Right& right, Product& product, int slices, int row,
                             int column) {
  using LeftTile = typename Left::Tile;
  using RightTile = typename Right::Tile;
  const auto lefts = dynamic_shared<T>(0, kStages * LeftTile::kElements);
  const auto rights = dynamic_shared<T>(kStages * LeftTile::kElements * static_cast<int64_t>(sizeof(T)),
                                        kStages * RightTile::kElements);
  const auto fetch = [&](int slice) {
    if (slice < slices) {
      left.fetch(p, p.left, lefts + slice % kStages * LeftTile::kElements);
      right.fetch(p, p.right, rights + slice % kStages * RightTile::kElements);
    }
    copy_async_commit();  // empty groups keep the count of groups in step with that of slices
  };
  const auto store = [&](int slice) {
    if (slice >= slices) return;
    left.store(lefts + slice % kStages * LeftTile::kElements);
    right.store(rights + slice % kStages * RightTile::kElements);
  };
  for (int slice = 0; slice < kStages - 1; ++slice) {
    fetch(slice);
    store(slice);
  }
  for (int slice = 0; slice < slices; ++slice) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the slice is there, and nobody reads any more what comes next into its place
    fetch(slice + kStages - 1);
    product.add_slice(lefts + slice % kStages * LeftTile::kElements, rights + slice % kStages * RightTile::kElements,
                      row, column);
    store(slice + kStages - 1);
  }
}

}  // namespace convlab::cuda
