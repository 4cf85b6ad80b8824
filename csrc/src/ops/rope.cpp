// Rotary position embedding (Su et al. 2021): the angles of a step, once, and the rotation of heads,
// whole or their first part (Black et al. 2022, GPT-NeoX).
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "rows.h"
#include "tokens.h"

namespace penstock {

namespace {

void run_angles(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_angles_args*>(op_args);
    for_tokens(step, team, [&](int64_t token) {
        float* out = args.out + token * 2 * args.half;
        const float position = static_cast<float>(step.positions[token]);
        for (int64_t i = 0; i < args.half; ++i) {
            const float angle = position * args.frequencies[i];
            out[i] = std::cos(angle) * args.scale;
            out[args.half + i] = std::sin(angle) * args.scale;
        }
    });
}

const char* check_angles(const void* op_args) {
    const auto& args = *static_cast<const penstock_angles_args*>(op_args);
    if (!args.frequencies || !args.out) return "angles: a pointer is null";
    if (args.half < 1) return "angles: no frequencies";
    if (!std::isfinite(args.scale) || args.scale == 0) return "angles: the scale must be finite and not 0";
    return nullptr;
}

void run_rope(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_rope_args*>(op_args);
    const RowKernels& rows = *kernels().rows;
    for_tokens(step, team, [&](int64_t token) {
        const float* angles = args.angles + token * 2 * args.half;
        void* x = at(args.x, args.dtype, token * args.stride + args.first);
        if (args.dtype == PENSTOCK_F32) {
            rows.rope_f32(angles, static_cast<float*>(x), args.num_heads, args.head_stride, args.half);
        } else {
            rows.rope_bf16(angles, static_cast<uint16_t*>(x), args.num_heads, args.head_stride, args.half);
        }
    });
}

const char* check_rope(const void* op_args) {
    const auto& args = *static_cast<const penstock_rope_args*>(op_args);
    if (!is_row_dtype(args.dtype)) return "rope: dtype must be F32 or BF16";
    if (!args.angles || !args.x) return "rope: a pointer is null";
    if (args.half < 1 || args.num_heads < 1) return "rope: nothing to rotate";
    if (args.head_stride < 2 * args.half) return "rope: heads overlap";
    // The last head may end before its stride does.
    const int64_t last = args.stride - args.first - 2 * args.half;
    if (args.first < 0 || last < 0 || last / args.head_stride < args.num_heads - 1) return "rope: rows overlap";
    return nullptr;
}

}  // namespace

const Op angles_op = {run_angles, no_scratch, check_angles};
const Op rope_op = {run_rope, no_scratch, check_rope};

}  // namespace penstock
