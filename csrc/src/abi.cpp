// The C functions of penstock_native.h that are not about weights, and the choice of kernels.
#include <cstdio>
#include <new>

#include "cpu.h"
#include "kernels.h"
#include "ops.h"
#include "penstock_native.h"

namespace penstock {

namespace {

thread_local char last_error[256] = "";

const Kernels kTables[] = {
    {PENSTOCK_SCALAR, scalar_linear, &scalar_rows, &scalar_codes},
#if defined(PENSTOCK_X86)
    {PENSTOCK_AVX2, avx2_linear, &avx2_rows, &avx2_codes},
    {PENSTOCK_AVX512, avx512_linear, &avx512_rows, &avx512_codes},
    {PENSTOCK_AMX, amx_linear, &avx512_rows, &amx_codes},
    {PENSTOCK_AMX_EMULATED, amx_emulated_linear, &avx512_rows, &amx_emulated_codes},
#endif
};

const Kernels* best() {
    const Kernels* found = &kTables[0];
    for (const Kernels& table : kTables) {
        if (table.isa != PENSTOCK_AMX_EMULATED && penstock_available_isas() >> table.isa & 1) found = &table;
    }
    return found;
}

const Kernels*& chosen() {
    static const Kernels* table = best();
    return table;
}

const Op* op_of(int64_t kind) {
    switch (kind) {
        case PENSTOCK_OP_EMBED: return &embed_op;
        case PENSTOCK_OP_NORM: return &norm_op;
        case PENSTOCK_OP_LINEAR: return &linear_op;
        case PENSTOCK_OP_ANGLES: return &angles_op;
        case PENSTOCK_OP_ROPE: return &rope_op;
        case PENSTOCK_OP_ATTENTION: return &attention_op;
        case PENSTOCK_OP_SLICE_NORM: return &slice_norm_op;
        case PENSTOCK_OP_ADD: return &add_op;
        case PENSTOCK_OP_COPY: return &copy_op;
        case PENSTOCK_OP_EXPERTS: return &experts_op;
        default: return nullptr;
    }
}

struct Program {
    const penstock_op* ops;
    int64_t num_ops;
    const penstock_step* step;
};

void walk(Team& team, const void* context) {
    const Program& program = *static_cast<const Program*>(context);
    for (int64_t i = 0; i < program.num_ops; ++i) {
        op_of(program.ops[i].kind)->run(program.ops[i].args, *program.step, team);
        team.barrier();
    }
}

// The most that any op needs.
Scratch scratch_of(const penstock_op* ops, int64_t num_ops, int64_t num_tokens, int64_t num_logit_rows,
                   const Pool& pool) {
    Scratch most;
    for (int64_t i = 0; i < num_ops; ++i) {
        const Scratch one = op_of(ops[i].kind)->scratch(ops[i].args, num_tokens, num_logit_rows, pool.num_threads());
        if (one.thread_bytes > most.thread_bytes) most.thread_bytes = one.thread_bytes;
        if (one.shared_bytes > most.shared_bytes) most.shared_bytes = one.shared_bytes;
    }
    return most;
}

}  // namespace

void set_error(const char* message) { snprintf(last_error, sizeof last_error, "%s", message); }

const Kernels& kernels() { return *chosen(); }

}  // namespace penstock

using namespace penstock;

extern "C" {

int32_t penstock_abi_version(void) { return PENSTOCK_ABI_VERSION; }

const char* penstock_last_error(void) { return last_error; }

uint64_t penstock_available_isas(void) {
    static const uint64_t found = [] {
        uint64_t held = 0;
        for (const Kernels& table : kTables) held |= uint64_t{1} << table.isa;
        return held & detect_isas();
    }();
    return found;
}

int32_t penstock_isa(void) { return kernels().isa; }

int32_t penstock_set_isa(int32_t isa) {
    for (const Kernels& table : kTables) {
        if (table.isa == isa && penstock_available_isas() >> isa & 1) {
            chosen() = &table;
            return 0;
        }
    }
    set_error("isa: not available here");
    return -1;
}

penstock_pool* penstock_pool_create(int32_t num_threads, const int32_t* cpus) {
    if (num_threads < 1 || num_threads > 1024) {
        set_error("pool: between 1 and 1024 threads");
        return nullptr;
    }
    try {
        return new penstock_pool(num_threads, cpus);
    } catch (const std::exception& error) {
        char message[200];
        snprintf(message, sizeof message, "pool: the system does not give %d threads: %s", num_threads, error.what());
        set_error(message);
        return nullptr;
    }
}

void penstock_pool_destroy(penstock_pool* pool) {
    if (!pool || pool->problem()) return;  // a fork has no threads to wait for, and its memory ends with it
    delete pool;
}

int64_t penstock_reserve(penstock_pool* pool, const penstock_op* ops, int64_t num_ops, int64_t max_tokens,
                         int64_t max_logit_rows) {
    for (int64_t i = 0; i < num_ops; ++i) {
        const Op* op = op_of(ops[i].kind);
        const char* problem = op ? op->check(ops[i].args) : "program: unknown op";
        if (problem) {
            char message[200];
            snprintf(message, sizeof message, "op %lld: %s", static_cast<long long>(i), problem);
            set_error(message);
            return -1;
        }
    }
    const Scratch most = scratch_of(ops, num_ops, max_tokens, max_logit_rows, *pool);
    if (!pool->reserve(most.thread_bytes, most.shared_bytes)) {
        set_error("program: no memory for its scratch");
        return -1;
    }
    return pool->scratch_bytes();
}

int32_t penstock_run(penstock_pool* pool, const penstock_op* ops, int64_t num_ops, const penstock_step* step) {
    const char* problem = pool->problem();
    for (int64_t i = 0; i < num_ops && !problem; ++i) {
        if (!op_of(ops[i].kind)) problem = "program: unknown op";
    }
    if (!problem) {
        const Scratch most = scratch_of(ops, num_ops, step->num_tokens, step->num_logit_rows, *pool);
        if (!pool->holds(most.thread_bytes, most.shared_bytes)) problem = "step: more tokens than were reserved";
    }
    if (problem) {
        set_error(problem);
        return -1;
    }
    const Program program{ops, num_ops, step};
    pool->run(walk, &program);
    return 0;
}

}  // extern "C"
