// Number formats, one value at a time: for baseline code, the scalar oracle and plain loops over rows.
#pragma once

#include <cstdint>
#include <cstring>

namespace penstock {

// Adding this rounds to an integer in the lowest bits, ties to even, for |x| < 2^22.
static constexpr float kRound = 12582912.0f;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bf16_to_f32(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = bits_of(value);
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
        bits = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
    }
    return float_of(bits | sign);
}

}  // namespace penstock
