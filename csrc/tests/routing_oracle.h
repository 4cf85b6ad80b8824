// Routing in double precision, as plainly as it can be written.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "penstock_native.h"

struct Choice {
    std::vector<int> experts;  // ascending
    std::vector<double> factors;
};

inline Choice oracle_route(const penstock_experts_args& args, const float* logits) {
    const int n = static_cast<int>(args.num_experts), k = static_cast<int>(args.top_k);
    std::vector<double> scores(logits, logits + n);
    const double peak = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - peak);
    for (double& score : scores) {
        if (args.scoring == PENSTOCK_SOFTMAX) score = std::exp(score - peak) / sum;
        if (args.scoring == PENSTOCK_SIGMOID) score = 1 / (1 + std::exp(-score));
    }
    std::vector<double> keys = scores;
    for (int i = 0; args.correction && i < n; ++i) keys[i] += args.correction[i];
    const auto order_of = [](const std::vector<double>& values) {
        std::vector<int> order(values.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] > values[b]; });
        return order;
    };
    const int groups = static_cast<int>(args.num_expert_groups), size = n / groups;
    std::vector<double> quality(groups);
    for (int g = 0; groups > 1 && g < groups; ++g) {
        std::vector<double> group(keys.begin() + g * size, keys.begin() + (g + 1) * size);
        std::sort(group.rbegin(), group.rend());
        quality[g] = args.group_top == 2 ? group[0] + group[1] : group[0];
    }
    const std::vector<int> best = order_of(quality);
    const auto allowed = [&](int expert) {
        return groups == 1 || std::find(best.begin(), best.begin() + args.top_groups, expert / size) <
                                  best.begin() + args.top_groups;
    };
    Choice choice;
    for (const int expert : order_of(keys)) {
        if (allowed(expert) && static_cast<int>(choice.experts.size()) < k) choice.experts.push_back(expert);
    }
    std::sort(choice.experts.begin(), choice.experts.end());
    double total = 0;
    for (const int expert : choice.experts) {
        const bool late = args.scoring == PENSTOCK_SOFTMAX_CHOSEN;
        choice.factors.push_back(late ? std::exp(scores[expert] - peak) : scores[expert]);
        total += choice.factors.back();
    }
    for (double& factor : choice.factors) {
        if (args.normalise || args.scoring == PENSTOCK_SOFTMAX_CHOSEN) factor /= total;
        factor *= args.routed_scale;
    }
    return choice;
}
