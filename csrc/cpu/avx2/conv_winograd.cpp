#define CONVLAB_AVX2
#include "../conv_winograd.h"

#include "../conv_algorithm.h"
#include "../isa.h"

CONVLAB_ALGORITHM(Winograd)
