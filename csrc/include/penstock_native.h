/* The C ABI of penstock's CPU kernels. No torch, no Python headers, no C++ across the border.
 *
 * A program is a list of ops, recorded once per model; penstock_run replays it for every step. An
 * op's arguments are constant over the life of a program; whatever changes from step to step (how
 * many tokens, which slots) is read from penstock_step. Ops allocate nothing: their scratch memory
 * belongs to the pool.
 *
 * Activations are row-major [T, width] with a stride in elements. Weights are packed in panels of
 * 16 outputs (see penstock_weight). Every function that returns int32_t returns 0, or -1 after
 * having set penstock_last_error of the calling thread.
 */
#ifndef PENSTOCK_NATIVE_H
#define PENSTOCK_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PENSTOCK_API __attribute__((visibility("default")))

#define PENSTOCK_ABI_VERSION 2

enum penstock_dtype {
    PENSTOCK_F32 = 0,
    PENSTOCK_BF16 = 1,
    PENSTOCK_F16 = 2,
    PENSTOCK_INT8 = 3,
    PENSTOCK_INT4 = 4,
    PENSTOCK_CODES4 = 5, /* weights as a checkpoint has them: 4-bit codes, scales by group */
    PENSTOCK_CODES8 = 6  /* the same with 8-bit codes */
};

enum penstock_isa {
    PENSTOCK_SCALAR = 0,
    PENSTOCK_AVX2 = 1,
    PENSTOCK_AVX512 = 2,
    PENSTOCK_AMX = 3,
    PENSTOCK_AMX_EMULATED = 4
};

enum penstock_op_kind {
    PENSTOCK_OP_EMBED = 0,
    PENSTOCK_OP_NORM = 1,
    PENSTOCK_OP_LINEAR = 2,
    PENSTOCK_OP_ANGLES = 3,
    PENSTOCK_OP_ROPE = 4,
    PENSTOCK_OP_ATTENTION = 5,
    PENSTOCK_OP_SLICE_NORM = 6,
    PENSTOCK_OP_ADD = 7,
    PENSTOCK_OP_COPY = 8,
    PENSTOCK_OP_EXPERTS = 9,
    PENSTOCK_NUM_OPS = 10
};

/* Which tokens of the step an op computes: all, or those whose logits are wanted. */
enum penstock_rows { PENSTOCK_ROWS_TOKENS = 0, PENSTOCK_ROWS_LOGITS = 1 };

/* What a linear map does with its sums. GATED: panels of the weight alternate gate and up; the result
 * has half the columns: activation(gate) * up. STORE: activation(y). */
enum penstock_epilogue { PENSTOCK_STORE = 0, PENSTOCK_GATED = 1 };

/* SWIGLU_OAI is for gated maps only (GPT-OSS): gate and up are clipped to at most 7 (up also to at
 * least -7), and the result is gate * sigmoid(1.702 gate) * (up + 1). */
enum penstock_activation {
    PENSTOCK_IDENTITY = 0,
    PENSTOCK_SILU = 1,
    PENSTOCK_GELU = 2,      /* with erf */
    PENSTOCK_GELU_TANH = 3, /* its approximation with tanh */
    PENSTOCK_RELU = 4,
    PENSTOCK_RELU_SQUARED = 5,
    PENSTOCK_SWIGLU_OAI = 6
};

enum penstock_norm_kind { PENSTOCK_RMS_NORM = 0, PENSTOCK_LAYER_NORM = 1 };

/* What the codes of CODES8 are; those of CODES4 mean what the book says. */
enum penstock_code { PENSTOCK_CODE_UINT8 = 0, PENSTOCK_CODE_INT8 = 1, PENSTOCK_CODE_E4M3 = 2, PENSTOCK_CODE_E5M2 = 3 };

/* From the router's logits to the chosen experts and their factors. */
enum penstock_scoring {
    PENSTOCK_SOFTMAX = 0,        /* over all experts, then the largest are chosen */
    PENSTOCK_SIGMOID = 1,        /* of each, then the largest are chosen (DeepSeek-V3) */
    PENSTOCK_SOFTMAX_CHOSEN = 2  /* the largest logits are chosen, softmax over those (GPT-OSS) */
};

/* What one step computes: T tokens in R requests, L of which want logits. */
typedef struct penstock_step {
    int64_t num_tokens;
    int64_t num_requests;
    int64_t num_logit_rows;
    int64_t block_size;
    int64_t block_table_stride;  /* elements from one request to the next */
    const int64_t* input_ids;    /* [T] */
    const int64_t* positions;    /* [T] */
    const int64_t* slot_mapping; /* [T] where each token's key and value go */
    const int32_t* query_start;  /* [R + 1] */
    const int32_t* context_len;  /* [R] tokens of the request, those of this step included */
    const int32_t* block_table;  /* [R, stride] */
    const int64_t* logit_rows;   /* [L] indices into T */
} penstock_step;

/* A packed matrix [num_rows, num_columns]: panels of 16 rows, num_columns padded with zeros to
 * `padded_columns` (a multiple of 64), panel after panel, each 64-byte aligned. A panel holds
 *   F32   [k][16]
 *   BF16  [k / 2][16][2]
 *   INT8  [k / 4][16][4], unsigned: value + 128
 *   INT4  [k / 64][512 bytes] of nibbles, then the scales of its groups, 16 bytes for each 64
 *         columns (groups of 32: low nibble the first group, high nibble the second; groups of
 *         128 repeat theirs). Layout of the 512 bytes: pack.cpp.
 * INT8: weight = scale[row] * value, value in [-127, 127].
 * INT4: weight = scale[row] * group_scale * value, group_scale in [0, 15], value in [-8, 7]:
 *       the product of both fits into int8, so that every 4-bit weight is exactly an INT8 one
 *       ("progressive" group scales, Lin et al. 2024, QServe).
 *   CODES4, CODES8  codes of a checkpoint with their scales; layout: codes.h.
 * CODES4, CODES8: weight = number(code) * scale + minimum in float, rounded after the product and
 *       after the sum; scale and minimum are those of the row and the group of columns. With
 *       scale_format F16 they are kept as such (exact for what was F16); with INT8 a scale is
 *       unit * integer, integer in [-128, 127] ([0, 255] of minima), and the unit is one float for
 *       256 columns of a row, and another one for minima: the K-quants of ggml, exactly. Scales of
 *       E4M3 are below 2^120, or not finite. */
typedef struct penstock_weight {
    int32_t format;         /* penstock_dtype: F32, BF16, INT8, INT4, CODES4, CODES8 */
    int32_t group_size;     /* INT4: 32 or 128; CODES: columns that share a scale: 16, a multiple of 32, 0 = all */
    int64_t num_rows;
    int64_t num_columns;
    int64_t padded_columns; /* set by penstock_weight_layout */
    int64_t panel_bytes;    /* set by penstock_weight_layout */
    int64_t data_bytes;     /* set by penstock_weight_layout */
    void* data;             /* 64-byte aligned */
    float* scales;          /* [num_rows rounded up to 16], INT8 and INT4 */
    int32_t code;           /* CODES8: penstock_code */
    int32_t scale_format;   /* CODES: penstock_dtype: F32, F16, INT8 */
    int32_t has_minima;     /* CODES */
    int32_t padding;
    float book[16];         /* CODES4: the number of each code */
} penstock_weight;

/* Quantizes and packs `num_source_rows` rows. Source row r becomes row
 * first_row + (r / 16) * 16 * panel_step + r % 16 of the weight; with panel_step 2, two matrices
 * interleave by panels (gate and up), and first_row is a multiple of 16. A row with a NaN or an
 * infinity cannot be quantized: the call fails and names it, and the weight is not to be used. To F32
 * and BF16 such numbers go as they are. */
typedef struct penstock_pack_args {
    penstock_weight weight;
    const void* source;  /* [num_source_rows, num_columns] contiguous, any alignment */
    int32_t source_dtype; /* F32, BF16, F16 */
    int32_t panel_step;
    int64_t first_row;
    int64_t num_source_rows;
} penstock_pack_args;

/* Packs rows that are codes already, without rounding anything. G: groups of a row. Into INT8: codes
 * in two's complement, one scale a row. A code or a scale that the format does not hold exactly is
 * refused, and the weight is not to be used. Otherwise placed as by penstock_pack. */
typedef struct penstock_pack_codes_args {
    penstock_weight weight;      /* CODES4, CODES8 or INT8 */
    const uint8_t* codes;        /* [num_source_rows, num_columns], one to a byte */
    const float* scales;         /* [num_source_rows, G]; scale_format INT8: the integers */
    const float* minima;         /* [num_source_rows, G] or null, likewise */
    const float* units;          /* scale_format INT8: [num_source_rows, num_columns / 256 rounded up] */
    const float* minimum_units;  /* likewise, or null */
    int64_t first_row;
    int64_t num_source_rows;
    int32_t panel_step;
    int32_t padding;
} penstock_pack_codes_args;

/* out = scale * table[id] + positions[position] (if there are positions). */
typedef struct penstock_embed_args {
    penstock_weight table; /* rows are token ids */
    float* out;            /* [T, num_columns] */
    int64_t out_stride;
    const float* positions; /* [num_positions, num_columns] or null; a later position takes the last */
    int64_t num_positions;
    float scale;
    int32_t padding;
} penstock_embed_args;

/* residual += x_scale * x (if x); out = norm(residual) * weight + bias. Without residual: out =
 * norm(x) * weight + bias. One row per token. The norm divides by the root mean square, or LAYER
 * takes the mean off first and divides by the standard deviation. */
typedef struct penstock_norm_args {
    float* residual; /* or null */
    int64_t residual_stride;
    const void* x; /* or null */
    int64_t x_stride;
    const float* weight; /* [size] or null: ones */
    const float* bias;   /* [size] or null */
    void* out;
    int64_t out_stride;
    int64_t size;
    float eps;
    float x_scale;
    int32_t kind;      /* penstock_norm_kind */
    int32_t dtype;     /* of x: F32 or BF16 */
    int32_t out_dtype; /* F32 or BF16 */
    int32_t padding;
} penstock_norm_args;

/* Norms, in place, of runs of each row's numbers: of x[t, first + i * size : first + (i + 1) * size]
 * for i < num_runs. Heads of queries or keys, or a latent vector. */
typedef struct penstock_slice_norm_args {
    void* x;
    int64_t stride;
    int64_t first;
    int64_t num_runs;
    int64_t size;
    const float* weight;   /* [size], or [num_runs, size] if weight_stride is `size`, or null: ones */
    int64_t weight_stride; /* 0: all runs share it */
    float eps;
    int32_t kind;  /* penstock_norm_kind */
    int32_t dtype; /* F32 or BF16 */
    int32_t padding;
} penstock_slice_norm_args;

/* residual += scale * x. */
typedef struct penstock_add_args {
    float* residual;
    int64_t residual_stride;
    const void* x;
    int64_t x_stride;
    int64_t size;
    float scale;
    int32_t dtype; /* of x: F32 or BF16 */
} penstock_add_args;

/* to[t, g * to_group_stride + i] = from[t, g * from_group_stride + i] for i < size. With a
 * from_group_stride of 0 every group is the first one; what is written and what is read are apart. */
typedef struct penstock_copy_args {
    const void* from;
    int64_t from_stride;
    int64_t from_group_stride;
    void* to;
    int64_t to_stride;
    int64_t to_group_stride;
    int64_t num_groups;
    int64_t size;
    int32_t dtype; /* of both: F32 or BF16 */
    int32_t padding;
} penstock_copy_args;

/* y = x W^T + bias, then the epilogue. With ROWS_LOGITS row i of y belongs to token logit_rows[i].
 * Several groups: a block-diagonal map. The weight's rows are num_groups runs of
 * num_outputs rows, each begun on a panel of its own; run g multiplies x[t, g * x_group_stride :] and
 * gives y[t, g * y_group_stride :]. */
typedef struct penstock_linear_args {
    penstock_weight weight;
    const float* bias; /* [num_rows of the weight, padding included] or null */
    const void* x;
    int64_t x_stride;
    void* y;
    int64_t y_stride;
    int64_t num_groups;     /* 1, or more with epilogue STORE only */
    int64_t x_group_stride;
    int64_t y_group_stride;
    int32_t x_dtype;         /* F32 or BF16 */
    int32_t y_dtype;         /* F32 or BF16 */
    int32_t rows;            /* penstock_rows */
    int32_t epilogue;        /* penstock_epilogue */
    int32_t activation;      /* penstock_activation */
    int32_t activation_bits; /* INT8, INT4: 8 = quantize each token's x to int8; 16 = bf16 x. CODES: 16 = the format
                                of x itself (with F32 x the product is in float) */
    int32_t num_outputs;     /* columns of y, of one group */
    float y_scale;           /* y *= y_scale (1 = no change), after the activation */
    float softcap;           /* y = softcap * tanh(y / softcap), last of all; 0 = no change */
    int32_t padding;
} penstock_linear_args;

/* Cosines and sines of the step's positions, times `scale`: out [T, 2, half]. */
typedef struct penstock_angles_args {
    const float* frequencies; /* [half] */
    float* out;
    int64_t half;
    float scale;
    int32_t padding;
} penstock_angles_args;

/* Rotates heads in place: of x[t, first + h * head_stride :], h < num_heads, dimension i with i + half;
 * what lies behind the first 2 * half numbers stays. */
typedef struct penstock_rope_args {
    const float* angles; /* [T, 2, half] */
    void* x;
    int64_t stride;
    int64_t half;
    int64_t first;
    int64_t head_stride;
    int32_t num_heads;
    int32_t dtype; /* F32 or BF16 */
} penstock_rope_args;

/* Writes the step's keys and values to their slots, then attends.
 *
 * Grouped-query attention: `latent` is null, qkv holds all three, value_dim is head_dim.
 * Multi-head latent attention (DeepSeek-V2, 2024), absorbed: qkv holds the queries alone, `latent` the
 * step's keys, num_kv_heads is 1, kv [num_slots, head_dim], and the value of a token is the first
 * value_dim numbers of its key. */
typedef struct penstock_attention_args {
    const void* qkv; /* [T, num_heads + 2 * num_kv_heads, head_dim], q and k rotated */
    int64_t qkv_stride;
    const void* latent; /* [T, head_dim] or null */
    int64_t latent_stride;
    void* out; /* [T, num_heads, value_dim] */
    int64_t out_stride;
    void* kv;         /* of this layer: [2 * num_kv_heads, num_slots, head_dim], keys first */
    float* kv_scales; /* INT8: [2 * num_kv_heads, num_slots]; latent: [num_slots] */
    const float* sinks; /* [num_heads]: a score of each head that takes part in the softmax and has no value; or null */
    int64_t num_slots;
    int64_t window;   /* tokens that a query sees, itself included; 0 = all; causal only */
    int32_t dtype;    /* of qkv, latent and out: F32 or BF16 */
    int32_t kv_dtype; /* F32, BF16 or INT8 */
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;  /* even, at most 640 */
    int32_t value_dim;
    float scale;
    float softcap;     /* score = softcap * tanh(score / softcap), after the scale; 0 = no change */
    int32_t is_causal; /* 0: a query sees all tokens of its request's context (encoders) */
    int32_t padding;
} penstock_attention_args;

/* A mixture of experts (Shazeer et al. 2017): chooses top_k experts for each token from the router's
 * logits; y = sum over them of factor * down(activation(gate) * up), plus the shared part, if any.
 * The experts' matrices lie one after the other in one weight, each begun on a panel of its own (of
 * gate_up: on a pair of panels, which alternate gate and up).
 *
 * Choosing: score = scoring(logits); with a correction, score + correction chooses and score alone is
 * the factor. With groups (DeepSeek), only experts of the `top_groups` best groups can be chosen; a
 * group is as good as its best expert (group_top 1) or its two best together (2). Ties: the lower
 * index. `normalise`: factors of a token are divided by their sum (+ 1e-20); then times routed_scale. */
typedef struct penstock_experts_args {
    penstock_weight gate_up; /* num_experts * 2 * (size rounded up to 16) rows, in_size columns */
    penstock_weight down;    /* num_experts * (in_size rounded up to 16) rows, size columns */
    const float* gate_up_bias; /* [rows of gate_up] or null */
    const float* down_bias;    /* [rows of down] or null */
    const void* x;             /* [T, in_size] */
    int64_t x_stride;
    const float* logits; /* [T, num_experts] of the router */
    int64_t logits_stride;
    const float* correction; /* [num_experts] or null */
    const void* shared;      /* [T, in_size] or null: added to y */
    int64_t shared_stride;
    const void* shared_gate; /* [T] numbers of x's dtype or null: shared is first multiplied with their sigmoid */
    int64_t shared_gate_stride;
    void* y; /* [T, in_size] */
    int64_t y_stride;
    int64_t num_experts;
    int64_t in_size;
    int64_t size;  /* of an expert's middle */
    int64_t top_k; /* at most 64 */
    int64_t num_expert_groups; /* 1: none */
    int64_t top_groups;
    int32_t group_top;
    int32_t scoring; /* penstock_scoring */
    int32_t normalise;
    int32_t activation; /* penstock_activation */
    int32_t activation_bits; /* as of a linear map */
    int32_t dtype;   /* of x, shared and y: F32 or BF16 */
    float routed_scale;
    int32_t padding;
} penstock_experts_args;

/* Chooses one token for each of `num_rows` rows of logits; arrays are [num_rows]. Temperature 0 is
 * the most likely token (the lowest id of several), and so are one whose inverse is not finite and a
 * row without a finite largest logit. */
typedef struct penstock_sample_args {
    const float* logits; /* [num_rows, vocab_size] */
    int64_t stride;
    int64_t vocab_size;
    int64_t num_rows;
    const float* temperature;
    const int32_t* top_k;     /* 0 = all */
    const float* top_p;
    const float* min_p;
    const double* draws; /* in [0, 1) */
    int64_t* token_ids;
} penstock_sample_args;

typedef struct penstock_op {
    int64_t kind;
    const void* args;
} penstock_op;

typedef struct penstock_pool penstock_pool;

PENSTOCK_API int32_t penstock_abi_version(void);
PENSTOCK_API const char* penstock_last_error(void);

/* Bits 1 << penstock_isa: what this library holds and this machine runs. */
PENSTOCK_API uint64_t penstock_available_isas(void);
PENSTOCK_API int32_t penstock_isa(void);
/* Choose an instruction set for the whole process; not while a program runs. */
PENSTOCK_API int32_t penstock_set_isa(int32_t isa);

/* `num_threads` threads, the caller of penstock_run being one of them. With `cpus` (one a thread)
 * every worker is pinned, the caller is not. Threads do not follow a process into a fork: there, what
 * would need them fails, and destroying the pool does nothing. */
PENSTOCK_API penstock_pool* penstock_pool_create(int32_t num_threads, const int32_t* cpus);
PENSTOCK_API void penstock_pool_destroy(penstock_pool* pool);

/* Fills in padded_columns, panel_bytes and data_bytes from format, group_size and shape. */
PENSTOCK_API int32_t penstock_weight_layout(penstock_weight* weight);
PENSTOCK_API int32_t penstock_pack(penstock_pool* pool, const penstock_pack_args* args);
PENSTOCK_API int32_t penstock_pack_codes(penstock_pool* pool, const penstock_pack_codes_args* args);

/* Makes the pool's scratch memory large enough for the program with up to `max_tokens` tokens and
 * `max_logit_rows` logit rows a step; returns what it holds, or -1. */
PENSTOCK_API int64_t penstock_reserve(penstock_pool* pool, const penstock_op* ops, int64_t num_ops,
                                      int64_t max_tokens, int64_t max_logit_rows);
PENSTOCK_API int32_t penstock_run(penstock_pool* pool, const penstock_op* ops, int64_t num_ops,
                                  const penstock_step* step);
PENSTOCK_API int32_t penstock_sample(penstock_pool* pool, const penstock_sample_args* args);

#ifdef __cplusplus
}
#endif
#endif
