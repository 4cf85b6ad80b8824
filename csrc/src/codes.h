// Weights as codes of a checkpoint (CODES4, CODES8): how a panel of them is laid out, and single
// numbers of it. How many at a time are decoded is the business of isa/.
//
// A panel is one group of columns after another; of a group come its 16 scales, its 16 minima (if
// there are any) and its codes. With INT8 scales every 256 columns begin with the units of their 16
// rows and, with minima, the units of those, as floats. One pass reads a panel in order, and nothing
// is stored twice.
//
// CODES8: bytes in the order of a bf16 panel, [k / 2][16][2]. CODES4: 8 columns are 64 bytes; row r,
// column c of them is in byte 4 * (2 * (r % 8) + c % 2) + c / 2, rows 0 to 7 in the low nibbles. In
// both, a pair of columns is two vectors of 16 numbers, rows 0 to 7 and rows 8 to 15, each with the
// two columns of a row side by side: what packing two vectors of floats into a line of bf16 wants.
//
// All is static: every instruction set's source compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "penstock_native.h"

namespace penstock {

static constexpr int64_t kUnitColumns = 256;  // share a unit
static constexpr int64_t kCodeLanes = 16;     // rows of a panel
// An E4M3 code's bits, moved to where a half has them, are a number that is so many times smaller.
// Kernels give the factor to the scale, exactly: scales of E4M3 are below 2^120 or not finite.
static constexpr float kE4m3Factor = 256.0f;

// What a panel's bytes are. `group_columns` of a whole row is all of it, padding included.
struct CodeLayout {
    int64_t group_columns;
    int64_t scale_bytes;  // of 16 scales, or of 16 minima
    int64_t head_bytes;   // of a group: before its codes
    int64_t code_bytes;   // of one column
    int64_t group_bytes;
    int64_t unit_bytes;   // before every 256 columns

    int64_t units_at(int64_t column) const { return offset_of(column / kUnitColumns * kUnitColumns) - unit_bytes; }
    // Of the group that begins with `column`.
    int64_t offset_of(int64_t column) const {
        const int64_t units = unit_bytes ? (column / kUnitColumns + 1) * unit_bytes : 0;
        return units + column / group_columns * group_bytes;
    }
};

// `padded_columns` is set.
static inline CodeLayout code_layout(const penstock_weight& w) {
    CodeLayout layout{};
    const bool whole = w.group_size == 0 || w.group_size > w.padded_columns;
    layout.group_columns = whole ? w.padded_columns : w.group_size;
    const int64_t item = w.scale_format == PENSTOCK_F32 ? 4 : w.scale_format == PENSTOCK_F16 ? 2 : 1;
    const int64_t parts = w.has_minima ? 2 : 1;
    layout.scale_bytes = kCodeLanes * item;
    layout.head_bytes = layout.scale_bytes * parts;
    layout.code_bytes = w.format == PENSTOCK_CODES4 ? kCodeLanes / 2 : kCodeLanes;
    layout.group_bytes = layout.head_bytes + layout.group_columns * layout.code_bytes;
    layout.unit_bytes = w.scale_format == PENSTOCK_INT8 ? kCodeLanes * 4 * parts : 0;
    return layout;
}

// Where a code lies: `column` counts from the first one of its group.
static inline int64_t byte_of_code(int32_t format, int64_t column, int64_t lane) {
    if (format == PENSTOCK_CODES8) return (column / 2 * kCodeLanes + lane) * 2 + column % 2;
    return column / 8 * 64 + 4 * (2 * (lane % 8) + column % 2) + column % 8 / 2;
}

static inline float e4m3_to_f32(uint8_t code) {
    if ((code & 0x7f) == 0x7f) return float_of(static_cast<uint32_t>(code & 0x80) << 24 | 0x7fc00000u);
    return f16_to_f32(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7)) * kE4m3Factor;
}

static inline float number_of(const penstock_weight& w, uint8_t code) {
    if (w.format == PENSTOCK_CODES4) return w.book[code & 15];
    switch (w.code) {
        case PENSTOCK_CODE_UINT8: return static_cast<float>(code);
        case PENSTOCK_CODE_INT8: return static_cast<float>(static_cast<int8_t>(code));
        case PENSTOCK_CODE_E4M3: return e4m3_to_f32(code);
        default: return f16_to_f32(static_cast<uint16_t>(code << 8));
    }
}

static inline float float_at(const uint8_t* bytes) {
    float value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

// One of a group's scales or minima; `units` are the 16 of its 256 columns.
static inline float scale_at(int32_t format, const uint8_t* scales, const uint8_t* units, int64_t lane, bool minimum) {
    if (format == PENSTOCK_F32) return float_at(scales + 4 * lane);
    if (format == PENSTOCK_F16) {
        uint16_t half;
        memcpy(&half, scales + 2 * lane, sizeof half);
        return f16_to_f32(half);
    }
    const int integer = minimum ? scales[lane] : static_cast<int8_t>(scales[lane]);
    return float_at(units + 4 * lane) * static_cast<float>(integer);
}

// Some numbers of one row of a panel, columns [first, last) of a group: the oracle of the kernels.
static inline void decode_row(const penstock_weight& w, const CodeLayout& layout, const uint8_t* panel, int64_t lane,
                              int64_t first, int64_t last, float* out) {
    const int64_t start = first / layout.group_columns * layout.group_columns;
    const uint8_t* group = panel + layout.offset_of(start);
    const uint8_t* units = panel + (layout.unit_bytes ? layout.units_at(start) : 0);
    const uint8_t* codes = group + layout.head_bytes;
    const float scale = scale_at(w.scale_format, group, units, lane, false);
    float minimum = -0.0f;  // x + -0 is x
    if (w.has_minima) {
        minimum = scale_at(w.scale_format, group + layout.scale_bytes, units + 4 * kCodeLanes, lane, true);
    }
    const int shift = w.format == PENSTOCK_CODES4 && lane >= 8 ? 4 : 0;
    for (int64_t column = first; column < last; ++column) {
        const uint8_t code = codes[byte_of_code(w.format, column - start, lane)];
        *out++ = number_of(w, static_cast<uint8_t>(code >> shift)) * scale + minimum;
    }
}

const char* check_codes(const penstock_weight& w);  // null, or why there is no layout for this
void set_codes_layout(penstock_weight& w);          // padded_columns and panel_bytes
void unpack_codes(const penstock_weight& w, int64_t row, float* out);

}  // namespace penstock
