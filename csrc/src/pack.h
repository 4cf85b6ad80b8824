// Packed weights: their layout, and single rows of them.
#pragma once

#include <cstdint>

#include "penstock_native.h"

namespace penstock {

const char* check_weight(const penstock_weight& weight);  // null, or what is wrong
// Row `row` as numbers: out [num_columns].
void unpack_row(const penstock_weight& weight, int64_t row, float* out);

}  // namespace penstock
