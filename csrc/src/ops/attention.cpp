// Attention over a paged store, one path for prefill and decode: causal, in a window of the last
// tokens, or over all of a request (encoders); with the score cap of Gemma 2, the sinks of GPT-OSS
// (a score without a value), and with latent attention (DeepSeek-V2 2024, absorbed: one vector a
// token is key and value of every head). What is done in which pieces: attention_plan.h; how a piece
// is done: attention_unit.h.
//
// Invariant: a query's result depends on its own request's tokens alone, bit by bit: not on the
// batch, the tile, the chunks of prefill, the block size, or the number of threads. Chunks and splits
// begin at fixed positions of the context; splits are always summed apart and merged in order,
// whether one thread takes them one by one or several threads share them ("split KV", Dao 2023).
// Nothing outside of all of a tile's windows is read, neither tokens nor their blocks' numbers.
// One exception: in bf16 on AMX (and its emulation) the last bits may depend on how many rows and
// tokens of a chunk the products are given, and so on all but the block size; on the threads only
// if a group of query heads is parted for them.
#include "attention_unit.h"

namespace penstock {

namespace {

using namespace attention;

// One vector as the store has it.
void write_vector(const Args& args, const void* from, int64_t row) {
    const Kernels& kernel = kernels();
    const int64_t d = args.head_dim, size = size_of(args.kv_dtype);
    char* to = static_cast<char*>(args.kv) + row * d * size;
    const auto* x = static_cast<const float*>(from);
    const auto* y = static_cast<const uint16_t*>(from);
    int32_t sum;
    if (args.kv_dtype == PENSTOCK_INT8) {
        auto* q = reinterpret_cast<int8_t*>(to);
        args.kv_scales[row] = args.dtype == PENSTOCK_F32 ? kernel.linear.quantize_f32(x, d, d, q, &sum)
                                                         : kernel.linear.quantize_bf16(y, d, d, q, &sum);
    } else if (args.kv_dtype == args.dtype) {
        memcpy(to, from, d * size);
    } else if (args.kv_dtype == PENSTOCK_BF16) {
        kernel.rows->f32_to_bf16(x, reinterpret_cast<uint16_t*>(to), d);
    } else {
        kernel.rows->bf16_to_f32(y, reinterpret_cast<float*>(to), d);
    }
}

// Keys and values of the step's tokens to their slots.
void write_tokens(const Args& args, const penstock_step& step, Team& team) {
    const int64_t size = size_of(args.dtype), num_vectors = args.latent ? 1 : 2 * args.num_kv_heads;
    const int64_t stride = (args.latent ? args.latent_stride : args.qkv_stride) * size;
    const int64_t vector_bytes = args.head_dim * size;
    const char* vectors = args.latent ? static_cast<const char*>(args.latent)
                                      : static_cast<const char*>(args.qkv) + args.num_heads * vector_bytes;
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        for (int64_t i = 0; i < num_vectors; ++i) {
            const char* from = vectors + token * stride + i * vector_bytes;
            write_vector(args, from, i * args.num_slots + step.slot_mapping[token]);
        }
    }
}

// What all threads of a run have in common, and the memory of this one.
struct Run {
    const Args& args;
    const penstock_step& step;
    const Workspace& space;
    const Shared& shared;
    Team& team;

    Unit unit(const Tile& tile, int64_t group) const { return {args, step, space, *shared.plan, tile, group}; }
};

// Returns the next task, which is taken as soon as its first chunk can be fetched.
int64_t run_task(const Run& run, int64_t index) {
    const Task task(run.shared, index);
    const Tile& tile = task.tile;
    const Workspace& space = run.space;
    const Unit unit = run.unit(tile, task.group);
    int64_t next = -1;
    const auto gather_next = [&](Chunk& chunk) {
        next = run.team.next(run.shared.plan->num_tasks);
        if (next < 0) return false;
        const Task other(run.shared, next);
        run.unit(other.tile, other.group).gather(other.first, other.last(other.first), chunk);
        return true;
    };
    unit.load_queries();
    if (tile.num_pieces > 1) {
        const SoftmaxState part = partial_of(run.shared, tile, task.group, task.piece);
        unit.attend(task.first, task.last(task.first), part, gather_next);
        return next;
    }
    for (int64_t first = task.first; first < tile.end; first = split_end(first)) {
        const int64_t last = task.last(first);
        unit.attend(first, last, first == task.first ? space.whole : space.part, [&](Chunk& chunk) {
            if (last == tile.end) return gather_next(chunk);
            unit.gather(last, task.last(last), chunk);
            return true;
        });
        if (first > task.first) kernels().rows->merge(unit.num_rows(), space.whole, space.part);
    }
    unit.store(space.whole);
    return next;
}

void merge_pieces(const Run& run) {
    const int64_t num_groups = run.shared.plan->num_groups, num_tasks = run.shared.plan->num_tiles * num_groups;
    for (int64_t task = run.team.next(num_tasks); task >= 0; task = run.team.next(num_tasks)) {
        const Tile& tile = run.shared.tiles[task / num_groups];
        const int64_t group = task % num_groups;
        if (tile.num_pieces == 1) continue;
        const Unit unit = run.unit(tile, group);
        const SoftmaxState whole = partial_of(run.shared, tile, group, 0);
        for (int64_t piece = 1; piece < tile.num_pieces; ++piece) {
            kernels().rows->merge(unit.num_rows(), whole, partial_of(run.shared, tile, group, piece));
        }
        unit.store(whole);
    }
}

void run(const void* op_args, const penstock_step& step, Team& team) {
    const Args& args = *static_cast<const Args*>(op_args);
    const Workspace space(team.scratch(), args);
    const Shared shared(team.shared_scratch(), args, team.num_threads());
    if (team.thread() == 0) make_plan(args, step, team.num_threads(), shared);
    write_tokens(args, step, team);
    memset(space.zeros, 0, args.head_dim * 4);
    team.barrier();
    const Run all{args, step, space, shared, team};
    const int64_t num_tasks = shared.plan->num_tasks;
    for (int64_t task = team.next(num_tasks); task >= 0;) task = run_task(all, task);
    if (!shared.plan->has_pieces) return;
    team.barrier();
    merge_pieces(all);
}

Scratch scratch(const void* op_args, int64_t max_tokens, int64_t, int num_threads) {
    const Args& args = *static_cast<const Args*>(op_args);
    const Workspace space(nullptr, args);
    Shared shared(nullptr, args, num_threads);
    shared.carver.take<Tile>(max_tokens);
    return {space.carver.used, shared.carver.used};
}

const char* check_shape(const Args& args) {
    if (args.num_heads < 1 || args.num_kv_heads < 1 || args.num_heads % args.num_kv_heads) {
        return "attention: num_heads must be a multiple of num_kv_heads";
    }
    if (args.head_dim < 2 || args.head_dim > 640 || args.head_dim % 2) {
        return "attention: head_dim must be even and at most 640";
    }
    if (args.latent && args.num_kv_heads != 1) return "attention: latent vectors have one key-value head";
    if (args.latent && (args.value_dim < 1 || args.value_dim > args.head_dim)) {
        return "attention: value_dim of latent vectors must be between 1 and head_dim";
    }
    if (!args.latent && args.value_dim != args.head_dim) return "attention: value_dim must be head_dim";
    const int64_t num_vectors = args.num_heads + (args.latent ? 0 : 2 * args.num_kv_heads);
    if (args.qkv_stride < num_vectors * args.head_dim || args.out_stride < args.num_heads * args.value_dim ||
        (args.latent && args.latent_stride < args.head_dim)) {
        return "attention: rows overlap";
    }
    if (args.num_slots < 1) return "attention: no slots";
    return nullptr;
}

const char* check(const void* op_args) {
    const Args& args = *static_cast<const Args*>(op_args);
    if (args.dtype != PENSTOCK_F32 && args.dtype != PENSTOCK_BF16) return "attention: dtype must be F32 or BF16";
    if (args.kv_dtype != PENSTOCK_F32 && args.kv_dtype != PENSTOCK_BF16 && args.kv_dtype != PENSTOCK_INT8) {
        return "attention: kv_dtype must be F32, BF16 or INT8";
    }
    if (!args.qkv || !args.out || !args.kv) return "attention: a pointer is null";
    if (args.kv_dtype == PENSTOCK_INT8 && !args.kv_scales) return "attention: INT8 needs kv_scales";
    if (const char* problem = check_shape(args)) return problem;
    if (!std::isfinite(args.scale)) return "attention: scale must be finite";
    if (!(args.softcap >= 0) || !std::isfinite(args.softcap) ||
        (args.softcap > 0 && !std::isfinite(args.scale / args.softcap))) {
        return "attention: softcap must be 0 or a cap that scores can have";
    }
    if (args.window < 0) return "attention: window must not be negative";
    if (args.is_causal != 0 && args.is_causal != 1) return "attention: is_causal must be 0 or 1";
    if (args.window && !args.is_causal) return "attention: a window needs is_causal";
    return nullptr;
}

}  // namespace

const Op attention_op = {run, scratch, check};

}  // namespace penstock
