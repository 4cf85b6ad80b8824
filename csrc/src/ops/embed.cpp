// Rows of the embedding table, straight out of its packed panels (it may be the output head's too).
#include "ops.h"
#include "pack.h"

namespace penstock {

namespace {

void run(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_embed_args*>(op_args);
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        unpack_row(args.table, step.input_ids[token], args.out + token * args.out_stride);
    }
}

Scratch scratch(const void*, int64_t, int64_t, int) { return {}; }

const char* check(const void* op_args) {
    const auto& args = *static_cast<const penstock_embed_args*>(op_args);
    if (const char* problem = check_weight(args.table)) return problem;
    if (!args.out) return "embed: no output";
    if (args.out_stride < args.table.num_columns) return "embed: rows of the output overlap";
    return nullptr;
}

}  // namespace

const Op embed_op = {run, scratch, check};

}  // namespace penstock
