// CONVLAB_HD marks functions that CUDA kernels call too.
#pragma once

#if defined(__CUDACC__)
#define CONVLAB_HD __host__ __device__
#else
#define CONVLAB_HD
#endif
