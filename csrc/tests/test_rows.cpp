// Row kernels of every instruction set here against double precision or, where exact, the oracle.
// Those of norms and rotations: test_row_ops.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "numbers.h"
#include "penstock_native.h"
#include "rows.h"
#include "values.h"

using namespace penstock;

namespace {

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

// exp2 and a few products apart; more if what went into exp2 was apart.
bool close(const std::vector<float>& x, const std::vector<float>& y, float tolerance = 1e-6f) {
    bool all = true;
    for (size_t i = 0; i < x.size(); ++i) all &= std::fabs(x[i] - y[i]) <= tolerance * std::fabs(y[i]);
    return all;
}

// Chunks after each other, of which some rows see nothing; `out` counts how often it was scaled, being
// 1 at first.
void test_softmax(const RowKernels& rows, bool scaled, float cap) {
    constexpr int64_t kRows = 10, kWidth = 32;
    const float tolerance = cap > 0 ? 4e-6f : 1e-6f;  // 3 ulp of tanh, times a cap of 6
    State state(kRows, kWidth), exact(kRows, kWidth);
    std::fill(state.out.begin(), state.out.end(), 1.0f);
    std::fill(exact.out.begin(), exact.out.end(), 1.0f);
    const struct {
        int64_t begin, end, step;
    } ranges[] = {{-100, 60, 1}, {62, 80, 1}, {-5, -1, 1}, {0, 100, 0}, {17, 50, 0}, {47, 48, 1}};
    for (const auto& [begin, end, step] : ranges) {
        std::vector<float> scores = numbers(kRows * kChunk, -20, 20), k_scales = numbers(kChunk, 0.1f, 2);
        std::vector<float> v_scales = numbers(kChunk, 0.1f, 2), p(kRows * kChunk), q(kRows * kChunk), copy = scores;
        const State before = state;
        SoftmaxChunk chunk{kRows, 3, begin, end, step, copy.data(), cap > 0 ? 0.1f : 0.7f, cap,
                           scaled ? k_scales.data() : nullptr, scaled ? v_scales.data() : nullptr, p.data(),
                           state.view()};
        rows.softmax_f32(chunk);
        chunk.scores = scores.data();
        chunk.probabilities = q.data();
        chunk.state = exact.view();
        scalar_rows.softmax_f32(chunk);
        CHECK(cap > 0 ? close(state.max, exact.max) : state.max == exact.max);
        CHECK(close(p, q, tolerance));
        for (int64_t i = 0; i < kRows * kChunk; ++i) {
            const int64_t moved = i / kChunk / 3 * step, column = i % kChunk;
            const bool is_seen = column >= begin + moved && column < end + moved;
            CHECK(is_seen || bits_of(p[i]) == 0, "a hidden column counts");
        }
        for (int64_t row = 0; row < kRows; ++row) {
            const int64_t moved = row / 3 * step;
            if (begin + moved < kChunk && end + moved > 0) continue;
            CHECK(bits_of(state.max[row]) == bits_of(before.max[row]), "what a row does not see counts");
            CHECK(!memcmp(&state.sums[row * kSumLanes], &before.sums[row * kSumLanes], kSumLanes * sizeof(float)));
            CHECK(!memcmp(&state.out[row * kWidth], &before.out[row * kWidth], kWidth * sizeof(float)));
        }
    }
    CHECK(close(state.sums, exact.sums, tolerance) && close(state.out, exact.out, tolerance));
}

// A row's end, with a sink or none; and a part of which a row saw nothing.
void test_finish(const RowKernels& rows) {
    constexpr int64_t kWidth = 32, kSize = 21;
    State state(1, kWidth), unseen(1, kWidth);
    state.max = {3.0f};
    state.sums = numbers(kSumLanes, 0.1f, 1);
    state.out = numbers(kWidth, -5, 5);
    double total = 0;
    for (float sum : state.sums) total += sum;
    for (float sink : {-INFINITY, -40.0f, 1.0f, 3.0f, 9.0f, 200.0f}) {
        std::vector<float> out(kSize + 1, 7.0f);
        rows.finish_f32(state.view(), 0, sink, out.data(), kSize);
        for (int64_t i = 0; i < kSize; ++i) {
            const double expected = state.out[i] / (total + std::exp2(sink - 3.0));
            const double budget = 2e-6 * std::fabs(expected) + 1e-38;
            CHECK(std::fabs(out[i] - expected) <= budget, "sink %g: %g, not %g", sink, out[i], expected);
        }
        CHECK(out[kSize] == 7.0f);
    }
    const State before = state;
    rows.merge(1, state.view(), unseen.view());
    CHECK(state.max == before.max && state.sums == before.sums && state.out == before.out);
    rows.merge(1, unseen.view(), state.view());
    CHECK(unseen.max == before.max && unseen.sums == before.sums && unseen.out == before.out);
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        const RowKernels& rows = *kernels().rows;
        test_conversions(rows);
        test_exp(rows);
        test_argmax(rows);
        test_above(rows);
        test_format<float>(rows, kKvF32);
        test_format<uint16_t>(rows, kKvBf16);
        test_format<int8_t>(rows, kKvInt8);
        for (bool scaled : {false, true}) {
            for (float cap : {0.0f, 6.0f}) test_softmax(rows, scaled, cap);
        }
        test_finish(rows);
    }
    return failures() != 0;
}
