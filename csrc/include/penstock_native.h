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

#define PENSTOCK_ABI_VERSION 1

enum penstock_dtype { PENSTOCK_F32 = 0, PENSTOCK_BF16 = 1, PENSTOCK_F16 = 2, PENSTOCK_INT8 = 3, PENSTOCK_INT4 = 4 };

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
    PENSTOCK_NUM_OPS = 6
};

/* Which tokens of the step an op computes: all, or those whose logits are wanted. */
enum penstock_rows { PENSTOCK_ROWS_TOKENS = 0, PENSTOCK_ROWS_LOGITS = 1 };

enum penstock_epilogue { PENSTOCK_STORE = 0, PENSTOCK_SILU_MUL = 1 };

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
 *       ("progressive" group scales, Lin et al. 2024, QServe). */
typedef struct penstock_weight {
    int32_t format;         /* penstock_dtype: F32, BF16, INT8, INT4 */
    int32_t group_size;     /* INT4: 32 or 128 */
    int64_t num_rows;
    int64_t num_columns;
    int64_t padded_columns; /* set by penstock_weight_layout */
    int64_t panel_bytes;    /* set by penstock_weight_layout */
    int64_t data_bytes;     /* set by penstock_weight_layout */
    void* data;             /* 64-byte aligned */
    float* scales;          /* [num_rows rounded up to 16], INT8 and INT4 */
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

typedef struct penstock_embed_args {
    penstock_weight table; /* rows are token ids */
    float* out;            /* [T, num_columns] */
    int64_t out_stride;
} penstock_embed_args;

/* residual += x (if x); out = residual / rms(residual) * weight. One row per token. */
typedef struct penstock_norm_args {
    float* residual;
    int64_t residual_stride;
    const void* x; /* or null */
    int64_t x_stride;
    const float* weight; /* [size] */
    void* out;
    int64_t out_stride;
    int64_t size;
    float eps;
    int32_t dtype; /* of x and out: F32 or BF16 */
} penstock_norm_args;

/* y = x W^T + bias. SILU_MUL: panels of the weight alternate gate and up; y has half the columns:
 * silu(gate) * up. With ROWS_LOGITS row i of y belongs to token logit_rows[i]. */
typedef struct penstock_linear_args {
    penstock_weight weight;
    const float* bias; /* [num_rows of the weight, padding included] or null */
    const void* x;
    int64_t x_stride;
    void* y;
    int64_t y_stride;
    int32_t x_dtype;         /* F32 or BF16 */
    int32_t y_dtype;         /* F32 or BF16 */
    int32_t rows;            /* penstock_rows */
    int32_t epilogue;        /* penstock_epilogue */
    int32_t activation_bits; /* INT8, INT4: 8 = quantize each token's x to int8; 16 = bf16 x */
    int32_t num_outputs;     /* columns of y */
} penstock_linear_args;

/* Cosines and sines of the step's positions: out [T, 2, half]. */
typedef struct penstock_angles_args {
    const float* frequencies; /* [half] */
    float* out;
    int64_t half;
} penstock_angles_args;

/* Rotates heads in place: x [T, num_heads, 2 * half], dimension i with i + half. */
typedef struct penstock_rope_args {
    const float* angles; /* [T, 2, half] */
    void* x;
    int64_t stride;
    int64_t half;
    int32_t num_heads;
    int32_t dtype; /* F32 or BF16 */
} penstock_rope_args;

/* Writes the step's keys and values to their slots, then attends causally. */
typedef struct penstock_attention_args {
    const void* qkv; /* [T, num_heads + 2 * num_kv_heads, head_dim], q and k rotated */
    int64_t qkv_stride;
    void* out; /* [T, num_heads, head_dim] */
    int64_t out_stride;
    void* kv;         /* of this layer: [2 * num_kv_heads, num_slots, head_dim], keys first */
    float* kv_scales; /* INT8: [2 * num_kv_heads, num_slots] */
    int64_t num_slots;
    int32_t dtype;    /* of qkv and out: F32 or BF16 */
    int32_t kv_dtype; /* F32, BF16 or INT8 */
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    float scale;
} penstock_attention_args;

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
