// Sources: Shazeer et al. 2017 (a mixture of experts); DeepSeek-AI 2024 (V2: groups of experts; V3:
// sigmoid scores and a correction that chooses but does not weigh).
#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace penstock {

namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();
constexpr float kTaken = std::numeric_limits<float>::quiet_NaN();  // a key that cannot be chosen

// Softmax of x[n] in place.
void softmax(float* x, int64_t n) {
    const float peak = *std::max_element(x, x + n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - peak);
    const auto inverse = static_cast<float>(1 / sum);
    for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
}

// The first of the largest keys of [first, last) that are not taken, or -1.
int64_t best_of(const float* keys, int64_t first, int64_t last) {
    int64_t best = -1;
    float top = kLeast;
    for (int64_t i = first; i < last; ++i) {
        if (keys[i] > top || (best < 0 && keys[i] == keys[i])) {
            best = i;
            top = keys[i];
        }
    }
    return best;
}

// Takes the experts of all groups but the best ones out of the choice.
void keep_best_groups(const penstock_experts_args& args, float* keys) {
    const int64_t size = args.num_experts / args.num_expert_groups;
    float groups[kMaxExperts];
    for (int64_t g = 0; g < args.num_expert_groups; ++g) {
        const int64_t first = g * size, best = best_of(keys, first, first + size);
        groups[g] = keys[best];
        if (args.group_top == 2) {
            float second = kLeast;
            for (int64_t i = first; i < first + size; ++i) second = i != best ? std::max(second, keys[i]) : second;
            groups[g] += second;
        }
        if (groups[g] != groups[g]) groups[g] = kLeast;  // infinities of both signs
    }
    for (int64_t i = 0; i < args.top_groups; ++i) groups[best_of(groups, 0, args.num_expert_groups)] = kTaken;
    for (int64_t g = 0; g < args.num_expert_groups; ++g) {
        if (groups[g] == groups[g]) std::fill_n(keys + g * size, size, kTaken);
    }
}

}  // namespace

const char* check_routing(const penstock_experts_args& args) {
    const int64_t groups = args.num_expert_groups;
    if (args.num_experts < 1 || args.num_experts > kMaxExperts) return "experts: between 1 and 1024 of them";
    if (args.top_k < 1 || args.top_k > kMaxChosen || args.top_k > args.num_experts) {
        return "experts: a token has at least one, at most 64, and not more than there are";
    }
    if (args.scoring < PENSTOCK_SOFTMAX || args.scoring > PENSTOCK_SOFTMAX_CHOSEN) return "experts: unknown scoring";
    if (groups < 1 || args.num_experts % groups) return "experts: groups of different sizes";
    if (groups > 1) {
        const int64_t size = args.num_experts / groups;
        if (args.group_top != 1 && args.group_top != 2) return "experts: a group's best or its two best count";
        if (args.group_top > size) return "experts: groups of one have no two best";
        if (args.top_groups < 1 || args.top_groups > groups) return "experts: more groups chosen than there are";
        if (args.top_groups * size < args.top_k) return "experts: the chosen groups hold too few";
    }
    if (!std::isfinite(args.routed_scale)) return "experts: routed_scale must be finite";
    return nullptr;
}

void route(const penstock_experts_args& args, const float* logits, int32_t* experts, float* factors) {
    const int64_t n = args.num_experts, k = args.top_k;
    float scores[kMaxExperts], keys[kMaxExperts];
    std::copy_n(logits, n, scores);
    if (args.scoring == PENSTOCK_SOFTMAX) softmax(scores, n);
    if (args.scoring == PENSTOCK_SIGMOID) {
        for (int64_t i = 0; i < n; ++i) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    }
    for (int64_t i = 0; i < n; ++i) {
        const float key = args.correction ? scores[i] + args.correction[i] : scores[i];
        keys[i] = key == key ? key : kLeast;
    }
    if (args.num_expert_groups > 1) keep_best_groups(args, keys);
    for (int64_t i = 0; i < k; ++i) {
        const int64_t best = best_of(keys, 0, n);
        experts[i] = static_cast<int32_t>(best);
        keys[best] = kTaken;
    }
    std::sort(experts, experts + k);
    for (int64_t i = 0; i < k; ++i) factors[i] = scores[experts[i]];
    if (args.scoring == PENSTOCK_SOFTMAX_CHOSEN) softmax(factors, k);
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += factors[i];
    for (int64_t i = 0; i < k; ++i) {
        if (args.normalise) factors[i] /= sum + 1e-20f;
        factors[i] *= args.routed_scale;
    }
}

}  // namespace penstock
