// Root mean square norm (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016): of the residual
// stream after a sum, of a plain value, and of runs of numbers within rows.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "rows.h"
#include "tokens.h"

namespace penstock {

namespace {

void run_norm(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_norm_args*>(op_args);
    const auto kernel = kernels().rows->norm[args.dtype == PENSTOCK_BF16][args.out_dtype == PENSTOCK_BF16];
    for_tokens(step, team, [&](int64_t token) {
        kernel({args.residual ? args.residual + token * args.residual_stride : nullptr,
                args.x ? at(args.x, args.dtype, token * args.x_stride) : nullptr, args.x_scale, args.weight, args.bias,
                at(args.out, args.out_dtype, token * args.out_stride), args.size, args.eps,
                args.kind == PENSTOCK_LAYER_NORM});
    });
}

const char* check_norm(const void* op_args) {
    const auto& args = *static_cast<const penstock_norm_args*>(op_args);
    if (!is_row_dtype(args.dtype) || !is_row_dtype(args.out_dtype)) return "norm: dtypes must be F32 or BF16";
    if (args.kind != PENSTOCK_RMS_NORM && args.kind != PENSTOCK_LAYER_NORM) return "norm: unknown kind";
    if (!args.out || (!args.residual && !args.x)) return "norm: a pointer is null";
    if (args.size < 1) return "norm: empty rows";
    if (!(args.eps >= 0)) return "norm: eps must not be negative";
    if (args.residual && args.x && (!std::isfinite(args.x_scale) || args.x_scale == 0)) {
        return "norm: the scale of x must be finite and not 0";
    }
    if ((args.residual && args.residual_stride < args.size) || args.out_stride < args.size ||
        (args.x && args.x_stride < args.size)) {
        return "norm: rows overlap";
    }
    return nullptr;
}

void run_slice_norm(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_slice_norm_args*>(op_args);
    const auto kernel = kernels().rows->norm_runs[args.dtype == PENSTOCK_BF16];
    for_tokens(step, team, [&](int64_t token) {
        kernel({at(args.x, args.dtype, token * args.stride + args.first), args.num_runs, args.size, args.weight,
                args.weight_stride, args.eps, args.kind == PENSTOCK_LAYER_NORM});
    });
}

const char* check_slice_norm(const void* op_args) {
    const auto& args = *static_cast<const penstock_slice_norm_args*>(op_args);
    if (!is_row_dtype(args.dtype)) return "slice norm: dtype must be F32 or BF16";
    if (args.kind != PENSTOCK_RMS_NORM && args.kind != PENSTOCK_LAYER_NORM) return "slice norm: unknown kind";
    if (!args.x) return "slice norm: a pointer is null";
    if (args.size < 1 || args.num_runs < 1) return "slice norm: nothing to norm";
    if (args.weight_stride != 0 && args.weight_stride != args.size) return "slice norm: weights of the wrong stride";
    if (!(args.eps >= 0)) return "slice norm: eps must not be negative";
    if (args.first < 0 || (args.stride - args.first) / args.size < args.num_runs) return "slice norm: rows overlap";
    return nullptr;
}

}  // namespace

const Op norm_op = {run_norm, no_scratch, check_norm};
const Op slice_norm_op = {run_slice_norm, no_scratch, check_slice_norm};

}  // namespace penstock
