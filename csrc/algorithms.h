// The convolution algorithms: one line each. Declarations, dispatch, `explain()`, tests, benchmark and the
// Python names are generated from this list.
//
//   X(name, one-line description)
//
// An algorithm may refuse a problem; `refusal()` in algorithm_choice.cpp asks it and returns the reason.
#pragma once

#define CONVLAB_FOR_EACH_ALGORITHM(X)                                                                                 \
  X(naive, "the definition: a patch of the input times a filter, one output at a time; never vectorised")             \
  X(implicit_gemm, "blocked matrix product whose patch matrix exists only as a packed panel in cache; any geometry")  \
  X(winograd, "a quarter of the multiplications: F(4x4, 3x3); 3x3 layers with stride 1, or 2 by phases")              \
  X(direct, "windows of pixels with written channels as lanes; few channels per group")                               \
  X(depthwise, "one channel, one filter: no matrix product, every tensor once through the cache; groups == channels") \
  X(inner_product, "pointwise on few pixels: weights are read where they lie, once")                                  \
  X(strassen, "pointwise with seven products of halves in the place of eight; channels_last, many channels")          \
  X(amx, "matrix products on tile registers (AMX), of bfloat16 or of parts that add up to float16 and float32")

namespace convlab {

enum class Algorithm : int {
#define X(name, description) name,
  CONVLAB_FOR_EACH_ALGORITHM(X)
#undef X
};

constexpr int kAlgorithms = 0
#define X(name, description) +1
    CONVLAB_FOR_EACH_ALGORITHM(X)
#undef X
    ;

inline const char* algorithm_name(Algorithm algorithm) {
  constexpr const char* names[] = {
#define X(name, description) #name,
      CONVLAB_FOR_EACH_ALGORITHM(X)
#undef X
  };
  return names[static_cast<int>(algorithm)];
}

inline const char* algorithm_description(Algorithm algorithm) {
  constexpr const char* descriptions[] = {
#define X(name, description) description,
      CONVLAB_FOR_EACH_ALGORITHM(X)
#undef X
  };
  return descriptions[static_cast<int>(algorithm)];
}

}  // namespace convlab
