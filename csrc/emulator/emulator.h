// CUDA's vocabulary on the CPU: what csrc/cuda/simt.h includes where the compiler is not nvcc.
//
// Idea: every CUDA thread is a fiber; scheduler.cpp runs the fibers of a block in turn, each up to its next barrier or
// warp collective, in an order that a seed shuffles. Memory is as unkind as the manual allows: shared memory is full of
// NaNs at first, asynchronous copies land when they are waited for and not before, and pointers know their ends. So a
// missing barrier, a short wait, a wrong index and a deadlock are errors with a message, not luck.
// Cost: about 10 ns per switch; 1 to 10 us per mma. Limits: x86-64; one block at a time per worker thread, so races
// between blocks are not seen; nothing is said of speed, bank conflicts or the hardware's own rounding inside mma.
#pragma once
#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CONVLAB_DEVICE inline
#define CONVLAB_EXPORT __attribute__((visibility("default")))

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace convlab::emulator {

enum class State : int { ready, at_block_barrier, at_warp_barrier, done };

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
};

constexpr int kWarp = 32;
constexpr int kExchangeBytes = 64;

struct Warp {
  alignas(16) unsigned char exchange[2][kWarp][kExchangeBytes];
};

struct Thread {
  uint3 index;
  int lane = 0;
  Warp* warp = nullptr;
  State state = State::done;
  uint32_t mask = 0;  // of the warp collective that it waits in
  int site = 0;       // line of the barrier that it waits in
  unsigned exchanges = 0, block_meetings = 0, warp_meetings = 0;
  std::vector<std::vector<AsyncCopy>> copies;  // groups, oldest first; the last one is open
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer_fiber = nullptr;
};

struct Block {
  uint3 index;
  dim3 threads, blocks;
  unsigned char* dynamic = nullptr;
  int64_t dynamic_bytes = 0;
};

extern thread_local Thread* thread;
extern thread_local Block* block;

// Ends the launch with an error that says this, and where. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void wait_for_block(int site);
void wait_for_warp(uint32_t mask, int site);
void* shared_variable(int key, size_t bytes);  // one per block, filled with NaN when the block begins
const char* error_text(int code);              // of the last launch that failed
int run(dim3 grid, dim3 threads, int64_t shared_bytes, const std::function<void()>& body);

// A pointer to an array that knows the array's ends.
template <class T>
class Span {
 public:
  Span() = default;
  Span(std::nullptr_t) {}
  Span(T* first, int64_t count, const char* space) : first_(first), count_(first ? count : 0), space_(space) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T> && !std::is_const_v<U>>>
  Span(const Span<U>& other) : first_(other.first_), at_(other.at_), count_(other.count_), space_(other.space_) {}

  T& operator[](int64_t i) const { return *checked(i, 1); }
  T& operator*() const { return *checked(0, 1); }
  Span operator+(int64_t i) const {
    Span moved = *this;
    moved.at_ += i;
    return moved;
  }
  explicit operator bool() const { return first_ != nullptr; }

  // Elements [i, i + n), of which the first must be aligned to all of them if there are several.
  T* checked(int64_t i, int n) const {
    const int64_t first = at_ + i;
    if (first < 0 || first + n > count_)
      fail("access to element %lld of an array of %lld in %s memory, %zu bytes each",
           static_cast<long long>(first < 0 ? first : first + n - 1), static_cast<long long>(count_), space_,
           sizeof(T));
    T* p = first_ + first;
    if (n > 1 && reinterpret_cast<uintptr_t>(p) % (static_cast<size_t>(n) * sizeof(T)) != 0)
      fail("misaligned access of %zu bytes to element %lld in %s memory", static_cast<size_t>(n) * sizeof(T),
           static_cast<long long>(first), space_);
    return p;
  }

 private:
  template <class U>
  friend class Span;
  T* first_ = nullptr;
  int64_t at_ = 0, count_ = 0;
  const char* space_ = "no";
};

// T[N][M]... whose indices are checked.
template <class T>
struct CheckedArray {
  using type = T;
};
template <class T, size_t N>
struct CheckedArray<T[N]> {
  using type = CheckedArray;
  typename CheckedArray<T>::type element[N];
  auto& operator[](int64_t i) {
    if (i < 0 || i >= static_cast<int64_t>(N))
      fail("index %lld of a shared array's dimension of %zu", static_cast<long long>(i), N);
    return element[i];
  }
};

// Gives this lane's value to the others of `mask` and calls read(at), where at(lane) is the value of that lane. The two
// exchange buffers alternate, so that one meeting per collective is enough.
template <class T, class Read>
auto exchange(uint32_t mask, const T& value, const Read& read, int site) {
  static_assert(sizeof(T) <= kExchangeBytes && std::is_trivially_copyable_v<T>);
  auto& buffer = thread->warp->exchange[thread->exchanges++ & 1];
  std::memcpy(buffer[thread->lane], &value, sizeof value);
  wait_for_warp(mask, site);
  return read([&buffer](int lane) -> const T& { return *reinterpret_cast<const T*>(buffer[lane & (kWarp - 1)]); });
}

}  // namespace convlab::emulator

#define CONVLAB_SHARED(T, name, ...)                                                    \
  using name##_array = typename ::convlab::emulator::CheckedArray<T __VA_ARGS__>::type; \
  name##_array& name =                                                                  \
      *static_cast<name##_array*>(::convlab::emulator::shared_variable(__COUNTER__, sizeof(name##_array)))

#define threadIdx (::convlab::emulator::thread->index)
#define blockIdx (::convlab::emulator::block->index)
#define blockDim (::convlab::emulator::block->threads)
#define gridDim (::convlab::emulator::block->blocks)

inline void __syncthreads(int site = __builtin_LINE()) { convlab::emulator::wait_for_block(site); }
inline void __syncwarp(uint32_t mask = ~0u, int site = __builtin_LINE()) {
  convlab::emulator::wait_for_warp(mask, site);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32, int site = __builtin_LINE()) {
  const int lane = convlab::emulator::thread->lane, from = lane ^ other;
  const bool inside = (from & ~(width - 1)) <= (lane & ~(width - 1));
  return convlab::emulator::exchange(mask, value, [&](auto at) { return inside ? at(from) : value; }, site);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32, int site = __builtin_LINE()) {
  const int source = (convlab::emulator::thread->lane & ~(width - 1)) | (from & (width - 1));
  return convlab::emulator::exchange(mask, value, [&](auto at) { return at(source); }, site);
}

namespace convlab::cuda {

template <class T>
using Global = emulator::Span<T>;
template <class T>
using Shared = emulator::Span<T>;

template <class T>
Global<T> global(T* pointer, int64_t count) {
  return {pointer, count, "global"};
}

template <class T>
Shared<T> dynamic_shared(int64_t offset, int64_t count) {
  if (offset + count * static_cast<int64_t>(sizeof(T)) > emulator::block->dynamic_bytes)
    emulator::fail("an array up to byte %lld of %lld in dynamic shared memory",
                   static_cast<long long>(offset + count * static_cast<int64_t>(sizeof(T))),
                   static_cast<long long>(emulator::block->dynamic_bytes));
  return {reinterpret_cast<T*>(emulator::block->dynamic + offset), count, "shared"};
}

template <int N, class T>
Vector<std::remove_const_t<T>, N> load_vector(const emulator::Span<T>& p, int64_t at) {
  Vector<std::remove_const_t<T>, N> vector;
  std::memcpy(&vector, p.checked(at, N), sizeof vector);
  return vector;
}
template <int N, class T>
void store_vector(const emulator::Span<T>& p, int64_t at, const Vector<T, N>& vector) {
  std::memcpy(p.checked(at, N), &vector, sizeof vector);
}

template <class T>
void copy_async(const Shared<T>& to, const Global<const T>& from, bool valid) {
  constexpr int n = 16 / sizeof(T);
  auto& groups = emulator::thread->copies;
  if (groups.empty()) groups.emplace_back();
  void* target = to.checked(0, n);
  std::memset(target, 0xff, 16);  // NaN until it lands
  groups.back().push_back({target, valid ? from.checked(0, n) : nullptr});
}
inline void copy_async_commit() {
  auto& groups = emulator::thread->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int N>
void copy_async_wait() {
  auto& groups = emulator::thread->copies;
  while (groups.size() > static_cast<size_t>(N) + 1) {
    for (const auto& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// A lane reads its row when it arrives: writes of other lanes that no barrier has ordered before may be missing.
struct MatrixRow {
  uint16_t value[8];
};
template <class T>
MatrixRow matrix_row(const Shared<T>& row) {
  static_assert(sizeof(T) == 2);
  MatrixRow copy;
  std::memcpy(&copy, row.checked(0, 8), sizeof copy);
  return copy;
}
template <class T>
void load_matrices(uint32_t (&r)[4], const Shared<T>& row, int site = __builtin_LINE()) {
  const int lane = emulator::thread->lane;
  const auto read = [&](auto at) {
    for (int i = 0; i < 4; ++i) std::memcpy(&r[i], &at(i * 8 + lane / 4).value[lane % 4 * 2], 4);
    return 0;
  };
  emulator::exchange(~0u, matrix_row(row), read, site);
}
template <class T>
void load_matrices_transposed(uint32_t (&r)[4], const Shared<T>& row, int site = __builtin_LINE()) {
  const int lane = emulator::thread->lane;
  const auto read = [&](auto at) {
    for (int i = 0; i < 4; ++i)
      r[i] = at(i * 8 + lane % 4 * 2).value[lane / 4] |
             static_cast<uint32_t>(at(i * 8 + lane % 4 * 2 + 1).value[lane / 4]) << 16;
    return 0;
  };
  emulator::exchange(~0u, matrix_row(row), read, site);
}

struct Fragments {
  uint32_t a[4], b[2];
};

// Element (row, k) of a and (k, column) of b lie with the lanes that the PTX manual names. element(word, half) is one
// of the kPerWord values in a word.
template <int kPerWord, class Element>
void mma_of(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int site, const Element& element) {
  const int lane = emulator::thread->lane;
  emulator::exchange(
      ~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}},
      [&](auto at) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4, column = lane % 4 * 2 + i % 2;
          float sum = 0;
          for (int word = 0; word < 8; ++word) {  // of a row: those of 4 lanes, then 4 more
            const uint32_t left = at(row * 4 + word % 4).a[i / 2 + 2 * (word / 4)];
            const uint32_t right = at(column * 4 + word % 4).b[word / 4];
            for (int half = 0; half < kPerWord; ++half) sum += element(left, half) * element(right, half);
          }
          d[i] += sum;
        }
        return 0;
      },
      site);
}

inline void mma(bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                int site = __builtin_LINE()) {
  mma_of<2>(d, a, b0, b1, site, [](uint32_t w, int half) { return bits_to_float(half ? w & 0xffff0000u : w << 16); });
}
inline void mma(float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int site = __builtin_LINE()) {
  mma_of<2>(d, a, b0, b1, site,
            [](uint32_t w, int half) { return to_accumulate(float16{static_cast<uint16_t>(half ? w >> 16 : w)}); });
}
// Tensor cores read tf32 operands as the upper 19 bits of a float.
inline void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int site = __builtin_LINE()) {
  mma_of<1>(d, a, b0, b1, site, [](uint32_t w, int) { return bits_to_float(w & 0xffffe000u); });
}
inline uint32_t to_tf32(float value) {  // to nearest, ties away from zero
  const uint32_t bits = float_to_bits(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, void*,
           const Arguments&... arguments) {
  return emulator::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace convlab::cuda
