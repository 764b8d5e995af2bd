#include "../conv_algorithm.h"
#include "../conv_implicit_gemm.h"
#include "../conv_inner_product.h"
#include "../isa.h"

CONVLAB_ALGORITHM(ImplicitGemm)
CONVLAB_ALGORITHM(InnerProduct)
