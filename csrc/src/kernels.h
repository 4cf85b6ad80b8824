// What an instruction set provides: a table of functions, chosen once at run time.
//
// Sources under isa/ are compiled with their own flags and define one table each. They share no
// inline function with other sources unless it is `static`: the linker could otherwise keep the
// copy that an older processor cannot run.
//
// All matrix kernels work on panels of 16 outputs, and every output is one chain of sums in the
// order of k, whatever m and the number of panels: a row's result does not depend on its batch.
// One exception: AMX sums bf16 in tiles from some m on, so that in bf16 on AMX (and its emulation)
// the last bits may depend on the number of rows, in linear ops and in attention.
#pragma once

#include <cstdint>

struct penstock_weight;

namespace penstock {

constexpr int kPanel = 16;

// c[m, 16 * num_panels] = a[m, k] x panels (+ c, if accumulate); panel j starts at b + j * b_stride
// bytes. lda and ldc in elements. k is a multiple of 64 in linear ops; attention calls f32 and bf16
// with k a multiple of 2.
struct Gemm {
    int64_t m, num_panels, k;
    const void* a;
    int64_t lda;
    const void* b;
    int64_t b_stride;
    void* c;  // float or int32_t
    int64_t ldc;
    bool accumulate;
};

// One row of products on its way out. v[n] = c[n] * scales[n] * row_scale + bias[n]; y = activation(v),
// or gated, with panels of c that alternate gate and up: activation(gate) * up. Then y *= y_scale, and
// y = softcap * tanh(y / softcap) unless softcap is 0.
//
// An activation, and tanh, is off by at most 2e-6 of its result or, where that is nearly zero, by 1e-12
// (GELU_TANH and SWIGLU_OAI: 2e-9). At infinity they have their limits, and NaN stays NaN. All
// instruction sets compute the same bits.
struct Finish {
    const void* c;  // float, or int32_t if `integers`
    bool integers, gated, to_bf16;
    int32_t activation;   // penstock_activation
    float y_scale, softcap;
    int64_t num_outputs;  // of y
    float row_scale;
    const float* scales;  // or null: neither scales nor row_scale
    const float* bias;    // or null
    void* y;              // float or bf16
};

struct LinearKernels {
    void (*gemm_f32)(const Gemm&);   // a float, panels [k][16] float, c float
    void (*gemm_bf16)(const Gemm&);  // a bf16, panels [k / 2][16][2] bf16, c float
    // a int8, panels [k / 4][16][4] unsigned (value + 128), c int32 = sum of a * (panel - 128):
    // the caller gives the sums of a's rows, [m].
    void (*gemm_i8)(const Gemm&, const int32_t* row_sums);
    // The same straight from 4-bit panels, for few rows. c int32 = sum of a * group scale * value.
    void (*gemm_i4)(const Gemm&, const int32_t* row_sums);
    // One panel of k columns to another format, exactly.
    void (*i4_to_i8)(const void* panel, int64_t k, uint8_t* out);
    void (*i4_to_bf16)(const void* panel, int64_t k, uint16_t* out);
    void (*i8_to_bf16)(const void* panel, int64_t k, uint16_t* out);
    // One row of x to int8: x ~ scale * q; k padded with zeros to padded_k. Returns the scale.
    float (*quantize_f32)(const float* x, int64_t k, int64_t padded_k, int8_t* q, int32_t* sum);
    float (*quantize_bf16)(const uint16_t* x, int64_t k, int64_t padded_k, int8_t* q, int32_t* sum);
    void (*finish)(const Finish&);
    // Up to so many rows gemm_i4 is faster than i4_to_i8 and gemm_i8.
    int64_t max_rows_i4;
};

// Weights as codes (CODES4, CODES8): b of a Gemm is panels of them, k the padded columns.
//
// A weight's value is rounded as a float after its product and after its sum, and then to the format
// of x. Columns of the padding are zeros. So the sums are those of to_bf16 and gemm_bf16 (to_f32 and
// gemm_f32) to the last bit, in as few passes as the number of rows wants.
struct CodeKernels {
    // Columns [first, last) of one panel, both multiples of 16: [k][16], or [k / 2][16][2].
    void (*to_f32)(const penstock_weight& weight, const void* panel, int64_t first, int64_t last, float* out);
    void (*to_bf16)(const penstock_weight& weight, const void* panel, int64_t first, int64_t last, uint16_t* out);
    void (*gemm_f32)(const penstock_weight& weight, const Gemm&);
    void (*gemm_bf16)(const penstock_weight& weight, const Gemm&);
    // Up to so many rows these are faster than converting whole panels, and have the same bits.
    int64_t max_rows_f32, max_rows_bf16;
};

struct RowKernels;  // rows.h: norms, rotations, softmax; sampling; attention's packing

struct Kernels {
    int isa;
    LinearKernels linear;
    const RowKernels* rows;
    const CodeKernels* codes;
};

const Kernels& kernels();  // of the chosen instruction set

extern const LinearKernels scalar_linear, avx2_linear, avx512_linear, amx_linear, amx_emulated_linear;
extern const CodeKernels scalar_codes, avx2_codes, avx512_codes, amx_codes, amx_emulated_codes;
extern const RowKernels scalar_rows, avx2_rows, avx512_rows;

}  // namespace penstock
