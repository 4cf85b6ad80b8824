// How ops over rows divide a step: every thread takes a run of tokens, and no token needs another.
#pragma once

#include <cstdint>

#include "ops.h"

namespace penstock {

// Calls body(token) for the tokens of this thread.
template <typename Body>
inline void for_tokens(const penstock_step& step, const Team& team, Body&& body) {
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) body(token);
}

inline Scratch no_scratch(const void*, int64_t, int64_t, int) { return {}; }

inline bool is_row_dtype(int32_t dtype) { return dtype == PENSTOCK_F32 || dtype == PENSTOCK_BF16; }

// The number at `index` of an array of floats or bf16.
inline void* at(void* x, int32_t dtype, int64_t index) {
    return static_cast<char*>(x) + index * (dtype == PENSTOCK_F32 ? 4 : 2);
}
inline const void* at(const void* x, int32_t dtype, int64_t index) { return at(const_cast<void*>(x), dtype, index); }

}  // namespace penstock
