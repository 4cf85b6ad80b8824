// Kernels over rows: norms, rotations, softmax, what sampling needs, and the packing of attention.
//
// Every function's result depends on its arguments alone, sums being taken in an order that their
// length fixes. Between instruction sets the order, and so the last bits, differ.
//
// exp, also in softmax: an error of at most 2.5 ulp (of the exact result for the rounded argument),
// exp(-inf) = 0 exactly, NaN stays NaN. bf16 is rounded to nearest even everywhere, denormals kept.
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
// the first of them columns [0, first_visible), the next query one more, and so on.
struct SoftmaxChunk {
    int64_t num_rows;
    int64_t rows_per_query;
    int64_t first_visible;
    float* scores;          // [num_rows, kChunk], overwritten
    float scale;            // of the scores, log2(e) included
    const float* k_scales;  // [kChunk] or null
    const float* v_scales;  // [kChunk] or null
    void* probabilities;    // [num_rows, kChunk], bf16 or float: what is multiplied with the values
    SoftmaxState state;     // updated; `out` is scaled to the new maximum
};

struct RowKernels {
    // residual += x (unless null); out = residual / sqrt(mean(residual^2) + eps) * weight.
    void (*norm_f32)(float* residual, const float* x, const float* weight, float* out, int64_t size, float eps);
    void (*norm_bf16)(float* residual, const uint16_t* x, const float* weight, uint16_t* out, int64_t size,
                      float eps);
    // angles: cosines [half], then sines [half]. x [num_heads, 2 * half] in place, in fp32.
    void (*rope_f32)(const float* angles, float* x, int64_t num_heads, int64_t half);
    void (*rope_bf16)(const float* angles, uint16_t* x, int64_t num_heads, int64_t half);
    void (*exp)(const float* x, float* out, int64_t n);
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
    // out = the state's row / its sum, [head_dim] elements.
    void (*finish_f32)(const SoftmaxState& state, int64_t row, float* out, int64_t head_dim);
    void (*finish_bf16)(const SoftmaxState& state, int64_t row, uint16_t* out, int64_t head_dim);
};

}  // namespace penstock
