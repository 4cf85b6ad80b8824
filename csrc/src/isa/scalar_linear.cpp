// The oracle: every kernel as plainly as it can be written.
#include <cmath>

#include "../kernels.h"
#include "../numbers.h"
#include "linear_plain.h"

namespace penstock {

namespace {

const char* panel_of(const Gemm& g, int64_t j) { return static_cast<const char*>(g.b) + j * g.b_stride; }

void gemm_f32(const Gemm& g) {
    for (int64_t i = 0; i < g.m; ++i) {
        const float* a = static_cast<const float*>(g.a) + i * g.lda;
        for (int64_t n = 0; n < g.num_panels * kPanel; ++n) {
            const auto* b = reinterpret_cast<const float*>(panel_of(g, n / kPanel));
            float& c = static_cast<float*>(g.c)[i * g.ldc + n];
            float sum = g.accumulate ? c : 0.0f;
            for (int64_t k = 0; k < g.k; ++k) sum = std::fma(a[k], b[k * kPanel + n % kPanel], sum);
            c = sum;
        }
    }
}

void gemm_bf16(const Gemm& g) {
    for (int64_t i = 0; i < g.m; ++i) {
        const uint16_t* a = static_cast<const uint16_t*>(g.a) + i * g.lda;
        for (int64_t n = 0; n < g.num_panels * kPanel; ++n) {
            const auto* b = reinterpret_cast<const uint16_t*>(panel_of(g, n / kPanel));
            float& c = static_cast<float*>(g.c)[i * g.ldc + n];
            float sum = g.accumulate ? c : 0.0f;
            for (int64_t k = 0; k < g.k; ++k) {
                sum += bf16_to_f32(a[k]) * bf16_to_f32(b[(k / 2 * kPanel + n % kPanel) * 2 + k % 2]);
            }
            c = sum;
        }
    }
}

void gemm_i8(const Gemm& g, const int32_t*) {
    for (int64_t i = 0; i < g.m; ++i) {
        const int8_t* a = static_cast<const int8_t*>(g.a) + i * g.lda;
        for (int64_t n = 0; n < g.num_panels * kPanel; ++n) {
            const auto* b = reinterpret_cast<const uint8_t*>(panel_of(g, n / kPanel));
            int32_t& c = static_cast<int32_t*>(g.c)[i * g.ldc + n];
            int32_t sum = g.accumulate ? c : 0;
            for (int64_t k = 0; k < g.k; ++k) sum += a[k] * (b[(k / 4 * kPanel + n % kPanel) * 4 + k % 4] - 128);
            c = sum;
        }
    }
}

// Group scale times value: what an INT4 weight is as an INT8 one.
int i4_value(const uint8_t* panel, int64_t num_columns, int64_t k, int lane) {
    const int64_t block = k / 64, column = k % 64;
    const int shift = column < 32 ? 0 : 4;
    const int value = (panel[block * 512 + column % 32 / 4 * 64 + lane * 4 + k % 4] >> shift & 15) - 8;
    return (panel[num_columns / 64 * 512 + block * 16 + lane] >> shift & 15) * value;
}

void gemm_i4(const Gemm& g, const int32_t*) {
    for (int64_t i = 0; i < g.m; ++i) {
        const int8_t* a = static_cast<const int8_t*>(g.a) + i * g.lda;
        for (int64_t n = 0; n < g.num_panels * kPanel; ++n) {
            const auto* b = reinterpret_cast<const uint8_t*>(panel_of(g, n / kPanel));
            int32_t& c = static_cast<int32_t*>(g.c)[i * g.ldc + n];
            int32_t sum = g.accumulate ? c : 0;
            for (int64_t k = 0; k < g.k; ++k) sum += a[k] * i4_value(b, g.k, k, n % kPanel);
            c = sum;
        }
    }
}

void i4_to_i8(const void* panel, int64_t k, uint8_t* out) {
    for (int64_t i = 0; i < k * kPanel; ++i) {
        const int64_t column = i / 64 * 4 + i % 4;
        const int lane = static_cast<int>(i / 4 % kPanel);
        out[i] = static_cast<uint8_t>(i4_value(static_cast<const uint8_t*>(panel), k, column, lane) + 128);
    }
}

void i4_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    for (int64_t i = 0; i < k * kPanel; ++i) {
        const int64_t column = i / 32 * 2 + i % 2;
        const int lane = static_cast<int>(i / 2 % kPanel);
        out[i] = f32_to_bf16(static_cast<float>(i4_value(static_cast<const uint8_t*>(panel), k, column, lane)));
    }
}

void i8_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    const auto* bytes = static_cast<const uint8_t*>(panel);
    for (int64_t i = 0; i < k * kPanel; ++i) {
        const int64_t column = i / 32 * 2 + i % 2, lane = i / 2 % kPanel;
        out[i] = f32_to_bf16(static_cast<float>(bytes[(column / 4 * kPanel + lane) * 4 + column % 4] - 128));
    }
}

}  // namespace

const LinearKernels scalar_linear = {
    gemm_f32,   gemm_bf16,  gemm_i8,
    gemm_i4,    i4_to_i8,   i4_to_bf16,
    i8_to_bf16, quantize_row<float>, quantize_row<uint16_t>,
    finish,
    8,
};

}  // namespace penstock
