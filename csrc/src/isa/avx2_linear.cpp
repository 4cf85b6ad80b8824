#include "../kernels.h"
#define scalar_linear avx2_linear
#include "scalar_linear.cpp"
