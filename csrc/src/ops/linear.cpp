// y = x W^T, the op: prepares the rows of x, divides the panels of W among the threads, converts
// panels where the kernels want another format, and sends the results out through the epilogue.
// Knows not how products are computed (isa/) nor how weights are laid out inside a panel (pack.cpp).
//
// Invariant: a row of y depends on its row of x and on the weight alone, not on the batch, the
// number of threads or who computed which panel. One exception: with bf16 rows on AMX its last bits
// may depend on how many rows the step has (amx_linear.inc).
#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "../ops.h"
#include "../pack.h"
#include "../rows.h"

namespace penstock {

namespace {

using Args = penstock_linear_args;

constexpr int64_t kOwnRows = 4;    // up to so many rows each thread prepares all: cheaper than a barrier
constexpr int64_t kFewRows = 12;   // up to so many rows every panel is read once: caches do not matter
constexpr int64_t kBlockRows = 96;  // rows whose products with a group of panels lie in L2
constexpr int64_t kGroup = 8;       // panels a task at most: as many streams from memory
constexpr int64_t kGroupBytes = 512 << 10;  // of panels used again and again: half of a small L2
constexpr int64_t kTasksPerThread = 6;      // so that a slow thread costs a fraction of its share

int64_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }

bool quantized(const Args& args) { return args.weight.format == PENSTOCK_INT8 || args.weight.format == PENSTOCK_INT4; }

// What the kernel multiplies with: float, bf16 or int8 rows.
int32_t row_dtype(const Args& args) {
    if (!quantized(args)) return args.weight.format;
    return args.activation_bits == 8 ? PENSTOCK_INT8 : PENSTOCK_BF16;
}

// Rows of an even number of cache lines would meet in few sets of the cache.
int64_t row_bytes(const Args& args) {
    const int64_t num_bytes = args.weight.padded_columns * size_of(row_dtype(args));
    return num_bytes / kAlignment % 2 == 0 ? num_bytes + kAlignment : num_bytes;
}

// A panel in the format that the kernel reads, if that is not the stored one; else 0.
int64_t converted_bytes(const Args& args, int64_t num_rows) {
    const int64_t k = args.weight.padded_columns;
    if (!quantized(args)) return 0;
    if (row_dtype(args) == PENSTOCK_BF16) return k * kPanel * 2;
    return args.weight.format == PENSTOCK_INT4 && num_rows > kernels().linear.max_rows_i4 ? k * kPanel : 0;
}

bool gated(const Args& args) { return args.epilogue == PENSTOCK_SILU_MUL; }

int64_t num_panels(const Args& args) { return (args.num_outputs + kPanel - 1) / kPanel * (gated(args) ? 2 : 1); }

// Panels a task: a power of two, at least one, with gates a pair.
int64_t group_size(const Args& args, int64_t num_rows, int num_threads) {
    const int64_t converted = converted_bytes(args, num_rows);
    const int64_t num_bytes = converted ? converted : num_rows > kFewRows ? args.weight.panel_bytes : 0;
    int64_t group = kGroup;
    while (group > (gated(args) ? 2 : 1) &&
           (group * num_bytes > kGroupBytes || num_panels(args) < kTasksPerThread * num_threads * group)) {
        group /= 2;
    }
    return group;
}

// Rows of x as the kernel takes them.
struct Rows {
    const char* data;
    int64_t stride;  // bytes
    float* scales;   // int8: x = scale * row
    int32_t* sums;   // int8
};

void prepare_row(const Args& args, const penstock_step& step, int64_t row, const Rows& rows) {
    const int64_t source = args.rows == PENSTOCK_ROWS_LOGITS ? step.logit_rows[row] : row;
    const void* x = static_cast<const char*>(args.x) + source * args.x_stride * size_of(args.x_dtype);
    char* out = const_cast<char*>(rows.data) + row * rows.stride;
    const auto* floats = static_cast<const float*>(x);
    const auto* halves = static_cast<const uint16_t*>(x);
    const bool is_float = args.x_dtype == PENSTOCK_F32;
    const int64_t n = args.weight.num_columns, padded = args.weight.padded_columns;
    const int32_t dtype = row_dtype(args);
    if (dtype == PENSTOCK_INT8) {
        const LinearKernels& linear = kernels().linear;
        auto* q = reinterpret_cast<int8_t*>(out);
        rows.scales[row] = is_float ? linear.quantize_f32(floats, n, padded, q, &rows.sums[row])
                                    : linear.quantize_bf16(halves, n, padded, q, &rows.sums[row]);
        return;
    }
    if (dtype == args.x_dtype) {
        memcpy(out, x, n * size_of(dtype));
    } else if (is_float) {
        kernels().rows->f32_to_bf16(floats, reinterpret_cast<uint16_t*>(out), n);
    } else {
        kernels().rows->bf16_to_f32(halves, reinterpret_cast<float*>(out), n);
    }
    memset(out + n * size_of(dtype), 0, (padded - n) * size_of(dtype));
}

// The kernel may read the caller's x where it is.
bool usable(const Args& args, int64_t num_rows) {
    const int64_t stride = args.x_stride * size_of(args.x_dtype);
    const bool spread = stride % kAlignment || stride / kAlignment % 2;
    return args.x_dtype == row_dtype(args) && args.rows == PENSTOCK_ROWS_TOKENS &&
           args.weight.num_columns == args.weight.padded_columns && (num_rows <= kOwnRows || spread);
}

int64_t prepared_bytes(const Args& args, int64_t num_rows) {
    return num_rows * row_bytes(args) + 2 * round_up(num_rows * 4, kAlignment);
}

Rows rows_at(const Args& args, int64_t num_rows, char* memory) {
    char* scales = memory + num_rows * row_bytes(args);
    char* sums = scales + round_up(num_rows * 4, kAlignment);
    return {memory, row_bytes(args), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums)};
}

Rows prepare(const Args& args, const penstock_step& step, int64_t num_rows, Team& team) {
    if (usable(args, num_rows)) {
        return {static_cast<const char*>(args.x), args.x_stride * size_of(args.x_dtype), nullptr, nullptr};
    }
    const bool alone = num_rows <= kOwnRows;
    const Rows rows = rows_at(args, num_rows, alone ? team.scratch() : team.shared_scratch());
    const int64_t step_size = alone ? 1 : team.num_threads();
    for (int64_t row = alone ? 0 : team.thread(); row < num_rows; row += step_size) prepare_row(args, step, row, rows);
    if (!alone) team.barrier();
    return rows;
}

// Panels [first, first + count) in the format that the kernel reads, one after another.
void convert(const Args& args, const char* panels, int64_t count, int64_t panel_bytes, char* out) {
    const LinearKernels& linear = kernels().linear;
    const penstock_weight& w = args.weight;
    for (int64_t j = 0; j < count; ++j, panels += w.panel_bytes, out += panel_bytes) {
        if (w.format == PENSTOCK_INT8) {
            linear.i8_to_bf16(panels, w.padded_columns, reinterpret_cast<uint16_t*>(out));
        } else if (row_dtype(args) == PENSTOCK_BF16) {
            linear.i4_to_bf16(panels, w.padded_columns, reinterpret_cast<uint16_t*>(out));
        } else {
            linear.i4_to_i8(panels, w.padded_columns, reinterpret_cast<uint8_t*>(out));
        }
    }
}

void multiply(const Args& args, const Gemm& gemm, const int32_t* sums, bool converted) {
    const LinearKernels& linear = kernels().linear;
    switch (row_dtype(args)) {
        case PENSTOCK_F32: linear.gemm_f32(gemm); return;
        case PENSTOCK_BF16: linear.gemm_bf16(gemm); return;
        default: break;
    }
    if (args.weight.format == PENSTOCK_INT4 && !converted) {
        linear.gemm_i4(gemm, sums);
    } else {
        linear.gemm_i8(gemm, sums);
    }
}

// Rows [first_row, + count) of the group that begins with `first_panel`: from c to y.
void send_out(const Args& args, const Gemm& gemm, const Rows& rows, int64_t first_row, int64_t first_panel) {
    const int64_t first_output = first_panel * kPanel / (gated(args) ? 2 : 1);
    const int64_t width = gemm.num_panels * kPanel / (gated(args) ? 2 : 1);
    const bool integers = row_dtype(args) == PENSTOCK_INT8;
    Finish out{};
    out.integers = integers;
    out.gated = gated(args);
    out.to_bf16 = args.y_dtype == PENSTOCK_BF16;
    out.num_outputs = std::min(width, args.num_outputs - first_output);
    out.scales = quantized(args) ? args.weight.scales + first_panel * kPanel : nullptr;
    out.bias = args.bias ? args.bias + first_panel * kPanel : nullptr;
    for (int64_t i = 0; i < gemm.m; ++i) {
        const int64_t row = first_row + i;
        out.c = static_cast<const char*>(gemm.c) + i * gemm.ldc * 4;
        out.row_scale = integers ? rows.scales[row] : 1.0f;
        out.y = static_cast<char*>(args.y) + (row * args.y_stride + first_output) * size_of(args.y_dtype);
        kernels().linear.finish(out);
    }
}

void run(const void* pointer, const penstock_step& step, Team& team) {
    const Args& args = *static_cast<const Args*>(pointer);
    const int64_t num_rows = args.rows == PENSTOCK_ROWS_LOGITS ? step.num_logit_rows : step.num_tokens;
    if (num_rows == 0) return;
    const Rows rows = prepare(args, step, num_rows, team);
    const int64_t panels = num_panels(args), group = group_size(args, num_rows, team.num_threads());
    const int64_t converted = converted_bytes(args, num_rows);
    const int64_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
    const int64_t block = std::min(num_rows, round_up((num_rows + num_blocks - 1) / num_blocks, 16));
    char* b_memory = team.scratch() + round_up(prepared_bytes(args, kOwnRows), kAlignment);
    char* c_memory = b_memory + group * converted;
    const int64_t num_tasks = (panels + group - 1) / group;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t first = task * group, count = std::min(group, panels - first);
        const char* b = static_cast<const char*>(args.weight.data) + first * args.weight.panel_bytes;
        if (converted) {
            convert(args, b, count, converted, b_memory);
            b = b_memory;
        }
        for (int64_t row = 0; row < num_rows; row += block) {
            const Gemm gemm{std::min(block, num_rows - row), count, args.weight.padded_columns,
                            rows.data + row * rows.stride, rows.stride / size_of(row_dtype(args)),
                            b, converted ? converted : args.weight.panel_bytes,
                            c_memory, count * kPanel, false};
            multiply(args, gemm, rows.sums ? rows.sums + row : nullptr, converted);
            send_out(args, gemm, rows, row, first);
        }
    }
}

Scratch scratch(const void* pointer, int64_t max_tokens, int64_t max_logit_rows, int num_threads) {
    const Args& args = *static_cast<const Args*>(pointer);
    const int64_t num_rows = args.rows == PENSTOCK_ROWS_LOGITS ? max_logit_rows : max_tokens;
    const int64_t converted = converted_bytes(args, num_rows) * group_size(args, num_rows, num_threads);
    const int64_t products = std::min(num_rows, kBlockRows) * kGroup * kPanel * 4;
    return {round_up(prepared_bytes(args, kOwnRows), kAlignment) + converted + products,
            num_rows > kOwnRows ? prepared_bytes(args, num_rows) : 0};
}

const char* check(const void* pointer) {
    const Args& args = *static_cast<const Args*>(pointer);
    if (const char* problem = check_weight(args.weight)) return problem;
    const penstock_weight& w = args.weight;
    if (!args.x || !args.y) return "linear: no x or no y";
    if (args.x_dtype != PENSTOCK_F32 && args.x_dtype != PENSTOCK_BF16) return "linear: x must be F32 or BF16";
    if (args.y_dtype != PENSTOCK_F32 && args.y_dtype != PENSTOCK_BF16) return "linear: y must be F32 or BF16";
    if (args.rows != PENSTOCK_ROWS_TOKENS && args.rows != PENSTOCK_ROWS_LOGITS) return "linear: unknown choice of rows";
    if (args.epilogue != PENSTOCK_STORE && args.epilogue != PENSTOCK_SILU_MUL) return "linear: unknown epilogue";
    if (quantized(args) && args.activation_bits != 8 && args.activation_bits != 16) {
        return "linear: activations have 8 or 16 bits";
    }
    const int64_t padded_rows = round_up(w.num_rows, kPanel);
    if (gated(args) && padded_rows % (2 * kPanel)) return "linear: gates need as many panels as values";
    if (args.num_outputs < 1 || args.num_outputs > (gated(args) ? padded_rows / 2 : w.num_rows)) {
        return "linear: more outputs than rows of the weight";
    }
    if (args.x_stride < w.num_columns || args.y_stride < args.num_outputs) return "linear: rows overlap";
    if (row_dtype(args) == PENSTOCK_INT8 && w.padded_columns > 1 << 16) return "linear: sums of int8 would overflow";
    return nullptr;
}

}  // namespace

const Op linear_op{run, scratch, check};

}  // namespace penstock
