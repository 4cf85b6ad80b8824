// Row kernels of every instruction set here against double precision or, where exact, the oracle;
// the ops that use them, with one thread and with several.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "numbers.h"
#include "ops.h"
#include "penstock_native.h"
#include "rows.h"

using namespace penstock;

namespace {

std::mt19937_64 generator(7);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

std::vector<float> numbers(int64_t n, float low = -3, float high = 3) {
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

double value_of(float x) { return x; }
double value_of(uint16_t x) { return bf16_to_f32(x); }
// Half a unit in the last place, as a share of the value.
double rounding(float) { return 0x1p-24; }
double rounding(uint16_t) { return 0x1p-8; }

void test_conversions(const RowKernels& rows) {
    std::vector<uint16_t> all(65536), back(65536);
    std::vector<float> wide(65536);
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    rows.bf16_to_f32(all.data(), wide.data(), 65536);
    for (int i = 0; i < 65536; ++i) CHECK(bits_of(wide[i]) == static_cast<uint32_t>(i) << 16, "bf16 %x", i);
    // Every pattern of the upper half with lower halves around the ties.
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
        for (uint32_t i = 0; i < 65536; ++i) wide[i] = float_of(i << 16 | low);
        rows.f32_to_bf16(wide.data(), back.data(), 65536 - low % 7);
        for (uint32_t i = 0; i < 65536 - low % 7; ++i) {
            CHECK(back[i] == f32_to_bf16(wide[i]), "f32 %x gave %x", i << 16 | low, back[i]);
        }
    }
}

// Distance in units of the last place of the exact result (at least the smallest float).
double ulps(float got, double exact) {
    int exponent;
    std::frexp(exact, &exponent);
    return std::fabs(got - exact) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

void test_exp(const RowKernels& rows) {
    std::vector<float> x = numbers(200000, -104, 88.7f), near = numbers(100000, -2, 2);
    x.insert(x.end(), near.begin(), near.end());
    std::vector<float> y(x.size());
    rows.exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
        const double off = ulps(y[i], std::exp(static_cast<double>(x[i])));
        CHECK(off <= 2.5, "exp(%.9g) is off by %.3f ulp", x[i], off);  // nor is it NaN
    }
    const float special[] = {-INFINITY, -1000, -0.0f, 0, 89, INFINITY, NAN};
    float out[7];
    rows.exp(special, out, 7);
    CHECK(bits_of(out[0]) == 0 && bits_of(out[1]) == 0 && out[2] == 1 && out[3] == 1);
    CHECK(std::isinf(out[4]) && std::isinf(out[5]) && std::isnan(out[6]));
}

template <typename T, typename Kernel>
void test_norm(Kernel kernel) {
    for (int64_t size : {1, 7, 16, 63, 64, 65, 100, 576, 2048}) {
        for (bool sum : {false, true}) {
            std::vector<float> residual = numbers(size), weight = numbers(size);
            const std::vector<float> before = residual;
            const std::vector<T> x = as<T>(numbers(size));
            std::vector<T> y(size);
            kernel(residual.data(), sum ? x.data() : nullptr, weight.data(), y.data(), size, 1e-5f);
            double squares = 0;
            for (int64_t i = 0; i < size; ++i) {
                CHECK(residual[i] == (sum ? before[i] + static_cast<float>(value_of(x[i])) : before[i]));
                squares += static_cast<double>(residual[i]) * residual[i];
            }
            const double inverse = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-5f);
            for (int64_t i = 0; i < size; ++i) {
                const double exact = residual[i] * inverse * weight[i];
                // 2048 squares in at most 512 steps: the mean is within 2^-15, mostly far better.
                CHECK(std::fabs(value_of(y[i]) - exact) <= std::fabs(exact) * (rounding(T{}) + 4e-6), "size %ld", size);
            }
        }
    }
}

template <typename T, typename Kernel>
void test_rope(Kernel kernel) {
    for (int64_t half : {1, 4, 16, 32, 40, 64}) {
        const int64_t num_heads = 3;
        std::vector<float> angles(2 * half);
        for (int64_t i = 0; i < half; ++i) {
            const float angle = uniform(-9, 9);
            angles[i] = std::cos(angle);
            angles[half + i] = std::sin(angle);
        }
        std::vector<T> x = as<T>(numbers(num_heads * 2 * half));
        const std::vector<T> before = x;
        kernel(angles.data(), x.data(), num_heads, half);
        for (int64_t i = 0; i < num_heads * half; ++i) {
            const int64_t low = i / half * 2 * half + i % half, high = low + half;
            const double a = value_of(before[low]), b = value_of(before[high]);
            const double cosine = angles[i % half], sine = angles[half + i % half];
            const double error = (std::fabs(a) + std::fabs(b)) * 2e-7;
            const double first = a * cosine - b * sine, second = b * cosine + a * sine;
            CHECK(std::fabs(value_of(x[low]) - first) <= error + std::fabs(first) * rounding(T{}));
            CHECK(std::fabs(value_of(x[high]) - second) <= error + std::fabs(second) * rounding(T{}));
        }
    }
}

int64_t first_largest(const std::vector<float>& x) {
    for (size_t i = 0; i < x.size(); ++i) {
        if (std::isnan(x[i])) return static_cast<int64_t>(i);
    }
    return std::max_element(x.begin(), x.end()) - x.begin();
}

void test_above(const RowKernels& rows) {
    const std::vector<float> x = {0.5f, 0.0f, 1.0f, NAN, 0.25f, 0.5f, -1.0f, 0.75f};
    for (int64_t n : {1, 8, 15, 16, 17, 100, 129}) {
        std::vector<float> row(n), kept, out(n + 16);
        for (int64_t i = 0; i < n; ++i) row[i] = x[i * 7 % 8];
        double expected = 0;
        for (float value : row) {
            if (!(value >= 0.5f)) continue;
            expected += value;
            kept.push_back(value);
        }
        int64_t count = -1;
        CHECK(rows.sum_above(row.data(), n, 0.5f, &count) == expected && count == int64_t(kept.size()));
        CHECK(rows.select_above(row.data(), n, 0.5f, out.data()) == count);
        CHECK(std::equal(kept.begin(), kept.end(), out.begin()));
    }
}

void test_argmax(const RowKernels& rows) {
    for (int64_t n = 1; n < 200; ++n) {
        for (int kind = 0; kind < 6; ++kind) {
            std::vector<float> x = numbers(n);
            if (kind == 1) std::fill(x.begin(), x.end(), -INFINITY);
            if (kind == 2) for (float& value : x) value = std::floor(value);  // ties
            if (kind == 3) x[generator() % n] = NAN;
            if (kind == 4) x[generator() % n] = x[generator() % n] = NAN;
            if (kind == 5) x[generator() % n] = INFINITY;
            CHECK(rows.argmax(x.data(), n) == first_largest(x), "n %ld kind %d", n, kind);
        }
    }
}

template <typename In, typename Out>
void test_packing(void (*keys)(const void* const*, int64_t, int64_t, Out*),
                  void (*values)(const void* const*, int64_t, int64_t, Out*, int64_t),
                  void (*exact_keys)(const void* const*, int64_t, int64_t, Out*),
                  void (*exact_values)(const void* const*, int64_t, int64_t, Out*, int64_t)) {
    for (int64_t d : {2, 4, 6, 8, 10, 24, 64, 80, 128, 250, 256}) {
        std::vector<std::vector<In>> rows;  // each in its own memory, so that reading too far is seen
        const void* pointers[kChunk];
        for (int64_t i = 0; i < kChunk; ++i) {
            rows.push_back(as<In>(numbers(d, -127, 127)));
            pointers[i] = rows.back().data();
        }
        const int64_t width = (d + kPanel - 1) / kPanel * kPanel;
        for (int64_t tokens : {16, 48, 64}) {
            std::vector<Out> got(tokens * d), exact(tokens * d);
            keys(pointers, tokens / kPanel, d, got.data());
            exact_keys(pointers, tokens / kPanel, d, exact.data());
            CHECK(got == exact, "keys, d %ld", d);
            std::vector<Out> got_values(kChunk * width), values_exact(kChunk * width);
            values(pointers, tokens, d, got_values.data(), kChunk * kPanel);
            exact_values(pointers, tokens, d, values_exact.data(), kChunk * kPanel);
            CHECK(got_values == values_exact, "values, d %ld", d);
        }
    }
}

template <typename In>
void test_format(const RowKernels& rows, KvFormat format) {
    const RowKernels& exact = scalar_rows;
    test_packing<In>(rows.pack_keys_f32[format], rows.pack_values_f32[format], exact.pack_keys_f32[format],
                     exact.pack_values_f32[format]);
    test_packing<In>(rows.pack_keys_bf16[format], rows.pack_values_bf16[format], exact.pack_keys_bf16[format],
                     exact.pack_values_bf16[format]);
}

struct State {
    explicit State(int64_t num_rows, int64_t width)
        : max(num_rows, -INFINITY), sums(num_rows * kSumLanes), out(num_rows * width), width(width) {}
    SoftmaxState view() { return {max.data(), sums.data(), out.data(), width}; }
    std::vector<float> max, sums, out;
    int64_t width;
};

bool close(const std::vector<float>& x, const std::vector<float>& y) {  // exp2 and a few products apart
    bool all = true;
    for (size_t i = 0; i < x.size(); ++i) all &= std::fabs(x[i] - y[i]) <= 1e-6f * std::fabs(y[i]);
    return all;
}

// Chunks after each other; `out` counts how often it was scaled, being 1 at first.
void test_softmax(const RowKernels& rows) {
    constexpr int64_t kRows = 10, kWidth = 32;
    for (bool scaled : {false, true}) {
        State state(kRows, kWidth), exact(kRows, kWidth);
        std::fill(state.out.begin(), state.out.end(), 1.0f);
        std::fill(exact.out.begin(), exact.out.end(), 1.0f);
        for (int64_t visible : {60, -1, 100}) {
            std::vector<float> scores = numbers(kRows * kChunk, -20, 20), k_scales = numbers(kChunk, 0.1f, 2);
            std::vector<float> v_scales = numbers(kChunk, 0.1f, 2), p(kRows * kChunk), q(kRows * kChunk), copy = scores;
            SoftmaxChunk chunk{kRows, 3, visible, copy.data(), 0.7f, scaled ? k_scales.data() : nullptr,
                               scaled ? v_scales.data() : nullptr, p.data(), state.view()};
            rows.softmax_f32(chunk);
            chunk.scores = scores.data();
            chunk.probabilities = q.data();
            chunk.state = exact.view();
            scalar_rows.softmax_f32(chunk);
            CHECK(state.max == exact.max);
            CHECK(close(p, q));
            for (int64_t i = 0; i < kRows * kChunk; ++i) {
                CHECK(i % kChunk < visible + i / kChunk / 3 || bits_of(p[i]) == 0, "a hidden column counts");
            }
        }
        CHECK(close(state.sums, exact.sums) && close(state.out, exact.out));
    }
}

void run(int num_threads, int64_t kind, const void* args, const penstock_step& step) {
    const penstock_op op{kind, args};
    penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
    CHECK(penstock_reserve(pool, &op, 1, step.num_tokens, step.num_logit_rows) >= 0, "%s", penstock_last_error());
    CHECK(penstock_run(pool, &op, 1, &step) == 0);
    penstock_pool_destroy(pool);
}

void test_ops(int num_threads) {
    constexpr int64_t kTokens = 9, kSize = 70, kVocab = 100;
    penstock_step step{};
    step.num_tokens = kTokens;
    std::vector<int64_t> ids(kTokens), positions(kTokens);
    for (int64_t i = 0; i < kTokens; ++i) {
        ids[i] = static_cast<int64_t>(generator() % kVocab);
        positions[i] = i * 1237;
    }
    step.input_ids = ids.data();
    step.positions = positions.data();

    const std::vector<float> table = numbers(kVocab * kSize);
    penstock_weight weight{};
    weight.format = PENSTOCK_F32;
    weight.num_rows = kVocab;
    weight.num_columns = kSize;
    CHECK(penstock_weight_layout(&weight) == 0);
    weight.data = aligned_alloc(64, weight.data_bytes);
    penstock_pool* pool = penstock_pool_create(1, nullptr);
    const penstock_pack_args packing{weight, table.data(), PENSTOCK_F32, 1, 0, kVocab};
    CHECK(penstock_pack(pool, &packing) == 0);
    penstock_pool_destroy(pool);
    std::vector<float> out(kTokens * 80);
    const penstock_embed_args embed{weight, out.data(), 80};
    run(num_threads, PENSTOCK_OP_EMBED, &embed, step);
    for (int64_t i = 0; i < kTokens * kSize; ++i) {
        CHECK(out[i / kSize * 80 + i % kSize] == table[ids[i / kSize] * kSize + i % kSize]);
    }
    free(weight.data);

    const std::vector<float> frequencies = numbers(12, 0.001f, 1);
    std::vector<float> angles(kTokens * 24);
    const penstock_angles_args angle_args{frequencies.data(), angles.data(), 12};
    run(num_threads, PENSTOCK_OP_ANGLES, &angle_args, step);
    for (int64_t i = 0; i < kTokens * 12; ++i) {
        const double angle = static_cast<float>(positions[i / 12]) * frequencies[i % 12];
        CHECK(std::fabs(angles[i / 12 * 24 + i % 12] - std::cos(angle)) < 2e-7);
        CHECK(std::fabs(angles[i / 12 * 24 + 12 + i % 12] - std::sin(angle)) < 2e-7);
    }

    // 3 heads of 24 in rows of 80: what lies behind the heads stays.
    std::vector<float> x = numbers(kTokens * 80), rotated = x;
    const penstock_rope_args rope{angles.data(), rotated.data(), 80, 12, 3, PENSTOCK_F32};
    run(num_threads, PENSTOCK_OP_ROPE, &rope, step);
    for (int64_t token = 0; token < kTokens; ++token) {
        kernels().rows->rope_f32(angles.data() + token * 24, x.data() + token * 80, 3, 12);
    }
    CHECK(rotated == x);

    const std::vector<float> scale = numbers(kSize);
    std::vector<float> residual = numbers(kTokens * 80), normed(kTokens * 72), expected(kTokens * 72);
    std::vector<float> copy = residual;
    const penstock_norm_args norm{residual.data(), 80,  x.data(), 80,    scale.data(),
                                  normed.data(),   72, kSize,    1e-6f, PENSTOCK_F32};
    run(num_threads, PENSTOCK_OP_NORM, &norm, step);
    for (int64_t token = 0; token < kTokens; ++token) {
        kernels().rows->norm_f32(copy.data() + token * 80, x.data() + token * 80, scale.data(),
                                 expected.data() + token * 72, kSize, 1e-6f);
    }
    CHECK(residual == copy && normed == expected);
}

void test_refusals() {
    penstock_pool* pool = penstock_pool_create(1, nullptr);
    const auto refused = [&](int64_t kind, const void* args) {
        const penstock_op op{kind, args};
        return penstock_reserve(pool, &op, 1, 1, 1) < 0;
    };
    float x[64];
    const penstock_norm_args good{x, 8, x, 8, x, x, 8, 8, 1e-5f, PENSTOCK_F32};
    CHECK(!refused(PENSTOCK_OP_NORM, &good));
    penstock_norm_args norm = good;
    norm.dtype = PENSTOCK_INT8;
    CHECK(refused(PENSTOCK_OP_NORM, &norm));
    norm = good;
    norm.residual_stride = 7;
    CHECK(refused(PENSTOCK_OP_NORM, &norm));
    norm = good;
    norm.eps = NAN;
    CHECK(refused(PENSTOCK_OP_NORM, &norm));
    const penstock_angles_args angles{x, x, 0};
    CHECK(refused(PENSTOCK_OP_ANGLES, &angles));
    const penstock_rope_args rope{x, x, 15, 4, 2, PENSTOCK_F32};
    CHECK(refused(PENSTOCK_OP_ROPE, &rope));
    const penstock_embed_args embed{};
    CHECK(refused(PENSTOCK_OP_EMBED, &embed));
    penstock_pool_destroy(pool);
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        const RowKernels& rows = *kernels().rows;
        test_conversions(rows);
        test_exp(rows);
        test_norm<float>(rows.norm_f32);
        test_norm<uint16_t>(rows.norm_bf16);
        test_rope<float>(rows.rope_f32);
        test_rope<uint16_t>(rows.rope_bf16);
        test_argmax(rows);
        test_above(rows);
        test_format<float>(rows, kKvF32);
        test_format<uint16_t>(rows, kKvBf16);
        test_format<int8_t>(rows, kKvInt8);
        test_softmax(rows);
        for (int num_threads : {1, 4}) {
            test_ops(num_threads);
        }
    }
    test_refusals();
    return failures() != 0;
}
