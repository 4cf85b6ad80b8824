// A mixture of experts, the op. Every thread routes its share of the tokens; then tokens are sorted by
// expert, and each expert's matrices are read once for all its tokens:
//   gate and up   tasks over (expert, some panels): the expert's tokens' rows -> the middle
//   down          tasks over panels of y: of one expert after the other the products with its part of
//                 the middle, times their factors, added to sums that the task alone writes
// Knows not how a product is computed (product.h) nor how experts are chosen (routing.h).
//
// Invariant: a row of y depends on its row of x, its logits and the weights alone: the sum over its
// experts runs in their order, whoever computes it. One exception: bf16 rows on AMX (product.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "../product.h"
#include "../routing.h"
#include "../rows.h"

namespace penstock {

namespace {

using Args = penstock_experts_args;

constexpr int64_t kTaskOutputs = kGroup * kPanel;  // of a task, at most

Product gate_up_of(const Args& args) { return {args.gate_up, args.dtype, args.activation_bits}; }
Product down_of(const Args& args) { return {args.down, args.dtype, args.activation_bits}; }
int64_t gate_up_panels(const Args& args) { return 2 * panels_of(args.size); }  // of an expert
int64_t down_panels(const Args& args) { return panels_of(args.in_size); }

// The kernels read x, or the middle, as it is written: in their format and padded with zeros.
bool reads_x(const Args& args) { return is_readable(gate_up_of(args), args.x_stride, 1); }
bool reads_middle(const Args& args) { return row_dtype(down_of(args)) == args.dtype; }

// Hands out memory in pieces; without memory it counts.
struct Pieces {
    char* memory;
    int64_t used = 0;

    template <typename T = char>
    T* take(int64_t count) {
        T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
        return piece;
    }
};

Rows take_rows(const Product& product, int64_t num_rows, Pieces& pieces) {
    char* memory = pieces.take(prepared_bytes(product, num_rows));
    return memory ? rows_at(product, num_rows, memory) : Rows{};
}

// What all threads write and read. A: chosen experts of all tokens together.
struct Shared {
    int32_t* experts;  // [T, top_k]
    float* factors;    // [T, top_k]
    Rows x;            // [T], unless the kernel reads x itself
    char* middle;      // [A, size] as the epilogue writes it, unless the kernel reads that
    Rows down_rows;    // [A] as the kernel reads it

    Shared(const Args& args, int64_t num_tokens, Pieces pieces, int64_t* num_bytes = nullptr) {
        const int64_t num_rows = num_tokens * args.top_k;
        experts = pieces.take<int32_t>(num_rows);
        factors = pieces.take<float>(num_rows);
        const Rows own_rows{static_cast<const char*>(args.x), args.x_stride * size_of(args.dtype), nullptr, nullptr};
        x = reads_x(args) ? own_rows : take_rows(gate_up_of(args), num_tokens, pieces);
        down_rows = take_rows(down_of(args), num_rows, pieces);
        middle = reads_middle(args) ? const_cast<char*>(down_rows.data)
                                    : pieces.take(num_rows * args.size * size_of(args.dtype));
        if (num_bytes) *num_bytes = pieces.used;
    }
};

// What a thread has for itself.
struct Own {
    int64_t gate_up_task, down_task;  // panels
    int32_t* first;    // [num_experts + 1]: where the rows of each expert begin, of A
    int32_t* active;   // [num_experts]: those that have rows
    int64_t num_active = 0;
    int32_t* tokens;   // [A] sorted by expert and token
    float* factors;    // [A]
    Rows gathered;     // of one expert, a block
    char* converted;   // panels
    char* products;    // [a block, panels of a task]
    float* sums;       // [T, outputs of a task]
    float* row;        // [outputs of a task]

    Own(const Args& args, int64_t num_tokens, int num_threads, Pieces pieces, int64_t* num_bytes = nullptr) {
        const Product gate_up = gate_up_of(args), down = down_of(args);
        const int64_t num_rows = num_tokens * args.top_k, some = std::min(args.num_experts, num_rows);
        const int64_t block = std::min(num_tokens, kBlockRows);
        gate_up_task = group_size(gate_up, some * gate_up_panels(args), 2, num_tokens, num_threads);
        down_task = group_size(down, down_panels(args), 1, num_tokens, num_threads);
        first = pieces.take<int32_t>(args.num_experts + 1);
        active = pieces.take<int32_t>(args.num_experts);
        tokens = pieces.take<int32_t>(num_rows);
        factors = pieces.take<float>(num_rows);
        gathered = take_rows(gate_up, block, pieces);
        const auto most_converted = [&](const Product& product) {
            return std::max(converted_bytes(product, 1), converted_bytes(product, num_tokens));
        };
        converted = pieces.take(std::max(gate_up_task * most_converted(gate_up), down_task * most_converted(down)));
        products = pieces.take(block * kTaskOutputs * 4);
        sums = pieces.take<float>(num_tokens * kTaskOutputs);
        row = pieces.take<float>(kTaskOutputs);
        if (num_bytes) *num_bytes = pieces.used;
    }
    int64_t num_rows(int64_t expert) const { return first[expert + 1] - first[expert]; }
};

void begin(const Args& args, const penstock_step& step, const Shared& shared, Team& team) {
    const Rows& rows = shared.down_rows;
    const int64_t element = size_of(row_dtype(down_of(args)));
    const int64_t used = args.size * element, padding = args.down.padded_columns * element - used;
    for (int64_t token = team.thread(); token < step.num_tokens; token += team.num_threads()) {
        route(args, args.logits + token * args.logits_stride, shared.experts + token * args.top_k,
              shared.factors + token * args.top_k);
        const char* x = static_cast<const char*>(args.x) + token * args.x_stride * size_of(args.dtype);
        if (!reads_x(args)) prepare_row(gate_up_of(args), x, shared.x, token);
        for (int64_t i = token * args.top_k; reads_middle(args) && i < (token + 1) * args.top_k; ++i) {
            memset(shared.middle + i * rows.stride + used, 0, padding);
        }
    }
}

// By counting; every thread for itself: as fast as waiting for another, and no barrier.
void sort_by_expert(const Args& args, int64_t num_tokens, const Shared& shared, Own& own) {
    const int64_t num_rows = num_tokens * args.top_k;
    std::fill_n(own.first, args.num_experts + 1, 0);
    for (int64_t i = 0; i < num_rows; ++i) ++own.first[shared.experts[i] + 1];
    for (int64_t expert = 0; expert < args.num_experts; ++expert) {
        if (own.first[expert + 1]) own.active[own.num_active++] = static_cast<int32_t>(expert);
        own.first[expert + 1] += own.first[expert];
    }
    for (int64_t i = 0; i < num_rows; ++i) {
        const int32_t at = own.first[shared.experts[i]]++;
        own.tokens[at] = static_cast<int32_t>(i / args.top_k);
        own.factors[at] = shared.factors[i];
    }
    for (int64_t expert = args.num_experts; expert > 0; --expert) own.first[expert] = own.first[expert - 1];
    own.first[0] = 0;
}

// The rows of x of tokens[count], one after the other.
Rows gather(const Args& args, const Rows& x, const int32_t* tokens, int64_t count, const Rows& to) {
    if (count == 1) return x.from(tokens[0]);
    const int64_t num_bytes = args.gate_up.padded_columns * size_of(row_dtype(gate_up_of(args)));
    for (int64_t i = 0; i < count; ++i) {
        memcpy(const_cast<char*>(to.data) + i * to.stride, x.data + tokens[i] * x.stride, num_bytes);
        if (!to.scales) continue;
        to.scales[i] = x.scales[tokens[i]];
        to.sums[i] = x.sums[tokens[i]];
    }
    return to;
}

void compute_middle(const Args& args, const Shared& shared, const Own& own, Team& team) {
    const Product product = gate_up_of(args);
    const int64_t num_panels = gate_up_panels(args), most = own.gate_up_task;
    const int64_t stride = reads_middle(args) ? shared.down_rows.stride : args.size * size_of(args.dtype);
    const int64_t per_expert = (num_panels + most - 1) / most, num_tasks = own.num_active * per_expert;
    int64_t gathered = -1;  // the first row of what `rows` holds
    Rows rows{};
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t expert = own.active[task / per_expert], first = task % per_expert * most;
        const int64_t count = std::min(most, num_panels - first), num_rows = own.num_rows(expert);
        const int64_t first_output = first * kPanel / 2, block = block_rows(num_rows);
        const Panels panels = load_panels(product, expert * num_panels + first, count, num_rows, own.converted);
        for (int64_t part = 0; part < num_rows; part += block) {
            const int64_t some = std::min(block, num_rows - part), at = own.first[expert] + part;
            if (gathered != at) rows = gather(args, shared.x, own.tokens + at, some, own.gathered);
            gathered = at;
            multiply(product, rows, some, panels, own.products);
            for (int64_t i = 0; i < some; ++i) {
                Finish out = finish_of(product, rows, i, panels, own.products, args.gate_up_bias);
                out.gated = true;
                out.activation = args.activation;
                out.y_scale = 1.0f;
                out.to_bf16 = args.dtype == PENSTOCK_BF16;
                out.num_outputs = std::min(count * kPanel / 2, args.size - first_output);
                out.y = shared.middle + (at + i) * stride + first_output * size_of(args.dtype);
                kernels().linear.finish(out);
            }
        }
    }
}

void prepare_middle(const Args& args, int64_t num_rows, const Shared& shared, Team& team) {
    const int64_t num_bytes = args.size * size_of(args.dtype);
    for (int64_t row = team.thread(); row < num_rows; row += team.num_threads()) {
        prepare_row(down_of(args), shared.middle + row * num_bytes, shared.down_rows, row);
    }
}

// sums[token] += factor * down(middle), for panels [first, + count) of one expert.
void add_expert(const Args& args, int64_t expert, int64_t first, int64_t count, const Shared& shared, const Own& own) {
    const Product product = down_of(args);
    const int64_t num_rows = own.num_rows(expert), block = block_rows(num_rows);
    const int64_t width = std::min(count * kPanel, args.in_size - first * kPanel);
    const int64_t panel = expert * down_panels(args) + first;
    const Panels panels = load_panels(product, panel, count, num_rows, own.converted);
    for (int64_t part = 0; part < num_rows; part += block) {
        const int64_t some = std::min(block, num_rows - part), at = own.first[expert] + part;
        const Rows rows = shared.down_rows.from(at);
        multiply(product, rows, some, panels, own.products);
        for (int64_t i = 0; i < some; ++i) {
            Finish out = finish_of(product, rows, i, panels, own.products, args.down_bias);
            out.activation = PENSTOCK_IDENTITY;
            out.y_scale = own.factors[at + i];
            out.num_outputs = width;
            out.y = own.row;
            kernels().linear.finish(out);
            float* sums = own.sums + own.tokens[at + i] * kTaskOutputs;
            for (int64_t n = 0; n < width; ++n) sums[n] += own.row[n];
        }
    }
}

float number_at(const void* x, int64_t element, int32_t dtype) {
    if (dtype == PENSTOCK_F32) return static_cast<const float*>(x)[element];
    float value;
    kernels().rows->bf16_to_f32(static_cast<const uint16_t*>(x) + element, &value, 1);
    return value;
}

// sums[n] += the shared part of a token, from column `first` on.
void add_shared(const Args& args, int64_t token, int64_t first, int64_t n, float* sums, float* row) {
    const int64_t element = token * args.shared_stride + first;
    if (args.dtype == PENSTOCK_F32) {
        memcpy(row, static_cast<const float*>(args.shared) + element, n * sizeof(float));
    } else {
        kernels().rows->bf16_to_f32(static_cast<const uint16_t*>(args.shared) + element, row, n);
    }
    float gate = 1.0f;
    if (args.shared_gate) {
        const float logit = number_at(args.shared_gate, token * args.shared_gate_stride, args.dtype);
        gate = 1.0f / (1.0f + std::exp(-logit));
    }
    for (int64_t i = 0; i < n; ++i) sums[i] += gate * row[i];
}

void compute_y(const Args& args, int64_t num_tokens, const Shared& shared, const Own& own, Team& team) {
    const int64_t num_panels = down_panels(args), most = own.down_task, num_tasks = (num_panels + most - 1) / most;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t first = task * most, count = std::min(most, num_panels - first), column = first * kPanel;
        const int64_t width = std::min(count * kPanel, args.in_size - column);
        std::fill_n(own.sums, num_tokens * kTaskOutputs, 0.0f);
        for (int64_t i = 0; i < own.num_active; ++i) add_expert(args, own.active[i], first, count, shared, own);
        for (int64_t token = 0; token < num_tokens; ++token) {
            float* sums = own.sums + token * kTaskOutputs;
            if (args.shared) add_shared(args, token, column, width, sums, own.row);
            const int64_t element = token * args.y_stride + column;
            if (args.dtype == PENSTOCK_F32) {
                memcpy(static_cast<float*>(args.y) + element, sums, width * sizeof(float));
            } else {
                kernels().rows->f32_to_bf16(sums, static_cast<uint16_t*>(args.y) + element, width);
            }
        }
    }
}

void run(const void* pointer, const penstock_step& step, Team& team) {
    const Args& args = *static_cast<const Args*>(pointer);
    const int64_t num_tokens = step.num_tokens;
    if (num_tokens == 0) return;
    const Shared shared(args, num_tokens, {team.shared_scratch()});
    Own own(args, num_tokens, team.num_threads(), {team.scratch()});
    begin(args, step, shared, team);
    team.barrier();
    sort_by_expert(args, num_tokens, shared, own);
    compute_middle(args, shared, own, team);
    team.barrier();
    if (!reads_middle(args)) {
        prepare_middle(args, num_tokens * args.top_k, shared, team);
        team.barrier();
    }
    compute_y(args, num_tokens, shared, own, team);
}

Scratch scratch(const void* pointer, int64_t max_tokens, int64_t, int num_threads) {
    const Args& args = *static_cast<const Args*>(pointer);
    Scratch needed;
    if (max_tokens == 0) return needed;
    Own(args, max_tokens, num_threads, {nullptr}, &needed.thread_bytes);
    Shared(args, max_tokens, {nullptr}, &needed.shared_bytes);
    return needed;
}

const char* check(const void* pointer) {
    const Args& args = *static_cast<const Args*>(pointer);
    if (const char* problem = check_routing(args)) return problem;
    if (const char* problem = check_product(gate_up_of(args))) return problem;
    if (const char* problem = check_product(down_of(args))) return problem;
    if (!args.x || !args.logits || !args.y) return "experts: no x, logits or y";
    if (args.in_size < 1 || args.size < 1) return "experts: empty rows";
    if (args.gate_up.num_columns != args.in_size || args.down.num_columns != args.size ||
        args.gate_up.num_rows != args.num_experts * gate_up_panels(args) * kPanel ||
        args.down.num_rows != args.num_experts * down_panels(args) * kPanel) {
        return "experts: the weights have other shapes";
    }
    if (args.activation < PENSTOCK_IDENTITY || args.activation > PENSTOCK_SWIGLU_OAI) {
        return "experts: unknown activation";
    }
    if (args.shared_gate && !args.shared) return "experts: a gate for a shared part that is not there";
    if (args.x_stride < args.in_size || args.y_stride < args.in_size || args.logits_stride < args.num_experts ||
        (args.shared && args.shared_stride < args.in_size)) {
        return "experts: rows overlap";
    }
    return nullptr;
}

}  // namespace

const Op experts_op{run, scratch, check};

}  // namespace penstock
