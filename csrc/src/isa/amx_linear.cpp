#include "../kernels.h"
#define scalar_linear amx_linear
#include "scalar_linear.cpp"
