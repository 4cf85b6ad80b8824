// Packed weights: their layout, and single rows of them.
#pragma once

#include <cstdint>

#include "penstock_native.h"

namespace penstock {

inline bool is_coded(const penstock_weight& weight) {
    return weight.format == PENSTOCK_CODES4 || weight.format == PENSTOCK_CODES8;
}

const char* check_weight(const penstock_weight& weight);  // null, or what is wrong
// Null if source rows can be placed so (see penstock_pack_args), else what is wrong.
const char* check_rows(const penstock_weight& weight, int64_t first_row, int64_t num_rows, int64_t panel_step);
// Row `row` as numbers: out [num_columns].
void unpack_row(const penstock_weight& weight, int64_t row, float* out);

}  // namespace penstock
