// What a composition does beside norms and products: a sum into the residual stream, and groups of
// numbers put elsewhere.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "ops.h"
#include "rows.h"
#include "tokens.h"

namespace penstock {

namespace {

void run_add(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_add_args*>(op_args);
    const auto kernel = kernels().rows->add[args.dtype == PENSTOCK_BF16];
    for_tokens(step, team, [&](int64_t token) {
        kernel(args.residual + token * args.residual_stride, at(args.x, args.dtype, token * args.x_stride), args.scale,
               args.size);
    });
}

const char* check_add(const void* op_args) {
    const auto& args = *static_cast<const penstock_add_args*>(op_args);
    if (!is_row_dtype(args.dtype)) return "add: dtype must be F32 or BF16";
    if (!args.residual || !args.x) return "add: a pointer is null";
    if (args.size < 1) return "add: empty rows";
    if (args.residual_stride < args.size || args.x_stride < args.size) return "add: rows overlap";
    if (!std::isfinite(args.scale) || args.scale == 0) return "add: the scale must be finite and not 0";
    return nullptr;
}

void run_copy(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_copy_args*>(op_args);
    const size_t num_bytes = static_cast<size_t>(args.size) * (args.dtype == PENSTOCK_F32 ? 4 : 2);
    for_tokens(step, team, [&](int64_t token) {
        for (int64_t group = 0; group < args.num_groups; ++group) {
            memcpy(at(args.to, args.dtype, token * args.to_stride + group * args.to_group_stride),
                   at(args.from, args.dtype, token * args.from_stride + group * args.from_group_stride), num_bytes);
        }
    });
}

// Whether groups of `size` numbers, `group_stride` apart, fit into rows that are `stride` apart.
bool fits(int64_t stride, int64_t group_stride, int64_t num_groups, int64_t size) {
    if (stride < size || group_stride < 0) return false;
    return num_groups == 1 || group_stride == 0 || (stride - size) / group_stride >= num_groups - 1;
}

const char* check_copy(const void* op_args) {
    const auto& args = *static_cast<const penstock_copy_args*>(op_args);
    if (!is_row_dtype(args.dtype)) return "copy: dtype must be F32 or BF16";
    if (!args.from || !args.to) return "copy: a pointer is null";
    if (args.size < 1 || args.num_groups < 1) return "copy: nothing to copy";
    // Of what is read, groups may overlap or be the same one: a latent part for every head.
    if (!fits(args.from_stride, args.from_group_stride, args.num_groups, args.size) ||
        !fits(args.to_stride, args.to_group_stride, args.num_groups, args.size)) {
        return "copy: rows overlap";
    }
    if (args.num_groups > 1 && args.to_group_stride < args.size) return "copy: groups of the result overlap";
    return nullptr;
}

}  // namespace

const Op add_op = {run_add, no_scratch, check_add};
const Op copy_op = {run_copy, no_scratch, check_copy};

}  // namespace penstock
