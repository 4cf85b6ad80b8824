// Residual sum and root mean square norm (Zhang and Sennrich 2019), a row a token.
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace penstock {

namespace {

void run(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_norm_args*>(op_args);
    const RowKernels& rows = *kernels().rows;
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        float* residual = args.residual + token * args.residual_stride;
        const int64_t x = token * args.x_stride, out = token * args.out_stride;
        if (args.dtype == PENSTOCK_F32) {
            rows.norm_f32(residual, args.x ? static_cast<const float*>(args.x) + x : nullptr, args.weight,
                          static_cast<float*>(args.out) + out, args.size, args.eps);
        } else {
            rows.norm_bf16(residual, args.x ? static_cast<const uint16_t*>(args.x) + x : nullptr, args.weight,
                           static_cast<uint16_t*>(args.out) + out, args.size, args.eps);
        }
    }
}

Scratch scratch(const void*, int64_t, int64_t, int) { return {}; }

const char* check(const void* op_args) {
    const auto& args = *static_cast<const penstock_norm_args*>(op_args);
    if (args.dtype != PENSTOCK_F32 && args.dtype != PENSTOCK_BF16) return "norm: dtype must be F32 or BF16";
    if (!args.residual || !args.weight || !args.out) return "norm: a pointer is null";
    if (args.size < 1) return "norm: empty rows";
    if (!(args.eps >= 0)) return "norm: eps must not be negative";
    if (args.residual_stride < args.size || args.out_stride < args.size || (args.x && args.x_stride < args.size)) {
        return "norm: rows overlap";
    }
    return nullptr;
}

}  // namespace

const Op norm_op = {run, scratch, check};

}  // namespace penstock
