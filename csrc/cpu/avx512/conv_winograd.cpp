#define CONVLAB_AVX512
#include "../conv_winograd.h"

#include "../conv_algorithm.h"
#include "../isa.h"

CONVLAB_ALGORITHM(Winograd)
