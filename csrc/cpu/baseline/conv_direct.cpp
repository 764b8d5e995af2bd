#include "../conv_direct.h"

#include "../conv_algorithm.h"
#include "../conv_depthwise.h"
#include "../conv_naive.h"
#include "../isa.h"

CONVLAB_ALGORITHM(Direct)
CONVLAB_ALGORITHM(Depthwise)
CONVLAB_ALGORITHM(Naive)
