// Drawing against a plain double-precision implementation by sorting.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "penstock_native.h"

namespace {

struct Want {
    float temperature;
    int32_t top_k;
    float top_p, min_p;
};

// The token of a draw, or -1 where the draw lies too near an edge to tell.
int64_t expected(const float* logits, int64_t n, const Want& want, double draw) {
    double peak = *std::max_element(logits, logits + n);
    std::vector<double> p(n);
    for (int64_t i = 0; i < n; ++i) p[i] = std::exp((logits[i] - peak) / want.temperature);
    std::vector<double> sorted = p;
    std::sort(sorted.begin(), sorted.end(), std::greater<double>());
    double limit = want.min_p;
    if (want.top_k > 0 && want.top_k < n) limit = std::max(limit, sorted[want.top_k - 1]);
    if (want.top_p < 1) {
        double total = 0, mass = 0;
        for (double x : sorted) total += x >= limit ? x : 0;
        int64_t i = 0;
        while (i < n - 1 && mass + sorted[i] < want.top_p * total) mass += sorted[i++];
        if (std::fabs(mass - want.top_p * total) < 1e-5 * total ||
            std::fabs(mass + sorted[i] - want.top_p * total) < 1e-5 * total) return -1;
        limit = std::max(limit, sorted[i]);
    }
    limit *= 1 - 1e-6;  // equal numbers of another precision
    double total = 0;
    for (double x : p) total += x >= limit ? x : 0;
    double mass = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (p[i] < limit) continue;
        if (std::fabs(mass + p[i] - draw * total) < 1e-5 * total) return -1;
        mass += p[i];
        if (mass > draw * total) return i;
    }
    return -1;
}

constexpr int64_t kRows = 24;

std::vector<float> normal_logits(int64_t vocab_size, std::mt19937& random) {
    std::normal_distribution<float> normal(0, 2);
    std::vector<float> logits(kRows * vocab_size);
    for (float& x : logits) x = normal(random);
    return logits;
}

// Two likely tokens, and many of a fiftieth of their weight, which is more than half of all.
std::vector<float> flat_logits(int64_t vocab_size, std::mt19937& random) {
    std::vector<float> logits(kRows * vocab_size, std::log(0.02f));
    for (int64_t row = 0; row < kRows; ++row) {
        const int64_t first = row * vocab_size, place = static_cast<int64_t>(random()) % (vocab_size - 1);
        logits[first + place] = 0;
        logits[first + place + 1] = std::log(0.9f);
    }
    return logits;
}

using MakeLogits = std::vector<float> (*)(int64_t vocab_size, std::mt19937& random);

void compare(MakeLogits make, int64_t vocab_size, const Want& want, uint32_t seed, penstock_pool* pool) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0, 1);
    std::vector<float> logits = make(vocab_size, random);
    std::vector<int64_t> tokens(kRows, -1);
    std::vector<float> temperature(kRows, want.temperature), top_p(kRows, want.top_p), min_p(kRows, want.min_p);
    std::vector<int32_t> top_k(kRows, want.top_k);
    std::vector<double> draws(kRows);
    for (double& x : draws) x = uniform(random);
    draws[0] = 0.0;
    draws[1] = 1.0 - 0x1p-53;
    penstock_sample_args args{logits.data(), vocab_size, vocab_size, kRows, temperature.data(),
                              top_k.data(), top_p.data(), min_p.data(), draws.data(), tokens.data()};
    temperature[2] = 0;
    logits[3 * vocab_size] = -INFINITY;  // an excluded token is never drawn
    CHECK(penstock_sample(pool, &args) == 0);
    const float* greedy = &logits[2 * vocab_size];
    CHECK(tokens[2] == std::max_element(greedy, greedy + vocab_size) - greedy);
    int64_t told = 0;
    for (int64_t i = 0; i < kRows; ++i) {
        if (i == 2 || (i == 3 && vocab_size == 1)) continue;
        const int64_t token = expected(&logits[i * vocab_size], vocab_size, want, draws[i]);
        CHECK(tokens[i] >= 0 && tokens[i] < vocab_size);
        if (token < 0) continue;
        ++told;
        CHECK(tokens[i] == token, "row %d: %d, not %d (v %d k %d p %g m %g)", int(i), int(tokens[i]), int(token),
              int(vocab_size), want.top_k, want.top_p, want.min_p);
    }
    CHECK(told >= kRows / 2, "too few draws could be told");
}

// Temperatures without a finite inverse are as good as zero.
void test_tiny_temperatures(penstock_pool* pool) {
    const float logits[] = {0, 3, 2.9999f, -1};
    const float temperature[] = {1e-39f, 1e-45f, NAN}, ones[] = {1, 1, 1}, zeros[] = {0, 0, 0};
    const int32_t top_k[] = {0, 0, 2};
    const double draws[] = {0.99, 0.5, 0.99};
    for (int64_t row = 0; row < 3; ++row) {
        int64_t token = -1;
        const penstock_sample_args args{logits, 4,     4,           1,     temperature + row, top_k + row,
                                        ones,   zeros, draws + row, &token};
        CHECK(penstock_sample(pool, &args) == 0);
        CHECK(token == 1, "temperature %g drew %d", temperature[row], int(token));
    }
}

void test_refusals(penstock_pool* pool) {
    const float x[8] = {};
    const int32_t top_k[2] = {};
    const double draws[2] = {};
    int64_t tokens[2];
    const penstock_sample_args good{x, 4, 4, 2, x, top_k, x, x, draws, tokens};
    const auto refused = [&](auto change) {
        penstock_sample_args args = good;
        change(args);
        return penstock_sample(pool, &args) == -1;
    };
    CHECK(!refused([](auto&) {}));
    CHECK(!refused([](auto& a) { a.num_rows = 1, a.stride = 0; }));
    CHECK(!refused([](auto& a) { a = {}, a.vocab_size = 4; }));  // no rows
    CHECK(refused([](auto& a) { a.stride = 3; }));
    CHECK(refused([](auto& a) { a.vocab_size = 0; }));
    CHECK(refused([](auto& a) { a.num_rows = -1; }));
    CHECK(refused([](auto& a) { a.logits = nullptr; }));
    CHECK(refused([](auto& a) { a.temperature = nullptr; }));
    CHECK(refused([](auto& a) { a.top_k = nullptr; }));
    CHECK(refused([](auto& a) { a.top_p = nullptr; }));
    CHECK(refused([](auto& a) { a.min_p = nullptr; }));
    CHECK(refused([](auto& a) { a.draws = nullptr; }));
    CHECK(refused([](auto& a) { a.token_ids = nullptr; }));
}

}  // namespace

int main() {
    const Want wants[] = {{1, 0, 1, 0},      {0.7f, 0, 1, 0},      {1, 1, 1, 0},         {1, 50, 1, 0},
                          {1, 0, 0.9f, 0},   {0.8f, 40, 0.95f, 0}, {1, 0, 1, 0.05f},     {1.3f, 20, 0.5f, 0.02f},
                          {1, 7, 0.999f, 0}, {0.01f, 0, 0.9f, 0},  {1, 1000000, 1, 0.0f}};
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512}) {
        if (!(penstock_available_isas() >> isa & 1)) continue;
        CHECK(penstock_set_isa(isa) == 0);
        for (int32_t num_threads : {1, 3}) {
            penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
            uint32_t seed = 1;
            for (const Want& want : wants) {
                for (int64_t vocab_size : {1, 5, 127, 129, 3001}) {
                    compare(normal_logits, vocab_size, want, seed++, pool);
                }
            }
            compare(flat_logits, 102, {1, 0, 0.48f, 0.01f}, seed++, pool);
            compare(flat_logits, 102, {1, 90, 0.48f, 0.01f}, seed++, pool);
            test_tiny_temperatures(pool);
            test_refusals(pool);
            penstock_pool_destroy(pool);
        }
    }
    return failures() ? 1 : 0;
}
