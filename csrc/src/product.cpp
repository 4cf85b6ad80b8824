#include "product.h"

#include <cstring>

#include "pack.h"
#include "rows.h"

namespace penstock {

namespace {

constexpr int64_t kFewRows = 12;            // up to so many rows every panel is read once: caches do not matter
constexpr int64_t kGroupBytes = 512 << 10;  // of panels used again and again: half of a small L2
constexpr int64_t kTasksPerThread = 6;      // so that a slow thread costs a fraction of its share

// Panels [first, first + count) in the format that the kernel reads, one after another.
void convert(const Product& product, const char* panels, int64_t count, int64_t panel_bytes, char* out) {
    const LinearKernels& linear = kernels().linear;
    const penstock_weight& w = product.weight;
    for (int64_t j = 0; j < count; ++j, panels += w.panel_bytes, out += panel_bytes) {
        if (is_coded(w) && product.x_dtype == PENSTOCK_F32) {
            kernels().codes->to_f32(w, panels, 0, w.padded_columns, reinterpret_cast<float*>(out));
        } else if (is_coded(w)) {
            kernels().codes->to_bf16(w, panels, 0, w.padded_columns, reinterpret_cast<uint16_t*>(out));
        } else if (w.format == PENSTOCK_INT8) {
            linear.i8_to_bf16(panels, w.padded_columns, reinterpret_cast<uint16_t*>(out));
        } else if (row_dtype(product) == PENSTOCK_BF16) {
            linear.i4_to_bf16(panels, w.padded_columns, reinterpret_cast<uint16_t*>(out));
        } else {
            linear.i4_to_i8(panels, w.padded_columns, reinterpret_cast<uint8_t*>(out));
        }
    }
}

}  // namespace

bool has_row_scales(const penstock_weight& weight) {
    return weight.format == PENSTOCK_INT8 || weight.format == PENSTOCK_INT4;
}

int32_t row_dtype(const Product& product) {
    if (is_coded(product.weight)) return product.x_dtype;
    if (!has_row_scales(product.weight)) return product.weight.format;
    return product.activation_bits == 8 ? PENSTOCK_INT8 : PENSTOCK_BF16;
}

int64_t converted_bytes(const Product& product, int64_t num_rows) {
    const penstock_weight& w = product.weight;
    if (is_coded(w)) {
        const CodeKernels& codes = *kernels().codes;
        const int64_t few = product.x_dtype == PENSTOCK_F32 ? codes.max_rows_f32 : codes.max_rows_bf16;
        return num_rows > few ? w.padded_columns * kPanel * size_of(product.x_dtype) : 0;
    }
    if (!has_row_scales(w)) return 0;
    if (row_dtype(product) == PENSTOCK_BF16) return w.padded_columns * kPanel * 2;
    return w.format == PENSTOCK_INT4 && num_rows > kernels().linear.max_rows_i4 ? w.padded_columns * kPanel : 0;
}

const char* check_product(const Product& product) {
    if (const char* problem = check_weight(product.weight)) return problem;
    if (product.x_dtype != PENSTOCK_F32 && product.x_dtype != PENSTOCK_BF16) return "x must be F32 or BF16";
    if (has_row_scales(product.weight) && product.activation_bits != 8 && product.activation_bits != 16) {
        return "activations have 8 or 16 bits";
    }
    if (is_coded(product.weight) && product.activation_bits != 16) return "activations that meet codes have 16 bits";
    if (row_dtype(product) == PENSTOCK_INT8 && product.weight.padded_columns > 1 << 16) {
        return "sums of int8 would overflow";
    }
    return nullptr;
}

int64_t group_size(const Product& product, int64_t num_panels, int64_t least, int64_t num_rows, int num_threads) {
    const int64_t converted = converted_bytes(product, num_rows);
    const int64_t num_bytes = converted ? converted : num_rows > kFewRows ? product.weight.panel_bytes : 0;
    int64_t group = kGroup;
    while (group > least &&
           (group * num_bytes > kGroupBytes || num_panels < kTasksPerThread * num_threads * group)) {
        group /= 2;
    }
    return group;
}

bool is_readable(const Product& product, int64_t stride, int64_t num_rows) {
    const int64_t num_bytes = stride * size_of(product.x_dtype);
    const bool spread = num_bytes % kAlignment || num_bytes / kAlignment % 2;
    return product.x_dtype == row_dtype(product) && product.weight.num_columns == product.weight.padded_columns &&
           (num_rows <= kOwnRows || spread);
}

// Rows of an even number of cache lines would meet in few sets of the cache.
int64_t row_bytes(const Product& product) {
    const int64_t num_bytes = product.weight.padded_columns * size_of(row_dtype(product));
    return num_bytes / kAlignment % 2 == 0 ? num_bytes + kAlignment : num_bytes;
}

int64_t prepared_bytes(const Product& product, int64_t num_rows) {
    return num_rows * row_bytes(product) + 2 * round_up(num_rows * 4, kAlignment);
}

Rows rows_at(const Product& product, int64_t num_rows, char* memory) {
    char* scales = memory + num_rows * row_bytes(product);
    char* sums = scales + round_up(num_rows * 4, kAlignment);
    if (row_dtype(product) != PENSTOCK_INT8) return {memory, row_bytes(product), nullptr, nullptr};
    return {memory, row_bytes(product), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums)};
}

void prepare_row(const Product& product, const void* x, const Rows& rows, int64_t row) {
    char* out = const_cast<char*>(rows.data) + row * rows.stride;
    const auto* floats = static_cast<const float*>(x);
    const auto* halves = static_cast<const uint16_t*>(x);
    const bool is_float = product.x_dtype == PENSTOCK_F32;
    const int64_t n = product.weight.num_columns, padded = product.weight.padded_columns;
    const int32_t dtype = row_dtype(product);
    if (dtype == PENSTOCK_INT8) {
        const LinearKernels& linear = kernels().linear;
        auto* q = reinterpret_cast<int8_t*>(out);
        rows.scales[row] = is_float ? linear.quantize_f32(floats, n, padded, q, &rows.sums[row])
                                    : linear.quantize_bf16(halves, n, padded, q, &rows.sums[row]);
        return;
    }
    if (dtype == product.x_dtype) {
        memcpy(out, x, n * size_of(dtype));
    } else if (is_float) {
        kernels().rows->f32_to_bf16(floats, reinterpret_cast<uint16_t*>(out), n);
    } else {
        kernels().rows->bf16_to_f32(halves, reinterpret_cast<float*>(out), n);
    }
    memset(out + n * size_of(dtype), 0, (padded - n) * size_of(dtype));
}

Panels load_panels(const Product& product, int64_t first, int64_t count, int64_t num_rows, char* memory) {
    const penstock_weight& w = product.weight;
    const char* stored = static_cast<const char*>(w.data) + first * w.panel_bytes;
    const int64_t converted = converted_bytes(product, num_rows);
    if (!converted) return {first, count, stored, w.panel_bytes, false};
    convert(product, stored, count, converted, memory);
    return {first, count, memory, converted, true};
}

void multiply(const Product& product, const Rows& rows, int64_t num_rows, const Panels& panels, void* c) {
    const LinearKernels& linear = kernels().linear;
    const Gemm gemm{num_rows, panels.count, product.weight.padded_columns, rows.data,
                    rows.stride / size_of(row_dtype(product)), panels.data, panels.stride, c,
                    panels.count * kPanel, false};
    if (is_coded(product.weight) && !panels.is_converted) {
        const CodeKernels& codes = *kernels().codes;
        product.x_dtype == PENSTOCK_F32 ? codes.gemm_f32(product.weight, gemm) : codes.gemm_bf16(product.weight, gemm);
        return;
    }
    switch (row_dtype(product)) {
        case PENSTOCK_F32: linear.gemm_f32(gemm); return;
        case PENSTOCK_BF16: linear.gemm_bf16(gemm); return;
        default: break;
    }
    if (product.weight.format == PENSTOCK_INT4 && !panels.is_converted) {
        linear.gemm_i4(gemm, rows.sums);
    } else {
        linear.gemm_i8(gemm, rows.sums);
    }
}

Finish finish_of(const Product& product, const Rows& rows, int64_t row, const Panels& panels, const void* c,
                 const float* bias) {
    const int64_t first_row = panels.first * kPanel;
    Finish out{};
    out.c = static_cast<const char*>(c) + row * panels.count * kPanel * 4;
    out.integers = row_dtype(product) == PENSTOCK_INT8;
    out.scales = has_row_scales(product.weight) ? product.weight.scales + first_row : nullptr;
    out.row_scale = out.integers ? rows.scales[row] : 1.0f;
    out.bias = bias ? bias + first_row : nullptr;
    return out;
}

}  // namespace penstock
