// From logits to experts and factors: against an oracle, ties, and numbers that are none.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "penstock_native.h"
#include "routing.h"
#include "routing_oracle.h"

namespace {

using namespace penstock;
using Args = penstock_experts_args;

std::mt19937 random_bits(11);

float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(random_bits);
}
int64_t pick(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
long long number(int64_t value) { return value; }

Args routing(int64_t num_experts, int64_t top_k, int32_t scoring, bool normalise) {
    Args args{};
    args.num_experts = num_experts, args.top_k = top_k, args.scoring = scoring, args.normalise = normalise;
    args.num_expert_groups = 1, args.routed_scale = 1;
    return args;
}

void test_routing() {
    const int64_t counts[][4] = {{1, 1, 1, 1},   {4, 2, 1, 1},   {8, 8, 1, 1},     {60, 4, 1, 1},     {64, 6, 8, 3},
                                 {256, 8, 8, 4}, {160, 6, 8, 3}, {1024, 64, 1, 1}, {1024, 64, 32, 5}, {9, 3, 3, 1}};
    for (const auto& [num_experts, top_k, groups, top_groups] : counts) {
        for (int scoring = 0; scoring < 3; ++scoring) {
            for (int turn = 0; turn < 40; ++turn) {
                Args args = routing(num_experts, top_k, scoring, pick(2));
                args.num_expert_groups = groups, args.top_groups = top_groups;
                args.group_top = static_cast<int32_t>(1 + pick(2));
                args.routed_scale = pick(2) ? 1.0f : 2.5f;
                std::vector<float> logits(num_experts), correction(num_experts), factors(top_k);
                for (float& value : logits) value = 2 * normal();
                for (float& value : correction) value = 0.3f * normal();
                if (pick(2)) args.correction = correction.data();
                CHECK(check_routing(args) == nullptr);
                std::vector<int32_t> experts(top_k);
                route(args, logits.data(), experts.data(), factors.data());
                const Choice right = oracle_route(args, logits.data());
                for (int64_t i = 0; i < top_k; ++i) {
                    CHECK(experts[i] == right.experts[i], "%lld of %lld, scoring %d: expert %d, not %d", number(i),
                          number(num_experts), scoring, experts[i], right.experts[i]);
                    CHECK(std::fabs(factors[i] - right.factors[i]) <= 3e-6 * std::fabs(right.factors[i]),
                          "factor %g, not %g", factors[i], right.factors[i]);
                }
            }
        }
    }
}

// Equal scores: the lower index, of groups too; and what is no number is chosen last and harms nothing.
void test_ties_and_no_numbers() {
    int32_t experts[8];
    float factors[8];
    const auto chosen = [&](const Args& args, std::vector<float> logits) {
        route(args, logits.data(), experts, factors);
        return std::vector<int32_t>(experts, experts + args.top_k);
    };
    using Ints = std::vector<int32_t>;
    for (int scoring = 0; scoring < 3; ++scoring) {
        Args args = routing(6, 2, scoring, true);
        CHECK((chosen(args, {1, 1, 1, 1, 1, 1}) == Ints{0, 1}));
        CHECK((chosen(args, {0, 3, 1, 3, 3, 0}) == Ints{1, 3}));
        CHECK(factors[0] == 0.5f && factors[1] == 0.5f);
        const float correction[] = {0, 0, 0, 0, 0, 99};
        args.correction = correction;  // chooses, and does not weigh
        CHECK((chosen(args, {0, 3, 1, 3, 3, -9}) == Ints{1, 5}));
        CHECK(factors[0] > 0.99f && factors[1] < 0.01f);
        args.correction = nullptr;
        args.num_expert_groups = 3, args.top_groups = 1, args.group_top = 2;
        CHECK((chosen(args, {0, 5, 3, 3, 3, 3}) == Ints{2, 3} || scoring != PENSTOCK_SOFTMAX_CHOSEN));
        CHECK((chosen(args, {0, 0, 4, 4, 4, 4}) == Ints{2, 3}));
        args.group_top = 1;
        CHECK((chosen(args, {0, 5, 3, 3, 3, 3}) == Ints{0, 1}));
        const float nan = NAN, infinity = INFINITY;
        for (const auto& logits : {std::vector<float>{nan, nan, nan, nan, nan, nan}, {1, nan, 2, nan, nan, 3},
                                   {-infinity, -infinity, -infinity, -infinity, -infinity, -infinity},
                                   {infinity, -infinity, infinity, nan, 1, 2}, {nan, 0, 0, 0, 0, -infinity}}) {
            for (const int64_t groups : {1, 3}) {
                args.num_expert_groups = groups;
                const Ints found = chosen(args, logits);
                CHECK(found[0] >= 0 && found[0] < found[1] && found[1] < 6, "%d, %d", found[0], found[1]);
            }
        }
        args.num_expert_groups = 1;
        CHECK((chosen(args, {1, nan, 2, nan, nan, 3}) == Ints{2, 5} || scoring == PENSTOCK_SOFTMAX));
        CHECK(scoring == PENSTOCK_SOFTMAX ? factors[0] != factors[0] : factors[0] > 0);
    }
}

}  // namespace

int main() {
    test_routing();
    test_ties_and_no_numbers();
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
