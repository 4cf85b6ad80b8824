// Work on single rows around the products, in plain code. Every instruction set's source compiles
// its own copy (all is static) and the compiler vectorizes it under that source's flags.
// Invariant: no contraction, no reassociation of floats, no library function: every instruction
// set computes the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "../numbers.h"

namespace penstock {
namespace {

// exp by 2^n times the polynomial of Cephes' expf, 2 ulp; |x| beyond 87 saturates.
inline float exp_of(float x) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu, largest = bits_of(87.0f);
    x = float_of((bits_of(x) & 0x80000000u) | (magnitude < largest ? magnitude : largest));
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of((bits_of(shifted) - bits_of(kRound) + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exp_of(-x)); }

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) { return bf16_to_f32(value); }

// f32_to_bf16 without branches.
inline uint16_t round_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

template <typename T>
float quantize_row(const T* x, int64_t k, int64_t padded_k, int8_t* q, int32_t* sum) {
    int32_t peak_bits = 0;  // floats of one sign order like integers
    for (int64_t i = 0; i < k; ++i) {
        const auto bits = static_cast<int32_t>(bits_of(to_float(x[i])) & 0x7fffffffu);
        peak_bits = bits > peak_bits ? bits : peak_bits;
    }
    const float peak = float_of(static_cast<uint32_t>(peak_bits));
    const bool tiny = peak < 1e-36f;  // 127 / peak would overflow: so small that it is nothing
    const float inverse = tiny ? 0.0f : 127.0f / peak;
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) {
        const float rounded = to_float(x[i]) * inverse + kRound;
        const auto value = static_cast<int8_t>(bits_of(rounded) - bits_of(kRound));
        q[i] = value;
        total += value;
    }
    for (int64_t i = k; i < padded_k; ++i) q[i] = 0;
    *sum = total;
    return tiny ? 0.0f : peak / 127.0f;
}

// n products, scaled and with their bias; `first` counts outputs of the weight.
template <typename T>
void scale_products(const Finish& f, int64_t first, int64_t n, float* out) {
    const T* c = static_cast<const T*>(f.c) + first;
    if (f.scales) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(c[i]) * f.scales[first + i] * f.row_scale;
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(c[i]);
    }
    if (f.bias) {
        for (int64_t i = 0; i < n; ++i) out[i] += f.bias[first + i];
    }
}

// In pieces that stay in L1, in loops long enough for the compiler's vectorizer.
template <typename T>
void finish_row(const Finish& f) {
    constexpr int64_t kPiece = 128;
    alignas(64) float out[kPiece], up[kPiece];
    for (int64_t first = 0; first < f.num_outputs; first += kPiece) {
        const int64_t n = f.num_outputs - first < kPiece ? f.num_outputs - first : kPiece;
        if (f.gated) {
            for (int64_t i = 0; i < n; i += kPanel) {
                scale_products<T>(f, 2 * (first + i), kPanel, out + i);
                scale_products<T>(f, 2 * (first + i) + kPanel, kPanel, up + i);
            }
            for (int64_t i = 0; i < n; ++i) out[i] = silu(out[i]) * up[i];
        } else {
            scale_products<T>(f, first, n, out);
        }
        if (f.to_bf16) {
            auto* y = static_cast<uint16_t*>(f.y) + first;
            for (int64_t i = 0; i < n; ++i) y[i] = round_to_bf16(out[i]);
        } else {
            memcpy(static_cast<float*>(f.y) + first, out, sizeof(float) * n);
        }
    }
}

void finish(const Finish& f) {
    if (f.integers) {
        finish_row<int32_t>(f);
    } else {
        finish_row<float>(f);
    }
}

}  // namespace
}  // namespace penstock
