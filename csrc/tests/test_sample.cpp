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

void compare(int64_t vocab_size, float spread, const Want& want, uint32_t seed, penstock_pool* pool) {
    constexpr int64_t kRows = 24;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, spread);
    std::uniform_real_distribution<double> uniform(0, 1);
    std::vector<float> logits(kRows * vocab_size);
    for (float& x : logits) x = normal(random);
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
                for (int64_t vocab_size : {1, 5, 127, 129, 3001}) compare(vocab_size, 2.0f, want, seed++, pool);
            }
            penstock_pool_destroy(pool);
        }
    }
    return failures() ? 1 : 0;
}
