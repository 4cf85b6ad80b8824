// Mixtures of experts, in every instruction set: against sums in double, and bit by bit against what
// linear ops give for one token and one expert at a time (which test_linear.cpp holds to the oracle).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "experts_case.h"
#include "numbers.h"
#include "ops.h"
#include "pack.h"
#include "penstock_native.h"
#include "routing.h"
#include "routing_oracle.h"

namespace {

using namespace penstock;
using Doubles = std::vector<double>;

// One row through a linear op of one expert.
void linear(const Case& c, const penstock_weight& weight, const float* bias, const void* x, void* y,
            int64_t num_outputs, bool gated, bool to_float) {
    penstock_linear_args args{};
    args.weight = weight, args.bias = bias;
    args.x = x, args.x_stride = weight.num_columns, args.x_dtype = c.args.dtype;
    args.y = y, args.y_stride = num_outputs, args.y_dtype = to_float ? PENSTOCK_F32 : c.args.dtype;
    args.num_groups = 1, args.epilogue = gated ? PENSTOCK_GATED : PENSTOCK_STORE;
    args.activation = gated ? c.args.activation : PENSTOCK_IDENTITY;
    args.activation_bits = c.args.activation_bits;
    args.num_outputs = static_cast<int32_t>(num_outputs);
    args.y_scale = 1;
    const penstock_op op{PENSTOCK_OP_LINEAR, &args};
    CHECK(penstock_reserve(pools[1], &op, 1, 1, 0) > 0, "%s", penstock_last_error());
    penstock_step step{};
    step.num_tokens = 1;
    CHECK(penstock_run(pools[1], &op, 1, &step) == 0);
}

// A token put together of linear ops, in the order that the op promises.
std::vector<float> composed(const Case& c, int64_t token) {
    const Shape& s = c.shape;
    const int64_t up_rows = 2 * padded(s.size), down_rows = padded(s.in_size);
    std::vector<int32_t> experts(s.top_k);
    std::vector<float> factors(s.top_k), sums(s.in_size), row(s.in_size);
    std::vector<char> middle(s.size * c.element);
    route(c.args, c.args.logits + token * c.args.logits_stride, experts.data(), factors.data());
    const char* x = c.x.data() + token * c.args.x_stride * c.element;
    for (int64_t i = 0; i < s.top_k; ++i) {
        const int64_t e = experts[i];
        linear(c, c.gate_up.expert(e, up_rows), c.args.gate_up_bias ? c.args.gate_up_bias + e * up_rows : nullptr, x,
               middle.data(), s.size, true, false);
        linear(c, c.down.expert(e, down_rows), c.args.down_bias ? c.args.down_bias + e * down_rows : nullptr,
               middle.data(), row.data(), s.in_size, false, true);
        for (int64_t n = 0; n < s.in_size; ++n) {
            const float product = row[n] * factors[i];
            sums[n] += product;
        }
    }
    for (int64_t n = 0; n < s.in_size; ++n) {
        float gate = 1;
        if (c.args.shared_gate) gate = 1 / (1 + std::exp(-c.at(c.args.shared_gate, token * c.args.shared_gate_stride)));
        if (c.args.shared) sums[n] += gate * c.at(c.args.shared, token * c.args.shared_stride + n);
        if (!c.is_float) sums[n] = bf16_to_f32(f32_to_bf16(sums[n]));
    }
    return sums;
}

double activated(int32_t activation, double gate, double up) {
    if (activation == PENSTOCK_GELU) return gate * std::erfc(-gate / std::sqrt(2.0)) / 2 * up;
    if (activation == PENSTOCK_SILU) return gate / (1 + std::exp(-gate)) * up;
    const double g = std::fmin(gate, 7), u = std::fmax(-7, std::fmin(7, up));
    return g / (1 + std::exp(-1.702 * g)) * (u + 1);
}

// The same in double, of the numbers that the weights hold. 
void check_token(const Case& c, int64_t token, const float* y, const std::string& what) {
    const Shape& s = c.shape;
    const int64_t up_rows = 2 * padded(s.size), down_rows = padded(s.in_size);
    const Choice choice = oracle_route(c.args, c.args.logits + token * c.args.logits_stride);
    Doubles right(s.in_size), room(s.in_size, 1e-5);
    std::vector<float> weights(std::max(s.in_size, s.size));
    const auto dot = [&](const penstock_weight& w, int64_t row, const Doubles& x) {
        unpack_row(w, row, weights.data());
        double sum = 0;
        for (size_t i = 0; i < x.size(); ++i) sum += x[i] * weights[i];
        return sum;
    };
    Doubles x(s.in_size), middle(s.size);
    for (int64_t i = 0; i < s.in_size; ++i) x[i] = c.at(c.args.x, token * c.args.x_stride + i);
    for (int64_t i = 0; i < s.top_k; ++i) {
        const int64_t e = choice.experts[i];
        for (int64_t n = 0; n < s.size; ++n) {
            const int64_t gate = e * up_rows + n / 16 * 32 + n % 16, up = gate + 16;
            const double g = dot(c.args.gate_up, gate, x) + (c.args.gate_up_bias ? c.args.gate_up_bias[gate] : 0);
            const double u = dot(c.args.gate_up, up, x) + (c.args.gate_up_bias ? c.args.gate_up_bias[up] : 0);
            middle[n] = activated(c.args.activation, g, u);
        }
        double power = 0;
        for (const double value : middle) power += value * value;
        for (int64_t n = 0; n < s.in_size; ++n) {
            const int64_t row = e * down_rows + n;
            const double value = dot(c.args.down, row, middle) + (c.args.down_bias ? c.args.down_bias[row] : 0);
            right[n] += choice.factors[i] * value;
            // Errors of the middle are random and as large as its format's steps; weights have norm 1 or so.
            room[n] += std::fabs(choice.factors[i]) * (std::sqrt(power) + 1);
        }
    }
    const bool exact = c.is_float && (c.format.dtype == PENSTOCK_F32 || c.format.is_coded());
    const double share = exact ? 2e-5 : c.format.activation_bits == 8 ? 0.1 : 0.03;
    for (int64_t n = 0; n < s.in_size; ++n) {
        double gate = 1;
        if (c.args.shared_gate) gate = 1 / (1 + std::exp(-c.at(c.args.shared_gate, token * c.args.shared_gate_stride)));
        if (c.args.shared) right[n] += gate * c.at(c.args.shared, token * c.args.shared_stride + n);
        const double allowed = share * room[n] + std::fabs(right[n]) * (c.is_float ? 1e-6 : 0x1p-8);
        CHECK(std::fabs(y[n] - right[n]) <= allowed, "%s token %lld output %lld: %g, not %g (+- %g)", what.c_str(),
              number(token), number(n), y[n], right[n], allowed);
    }
}

bool same(const float* a, const float* b, int64_t n) { return memcmp(a, b, n * sizeof(float)) == 0; }

void test_experts() {
    int turn = 0;
    for (const Format& format : kFormats) {
        for (const int64_t num_tokens : {1, 2, 5, 33, 150, 260}) {
            const Shape& shape = kShapes[(turn + turn / 6) % 6];
            ++turn;
            const Case c(shape, format, num_tokens);
            for (int isa = 0; isa < 5; ++isa) {
                if (!(penstock_available_isas() >> isa & 1)) continue;
                const int threads = static_cast<int>(1 + pick(3));
                const std::string what = std::string(format.name) + " " + kIsaNames[isa] + " tokens " +
                                         std::to_string(num_tokens) + " experts " + std::to_string(shape.num_experts) +
                                         " threads " + std::to_string(threads);
                const int64_t width = shape.in_size;
                const std::vector<float> y = c.run(isa, threads, 0, num_tokens);
                // Tiles sum bf16 in another order than the kernel for few rows: equal bits only without.
                const bool in_float = format.dtype == PENSTOCK_F32 || (format.is_coded() && c.is_float);
                const bool in_bf16 = format.activation_bits == 16 && !in_float;
                const bool tiles = in_bf16 && (isa == PENSTOCK_AMX || isa == PENSTOCK_AMX_EMULATED);
                for (int64_t token = 0; token < num_tokens; token += num_tokens > 10 ? 11 : 1) {
                    check_token(c, token, &y[token * width], what);
                    if (tiles) continue;
                    const std::vector<float> right = composed(c, token);
                    CHECK(same(right.data(), &y[token * width], width), "%s: token %lld is not its linear ops'",
                          what.c_str(), number(token));
                }
                const int64_t parts[][2] = {{0, 1}, {num_tokens / 2, 1}, {num_tokens / 3, (num_tokens + 2) / 3}};
                for (const auto& [first, count] : parts) {
                    if (tiles) continue;
                    const int64_t some = std::min(count, num_tokens - first);
                    const std::vector<float> alone = c.run(isa, static_cast<int>(1 + pick(3)), first, some);
                    CHECK(same(alone.data(), &y[first * width], some * width), "%s: tokens %lld + %lld differ alone",
                          what.c_str(), number(first), number(some));
                }
            }
        }
    }
}

// A token with numbers that are none harms no other one.
void test_no_numbers() {
    for (int isa = 0; isa < 5; ++isa) {
        if (!(penstock_available_isas() >> isa & 1)) continue;
        for (const Format& format : {kFormats[0], kFormats[2], kFormats[4]}) {
            Case c(kShapes[1], format, 9);
            const std::vector<float> y = c.run(isa, 2, 0, 9);
            for (int64_t i = 0; i < 8; ++i) c.logits[2 * c.args.logits_stride + i] = NAN;
            for (int64_t i = 0; i < 8; ++i) c.logits[6 * c.args.logits_stride + i] = i % 2 ? INFINITY : -INFINITY;
            const float nan = NAN;
            const uint16_t half = f32_to_bf16(nan);
            for (int64_t i = 0; i < 100; ++i) {
                memcpy(&c.x[(4 * c.args.x_stride + i) * c.element], c.is_float ? static_cast<const void*>(&nan) : &half,
                       c.element);
            }
            const std::vector<float> with = c.run(isa, 3, 0, 9);
            for (const int64_t token : {0, 1, 3, 5, 7, 8}) {
                CHECK(same(&with[token * 100], &y[token * 100], 100), "%s %s token %lld", kIsaNames[isa], format.name,
                      number(token));
            }
            CHECK(with[4 * 100] != with[4 * 100]);
        }
    }
}

// Fewer tokens than were reserved, and scratch that grows with them.
void test_steps() {
    const Case c(kShapes[0], kFormats[4], 120);
    for (int threads = 1; threads <= 3; ++threads) {
        Scratch before;
        for (int64_t tokens = 1; tokens <= 120; ++tokens) {
            const Scratch needed = experts_op.scratch(&c.args, tokens, 0, threads);
            CHECK(needed.thread_bytes >= before.thread_bytes && needed.shared_bytes >= before.shared_bytes);
            before = needed;
        }
    }
    Args args = c.args;
    std::vector<char> y(120 * args.y_stride * 4);
    args.y = y.data();
    const penstock_op op{PENSTOCK_OP_EXPERTS, &args};
    penstock_step step{};
    CHECK(penstock_run(pools[1], &op, 1, &step) == 0);  // no tokens
    CHECK(penstock_reserve(pools[1], &op, 1, 50, 0) > 0);
    for (step.num_tokens = 1; step.num_tokens <= 50; ++step.num_tokens) {
        CHECK(penstock_run(pools[1], &op, 1, &step) == 0);
    }
}

void test_refusals() {
    const Case c(kShapes[1], kFormats[2], 2);
    std::vector<char> y(2 * c.args.y_stride * 4);
    const auto refused = [&](auto change) {
        Args args = c.args;
        args.y = y.data();
        change(args);
        const penstock_op op{PENSTOCK_OP_EXPERTS, &args};
        return penstock_reserve(pools[1], &op, 1, 2, 0) < 0 && strlen(penstock_last_error()) > 10;
    };
    CHECK(!refused([](auto&) {}));
    CHECK(refused([](auto& a) { a.x = nullptr; }));
    CHECK(refused([](auto& a) { a.y = nullptr; }));
    CHECK(refused([](auto& a) { a.logits = nullptr; }));
    CHECK(refused([](auto& a) { a.dtype = PENSTOCK_F16; }));
    CHECK(refused([](auto& a) { a.activation = 7; }));
    CHECK(refused([](auto& a) { a.activation_bits = 4; }));
    CHECK(refused([](auto& a) { a.scoring = 3; }));
    CHECK(refused([](auto& a) { a.top_k = 0; }));
    CHECK(refused([](auto& a) { a.top_k = 9; }));
    CHECK(refused([](auto& a) { a.num_experts = 7; }));
    CHECK(refused([](auto& a) { a.num_experts = 1025; }));
    CHECK(refused([](auto& a) { a.size = 71; }));
    CHECK(refused([](auto& a) { a.in_size = 96; }));
    CHECK(refused([](auto& a) { a.x_stride = 99; }));
    CHECK(refused([](auto& a) { a.y_stride = 99; }));
    CHECK(refused([](auto& a) { a.logits_stride = 7; }));
    CHECK(refused([&](auto& a) { a.shared = y.data(), a.shared_stride = 99; }));
    CHECK(refused([&](auto& a) { a.shared = nullptr, a.shared_gate = y.data(); }));
    CHECK(refused([](auto& a) { a.routed_scale = NAN; }));
    CHECK(refused([](auto& a) { a.down.num_rows -= 16; }));
    CHECK(refused([](auto& a) { a.down.data = nullptr; }));
    CHECK(refused([](auto& a) { a.gate_up.padded_columns *= 2; }));
    const auto grouped = [](auto& a) { a.num_expert_groups = 4, a.top_groups = 2, a.group_top = 1; };
    CHECK(!refused(grouped));
    CHECK(refused([](auto& a) { a.num_expert_groups = 0; }));
    CHECK(refused([](auto& a) { a.num_expert_groups = 3; }));
    CHECK(refused([&](auto& a) { grouped(a), a.top_groups = 1; }));  // holds two, three are chosen
    CHECK(refused([&](auto& a) { grouped(a), a.top_groups = 5; }));
    CHECK(refused([&](auto& a) { grouped(a), a.group_top = 0; }));
    CHECK(refused([&](auto& a) { grouped(a), a.num_expert_groups = 8, a.top_groups = 8, a.group_top = 2; }));
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 3; ++threads) pools.push_back(penstock_pool_create(threads, nullptr));
    test_experts();
    test_no_numbers();
    test_steps();
    test_refusals();
    for (penstock_pool* pool : pools) penstock_pool_destroy(pool);
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
