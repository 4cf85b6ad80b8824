// From the logits of a router to the experts of a token.
#pragma once

#include <cstdint>

#include "penstock_native.h"

namespace penstock {

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxChosen = 64;

// Null if `route` can serve these arguments, else what is wrong.
const char* check_routing(const penstock_experts_args& args);

// One token: its top_k experts in ascending order, and their factors. Baseline code, so that every
// instruction set chooses the same. A NaN among the logits is chosen last; where scores depend on all
// logits it makes all factors NaN, and no index is ever out of range.
void route(const penstock_experts_args& args, const float* logits, int32_t* experts, float* factors);

}  // namespace penstock
