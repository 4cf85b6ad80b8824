// Work on single rows around the products, in plain code. Every instruction set's source compiles
// its own copy (all is static) and the compiler vectorizes it under that source's flags.
// Invariant: no contraction, no reassociation of floats, no library function: every instruction
// set computes the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "../numbers.h"
#include "penstock_native.h"

namespace penstock {
namespace {

// From kExpEnd on exp_of is infinity, and x / (1 + exp_of(x)) is 0.
constexpr float kExpEnd = 88.5f;

// exp by 2^n times the polynomial of Cephes' expf, 2 ulp; 0 where that is subnormal. Of NaN any number.
inline float exp_of(float x) {
    x = x < kExpEnd ? x : kExpEnd;  // n = 128: infinity
    x = x > -88.0f ? x : -88.0f;    // n = -127: zero
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

// x * sigmoid(t), where t goes to an infinity with x. At -infinity 0, not the product with infinity.
inline float times_sigmoid(float x, float t) {
    const float finite = x < -kExpEnd ? -kExpEnd : x;
    return finite / (1.0f + exp_of(-t));
}

inline float silu(float x) { return times_sigmoid(x, x); }

// x / 2 * (1 + tanh(t / 2)) is x * sigmoid(t).
inline float gelu_tanh(float x) { return times_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x)); }

// x * Phi(x), Phi(-|x|) being exp(-x^2 / 2) times a polynomial in (|x| - 3.5) / (|x| + 3.5), a shape that
// Schonfelder (1978) found good for erfc; the coefficients are a fit of our own, within 6e-7.
inline float gelu(float x) {
    const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
    const float u = 1.0f - 7.0f / (magnitude + 3.5f);
    float p = 0.00014448115f;
    p = p * u + 0.000341885345f;
    p = p * u - 0.00139979797f;
    p = p * u - 0.00154471083f;
    p = p * u + 0.0190709494f;
    p = p * u - 0.0616419055f;
    p = p * u + 0.12585485f;
    p = p * u - 0.187139586f;
    p = p * u + 0.106345154f;
    const float tail = exp_of(-0.5f * x * x) * p;
    const float finite = x < -kExpEnd ? -kExpEnd : x;
    return finite < 0.0f ? finite * tail : finite * (1.0f - tail);
}

// Near zero the polynomial of Cephes' tanhf; NaN goes there too, and stays.
inline float tanh_of(float x) {
    const uint32_t sign = bits_of(x) & 0x80000000u;
    const float magnitude = float_of(bits_of(x) & 0x7fffffffu), square = x * x;
    const float far = 1.0f - 2.0f / (exp_of(2.0f * magnitude) + 1.0f);
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float near = p * square * x + x;
    return magnitude >= 0.625f ? float_of(bits_of(far) | sign) : near;
}

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

inline void activate(int32_t activation, int64_t n, float* x) {
    switch (activation) {
        case PENSTOCK_SILU:
            for (int64_t i = 0; i < n; ++i) x[i] = silu(x[i]);
            return;
        case PENSTOCK_GELU:
            for (int64_t i = 0; i < n; ++i) x[i] = gelu(x[i]);
            return;
        case PENSTOCK_GELU_TANH:
            for (int64_t i = 0; i < n; ++i) x[i] = gelu_tanh(x[i]);
            return;
        case PENSTOCK_RELU:
            for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
            return;
        case PENSTOCK_RELU_SQUARED:
            for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i] * x[i];
            return;
        default:
            return;
    }
}

// gate = activation(gate) * up; `up` may be overwritten.
inline void activate_gated(int32_t activation, int64_t n, float* gate, float* up) {
    if (activation == PENSTOCK_SWIGLU_OAI) {
        for (int64_t i = 0; i < n; ++i) {
            const float g = gate[i] > 7.0f ? 7.0f : gate[i], low = up[i] < -7.0f ? -7.0f : up[i];
            gate[i] = times_sigmoid(g, 1.702f * g);
            up[i] = (low > 7.0f ? 7.0f : low) + 1.0f;
        }
    } else {
        activate(activation, n, gate);
    }
    for (int64_t i = 0; i < n; ++i) gate[i] *= up[i];
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
            activate_gated(f.activation, n, out, up);
        } else {
            scale_products<T>(f, first, n, out);
            activate(f.activation, n, out);
        }
        if (f.y_scale != 1.0f) {
            for (int64_t i = 0; i < n; ++i) out[i] *= f.y_scale;
        }
        if (f.softcap > 0.0f) {
            for (int64_t i = 0; i < n; ++i) out[i] = f.softcap * tanh_of(out[i] / f.softcap);
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
