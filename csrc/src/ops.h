// The ops of a program: independent of the instruction set, they divide the work and call kernels.
#pragma once

#include <cstdint>

#include "penstock_native.h"
#include "pool.h"

namespace penstock {

struct Scratch {
    int64_t thread_bytes = 0;
    int64_t shared_bytes = 0;
};

struct Op {
    // Runs on every thread of the team; a barrier follows.
    void (*run)(const void* args, const penstock_step& step, Team& team);
    // What `run` needs at most.
    Scratch (*scratch)(const void* args, int64_t max_tokens, int64_t max_logit_rows, int num_threads);
    // Null if the arguments can be served, else what is wrong.
    const char* (*check)(const void* args);
};

extern const Op embed_op, norm_op, slice_norm_op, add_op, copy_op, linear_op, angles_op, rope_op, attention_op, experts_op;

void set_error(const char* message);  // of the calling thread

}  // namespace penstock
