// y = x W^T, the op: prepares the rows of x, divides the panels of W among the threads and sends the
// results out through the epilogue. Several groups: W is block-diagonal, and each block is multiplied
// with its own part of the rows. Knows not how products are computed (isa/), how weights are laid out
// inside a panel (pack.cpp), nor what a weight's format asks of rows and panels (product.h).
//
// Invariant: a row of y depends on its row of x and on the weight alone, not on the batch, the
// number of threads or who computed which panel. One exception: with bf16 rows on AMX its last bits
// may depend on how many rows the step has (amx_linear.inc).
#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "../product.h"

namespace penstock {

namespace {

using Args = penstock_linear_args;

Product product_of(const Args& args) { return {args.weight, args.x_dtype, args.activation_bits}; }

int64_t rows_of(const Args& args, int64_t num_tokens, int64_t num_logit_rows) {
    return args.rows == PENSTOCK_ROWS_LOGITS ? num_logit_rows : num_tokens;
}

// Outputs share panels with their gates: so many rows of the weight an output.
int64_t rows_per_output(const Args& args) { return args.epilogue == PENSTOCK_GATED ? 2 : 1; }

int64_t panels_per_group(const Args& args) { return panels_of(args.num_outputs) * rows_per_output(args); }

int64_t task_panels(const Args& args, int64_t num_rows, int num_threads) {
    return group_size(product_of(args), panels_per_group(args) * args.num_groups, rows_per_output(args), num_rows,
                      num_threads);
}

const void* source_row(const Args& args, const penstock_step& step, int64_t row, int64_t group) {
    const int64_t token = args.rows == PENSTOCK_ROWS_LOGITS ? step.logit_rows[row] : row;
    const int64_t element = token * args.x_stride + group * args.x_group_stride;
    return static_cast<const char*>(args.x) + element * size_of(args.x_dtype);
}

// Of every group: prepared one group after the other, or each where it lies in x.
struct PreparedRows {
    Rows rows;
    int64_t group_rows, group_bytes;  // from one group to the next

    Rows group(int64_t g) const {
        Rows own = rows.from(g * group_rows);
        own.data += g * group_bytes;
        return own;
    }
};

PreparedRows prepare(const Args& args, const penstock_step& step, int64_t num_rows, Team& team) {
    const Product product = product_of(args);
    if (args.rows == PENSTOCK_ROWS_TOKENS && is_readable(product, args.x_stride, num_rows)) {
        const int64_t size = size_of(args.x_dtype);
        const Rows rows{static_cast<const char*>(args.x), args.x_stride * size, nullptr, nullptr};
        return {rows, 0, args.x_group_stride * size};
    }
    const int64_t count = num_rows * args.num_groups;
    const bool alone = count <= kOwnRows;
    const Rows rows = rows_at(product, count, alone ? team.scratch() : team.shared_scratch());
    const int64_t step_size = alone ? 1 : team.num_threads();
    for (int64_t row = alone ? 0 : team.thread(); row < count; row += step_size) {
        prepare_row(product, source_row(args, step, row % num_rows, row / num_rows), rows, row);
    }
    if (!alone) team.barrier();
    return {rows, num_rows, 0};
}

// Rows [first_row, + count) of the products with some panels of a group: from c to y.
void send_out(const Args& args, const Rows& rows, int64_t first_row, int64_t count, int64_t group,
              const Panels& panels, const void* c) {
    const int64_t per_output = rows_per_output(args);
    const int64_t first_output = (panels.first - group * panels_per_group(args)) * kPanel / per_output;
    const int64_t width = panels.count * kPanel / per_output;
    for (int64_t i = 0; i < count; ++i) {
        Finish out = finish_of(product_of(args), rows, i, panels, c, args.bias);
        out.gated = args.epilogue == PENSTOCK_GATED;
        out.activation = args.activation;
        out.y_scale = args.y_scale;
        out.softcap = args.softcap;
        out.to_bf16 = args.y_dtype == PENSTOCK_BF16;
        out.num_outputs = std::min(width, args.num_outputs - first_output);
        const int64_t element = (first_row + i) * args.y_stride + group * args.y_group_stride + first_output;
        out.y = static_cast<char*>(args.y) + element * size_of(args.y_dtype);
        kernels().linear.finish(out);
    }
}

void run(const void* pointer, const penstock_step& step, Team& team) {
    const Args& args = *static_cast<const Args*>(pointer);
    const Product product = product_of(args);
    const int64_t num_rows = rows_of(args, step.num_tokens, step.num_logit_rows);
    if (num_rows == 0) return;
    const PreparedRows prepared = prepare(args, step, num_rows, team);
    const int64_t num_panels = panels_per_group(args), most = task_panels(args, num_rows, team.num_threads());
    const int64_t block = block_rows(num_rows);
    char* b_memory = team.scratch() + round_up(prepared_bytes(product, kOwnRows), kAlignment);
    char* c = b_memory + most * converted_bytes(product, num_rows);
    const int64_t tasks_per_group = (num_panels + most - 1) / most, num_tasks = tasks_per_group * args.num_groups;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t group = task / tasks_per_group, first = task % tasks_per_group * most;
        const int64_t count = std::min(most, num_panels - first);
        const Panels panels = load_panels(product, group * num_panels + first, count, num_rows, b_memory);
        const Rows rows = prepared.group(group);
        for (int64_t row = 0; row < num_rows; row += block) {
            const int64_t some = std::min(block, num_rows - row);
            multiply(product, rows.from(row), some, panels, c);
            send_out(args, rows.from(row), row, some, group, panels, c);
        }
    }
}

Scratch scratch(const void* pointer, int64_t max_tokens, int64_t max_logit_rows, int num_threads) {
    const Args& args = *static_cast<const Args*>(pointer);
    const Product product = product_of(args);
    const int64_t num_rows = rows_of(args, max_tokens, max_logit_rows), count = num_rows * args.num_groups;
    const int64_t converted = converted_bytes(product, num_rows) * task_panels(args, num_rows, num_threads);
    const int64_t products = std::min(num_rows, kBlockRows) * kGroup * kPanel * 4;
    return {round_up(prepared_bytes(product, kOwnRows), kAlignment) + converted + products,
            count > kOwnRows ? prepared_bytes(product, count) : 0};
}

const char* check_groups(const Args& args) {
    const penstock_weight& w = args.weight;
    const int64_t g = args.num_groups, last = g - 1;
    if (g < 1) return "linear: at least one group";
    if (g > 1 && args.epilogue != PENSTOCK_STORE) return "linear: several groups cannot be gated";
    if (args.num_outputs < 1) return "linear: no outputs";
    if (args.epilogue == PENSTOCK_GATED) {
        if (panels_of(w.num_rows) % 2) return "linear: gates need as many panels as values";
        if (args.num_outputs > panels_of(w.num_rows) / 2 * kPanel) return "linear: more outputs than gates";
    } else if (g > w.num_rows || last * panels_per_group(args) * kPanel + args.num_outputs > w.num_rows) {
        return "linear: more outputs than rows of the weight";
    }
    if (g > 1 && (args.x_group_stride < 0 || args.y_group_stride < args.num_outputs)) return "linear: groups overlap";
    const int64_t x_end = g > 1 ? last * args.x_group_stride : 0, y_end = g > 1 ? last * args.y_group_stride : 0;
    if (args.x_stride < x_end + w.num_columns || args.y_stride < y_end + args.num_outputs) {
        return "linear: rows overlap";
    }
    return nullptr;
}

const char* check(const void* pointer) {
    const Args& args = *static_cast<const Args*>(pointer);
    if (const char* problem = check_product(product_of(args))) return problem;
    if (!args.x || !args.y) return "linear: no x or no y";
    if (args.y_dtype != PENSTOCK_F32 && args.y_dtype != PENSTOCK_BF16) return "linear: y must be F32 or BF16";
    if (args.rows != PENSTOCK_ROWS_TOKENS && args.rows != PENSTOCK_ROWS_LOGITS) return "linear: unknown choice of rows";
    if (args.epilogue != PENSTOCK_STORE && args.epilogue != PENSTOCK_GATED) return "linear: unknown epilogue";
    const int32_t last_activation = args.epilogue == PENSTOCK_GATED ? PENSTOCK_SWIGLU_OAI : PENSTOCK_RELU_SQUARED;
    if (args.activation < PENSTOCK_IDENTITY || args.activation > last_activation) {
        return "linear: no such activation for this epilogue";
    }
    if (!std::isfinite(args.y_scale) || args.y_scale == 0) return "linear: y_scale must be finite and not zero";
    if (!std::isfinite(args.softcap) || args.softcap < 0) return "linear: softcap must be finite and not negative";
    return check_groups(args);
}

}  // namespace

const Op linear_op{run, scratch, check};

}  // namespace penstock
