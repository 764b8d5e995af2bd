// The interface between ops/convolution.cpp and the convolution kernels of the CPU. No torch.
//
// Every algorithm is five functions: `plan` says how much memory and how many independent tasks a problem needs, `pack`
// brings the weight into the order in which it is read, `prepare` fills the shared workspace, `run` computes a range of
// tasks, and `finish` combines what the tasks left in the workspace. The result never depends on how tasks are cut
// into ranges, so it is the same for every number of threads.
#pragma once
#include "../activation.h"
#include "../algorithms.h"
#include "../dtypes.h"
#include "../geometry.h"
#include "dispatch.h"

namespace convlab::cpu {

struct ConvPlan {
  int64_t rounds = 1;  // prepare and run are repeated, with arguments.round counting; pack and finish come once
  int64_t pack_tasks = 0;
  bool packs_in_place = false;  // a range of tasks reads mostly what the same range of pack_tasks has written
  int64_t prepare_tasks = 0;
  bool prepare_multiplies = false;  // every one of these tasks is worth a thread
  int64_t run_tasks = 0;
  int64_t finish_tasks = 0;
  int64_t packed_bytes = 0;   // depends on the weight, the algorithm and the layout alone: may be kept between calls
  int64_t shared_bytes = 0;   // workspace that all threads see
  int64_t scratch_bytes = 0;  // workspace of one thread
};

// The pass decides which of input, weight and output is written; the other two are only read.
// input, output: N x C x D x H x W, dense in `layout`. weight: out_channels x in_channels/groups x taps with
// filters dense; `weight_stride_channel` and `weight_stride_tap` say which of the two is contiguous.
template <class T>
struct ConvArguments {
  ConvGeometry geometry;
  Pass pass = Pass::forward;
  Layout layout = Layout::channels_first;
  T* input = nullptr;
  T* weight = nullptr;
  T* output = nullptr;
  const T* bias = nullptr;  // added to what the pass writes (never in backward_weight), one per channel; may be null
  const T* residual = nullptr;  // added too, element by element, in the layout of what is written; may be null
  Activation activation;        // last
  int64_t weight_stride_channel = 0, weight_stride_tap = 0;
  void *packed = nullptr, *shared = nullptr;
  int64_t round = 0;
  int threads = 1;  // how finely to cut tasks; never how to order a sum

  // Per group, of the tensors that are read and written forward or in backward_input.
  int64_t read_channels() const {
    return pass == Pass::backward_input ? geometry.out_channels_per_group() : geometry.in_channels_per_group();
  }
  int64_t written_channels() const {
    return pass == Pass::backward_input ? geometry.in_channels_per_group() : geometry.out_channels_per_group();
  }
  // Whether some pixel belongs to several patches.
  bool patches_overlap() const {
    const ConvGeometry& g = geometry;
    return g.stride[0] < g.kernel[0] || g.stride[1] < g.kernel[1] || g.stride[2] < g.kernel[2];
  }
  int64_t weight_stride_filter() const { return geometry.in_channels_per_group() * geometry.taps(); }
};

template <class T>
struct ConvKernels {
  ConvPlan (*plan)(const ConvArguments<T>&) = nullptr;
  void (*pack)(const ConvArguments<T>&, int64_t begin, int64_t end) = nullptr;
  void (*prepare)(const ConvArguments<T>&, void* scratch, int64_t begin, int64_t end) = nullptr;
  void (*run)(const ConvArguments<T>&, void* scratch, int64_t begin, int64_t end) = nullptr;
  void (*finish)(const ConvArguments<T>&, int64_t begin, int64_t end) = nullptr;
};

template <class T>
struct ConvKernelTable {
  ConvKernels<T> algorithm[kAlgorithms];
};

}  // namespace convlab::cpu

CONVLAB_KERNEL_TABLE(ConvKernelTable, conv_kernels)

namespace convlab::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
template <class T>
ConvKernelTable<T> conv_kernels();
}
namespace amx {
template <class T>
ConvKernels<T> amx_kernels();
}
#endif
namespace baseline {
template <class T>
ConvKernels<T> amx_kernels();  // of tiles in software
}

// Whether `direct` takes the kernels of AVX2 where a vector of AVX-512 costs two of them: if written channels leave
// half a vector of float32 idle or fill only one. Weight gradients gain with a stride alone.
inline bool direct_halves(Pass pass, int64_t written_channels, bool strided) {
  constexpr int64_t lanes = 8;
  const int64_t halves = (written_channels + lanes - 1) / lanes;
  const bool better = written_channels >= lanes && (halves <= 2 || halves % 2 == 1);
  return halves_avx512() && better && (strided || pass != Pass::backward_weight);
}

// The kernels of one algorithm for this CPU and problem.
template <class T>
ConvKernels<T> conv_kernels(Algorithm algorithm, [[maybe_unused]] const ConvArguments<T>& arguments) {
  const int index = static_cast<int>(algorithm);
  if constexpr (!std::is_same_v<T, double>)
    if (algorithm == Algorithm::amx) {
#if defined(__x86_64__)
      if (multiplies_tiles()) return amx::amx_kernels<T>();
#endif
      return baseline::amx_kernels<T>();
    }
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bfloat16>)
    if (multiplies_bfloat16()) return avx512_bf16::conv_kernels<T>().algorithm[index];
  if (algorithm == Algorithm::direct &&
      direct_halves(arguments.pass, arguments.written_channels(), arguments.geometry.strided()))
    return avx2::conv_kernels<T>().algorithm[index];
#endif
  return conv_kernels<T>().algorithm[index];
}

}  // namespace convlab::cpu
