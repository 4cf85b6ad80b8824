// What tests of products share: packed weights of random numbers in every format, and activations in
// double precision.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "penstock_native.h"

inline const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "amx", "amx_emulated"};

inline std::mt19937 random_bits(7);

inline float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(random_bits);
}

inline int64_t pick(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }

inline std::vector<penstock_pool*> pools(1);  // [number of threads]

struct Format {
    const char* name;
    int32_t dtype, group_size, activation_bits;
};

inline const Format kFormats[] = {
    {"f32", PENSTOCK_F32, 0, 16},          {"bf16", PENSTOCK_BF16, 0, 16},       {"int8", PENSTOCK_INT8, 0, 8},
    {"int8 a16", PENSTOCK_INT8, 0, 16},    {"int4 g32", PENSTOCK_INT4, 32, 8},   {"int4 g128", PENSTOCK_INT4, 128, 8},
    {"int4 g32 a16", PENSTOCK_INT4, 32, 16}, {"int4 g128 a16", PENSTOCK_INT4, 128, 16},
};

struct Packed {
    penstock_weight weight{};
    std::vector<float> source;
    std::unique_ptr<Buffer<char>> data;
    std::unique_ptr<Buffer<float>> scales;

    Packed(const Format& format, int64_t num_rows, int64_t num_columns) : source(num_rows * num_columns) {
        for (float& value : source) value = normal();
        weight.format = format.dtype;
        weight.group_size = format.group_size;
        weight.num_rows = num_rows;
        weight.num_columns = num_columns;
        CHECK(penstock_weight_layout(&weight) == 0);
        data = std::make_unique<Buffer<char>>(weight.data_bytes);
        scales = std::make_unique<Buffer<float>>((num_rows + 15) / 16 * 16);
        weight.data = data->data;
        weight.scales = scales->data;
        const penstock_pack_args args{weight, source.data(), PENSTOCK_F32, 1, 0, num_rows};
        CHECK(penstock_pack(pools[2], &args) == 0, "%s", penstock_last_error());
    }
};

inline const int32_t kActivations[] = {
    PENSTOCK_IDENTITY, PENSTOCK_SILU,         PENSTOCK_GELU,       PENSTOCK_GELU_TANH,
    PENSTOCK_RELU,     PENSTOCK_RELU_SQUARED, PENSTOCK_SWIGLU_OAI,
};

// In double. SWIGLU_OAI: of the gate alone.
inline double activated(int32_t activation, double x) {
    switch (activation) {
        case PENSTOCK_SILU: return x / (1 + std::exp(-x));
        case PENSTOCK_GELU: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
        case PENSTOCK_GELU_TANH: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case PENSTOCK_RELU: return std::fmax(x, 0);
        case PENSTOCK_RELU_SQUARED: return x > 0 ? x * x : 0;
        case PENSTOCK_SWIGLU_OAI: return std::fmin(x, 7) / (1 + std::exp(-1.702 * std::fmin(x, 7)));
        default: return x;
    }
}

inline bool same_bits(const std::vector<float>& a, const float* b) {
    return memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
}
