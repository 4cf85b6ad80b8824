// Rows of the embedding table, straight out of its packed panels (it may be the output head's too),
// with a factor and learned positions where a model has them.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "pack.h"
#include "tokens.h"

namespace penstock {

namespace {

void run(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_embed_args*>(op_args);
    const int64_t size = args.table.num_columns;
    for_tokens(step, team, [&](int64_t token) {
        float* out = args.out + token * args.out_stride;
        unpack_row(args.table, step.input_ids[token], out);
        if (args.scale != 1) {
            for (int64_t i = 0; i < size; ++i) out[i] *= args.scale;
        }
        if (args.positions) {
            const float* added = args.positions + std::min(step.positions[token], args.num_positions - 1) * size;
            for (int64_t i = 0; i < size; ++i) out[i] += added[i];
        }
    });
}

const char* check(const void* op_args) {
    const auto& args = *static_cast<const penstock_embed_args*>(op_args);
    if (const char* problem = check_weight(args.table)) return problem;
    if (!args.out) return "embed: no output";
    if (args.out_stride < args.table.num_columns) return "embed: rows of the output overlap";
    if (!std::isfinite(args.scale) || args.scale == 0) return "embed: the scale must be finite and not 0";
    if (args.positions && args.num_positions < 1) return "embed: no positions";
    return nullptr;
}

}  // namespace

const Op embed_op = {run, no_scratch, check};

}  // namespace penstock
