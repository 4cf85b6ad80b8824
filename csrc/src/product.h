// Rows of activations times panels of a packed weight: what the ops that multiply have in common.
// They decide which rows and panels meet and where the results go; here lies what the two formats have
// to agree upon, and how rows and panels are made ready for a kernel.
//
// Invariant: a row of products depends on its row of x and on the weight alone. One exception: with
// bf16 rows on AMX its last bits may depend on how many rows are multiplied at once (amx_linear.inc).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "penstock_native.h"
#include "pool.h"

namespace penstock {

constexpr int64_t kOwnRows = 4;     // up to so many rows each thread prepares all: cheaper than a barrier
constexpr int64_t kBlockRows = 96;  // rows whose products with a group of panels lie in L2
constexpr int64_t kGroup = 8;       // panels a task at most: as many streams from memory

struct Product {
    const penstock_weight& weight;
    int32_t x_dtype;  // F32 or BF16
    int32_t activation_bits;
};

inline int64_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }

inline int64_t panels_of(int64_t num_outputs) { return (num_outputs + kPanel - 1) / kPanel; }

// Rows that are multiplied at once, of `num_rows`: all, or parts of nearly one size.
inline int64_t block_rows(int64_t num_rows) {
    const int64_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
    const int64_t block = round_up((num_rows + num_blocks - 1) / num_blocks, 16);
    return num_rows < block ? num_rows : block;
}

// The weight has a scale a row, which is multiplied with the finished sums.
bool has_row_scales(const penstock_weight& weight);
// What the kernel multiplies with: float, bf16 or int8 rows.
int32_t row_dtype(const Product& product);
// A panel in the format that the kernel reads for so many rows, if that is not the stored one; else 0.
int64_t converted_bytes(const Product& product, int64_t num_rows);
// Null if the product can be computed, else what is wrong.
const char* check_product(const Product& product);

// Panels a task, of `num_panels` in all: a power of two, at most kGroup and at least `least`, which is 1 or 2.
int64_t group_size(const Product& product, int64_t num_panels, int64_t least, int64_t num_rows, int num_threads);

// Rows as the kernel takes them.
struct Rows {
    const char* data;
    int64_t stride;  // bytes
    float* scales;   // int8: x = scale * row
    int32_t* sums;   // int8

    Rows from(int64_t row) const {
        return {data + row * stride, stride, scales ? scales + row : nullptr, sums ? sums + row : nullptr};
    }
};

// The kernel may read x where it is: rows `stride` elements apart.
bool is_readable(const Product& product, int64_t stride, int64_t num_rows);
// Of one prepared row.
int64_t row_bytes(const Product& product);
// Of prepared rows with their scales and sums; a multiple of a cache line.
int64_t prepared_bytes(const Product& product, int64_t num_rows);
Rows rows_at(const Product& product, int64_t num_rows, char* memory);
// x, the weight's columns, to row `row` of `rows`, padded with zeros.
void prepare_row(const Product& product, const void* x, const Rows& rows, int64_t row);

// Some successive panels, ready for a kernel.
struct Panels {
    int64_t first, count;  // of the weight
    const char* data;
    int64_t stride;  // bytes
    bool is_converted;
};

// For products with `num_rows` rows. `memory`: count times converted_bytes.
Panels load_panels(const Product& product, int64_t first, int64_t count, int64_t num_rows, char* memory);
// c[num_rows, 16 * count of the panels], float or int32_t.
void multiply(const Product& product, const Rows& rows, int64_t num_rows, const Panels& panels, void* c);
// Row `row` of c on its way out; what becomes of it, and where it goes, is the caller's to add.
Finish finish_of(const Product& product, const Rows& rows, int64_t row, const Panels& panels, const void* c,
                 const float* bias);

}  // namespace penstock
