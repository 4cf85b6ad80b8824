#include "../kernels.h"
#define scalar_linear amx_emulated_linear
#include "scalar_linear.cpp"
