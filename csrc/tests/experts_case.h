// One mixture of experts and its operands, in every format of weights, and how to run it.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "numbers.h"
#include "ops.h"
#include "penstock_native.h"
#include "poison.h"

namespace penstock {

using Args = penstock_experts_args;

inline const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "amx", "amx_emulated"};
inline std::mt19937 random_bits(11);
inline std::vector<penstock_pool*> pools(1);  // [number of threads]

inline float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(random_bits);
}
inline int64_t pick(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
inline long long number(int64_t value) { return value; }

struct Format {
    const char* name;
    int32_t dtype, group_size, activation_bits;
    int32_t code = 0, scale_format = 0, has_minima = 0;

    bool is_coded() const { return dtype == PENSTOCK_CODES4 || dtype == PENSTOCK_CODES8; }
};

inline const Format kFormats[] = {{"f32", PENSTOCK_F32, 0, 16},         {"bf16", PENSTOCK_BF16, 0, 16},
                           {"int8", PENSTOCK_INT8, 0, 8},        {"int8 a16", PENSTOCK_INT8, 0, 16},
                           {"int4 g32", PENSTOCK_INT4, 32, 8},   {"int4 g128", PENSTOCK_INT4, 128, 8},
                           {"int4 g32 a16", PENSTOCK_INT4, 32, 16},
                           {"codes4 g32", PENSTOCK_CODES4, 32, 16, 0, PENSTOCK_F16, 1},
                           {"codes8 g128", PENSTOCK_CODES8, 128, 16, PENSTOCK_CODE_E4M3, PENSTOCK_F32, 0}};

struct Shape {
    int64_t num_experts, top_k, in_size, size;
};

inline const Shape kShapes[] = {{4, 2, 40, 24}, {8, 3, 100, 72}, {16, 4, 64, 128}, {1, 1, 33, 17}, {60, 4, 192, 90},
                         {5, 5, 130, 300}};

inline int64_t padded(int64_t value) { return (value + 15) / 16 * 16; }

// The matrices of all experts, `parts` of them interleaved by panels.
struct Matrices {
    penstock_weight weight{};
    std::unique_ptr<Buffer<char>> data;
    std::unique_ptr<Buffer<float>> scales;
    std::vector<float> bias;

    Matrices(const Format& format, int64_t num_experts, int64_t parts, int64_t num_rows, int64_t num_columns) {
        const int64_t per_expert = parts * padded(num_rows);
        weight.format = format.dtype, weight.group_size = format.group_size;
        weight.num_rows = num_experts * per_expert, weight.num_columns = num_columns;
        weight.code = format.code, weight.scale_format = format.scale_format, weight.has_minima = format.has_minima;
        for (int i = 0; i < 16; ++i) weight.book[i] = static_cast<float>(i * i) / 60 - 1.5f;
        CHECK(penstock_weight_layout(&weight) == 0);
        data = std::make_unique<Buffer<char>>(weight.data_bytes);
        scales = std::make_unique<Buffer<float>>(weight.num_rows);
        weight.data = data->data;
        bias.resize(weight.num_rows);
        for (float& value : bias) value = normal();
        if (format.is_coded()) {
            pack_codes(num_experts, parts, num_rows);
            return;
        }
        weight.scales = scales->data;
        std::vector<float> source(num_rows * num_columns);
        for (int64_t i = 0; i < num_experts * parts; ++i) {
            for (float& value : source) value = normal() / std::sqrt(static_cast<float>(num_columns));
            const penstock_pack_args pack{weight, source.data(), PENSTOCK_F32, static_cast<int32_t>(parts),
                                          i / parts * per_expert + i % parts * 16, num_rows};
            CHECK(penstock_pack(pools[2], &pack) == 0, "%s", penstock_last_error());
        }
    }
    void pack_codes(int64_t num_experts, int64_t parts, int64_t num_rows) {
        const int64_t groups = (weight.num_columns + weight.group_size - 1) / weight.group_size;
        std::vector<uint8_t> codes(num_rows * weight.num_columns);
        std::vector<float> group_scales(num_rows * groups), minima(num_rows * groups);
        for (int64_t i = 0; i < num_experts * parts; ++i) {
            // Of E4M3 the numbers up to 2 or so; of the scales what 16 bits hold.
            for (uint8_t& code : codes) {
                code = static_cast<uint8_t>(weight.format == PENSTOCK_CODES4 ? pick(16) : pick(64) | pick(2) << 7);
            }
            for (float& scale : group_scales) scale = f16_to_f32(static_cast<uint16_t>(0x2c00 + pick(1024)));
            for (float& value : minima) {
                value = f16_to_f32(static_cast<uint16_t>(pick(2) << 15 | (0x2800 + pick(1024))));
            }
            penstock_pack_codes_args pack{};
            pack.weight = weight;
            pack.codes = codes.data(), pack.scales = group_scales.data();
            if (weight.has_minima) pack.minima = minima.data();
            pack.panel_step = static_cast<int32_t>(parts), pack.num_source_rows = num_rows;
            pack.first_row = i / parts * parts * padded(num_rows) + i % parts * 16;
            CHECK(penstock_pack_codes(pools[2], &pack) == 0, "%s", penstock_last_error());
        }
    }
    // The panels of one expert as a weight of its own.
    penstock_weight expert(int64_t index, int64_t num_rows) const {
        penstock_weight one = weight;
        one.num_rows = num_rows;
        one.data = static_cast<char*>(weight.data) + index * num_rows / 16 * weight.panel_bytes;
        if (weight.scales) one.scales = weight.scales + index * num_rows;
        return one;
    }
};

struct Case {
    Shape shape;
    Format format;
    int64_t num_tokens;
    Matrices gate_up, down;
    Args args{};
    bool is_float = pick(2);
    int64_t element = is_float ? 4 : 2;
    std::vector<float> logits, correction;
    std::vector<char> x, shared, gates;

    Case(const Shape& s, const Format& f, int64_t tokens)
        : shape(s), format(f), num_tokens(tokens), gate_up(f, s.num_experts, 2, s.size, s.in_size),
          down(f, s.num_experts, 1, s.in_size, s.size) {
        args.gate_up = gate_up.weight, args.down = down.weight;
        if (pick(2)) args.gate_up_bias = gate_up.bias.data();
        if (pick(2)) args.down_bias = down.bias.data();
        args.num_experts = s.num_experts, args.in_size = s.in_size, args.size = s.size, args.top_k = s.top_k;
        args.num_expert_groups = 1, args.activation_bits = f.activation_bits;
        args.scoring = static_cast<int32_t>(pick(3)), args.normalise = static_cast<int32_t>(pick(2));
        const int32_t activations[] = {PENSTOCK_SILU, PENSTOCK_SILU, PENSTOCK_GELU, PENSTOCK_SWIGLU_OAI};
        args.activation = activations[pick(4)];
        args.dtype = is_float ? PENSTOCK_F32 : PENSTOCK_BF16;
        args.routed_scale = pick(2) ? 1.0f : 1.7f;
        args.logits_stride = s.num_experts + pick(3);
        args.x_stride = s.in_size + pick(3), args.y_stride = s.in_size + pick(3);
        args.shared_stride = s.in_size + pick(3), args.shared_gate_stride = 1 + pick(2);
        logits.resize(tokens * args.logits_stride);
        correction.resize(s.num_experts);
        for (float& value : logits) value = normal();
        for (float& value : correction) value = normal() * 0.2f;
        if (pick(3) == 0) args.correction = correction.data();
        x = numbers(tokens * args.x_stride);
        shared = numbers(tokens * args.shared_stride);
        gates = numbers(tokens * args.shared_gate_stride);
        args.x = x.data(), args.logits = logits.data();
        if (pick(2)) args.shared = shared.data();
        if (args.shared && pick(2)) args.shared_gate = gates.data();
    }

    std::vector<char> numbers(int64_t count) const {
        std::vector<char> bytes(count * element);
        for (int64_t i = 0; i < count; ++i) {
            const float value = normal();
            const uint16_t half = f32_to_bf16(value);
            memcpy(&bytes[i * element], is_float ? static_cast<const void*>(&value) : &half, element);
        }
        return bytes;
    }
    float at(const void* data, int64_t i) const {
        if (is_float) return static_cast<const float*>(data)[i];
        return bf16_to_f32(static_cast<const uint16_t*>(data)[i]);
    }

    // Tokens [first, first + count), as floats.
    std::vector<float> run(int isa, int threads, int64_t first, int64_t count) const {
        CHECK(penstock_set_isa(isa) == 0);
        // Copies of the right size, so that a sanitizer sees what is read beyond them.
        const auto part = [&](const void* data, int64_t stride, int64_t width, int64_t size) {
            const char* from = static_cast<const char*>(data) + first * stride * size;
            return std::vector<char>(from, from + ((count - 1) * stride + width) * size);
        };
        const std::vector<char> x_part = part(args.x, args.x_stride, shape.in_size, element);
        const std::vector<char> logits_part = part(args.logits, args.logits_stride, shape.num_experts, 4);
        std::vector<char> shared_part, gates_part, y((count * args.y_stride) * element, 0x55);
        Args own = args;
        own.x = x_part.data(), own.y = y.data();
        own.logits = reinterpret_cast<const float*>(logits_part.data());
        if (args.shared) {
            own.shared = (shared_part = part(args.shared, args.shared_stride, shape.in_size, element)).data();
        }
        if (args.shared_gate) {
            own.shared_gate = (gates_part = part(args.shared_gate, args.shared_gate_stride, 1, element)).data();
        }
        const penstock_op op{PENSTOCK_OP_EXPERTS, &own};
        CHECK(penstock_reserve(pools[threads], &op, 1, count, 0) > 0, "%s", penstock_last_error());
        poison(*pools[threads], experts_op.scratch(&own, count, 0, threads));
        penstock_step step{};
        step.num_tokens = count;
        CHECK(penstock_run(pools[threads], &op, 1, &step) == 0, "%s", penstock_last_error());
        std::vector<float> rows(count * shape.in_size);
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t i = 0; i < shape.in_size; ++i) {
                rows[t * shape.in_size + i] = at(y.data(), t * args.y_stride + i);
            }
            const char* gap = y.data() + (t * args.y_stride + shape.in_size) * element;
            const int64_t gap_bytes = (args.y_stride - shape.in_size) * element;
            for (int64_t i = 0; i < gap_bytes; ++i) CHECK(gap[i] == 0x55);
        }
        return rows;
    }
};

}  // namespace penstock
