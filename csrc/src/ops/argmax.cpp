// The largest logit of each row. As numpy does it: the first NaN wins, else the lowest index of
// equals.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace penstock {

namespace {

constexpr int64_t kColumns = 8192;  // of a task: 32 KiB, about 2 us

int64_t ranges_of(int64_t vocab_size) { return (vocab_size + kColumns - 1) / kColumns; }

void run(const void* op_args, const penstock_step& step, Team& team) {
    const auto& args = *static_cast<const penstock_argmax_args*>(op_args);
    const RowKernels& rows = *kernels().rows;
    auto* winners = reinterpret_cast<int64_t*>(team.shared_scratch());  // [L, ranges]
    const int64_t ranges = ranges_of(args.vocab_size), num_tasks = step.num_logit_rows * ranges;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t first = task % ranges * kColumns;
        const int64_t n = std::min(kColumns, args.vocab_size - first);
        winners[task] = first + rows.argmax(args.logits + task / ranges * args.stride + first, n);
    }
    team.barrier();
    if (team.thread() != 0) return;
    for (int64_t row = 0; row < step.num_logit_rows; ++row) {
        const float* logits = args.logits + row * args.stride;
        int64_t best = winners[row * ranges];
        for (int64_t range = 1; range < ranges && !std::isnan(logits[best]); ++range) {
            const int64_t other = winners[row * ranges + range];
            if (logits[other] > logits[best] || std::isnan(logits[other])) best = other;
        }
        args.token_ids[row] = best;
    }
}

Scratch scratch(const void* op_args, int64_t, int64_t max_logit_rows, int) {
    const auto& args = *static_cast<const penstock_argmax_args*>(op_args);
    return {0, max_logit_rows * ranges_of(args.vocab_size) * static_cast<int64_t>(sizeof(int64_t))};
}

const char* check(const void* op_args) {
    const auto& args = *static_cast<const penstock_argmax_args*>(op_args);
    if (!args.logits || !args.token_ids) return "argmax: a pointer is null";
    if (args.vocab_size < 1) return "argmax: no columns";
    if (args.stride < args.vocab_size) return "argmax: rows overlap";
    return nullptr;
}

}  // namespace

const Op argmax_op = {run, scratch, check};

}  // namespace penstock
