// Running the CPU's kernels of a convolution: what they compute in the place of the problem, workspace, threads, and
// weights that are kept in the order in which they are read.
#pragma once
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "../algorithm_choice.h"
#include "../cpu/conv_kernels.h"
#include "common.h"
#include "memory.h"

namespace convlab {

// In front of a packed weight: what it was packed for. Whoever asks with another problem has the weight packed anew.
struct alignas(64) PackedHeader {
  int64_t fields[8];

  // `layout`: of the operands as they were given.
  template <class T>
  PackedHeader(Algorithm algorithm, const cpu::ConvArguments<T>& a, Layout layout, const cpu::ConvPlan& plan)
      : fields{static_cast<int64_t>(algorithm),
               (has_one_output(a.geometry) ? 1 : 0) << 24 |
                   (static_cast<int64_t>(layout) * 4 + static_cast<int64_t>(a.pass)) << 16 | instruction_set() << 8 |
                   static_cast<int64_t>(sizeof(T)) << 1 | (std::is_same_v<T, bfloat16> ? 1 : 0),
               a.geometry.out_channels,
               a.geometry.in_channels,
               a.geometry.groups,
               joined(a.geometry.kernel),
               joined(a.geometry.stride),
               plan.packed_bytes} {}

  // The order of the elements follows the instruction set.
  static int64_t instruction_set() {
    return static_cast<int64_t>(cpu::capability()) * 2 + (cpu::multiplies_bfloat16() ? 1 : 0);
  }
  // For which there are other kernels.
  static bool has_one_output(const ConvGeometry& g) { return g.taps() > 1 && g.output_pixels() == 1; }
  static int64_t joined(const int64_t (&sizes)[kMaxSpatial]) { return sizes[0] << 40 | sizes[1] << 20 | sizes[2]; }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHeader)) + fields[7]; }
  bool heads(const at::Tensor& packed) const {
    return packed.numel() == bytes() && std::memcmp(packed.const_data_ptr(), fields, sizeof fields) == 0;
  }
};

// What the algorithm's kernels compute in the place of the problem (joins_map). `biases` keeps what `bias` points to.
template <class T>
cpu::ConvArguments<T> as_computed(Algorithm algorithm, cpu::ConvArguments<T> a, std::vector<T>& biases) {
  const bool last = a.layout == Layout::channels_last;
  const int64_t taps = a.geometry.taps(), channels = a.geometry.in_channels;
  if (!joins_map(algorithm, a.geometry)) return a;
  a.geometry = with_map_joined(a.geometry);
  a.layout = Layout::channels_last;
  a.weight_stride_channel = a.weight_stride_tap = 1;
  if (a.bias && a.pass == Pass::backward_input) {
    biases.resize(static_cast<size_t>(channels * taps));
    for (int64_t i = 0; i < channels * taps; ++i)
      biases[static_cast<size_t>(i)] = a.bias[last ? i % channels : i / taps];
    a.bias = biases.data();
  }
  return a;
}

// Ranges smaller than this many multiply-adds are not worth a thread.
inline constexpr int64_t kMultiplyAddsPerThread = 1 << 16;

// Whether each thread packs the weight for itself, which is worth a quarter of its time: what another core has just
// written takes longer to read than what this one has, several times across the parts of a processor, and no thread
// waits for another.
template <class T>
bool packs_alone(const cpu::ConvArguments<T>& arguments, const cpu::ConvPlan& plan) {
  constexpr int64_t per_element = 10, share = 4, most_bytes = int64_t{64} << 20;
  const int64_t elements = plan.packed_bytes / static_cast<int64_t>(sizeof(float));
  return arguments.threads > 1 && elements > 0 && !plan.packs_in_place &&
         plan.packed_bytes * arguments.threads <= most_bytes &&
         elements * per_element * share * arguments.threads <= arguments.geometry.multiply_adds();
}

template <class T>
void run_on_cpu(Algorithm algorithm, const cpu::ConvArguments<T>& given, const std::optional<at::Tensor>& packed) {
  std::vector<T> biases;
  cpu::ConvArguments<T> arguments = as_computed(algorithm, given, biases);
  const auto kernels = cpu::conv_kernels<T>(algorithm, arguments);
  const cpu::ConvPlan plan = kernels.plan(arguments);
  const bool kept = plan.packed_bytes > 0 && packed.has_value() &&
                    PackedHeader(algorithm, arguments, given.layout, plan).heads(*packed);
  const bool alone = !kept && packs_alone(arguments, plan);
  const int64_t packed_bytes = kept || alone ? 0 : (plan.packed_bytes + 63) / 64 * 64;
  char* shared = static_cast<char*>(thread_scratch(0, packed_bytes + plan.shared_bytes));
  arguments.packed = kept ? static_cast<char*>(packed->data_ptr()) + sizeof(PackedHeader) : alone ? nullptr : shared;
  arguments.shared = shared + packed_bytes;
  static std::atomic<int64_t> calls = 0;
  const int64_t call = calls++;
  const int64_t cost = arguments.geometry.multiply_adds() / plan.rounds / std::max<int64_t>(1, plan.run_tasks) + 1;
  const int64_t grain = std::max<int64_t>(1, kMultiplyAddsPerThread / cost);
  const auto copy_grain = [](int64_t bytes, int64_t tasks) {
    return std::max<int64_t>(1, kMultiplyAddsPerThread / (bytes / std::max<int64_t>(1, tasks) + 4));
  };
  if (!kept && !alone)
    parallel(plan.pack_tasks, copy_grain(plan.packed_bytes, plan.pack_tasks),
             [&](int64_t begin, int64_t end) { kernels.pack(arguments, begin, end); });
  const int64_t prepare_grain = plan.prepare_multiplies ? 1 : copy_grain(plan.shared_bytes, plan.prepare_tasks);
  for (arguments.round = 0; arguments.round < plan.rounds; ++arguments.round) {
    parallel(plan.prepare_tasks, prepare_grain, [&](int64_t begin, int64_t end) {
      kernels.prepare(arguments, thread_scratch(1, plan.scratch_bytes), begin, end);
    });
    parallel(plan.run_tasks, grain, [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(1, plan.scratch_bytes);
      if (!alone) return kernels.run(arguments, scratch, begin, end);
      cpu::ConvArguments<T> own = arguments;
      own.packed = thread_scratch(2, plan.packed_bytes);
      static thread_local int64_t packed_in = -1;
      if (packed_in != call) kernels.pack(own, 0, plan.pack_tasks);
      packed_in = call;
      kernels.run(own, scratch, begin, end);
    });
  }
  parallel(plan.finish_tasks, prepare_grain,
           [&](int64_t begin, int64_t end) { kernels.finish(arguments, begin, end); });
}

// The weight in the order in which the algorithm's kernel reads it; empty if it reads it as it is.
template <class T>
at::Tensor pack_weight(Algorithm algorithm, const cpu::ConvArguments<T>& given) {
  std::vector<T> biases;
  cpu::ConvArguments<T> arguments = as_computed(algorithm, given, biases);
  const auto kernels = cpu::conv_kernels<T>(algorithm, arguments);
  const cpu::ConvPlan plan = kernels.plan(arguments);
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  if (plan.packed_bytes == 0) return at::empty({0}, bytes);
  const PackedHeader header(algorithm, arguments, given.layout, plan);
  at::Tensor packed = empty_result({header.bytes()}, bytes);
  std::memcpy(packed.mutable_data_ptr(), header.fields, sizeof header.fields);
  arguments.packed = static_cast<char*>(packed.mutable_data_ptr()) + sizeof(PackedHeader);
  parallel(plan.pack_tasks, 1, [&](int64_t begin, int64_t end) { kernels.pack(arguments, begin, end); });
  return packed;
}

}  // namespace convlab
