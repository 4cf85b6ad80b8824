// Rotary position embedding (Su et al. 2021): the angles of a step, once, and the rotation of heads.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace penstock {

namespace {

Scratch no_scratch(const void*, int64_t, int64_t, int) { return {}; }

void run_angles(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_angles_args*>(op_args);
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        float* out = args.out + token * 2 * args.half;
        const float position = static_cast<float>(step.positions[token]);
        for (int64_t i = 0; i < args.half; ++i) {
            const float angle = position * args.frequencies[i];
            out[i] = std::cos(angle);
            out[args.half + i] = std::sin(angle);
        }
    }
}

const char* check_angles(const void* op_args) {
    const auto& args = *static_cast<const penstock_angles_args*>(op_args);
    if (!args.frequencies || !args.out) return "angles: a pointer is null";
    if (args.half < 1) return "angles: no frequencies";
    return nullptr;
}

void run_rope(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_rope_args*>(op_args);
    const RowKernels& rows = *kernels().rows;
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        const float* angles = args.angles + token * 2 * args.half;
        if (args.dtype == PENSTOCK_F32) {
            rows.rope_f32(angles, static_cast<float*>(args.x) + token * args.stride, args.num_heads, args.half);
        } else {
            rows.rope_bf16(angles, static_cast<uint16_t*>(args.x) + token * args.stride, args.num_heads, args.half);
        }
    }
}

const char* check_rope(const void* op_args) {
    const auto& args = *static_cast<const penstock_rope_args*>(op_args);
    if (args.dtype != PENSTOCK_F32 && args.dtype != PENSTOCK_BF16) return "rope: dtype must be F32 or BF16";
    if (!args.angles || !args.x) return "rope: a pointer is null";
    if (args.half < 1 || args.num_heads < 1) return "rope: nothing to rotate";
    if (args.stride < 2 * args.half * args.num_heads) return "rope: rows overlap";
    return nullptr;
}

}  // namespace

const Op angles_op = {run_angles, no_scratch, check_angles};
const Op rope_op = {run_rope, no_scratch, check_rope};

}  // namespace penstock
