// Random numbers for tests, and the two formats of rows as one.
#pragma once

#include <random>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace penstock {

inline std::mt19937_64 generator(7);

inline float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

inline std::vector<float> numbers(int64_t n, float low = -3, float high = 3) {
    std::vector<float> x(n);
    for (float& value : x) value = uniform(low, high);
    return x;
}

template <typename T>
std::vector<T> as(const std::vector<float>& x) {
    std::vector<T> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        if constexpr (std::is_same_v<T, uint16_t>) y[i] = f32_to_bf16(x[i]);
        else y[i] = static_cast<T>(x[i]);
    }
    return y;
}

inline double value_of(float x) { return x; }
inline double value_of(uint16_t x) { return bf16_to_f32(x); }
// Half a unit in the last place, as a share of the value.
inline double rounding(float) { return 0x1p-24; }
inline double rounding(uint16_t) { return 0x1p-8; }

}  // namespace penstock
