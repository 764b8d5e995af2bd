// strassen: pointwise convolution with seven products of halves in the place of eight. Forward and backward input, on
// N(D)HWC.
//
// Reference: Strassen, "Gaussian Elimination is not Optimal", 1969, in the form with 15 additions, S. Winograd 1971
// (Higham, "Accuracy and Stability of Numerical Algorithms", section 23.1).
//
// Idea: pixels x weight = [A11 A12; A21 A22] [B11 B12; B21 B22], where A1 and A2 are the first and the second half of a
// block of pixels of one image (what another image holds changes no digit of its result), and channels, read and
// written, are halved too. With
//   S1 = A21 + A22, S2 = S1 - A11, S3 = A11 - A21, S4 = A12 - S2,
//   T1 = B12 - B11, T2 = B22 - T1, T3 = B22 - B12, T4 = T2 - B21,
//   U2 = A11 B11 + S2 T2, U3 = U2 + S3 T3, U4 = U2 + S1 T1
// the halves of the result are
//   C11 = A11 B11 + A12 B21, C12 = U4 + S4 B22, C21 = U3 - A22 T4, C22 = U4 + S3 T3.
// The sums of pixels are made once per block and read for every panel of columns; those of weights are made when they
// are packed. Products go into sums that a cache holds, or into the result with what follows it (gemm.h).
// Cost: 7/8 of multiply_adds(), a pass over the read channels and two over the written ones for each block. Memory:
// 7/4 of the weight, packed; per thread the sums of a block. Error: two to three times that of a product, as halves are
// added and subtracted that may be larger than the result. Limits: float32 and float64, one group, channels that fill
// whole vectors by halves.
#pragma once
#include "conv_phase.h"
#include "pack.h"

namespace convlab::cpu::CONVLAB_ISA {

template <class T>
class Strassen {
 public:
  using A = accumulate_t<T>;

  template <class Body>
  static auto with(const ConvArguments<T>& arguments, const Body& body) {
    return body(Strassen(arguments));
  }

  explicit Strassen(const ConvArguments<T>& arguments) : arguments_(arguments), t_(arguments) {
    depth_ = t_.read_channels / 2;
    columns_ = t_.written_channels / 2;
    panels_ = divide_up(columns_, kPanel<A>);
    const int64_t most =
        std::clamp(kSumBytes / (4 * depth_ * static_cast<int64_t>(sizeof(A))) / kTileRows, kLeastTiles, kMostTiles) *
        kTileRows;
    image_rows_ = t_.phase(0).pixels();
    half_rows_ = divide_up(divide_up(image_rows_, divide_up(image_rows_, 2 * most)), 2);
    image_blocks_ = divide_up(image_rows_, 2 * half_rows_);
    row_blocks_ = t_.geometry.batch * image_blocks_;
    column_blocks_ = std::min(panels_, divide_up(enough_tasks(arguments.threads), row_blocks_));
    block_panels_ = divide_up(panels_, column_blocks_);
    column_blocks_ = divide_up(panels_, block_panels_);
    sum_pitch_ = depth_ + lanes<A>;
    follows_ = image_rows_ == t_.read_pixels();
  }

  ConvPlan plan() const {
    ConvPlan plan;
    plan.pack_tasks = panels_ * divide_up(depth_, kPackedRows);
    plan.packed_bytes = panels_ * kProducts * (depth_ + 1) * kPanel<A> * static_cast<int64_t>(sizeof(A));
    plan.packs_in_place = column_blocks_ >= arguments_.threads;
    plan.run_tasks = row_blocks_ * column_blocks_;
    Carver count(nullptr);
    carve(count);
    plan.scratch_bytes = count.used();
    return plan;
  }

  // Some rows of a panel of all seven factors.
  void pack(int64_t task) const {
    if constexpr (kComputes) {
      const int64_t chunks = divide_up(depth_, kPackedRows), panel = task / chunks, begin = task % chunks * kPackedRows;
      const int64_t end = std::min(depth_, begin + kPackedRows);
      const int width = panel_width<A>(columns_, panel);
      const int64_t read_stride = t_.weight_offset(arguments_, 0, 1, 0);
      const int64_t written_stride = t_.weight_offset(arguments_, 0, 0, 1);
      const auto take = [&](int64_t half_read, int64_t half_written, Factor factor) {
        const int64_t read = half_read * depth_ + begin, written = half_written * columns_ + panel * kPanel<A>;
        const WeightBlock<T> block{arguments_.weight + t_.weight_offset(arguments_, 0, read, written), read_stride,
                                   written_stride, end - begin, width};
        pack_columns(block, begin, end, width, factor_at(panel, factor));
      };
      take(0, 0, kB11);
      take(1, 0, kB21);
      take(1, 1, kB22);
      take(0, 1, kT1);  // B12, for now
      A* at[kProducts];
      for (int factor = 0; factor < kProducts; ++factor) at[factor] = factor_at(panel, static_cast<Factor>(factor));
      for (int64_t i = begin * width; i < end * width; i += lanes<A>) {
        const vec<A> b11 = load(at[kB11] + i), b12 = load(at[kT1] + i), b21 = load(at[kB21] + i),
                     b22 = load(at[kB22] + i);
        const vec<A> t1 = b12 - b11, t2 = b22 - t1;
        store(at[kT1] + i, t1);
        store(at[kT2] + i, t2);
        store(at[kT3] + i, b22 - b12);
        store(at[kMinusT4] + i, b21 - t2);
      }
    }
  }

  // One block of pixels, times some panels.
  void run(void* scratch, int64_t task) const {
    if constexpr (kComputes) {
      // A thread's panels are mostly those that it has packed.
      const int64_t row_block = task % row_blocks_, first_panel = task / row_blocks_ * block_panels_;
      const int64_t in_image = row_block % image_blocks_ * 2 * half_rows_, left = image_rows_ - in_image;
      const int64_t begin = row_block / image_blocks_ * image_rows_ + in_image;
      Block block = {std::min(half_rows_, left), std::clamp<int64_t>(left - half_rows_, 0, half_rows_), nullptr,
                     nullptr};
      if (follows_) {
        const int64_t next = begin + block.first + block.second;
        const auto address = [&](int64_t row) {
          return reinterpret_cast<const char*>(t_.read + std::min(row, t_.rows()) * t_.read_channels);
        };
        block.ahead = address(next), block.ahead_end = address(next + 2 * half_rows_);
      }
      Carver carver(scratch);
      const Scratch s = carve(carver);
      std::fill(s.zeros, s.zeros + 2 * depth_, A(0));
      point_at_rows(begin, block, s);
      for (int64_t row = 0; row < block.first; ++row) add_pixels(row, s);
      const int64_t last_panel = std::min(panels_, first_panel + block_panels_);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) multiply_panel(panel, block, s);
    }
  }

 private:
  static constexpr bool kComputes = std::is_same_v<A, T>;  // others are refused
  static constexpr int64_t kSumBytes = int64_t{1} << 17;   // of the sums of a block's pixels
  static constexpr int64_t kLeastTiles = 5, kMostTiles = 10;
  static constexpr int64_t kPackedRows = 64;  // of a task

  // What the seven products take from the weight, and the sums of pixels.
  enum Factor { kB11, kB21, kB22, kT1, kT2, kT3, kMinusT4, kProducts };
  enum Sum { kS1, kS2, kS3, kS4, kSums };

  // Pixels of the halves of a block, and the memory that the next block reads, which is fetched during the products.
  struct Block {
    int64_t first, second;
    const char *ahead, *ahead_end;
  };

  struct Scratch {
    const A **first, **second;  // read by the pixels of either half
    T **to_first, **to_second;  // where their results go
    A* zeros;                   // read where the second half has a pixel less
    A* sums;                    // [sum][row][channel]
    const A** sum_rows[kSums];
    A *u, *u4, *product;  // [row][column]: U2, then U3; U4; S3 T3
    A **u_rows, **u4_rows, **product_rows;
    A *left_bias, *right_bias;  // of a panel of each half of the columns
  };

  Scratch carve(Carver& carver) const {
    Scratch s;
    for (const A*** rows : {&s.first, &s.second}) *rows = carver.take<const A*>(half_rows_);
    for (T*** rows : {&s.to_first, &s.to_second}) *rows = carver.take<T*>(half_rows_);
    s.zeros = carver.take<A>(2 * depth_);
    s.sums = carver.take<A>(kSums * half_rows_ * sum_pitch_);
    for (const A**& rows : s.sum_rows) rows = carver.take<const A*>(half_rows_);
    for (A** staged : {&s.u, &s.u4, &s.product}) *staged = carver.take<A>(half_rows_ * kPanel<A>);
    for (A*** rows : {&s.u_rows, &s.u4_rows, &s.product_rows}) *rows = carver.take<A*>(half_rows_);
    for (A** bias : {&s.left_bias, &s.right_bias}) *bias = carver.take<A>(kPanel<A>);
    return s;
  }

  // A panel's factors lie off a power of two from each other: they are read and written side by side.
  A* factor_at(int64_t panel, Factor factor) const {
    const int64_t size = depth_ * panel_width<A>(columns_, panel) + kPanel<A>;
    return static_cast<A*>(arguments_.packed) + panel * kProducts * (depth_ + 1) * kPanel<A> + factor * size;
  }

  void point_at_rows(int64_t begin, const Block& block, const Scratch& s) const {
    const Phase phase = t_.phase(0);
    PixelWalk pixel(phase, begin);
    const auto point = [&](int64_t count, const A** rows, T** outputs) {
      for (int64_t row = 0; row < count; ++row, pixel.advance(1)) {
        const int64_t z = pixel.z * phase.axis[0].read_step, y = pixel.y * phase.axis[1].read_step;
        const int64_t at = (z * t_.read_size[1] + y) * t_.read_size[2] + pixel.x * phase.axis[2].read_step;
        rows[row] = t_.read + (pixel.n * t_.read_pixels() + at) * t_.read_channels;
        outputs[row] =
            t_.written + (pixel.n * t_.written_pixels() + pixel.written_pixel(t_.written_size)) * t_.written_channels;
      }
    };
    point(block.first, s.first, s.to_first);
    point(block.second, s.second, s.to_second);
    std::fill(s.second + block.second, s.second + block.first, s.zeros);
    for (int64_t row = 0; row < block.first; ++row) {
      for (int64_t sum = 0; sum < kSums; ++sum) s.sum_rows[sum][row] = s.sums + (sum * half_rows_ + row) * sum_pitch_;
      s.u_rows[row] = s.u + row * kPanel<A>;
      s.u4_rows[row] = s.u4 + row * kPanel<A>;
      s.product_rows[row] = s.product + row * kPanel<A>;
    }
  }

  // The sums of a pixel of the first half and its partner.
  void add_pixels(int64_t row, const Scratch& s) const {
    const A *a1 = s.first[row], *a2 = s.second[row];
    A* to[kSums];
    for (int64_t sum = 0; sum < kSums; ++sum) to[sum] = s.sums + (sum * half_rows_ + row) * sum_pitch_;
    for (int64_t i = 0; i < depth_; i += lanes<A>) {
      const vec<A> a11 = load(a1 + i), a12 = load(a1 + depth_ + i), a21 = load(a2 + i), a22 = load(a2 + depth_ + i);
      const vec<A> s1 = a21 + a22, s2 = s1 - a11;
      store(to[kS1] + i, s1);
      store(to[kS2] + i, s2);
      store(to[kS3] + i, a11 - a21);
      store(to[kS4] + i, a12 - s2);
    }
  }

  // A panel of both halves of the columns.
  void multiply_panel(int64_t panel, const Block& block, const Scratch& s) const {
    using Product = TileProduct<A, A, T>;
    const int64_t left = panel * kPanel<A>, right = columns_ + left;
    const int width = panel_width<A>(columns_, panel);
    t_.load_bias(0, left, width, s.left_bias);
    t_.load_bias(0, right, width, s.right_bias);
    const char* ahead = panel % block_panels_ == 0 ? block.ahead : block.ahead_end;
    // outputs (+)= rows x factor; `second`: of the channels' second half.
    const auto multiply = [&](const A* const* rows, bool second, Factor factor, int64_t count, Product product) {
      const A* panels[] = {factor_at(panel, factor)};
      product.panels = panels;
      product.depth = depth_;
      product.row_offset = second ? depth_ : 0;
      const int64_t tiles = divide_up(count, kTileRows);
      for (int64_t index = 0; index < tiles; ++index) {
        const int64_t row = count * index / tiles, height = count * (index + 1) / tiles - row;
        Product tile = product;
        tile.rows = rows + row, tile.outputs = product.outputs + row;
        if (ahead < block.ahead_end) {  // a line per step
          tile.ahead = ahead, tile.ahead_step = 64;
          ahead += depth_ * 64;
        }
        if (product.written) tile.written = product.written + row;
        tile_kernel<A, 1, A, T>(static_cast<int>(height), width / lanes<A>)(tile);
      }
    };
    const auto sums = [](A* const* rows, bool accumulate) {
      Product product;
      product.outputs = rows, product.accumulate = accumulate;
      return product;
    };
    const auto added_into = [&](A* const* rows, T* const* target, int64_t column, const Epilogue<T>* epilogue) {
      Product product = sums(rows, true);
      product.written = target, product.written_offset = column, product.epilogue = epilogue;
      return product;
    };
    const auto result = [&](A* const* rows, T* const* target, int64_t column) {
      Product product = added_into(rows, target, column, &t_.epilogue);
      if (t_.bias) product.column_start = column == left ? s.left_bias : s.right_bias;
      return product;
    };
    const Epilogue<T> nothing;
    const int64_t first = block.first, second = block.second;
    multiply(s.first, false, kB11, first, sums(s.u_rows, false));
    multiply(s.first, true, kB21, first, result(s.u_rows, s.to_first, left));
    multiply(s.sum_rows[kS2], false, kT2, first, sums(s.u_rows, true));
    multiply(s.sum_rows[kS1], false, kT1, first, added_into(s.u_rows, s.u4_rows, 0, &nothing));
    multiply(s.sum_rows[kS4], false, kB22, first, result(s.u4_rows, s.to_first, right));
    multiply(s.sum_rows[kS3], false, kT3, second, sums(s.product_rows, false));
    for (int64_t row = 0; row < second; ++row)
      for (int64_t j = 0; j < width; j += lanes<A>) {
        const vec<A> product = load(s.product_rows[row] + j);
        store(s.u_rows[row] + j, load(s.u_rows[row] + j) + product);
        t_.epilogue.store(s.to_second[row] + right + j, load(s.u4_rows[row] + j) + product + load(s.right_bias + j));
        t_.epilogue.open_gate(s.to_second[row] + right + j, lanes<A>);
      }
    multiply(s.second, true, kMinusT4, second, result(s.u_rows, s.to_second, left));
  }

  const ConvArguments<T>& arguments_;
  Transfer<T> t_;
  bool follows_;                       // blocks follow each other in memory
  int64_t depth_, columns_;            // halves of the channels that are read and written
  int64_t image_rows_, image_blocks_;  // pixels of an image, and how many blocks they are
  int64_t panels_, row_blocks_, half_rows_, column_blocks_, block_panels_, sum_pitch_;
};

}  // namespace convlab::cpu::CONVLAB_ISA
