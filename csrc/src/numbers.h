// Number formats, one value at a time. Only for baseline code and the scalar oracle.
#pragma once

#include <cstdint>
#include <cstring>

namespace penstock {

static inline float bf16_to_f32(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    bits += 0x7fffu + ((bits >> 16) & 1);
    return static_cast<uint16_t>(bits >> 16);
}

static inline float f16_to_f32(uint16_t value) {
    uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    uint32_t magnitude = value & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {
        bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = (magnitude << 13) + 0x38000000u;
    } else {  // subnormal: the fraction times 2^-24
        float fraction = static_cast<float>(magnitude) * 0x1p-24f;
        memcpy(&bits, &fraction, sizeof bits);
    }
    bits |= sign;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

}  // namespace penstock
