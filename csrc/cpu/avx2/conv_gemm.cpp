#define CONVLAB_AVX2
#include "../conv_algorithm.h"
#include "../conv_implicit_gemm.h"
#include "../conv_inner_product.h"
#include "../conv_strassen.h"
#include "../isa.h"

CONVLAB_ALGORITHM(ImplicitGemm)
CONVLAB_ALGORITHM(InnerProduct)
CONVLAB_ALGORITHM(Strassen)
