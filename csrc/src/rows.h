// Kernels over rows: norms, rotations, softmax, what sampling needs, and the packing of attention.
//
// Every function's result depends on its arguments alone, sums being taken in an order that their
// length fixes. Between instruction sets the order, and so the last bits, differ.
//
// exp, also in softmax: an error of at most 2.5 ulp (of the exact result for the rounded argument),
// exp(-inf) = 0 exactly, NaN stays NaN. tanh: at most 3 ulp, tanh(0) = 0 exactly, NaN stays NaN. bf16
// is rounded to nearest even everywhere, denormals kept.
#pragma once

#include <cstdint>

namespace penstock {

// Tokens of context that attention takes at once; scores and probabilities have this many columns.
constexpr int64_t kChunk = 64;
// Partial sums of a row's softmax; only their total means anything outside a kernel.
constexpr int64_t kSumLanes = 16;

// Formats of stored keys and values, as indices of the packing tables.
enum KvFormat { kKvF32 = 0, kKvBf16 = 1, kKvInt8 = 2 };
inline constexpr int kNumKvFormats = 3;

// The running state of online softmax (Milakov and Gimelshein 2018) over rows of queries:
// exp2(max) times `out` is the sum so far of exp2(score) * value, likewise for the row of `sums`.
struct SoftmaxState {
    float* max;   // [rows], -inf at the start
    float* sums;  // [rows, kSumLanes], zeros at the start
    float* out;   // [rows, out_stride], zeros at the start
    int64_t out_stride;  // a multiple of 16; columns are padded to it
};

// One chunk of context for `num_rows` rows: `rows_per_query` successive rows see the same columns,
// those of the first query columns [begin, end), those of each next query both moved on by `step`.
// Neither need lie within the chunk. A row that sees nothing of it keeps its state, bit by bit.
struct SoftmaxChunk {
    int64_t num_rows;
    int64_t rows_per_query;
    int64_t begin, end, step;
    float* scores;          // [num_rows, kChunk], overwritten
    float scale;            // of the scores, log2(e) included; with a cap, that of the argument of tanh
    float cap;              // score = cap * tanh(scale * score), log2(e) included; 0: score = scale * score
    const float* k_scales;  // [kChunk] or null
    const float* v_scales;  // [kChunk] or null
    void* probabilities;    // [num_rows, kChunk], bf16 or float: what is multiplied with the values
    SoftmaxState state;     // updated; `out` is scaled to the new maximum
};

// One row: residual += x_scale * x (if x), and the norm of that; without residual the norm of x.
// The norm, in float: (value - mean) / sqrt(variance + eps) * weight + bias if it `is_centered` (the
// mean first, then the variance of the differences), else value / sqrt(mean square + eps) * ...
struct NormRow {
    float* residual;  // or null
    const void* x;    // or null, if there is a residual
    float x_scale;
    const float* weight;  // or null: ones
    const float* bias;    // or null: zeros
    void* out;            // may be x
    int64_t size;
    float eps;
    bool is_centered;
};

// Runs of `size` numbers, one after the other, each normed in place as above.
struct NormRuns {
    void* x;  // [num_runs, size]
    int64_t num_runs, size;
    const float* weight;  // of the first run, or null: ones
    int64_t weight_stride;
    float eps;
    bool is_centered;
};

struct RowKernels {
    // Indexed by whether x is bf16 (else float), and by whether out is.
    void (*norm[2][2])(const NormRow& row);
    void (*norm_runs[2])(const NormRuns& runs);
    void (*add[2])(float* residual, const void* x, float scale, int64_t size);  // residual += scale * x
    // angles: cosines [half], then sines [half]. The first 2 * half numbers of each head, in place, in
    // fp32; heads are `head_stride` elements apart.
    void (*rope_f32)(const float* angles, float* x, int64_t num_heads, int64_t head_stride, int64_t half);
    void (*rope_bf16)(const float* angles, uint16_t* x, int64_t num_heads, int64_t head_stride, int64_t half);
    void (*exp)(const float* x, float* out, int64_t n);
    void (*tanh)(const float* x, float* out, int64_t n);
    void (*f32_to_bf16)(const float* x, uint16_t* out, int64_t n);
    void (*bf16_to_f32)(const uint16_t* x, float* out, int64_t n);
    // Index of the first NaN, else of the first of the largest; n > 0.
    int64_t (*argmax)(const float* x, int64_t n);
    // Of the elements from `bound` up: their sum, in double, and their number; and themselves, in
    // order (`out` has room for n + 16, and its end is overwritten).
    double (*sum_above)(const float* x, int64_t n, float bound, int64_t* count);
    int64_t (*select_above)(const float* x, int64_t n, float bound, float* out);

    // Keys of 16 * num_panels tokens, each a row of head_dim (even) values anywhere, into panels over
    // tokens: [head_dim][16] float or [head_dim / 2][16][2] bf16, one after the other. Indexed by
    // KvFormat. Integers are stored as such, without their scale.
    void (*pack_keys_f32[kNumKvFormats])(const void* const* rows, int64_t num_panels, int64_t head_dim, float* out);
    void (*pack_keys_bf16[kNumKvFormats])(const void* const* rows, int64_t num_panels, int64_t head_dim,
                                          uint16_t* out);
    // Values of num_tokens (even) into panels over dimensions: [num_tokens][16] float or
    // [num_tokens / 2][16][2] bf16, panels `panel_stride` elements apart, the last padded with zeros.
    void (*pack_values_f32[kNumKvFormats])(const void* const* rows, int64_t num_tokens, int64_t head_dim, float* out,
                                           int64_t panel_stride);
    void (*pack_values_bf16[kNumKvFormats])(const void* const* rows, int64_t num_tokens, int64_t head_dim,
                                            uint16_t* out, int64_t panel_stride);
    void (*softmax_f32)(const SoftmaxChunk& chunk);
    void (*softmax_bf16)(const SoftmaxChunk& chunk);
    // into = into and part together; part's context follows that of `into`.
    void (*merge)(int64_t num_rows, const SoftmaxState& into, const SoftmaxState& part);
    // out = the state's row / (its sum + exp2(sink)), [size] elements; sink -inf: none.
    void (*finish_f32)(const SoftmaxState& state, int64_t row, float sink, float* out, int64_t size);
    void (*finish_bf16)(const SoftmaxState& state, int64_t row, float sink, uint16_t* out, int64_t size);
};

}  // namespace penstock
