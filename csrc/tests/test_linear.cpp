// Linear ops and packing: every instruction set of this machine against the scalar oracle and
// against sums in double precision.
//
// Budgets. Integer products are exact, and scaling is the same code everywhere: int8 activations
// give equal bits in every instruction set. A float sum of k products in any order is within
// k * 2^-24 of the sum of their magnitudes (Higham 2002, section 3.1); bf16 activations are what the
// kernel is given, and a bf16 result adds half a unit in its last place, 2^-9 of it. What the epilogue
// makes of an error follows from its slope; its own errors are those that kernels.h tells.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "numbers.h"
#include "ops.h"
#include "pack.h"
#include "packed.h"
#include "penstock_native.h"
#include "poison.h"

namespace {

using namespace penstock;

const int64_t kRowCounts[] = {1, 2, 3, 5, 7, 16, 17, 33, 64, 130};

// One linear op and its operands.
struct Case {
    const Packed& packed;
    const Format& format;
    int64_t m;
    bool gated, with_bias, logits, x_floats, y_floats;
    int32_t activation = kActivations[pick(6)];
    float y_scale = pick(2) ? 1.0f : 0.37f, softcap = pick(3) ? 0.0f : 5.0f;
    int64_t num_outputs, x_stride, y_stride;
    std::vector<float> x;  // [tokens, columns]
    std::vector<int64_t> logit_rows;
    std::vector<float> bias;

    Case(const Packed& p, const Format& f, int64_t rows) : packed(p), format(f), m(rows) {
        const penstock_weight& w = p.weight;
        gated = (w.num_rows + 15) / 16 % 2 == 0 && pick(2);
        if (gated && pick(4) == 0) activation = PENSTOCK_SWIGLU_OAI;
        with_bias = pick(2), logits = pick(3) == 0, x_floats = pick(2), y_floats = pick(2);
        num_outputs = (gated ? w.num_rows / 32 * 16 : w.num_rows) - pick(3);
        x_stride = w.num_columns + pick(3);
        y_stride = num_outputs + pick(3);
        x.resize(num_tokens() * w.num_columns);
        for (float& value : x) value = bf16_to_f32(f32_to_bf16(normal()));
        for (int64_t i = 0; logits && i < m; ++i) logit_rows.push_back(pick(num_tokens()));
        bias.assign((w.num_rows + 15) / 16 * 16, 0.0f);
        for (float& value : bias) value = normal();
    }
    int64_t num_tokens() const { return logits ? m + 3 : m; }
    int64_t source_row(int64_t i) const { return logits ? logit_rows[i] : i; }

    // Rows [first, first + count) of the result, as floats.
    std::vector<float> run(int isa, int threads, int64_t first, int64_t count) const {
        CHECK(penstock_set_isa(isa) == 0);
        const penstock_weight& w = packed.weight;
        const int64_t tokens = logits ? num_tokens() : count;
        Buffer<float> x_data((tokens * x_stride + 1) / (x_floats ? 1 : 2));
        Buffer<float> y_data((count * y_stride + 1) / (y_floats ? 1 : 2));
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t i = 0; i < w.num_columns; ++i) {
                const float value = x[(logits ? t : first + t) * w.num_columns + i];
                if (x_floats) x_data[t * x_stride + i] = value;
                else reinterpret_cast<uint16_t*>(x_data.data)[t * x_stride + i] = f32_to_bf16(value);
            }
        }
        penstock_linear_args args{};
        args.weight = w;
        args.bias = with_bias ? bias.data() : nullptr;
        args.x = x_data.data, args.x_stride = x_stride, args.x_dtype = x_floats ? PENSTOCK_F32 : PENSTOCK_BF16;
        args.y = y_data.data, args.y_stride = y_stride, args.y_dtype = y_floats ? PENSTOCK_F32 : PENSTOCK_BF16;
        args.num_groups = 1;
        args.rows = logits ? PENSTOCK_ROWS_LOGITS : PENSTOCK_ROWS_TOKENS;
        args.epilogue = gated ? PENSTOCK_GATED : PENSTOCK_STORE;
        args.activation = activation;
        args.activation_bits = format.activation_bits;
        args.num_outputs = static_cast<int32_t>(num_outputs);
        args.y_scale = y_scale, args.softcap = softcap;
        const penstock_op op{PENSTOCK_OP_LINEAR, &args};
        CHECK(penstock_reserve(pools[threads], &op, 1, tokens, count) > 0, "%s", penstock_last_error());
        poison(*pools[threads], linear_op.scratch(&args, tokens, count, threads));
        penstock_step step{};
        step.num_tokens = tokens;
        step.num_logit_rows = count;
        step.logit_rows = logits ? logit_rows.data() + first : nullptr;
        CHECK(penstock_run(pools[threads], &op, 1, &step) == 0, "%s", penstock_last_error());
        std::vector<float> y(count * num_outputs);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t n = 0; n < num_outputs; ++n) {
                const int64_t at = i * y_stride + n;
                const auto* halves = reinterpret_cast<const uint16_t*>(y_data.data);
                y[i * num_outputs + n] = y_floats ? y_data[at] : bf16_to_f32(halves[at]);
            }
        }
        return y;
    }
};

// What a product is worth exactly, and how large its terms are.
struct Exact {
    double value, magnitude;
};

Exact product(const Case& c, const std::vector<float>& weights, int64_t source_row, int64_t row) {
    const int64_t k = c.packed.weight.num_columns;
    Exact result{c.with_bias ? c.bias[row] : 0.0, c.with_bias ? std::fabs(c.bias[row]) : 0.0};
    for (int64_t i = 0; i < k; ++i) {
        const double term = static_cast<double>(c.x[source_row * k + i]) * weights[row * k + i];
        result.value += term;
        result.magnitude += std::fabs(term);
    }
    return result;
}

// The epilogue of exact products; errors of the products become those of its result.
void apply_epilogue(const Case& c, Exact& e, double& error, const Exact& up, double up_error) {
    const double slope = c.activation == PENSTOCK_RELU_SQUARED ? 2 * (std::fabs(e.value) + error) : 1.2;
    e.value = activated(c.activation, e.value);
    error = (c.activation == PENSTOCK_IDENTITY ? error : slope * error) + 2e-6 * std::fabs(e.value) + 1e-8;
    if (c.gated) {
        const bool clipped = c.activation == PENSTOCK_SWIGLU_OAI;
        const double factor = clipped ? std::fmax(-7, std::fmin(7, up.value)) + 1 : up.value;
        error = error * std::fabs(factor) + up_error * (std::fabs(e.value) + error);
        e.value *= factor;
    }
    e.value *= c.y_scale;
    error = error * c.y_scale + std::fabs(e.value) * 0x1p-21;
    if (c.softcap > 0) {
        e.value = c.softcap * std::tanh(e.value / c.softcap);
        error += 2e-6 * std::fabs(e.value);
    }
}

void check_floats(const Case& c, const std::vector<float>& weights, const std::vector<float>& y, const char* what) {
    const double budget = static_cast<double>(c.packed.weight.num_columns + 4) * 0x1p-24;
    for (int64_t i = 0; i < c.m; i += c.m > 20 ? 7 : 1) {
        for (int64_t n = 0; n < c.num_outputs; ++n) {
            const int64_t row = c.gated ? n / 16 * 32 + n % 16 : n;
            Exact e = product(c, weights, c.source_row(i), row);
            const Exact up = c.gated ? product(c, weights, c.source_row(i), row + 16) : Exact{};
            double allowed = e.magnitude * budget;
            apply_epilogue(c, e, allowed, up, up.magnitude * budget);
            if (!c.y_floats) allowed += std::fabs(e.value) * 0x1p-8;
            const float got = y[i * c.num_outputs + n];
            CHECK(std::fabs(got - e.value) <= allowed + 1e-30,
                  "%s m %lld row %lld output %lld activation %d: %.9g, not %.9g (+- %.3g)", what,
                  static_cast<long long>(c.m), static_cast<long long>(i), static_cast<long long>(n), c.activation, got,
                  e.value, allowed);
        }
    }
}

// A row alone, and in a batch of other sizes, has the same bits as in this batch.
void check_alone(const Case& c, const std::vector<float>& y, int isa, const std::string& what) {
    const bool in_bf16 = c.format.activation_bits == 16 && c.format.dtype != PENSTOCK_F32;
    const bool tiles = in_bf16 && (isa == PENSTOCK_AMX || isa == PENSTOCK_AMX_EMULATED);
    const int64_t parts[][2] = {{0, 1}, {c.m / 2, 1}, {c.m - 1, 1}, {0, (c.m + 1) / 2}, {c.m / 3, (c.m + 2) / 3}};
    for (const auto& [first, count] : parts) {
        const int64_t rows = first + count > c.m ? c.m - first : count;
        // Tiles sum bf16 in another order than the kernel for few rows.
        if (tiles && (rows < 4) != (c.m < 4)) continue;
        const std::vector<float> alone = c.run(isa, 1, first, rows);
        CHECK(same_bits(alone, &y[first * c.num_outputs]), "%s: rows %lld + %lld differ alone", what.c_str(),
              static_cast<long long>(first), static_cast<long long>(rows));
    }
}

void test_products() {
    const int64_t shapes[][2] = {{37, 100}, {96, 192}, {160, 324}, {65, 64}, {256, 33}};
    int turn = 0;
    for (const Format& format : kFormats) {
        for (const int64_t m : kRowCounts) {
            const auto& shape = shapes[turn++ % 5];
            const Packed packed(format, shape[0], shape[1]);
            std::vector<float> weights(packed.source.size());
            for (int64_t row = 0; row < shape[0]; ++row) unpack_row(packed.weight, row, &weights[row * shape[1]]);
            const Case c(packed, format, m);
            const std::vector<float> oracle = c.run(PENSTOCK_SCALAR, 1, 0, m);
            if (format.activation_bits == 16) check_floats(c, weights, oracle, "scalar");
            for (int isa = 0; isa < 5; ++isa) {
                if (!(penstock_available_isas() >> isa & 1)) continue;
                const int threads = static_cast<int>(1 + pick(4));
                const std::string what = std::string(format.name) + " " + kIsaNames[isa] + " m " + std::to_string(m) +
                                         " [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                                         "] threads " + std::to_string(threads);
                const std::vector<float> y = c.run(isa, threads, 0, m);
                if (format.activation_bits == 8) {
                    CHECK(same_bits(y, oracle.data()), "%s: differs from the oracle", what.c_str());
                } else {
                    check_floats(c, weights, y, what.c_str());
                }
                check_alone(c, y, isa, what);
            }
        }
    }
}

// Columns enough for several cuts of a panel and of a block of 4-bit groups.
void test_long_rows() {
    for (const Format& format : kFormats) {
        const Packed packed(format, 48, 4288);
        std::vector<float> weights(packed.source.size());
        for (int64_t row = 0; row < 48; ++row) unpack_row(packed.weight, row, &weights[row * 4288]);
        for (const int64_t m : {1, 14, 40}) {
            const Case c(packed, format, m);
            const std::vector<float> oracle = c.run(PENSTOCK_SCALAR, 1, 0, m);
            for (int isa = 1; isa < 5; ++isa) {
                if (!(penstock_available_isas() >> isa & 1)) continue;
                const std::string what = std::string(format.name) + " " + kIsaNames[isa] + " long";
                const std::vector<float> y = c.run(isa, 2, 0, m);
                if (format.activation_bits == 8) CHECK(same_bits(y, oracle.data()), "%s", what.c_str());
                else check_floats(c, weights, y, what.c_str());
                check_alone(c, y, isa, what);
            }
        }
    }
}

// int8 activations are within half a step of x: the result within the sum of |w| steps.
void test_quantized_activations() {
    const Format format{"int8", PENSTOCK_INT8, 0, 8};
    const Packed packed(format, 40, 200);
    std::vector<float> weights(packed.source.size());
    for (int64_t row = 0; row < 40; ++row) unpack_row(packed.weight, row, &weights[row * 200]);
    Case c(packed, format, 5);
    c.y_floats = true, c.gated = false, c.num_outputs = 40, c.y_stride = 40, c.x_floats = true;
    c.activation = PENSTOCK_IDENTITY, c.y_scale = 1, c.softcap = 0;
    for (int64_t i = 0; i < 200; ++i) c.x[c.source_row(1) * 200 + i] = 0;  // a row of zeros
    const std::vector<float> y = c.run(PENSTOCK_SCALAR, 1, 0, 5);
    for (int64_t i = 0; i < 5; ++i) {
        float peak = 0;
        for (int64_t k = 0; k < 200; ++k) peak = std::fmax(peak, std::fabs(c.x[c.source_row(i) * 200 + k]));
        for (int64_t n = 0; n < 40; ++n) {
            double magnitude = 0;
            for (int64_t k = 0; k < 200; ++k) magnitude += std::fabs(weights[n * 200 + k]);
            const Exact e = product(c, weights, c.source_row(i), n);
            const double got = y[i * 40 + n];
            CHECK(std::fabs(got - e.value) <= magnitude * peak / 254 * 1.001 + 1e-4, "%g, not %g", got, e.value);
        }
    }
}

void test_packing() {
    for (const Format& format : kFormats) {
        const Packed packed(format, 35, 150);
        double error = 0, power = 0;
        for (int64_t row = 0; row < 35; ++row) {
            std::vector<float> out(150);
            unpack_row(packed.weight, row, out.data());
            float peak = 0;
            for (int64_t i = 0; i < 150; ++i) peak = std::fmax(peak, std::fabs(packed.source[row * 150 + i]));
            for (int64_t i = 0; i < 150; ++i) {
                const float source = packed.source[row * 150 + i], difference = std::fabs(out[i] - source);
                error += static_cast<double>(difference) * difference;
                power += static_cast<double>(source) * source;
                if (format.dtype == PENSTOCK_F32) CHECK(difference == 0);
                if (format.dtype == PENSTOCK_BF16) CHECK(out[i] == bf16_to_f32(f32_to_bf16(source)));
                if (format.dtype == PENSTOCK_INT8) CHECK(difference <= peak / 254 * 1.001f);
            }
        }
        // Normal weights: 4 bits with the best of 15 scales a group lose about 0.7 % of the power.
        if (format.dtype == PENSTOCK_INT4) {
            CHECK(error / power < (format.group_size == 32 ? 0.011 : 0.016), "%s: %g", format.name, error / power);
        }
    }
}

// Interleaved parts, other source types, and padding that stays zero.
void test_pack_places() {
    penstock_weight w{};
    w.format = PENSTOCK_BF16;
    w.num_rows = 64;
    w.num_columns = 70;
    CHECK(penstock_weight_layout(&w) == 0 && w.padded_columns == 128);
    Buffer<char> data(w.data_bytes);
    w.data = data.data;
    std::vector<uint16_t> part(32 * 70);
    for (int which = 0; which < 2; ++which) {
        for (size_t i = 0; i < part.size(); ++i) part[i] = f32_to_bf16(static_cast<float>(which * 100 + i / 70));
        const penstock_pack_args args{w, part.data(), PENSTOCK_BF16, 2, which * 16, 32};
        CHECK(penstock_pack(pools[1], &args) == 0);
    }
    for (int64_t row = 0; row < 64; ++row) {
        std::vector<float> out(70);
        unpack_row(w, row, out.data());
        const int64_t panel = row / 16, expected = panel % 2 * 100 + panel / 2 * 16 + row % 16;
        CHECK(out[0] == static_cast<float>(expected) && out[69] == out[0], "row %lld: %g",
              static_cast<long long>(row), out[0]);
    }
    for (int64_t k = 70; k < 128; ++k) {
        CHECK(reinterpret_cast<uint16_t*>(data.data)[(k / 2 * 16 + 3) * 2 + k % 2] == 0);
    }
}

void test_refusals() {
    const Format format{"int8", PENSTOCK_INT8, 0, 8};
    const Packed packed(format, 48, 64);
    float x[64] = {}, y[48];
    penstock_linear_args good{};
    good.weight = packed.weight;
    good.x = x, good.x_stride = 64, good.x_dtype = PENSTOCK_F32;
    good.y = y, good.y_stride = 48, good.y_dtype = PENSTOCK_F32;
    good.num_groups = 1, good.activation_bits = 8, good.num_outputs = 48, good.y_scale = 1;
    const auto refused = [&](auto change) {
        penstock_linear_args args = good;
        change(args);
        const penstock_op op{PENSTOCK_OP_LINEAR, &args};
        return penstock_reserve(pools[1], &op, 1, 4, 4) < 0 && strlen(penstock_last_error()) > 10;
    };
    CHECK(!refused([](auto&) {}));
    CHECK(refused([](auto& a) { a.x = nullptr; }));
    CHECK(refused([](auto& a) { a.y = nullptr; }));
    CHECK(refused([](auto& a) { a.x_dtype = PENSTOCK_INT8; }));
    CHECK(refused([](auto& a) { a.y_dtype = PENSTOCK_F16; }));
    CHECK(refused([](auto& a) { a.rows = 2; }));
    CHECK(refused([](auto& a) { a.epilogue = 2; }));
    CHECK(refused([](auto& a) { a.epilogue = PENSTOCK_GATED; }));  // three panels
    CHECK(refused([](auto& a) { a.activation = 7; }));
    CHECK(refused([](auto& a) { a.activation = -1; }));
    CHECK(refused([](auto& a) { a.activation = PENSTOCK_SWIGLU_OAI; }));  // not gated
    CHECK(refused([](auto& a) { a.y_scale = 0; }));
    CHECK(refused([](auto& a) { a.y_scale = NAN; }));
    CHECK(refused([](auto& a) { a.softcap = -1; }));
    CHECK(refused([](auto& a) { a.softcap = INFINITY; }));
    const auto grouped = [](auto& a) {
        a.num_groups = 3, a.num_outputs = 16, a.x_group_stride = 64, a.x_stride = 192, a.y_group_stride = 16;
    };
    CHECK(!refused(grouped));
    CHECK(refused([](auto& a) { a.num_groups = 0; }));
    CHECK(refused([&](auto& a) { grouped(a), a.num_groups = 4; }));
    CHECK(refused([&](auto& a) { grouped(a), a.num_groups = int64_t{1} << 60; }));
    CHECK(refused([&](auto& a) { grouped(a), a.num_outputs = 17; }));
    CHECK(refused([&](auto& a) { grouped(a), a.x_stride = 191; }));
    CHECK(refused([&](auto& a) { grouped(a), a.x_group_stride = -1; }));
    CHECK(refused([&](auto& a) { grouped(a), a.y_group_stride = 15; }));
    CHECK(refused([&](auto& a) { grouped(a), a.y_stride = 47; }));
    CHECK(refused([&](auto& a) { grouped(a), a.epilogue = PENSTOCK_GATED; }));
    CHECK(refused([](auto& a) { a.activation_bits = 4; }));
    CHECK(refused([](auto& a) { a.num_outputs = 49; }));
    CHECK(refused([](auto& a) { a.num_outputs = 0; }));
    CHECK(refused([](auto& a) { a.x_stride = 63; }));
    CHECK(refused([](auto& a) { a.y_stride = 47; }));
    CHECK(refused([](auto& a) { a.weight.data = nullptr; }));
    CHECK(refused([](auto& a) { a.weight.data = static_cast<char*>(a.weight.data) + 4; }));
    CHECK(refused([](auto& a) { a.weight.scales = nullptr; }));
    CHECK(refused([](auto& a) { a.weight.padded_columns = 128; }));
    CHECK(refused([](auto& a) { a.weight.format = PENSTOCK_F16; }));
    const penstock_op unknown{99, &good};
    CHECK(penstock_reserve(pools[1], &unknown, 1, 4, 4) < 0);
    const penstock_op op{PENSTOCK_OP_LINEAR, &good};
    penstock_step step{};
    CHECK(penstock_run(pools[1], &unknown, 1, &step) < 0);
    step.num_tokens = 1 << 24;  // more than was reserved
    CHECK(penstock_run(pools[1], &op, 1, &step) < 0);
    CHECK(penstock_set_isa(17) < 0);
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 4; ++threads) pools.push_back(penstock_pool_create(threads, nullptr));
    test_packing();
    test_pack_places();
    test_quantized_activations();
    test_products();
    test_long_rows();
    test_refusals();
    for (penstock_pool* pool : pools) penstock_pool_destroy(pool);
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
