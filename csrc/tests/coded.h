// Weights as codes for tests: random ones of every kind, with each value from the formats' definitions.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "penstock_native.h"

namespace penstock {

inline std::mt19937 random_bits(11);

inline int64_t pick(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
inline float normal() { return std::normal_distribution<float>()(random_bits); }

inline std::vector<penstock_pool*> pools(1);  // [number of threads]

// The numbers of codes, from the formats' definitions.
inline double float8(int code, int exponent_bits, int mantissa_bits, int bias) {
    const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
    const double mantissa = (code & ((1 << mantissa_bits) - 1)) / static_cast<double>(1 << mantissa_bits);
    const double value = exponent ? std::ldexp(1 + mantissa, exponent - bias) : std::ldexp(mantissa, 1 - bias);
    return code & 128 ? -value : value;
}

inline float number(const penstock_weight& w, int code) {
    if (w.format == PENSTOCK_CODES4) return w.book[code];
    if (w.code == PENSTOCK_CODE_UINT8) return static_cast<float>(code);
    if (w.code == PENSTOCK_CODE_INT8) return static_cast<float>(code < 128 ? code : code - 256);
    if (w.code == PENSTOCK_CODE_E4M3) {
        return (code & 127) == 127 ? NAN : static_cast<float>(float8(code, 4, 3, 7));
    }
    if ((code & 127) == 0x7c) return code & 128 ? -INFINITY : INFINITY;
    return (code & 127) > 0x7c ? NAN : static_cast<float>(float8(code, 5, 2, 15));
}

// One of every kind of codes, groups, scales; a name that says which.
struct Kind {
    int32_t format, code, group_size, scale_format, has_minima;

    std::string name() const {
        static const char* const codes[] = {"uint8", "int8", "e4m3", "e5m2"};
        return (format == PENSTOCK_CODES4 ? std::string("book") : codes[code]) + " g" + std::to_string(group_size) +
               (scale_format == PENSTOCK_F32 ? " f32" : scale_format == PENSTOCK_F16 ? " f16" : " int8") +
               (has_minima ? " minima" : "");
    }
};

// The source of a weight, and the weight with nothing in it yet.
struct Coded {
    penstock_weight w{};
    int64_t num_groups, num_units;
    std::vector<uint8_t> codes;
    std::vector<float> scales, minima, units, minimum_units;
    std::unique_ptr<Buffer<char>> data;

    Coded(const Kind& kind, int64_t num_rows, int64_t num_columns) {
        w.format = kind.format, w.code = kind.code, w.group_size = kind.group_size;
        w.scale_format = kind.scale_format, w.has_minima = kind.has_minima;
        w.num_rows = num_rows, w.num_columns = num_columns;
        const int64_t which = pick(3);  // of integers without and with sign, or any numbers
        for (int i = 0; i < 16; ++i) {
            w.book[i] = static_cast<float>(which == 0 || i < 8 ? i : i - 16) + (which == 2 ? 0.25f * normal() : 0.0f);
        }
        CHECK(penstock_weight_layout(&w) == 0, "%s", penstock_last_error());
        data = std::make_unique<Buffer<char>>(w.data_bytes);
        w.data = data->data;
        const int64_t group = kind.group_size ? kind.group_size : num_columns;
        num_groups = (num_columns + group - 1) / group, num_units = (num_columns + 255) / 256;
        codes.resize(num_rows * num_columns);
        for (uint8_t& code : codes) {
            do code = static_cast<uint8_t>(pick(w.format == PENSTOCK_CODES4 ? 16 : 256));
            while (!std::isfinite(number(w, code)));
        }
        scales.resize(num_rows * num_groups), minima.resize(kind.has_minima ? scales.size() : 0);
        for (float& scale : scales) scale = any_scale(-128);
        for (float& minimum : minima) minimum = any_scale(0);
        const bool with_units = w.scale_format == PENSTOCK_INT8;
        units.resize(with_units ? num_rows * num_units : 0), minimum_units.resize(w.has_minima ? units.size() : 0);
        for (float& unit : units) unit = normal() / 64;
        for (float& unit : minimum_units) unit = normal() / 64;
    }
    float any_scale(int64_t low) const {
        if (w.scale_format == PENSTOCK_INT8) return static_cast<float>(low + pick(256));
        if (w.scale_format == PENSTOCK_F16) return static_cast<float>(pick(4095) - 2047) * 0x1p-16f;
        return normal() / 32;
    }
    penstock_pack_codes_args args() const {
        const auto or_null = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
        return {w, codes.data(), scales.data(), or_null(minima), or_null(units), or_null(minimum_units),
                0, w.num_rows,   1,             0};
    }
    float value(int64_t row, int64_t column) const {
        const int64_t g = row * num_groups + (w.group_size ? column / w.group_size : 0);
        const int64_t u = row * num_units + column / 256;
        const float scale = units.empty() ? scales[g] : units[u] * scales[g];
        const float product = number(w, codes[row * w.num_columns + column]) * scale;
        if (minima.empty()) return product;
        return product + (minimum_units.empty() ? minima[g] : minimum_units[u] * minima[g]);
    }
};

struct Packed : Coded {
    Packed(const Kind& kind, int64_t num_rows, int64_t num_columns) : Coded(kind, num_rows, num_columns) {
        pack(3);
    }
    void pack(int threads) {
        const penstock_pack_codes_args all = args();
        CHECK(penstock_pack_codes(pools[threads], &all) == 0, "%s", penstock_last_error());
    }
};

}  // namespace penstock
