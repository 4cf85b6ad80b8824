// Causal attention over a paged store, one path for prefill and decode.
//
// A unit of work is a tile of a request's queries with one key-value head. Its rows are the queries
// times the query heads that share the head. The context is taken in chunks of kChunk tokens: keys
// and values are gathered and packed into panels once for all rows, and two small matrix products
// with online softmax between them (Dao et al. 2022) do the rest. For one query of decode the same
// code runs with few rows.
//
// Invariant: a query's result depends on its own request's tokens alone, bit by bit: not on the
// batch, the tile, the chunks of prefill, the block size, or the number of threads. Chunks and splits
// begin at fixed positions of the context; splits are always summed apart and merged in order,
// whether one thread takes them one by one or several threads share them ("split KV", Dao 2023).
// One exception: in bf16 on AMX (and its emulation) the last bits may depend on how many rows and
// tokens of a chunk the products are given, and so on all but the block size and the threads.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace penstock {

namespace {

constexpr int64_t kTileRows = 128;      // of a unit, at most, unless one query has more heads
constexpr int64_t kSplit = 512;         // tokens of a split at the beginning of the context
constexpr int64_t kTasksPerThread = 4;  // finer units would cost more than an idle end of a thread
constexpr float kLog2E = 1.44269504f;

// A chunk is fetched in portions of half a panel of keys or values, in the order of their use: about
// as many at each stage of the chunk before as suits its time.
constexpr int64_t kPortionRows = kPanel / 2, kPortions = 2 * kChunk / kPortionRows;
constexpr int64_t kFetchedAtScores = 11, kFetchedAtSoftmax = 13;

using Args = penstock_attention_args;

int64_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }
int64_t group_of(const Args& args) { return args.num_heads / args.num_kv_heads; }
int64_t queries_of(const Args& args) { return std::max<int64_t>(1, kTileRows / group_of(args)); }
int64_t width_of(const Args& args) { return round_up(args.head_dim, kPanel); }

// Splits grow with their position, so that no context has many: 8 in each doubling.
int64_t split_end(int64_t first) {
    return first + std::max(kSplit, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(first))) / 8);
}

int64_t count_splits(int64_t context) {
    int64_t count = 0;
    for (int64_t first = 0; first < context; first = split_end(first)) ++count;
    return count;
}

// Hands out parts of a block of memory, or measures how large it must be.
struct Carver {
    char* base;
    int64_t used = 0;
    template <typename T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
        used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
        return part;
    }
    SoftmaxState take_state(int64_t num_rows, int64_t width) {
        float* max = take<float>(num_rows);
        float* sums = take<float>(num_rows * kSumLanes);
        return {max, sums, take<float>(num_rows * width), width};
    }
};

SoftmaxState from_row(const SoftmaxState& state, int64_t row) {
    return {state.max + row, state.sums + row * kSumLanes, state.out + row * state.out_stride, state.out_stride};
}

// Where the tokens of a chunk lie.
struct Chunk {
    const void* keys[kChunk];
    const void* values[kChunk];
    int64_t slots[kChunk];
    int64_t num_portions;
    const float *k_scales, *v_scales;  // of the head, by slot; INT8 only
};

// A thread's memory.
struct Workspace {
    Workspace(char* base, const Args& args) : carver{base} {
        const int64_t rows = queries_of(args) * group_of(args), width = width_of(args);
        queries = carver.take<char>(rows * args.head_dim * 4);
        keys = carver.take<char>(kChunk * args.head_dim * 4);
        values = carver.take<char>(kChunk * width * 4);
        scores = carver.take<float>(rows * kChunk);
        probabilities = carver.take<char>(rows * kChunk * 4);
        whole = carver.take_state(rows, width);
        part = carver.take_state(rows, width);
        chunks = carver.take<Chunk>(2);
        k_scales = carver.take<float>(kChunk);
        v_scales = carver.take<float>(kChunk);
        zeros = carver.take<char>(args.head_dim * 4);
    }
    Carver carver;
    char *queries, *keys, *values;
    float* scores;
    char* probabilities;
    SoftmaxState whole, part;
    Chunk* chunks;
    float *k_scales, *v_scales;
    char* zeros;  // the row of a token that does not exist
};

// A tile of one request's queries, for all key-value heads.
struct Tile {
    int64_t request, first_query, num_queries;
    int64_t context;     // of the last query
    int64_t num_pieces;  // tasks a head: 1, or the number of splits
    int64_t first_task;
    int64_t first_row;  // in the memory of partial results, if there are several pieces
    int64_t work;       // of a task; an estimate
};

struct Plan {
    int64_t num_tiles, num_tasks;
    bool has_pieces;
};

int64_t partial_capacity(const Args& args, int num_threads) {  // rows
    if (num_threads == 1) return 0;
    return kTasksPerThread * num_threads * count_splits(args.num_slots) * std::max<int64_t>(group_of(args), 16);
}

// Memory of all threads.
struct Shared {
    Shared(char* base, const Args& args, int num_threads) : carver{base} {
        plan = carver.take<Plan>(1);
        partial = carver.take_state(partial_capacity(args, num_threads), width_of(args));
        tiles = carver.take<Tile>(0);  // as many as there are tokens at most
    }
    Carver carver;
    Plan* plan;
    SoftmaxState partial;
    Tile* tiles;
};

// Work of a row and a token, and of packing a token as so many rows.
constexpr int64_t kPackingRows = 4;

void make_plan(const Args& args, const penstock_step& step, int num_threads, const Shared& shared) {
    int64_t num_tiles = 0, total = 0;
    for (int64_t r = 0; r < step.num_requests; ++r) {
        const int64_t n = step.query_start[r + 1] - step.query_start[r];
        for (int64_t q = 0; q < n; q += queries_of(args)) {
            const int64_t num_queries = std::min(queries_of(args), n - q);
            const int64_t context = step.context_len[r] - n + q + num_queries;
            const int64_t work = context * (num_queries * group_of(args) + kPackingRows);
            shared.tiles[num_tiles++] = {r, q, num_queries, context, 1, 0, 0, work};
            total += work * args.num_kv_heads;
        }
    }
    int64_t free_rows = partial_capacity(args, num_threads), used_rows = 0;
    for (int64_t i = 0; i < num_tiles && num_threads > 1; ++i) {
        Tile& tile = shared.tiles[i];
        const int64_t num_splits = count_splits(tile.context);
        const int64_t rows = num_splits * tile.num_queries * args.num_heads;
        if (tile.work * num_threads * kTasksPerThread <= total) continue;
        if (num_splits == 1 || used_rows + rows > free_rows) continue;
        tile.num_pieces = num_splits;
        tile.work /= num_splits;
        tile.first_row = used_rows;
        used_rows += rows;
    }
    std::sort(shared.tiles, shared.tiles + num_tiles, [](const Tile& a, const Tile& b) { return a.work > b.work; });
    int64_t num_tasks = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
        shared.tiles[i].first_task = num_tasks;
        num_tasks += shared.tiles[i].num_pieces * args.num_kv_heads;
    }
    *shared.plan = {num_tiles, num_tasks, used_rows > 0};
}

// Keys and values of the step's tokens to their slots.
void write_tokens(const Args& args, const penstock_step& step, Team& team) {
    const Kernels& kernel = kernels();
    const int64_t d = args.head_dim, size = size_of(args.kv_dtype), num_heads = 2 * args.num_kv_heads;
    const int64_t threads = team.num_threads(), first = step.num_tokens * team.thread() / threads;
    const int64_t last = step.num_tokens * (team.thread() + 1) / threads;
    for (int64_t token = first; token < last; ++token) {
        for (int64_t head = 0; head < num_heads; ++head) {
            const int64_t from = token * args.qkv_stride + (args.num_heads + head) * d;
            const int64_t slot = head * args.num_slots + step.slot_mapping[token];
            char* to = static_cast<char*>(args.kv) + slot * d * size;
            const auto* x = static_cast<const float*>(args.qkv) + from;
            const auto* y = static_cast<const uint16_t*>(args.qkv) + from;
            int32_t sum;
            if (args.kv_dtype == PENSTOCK_INT8) {
                auto* q = reinterpret_cast<int8_t*>(to);
                args.kv_scales[slot] = args.dtype == PENSTOCK_F32 ? kernel.linear.quantize_f32(x, d, d, q, &sum)
                                                                  : kernel.linear.quantize_bf16(y, d, d, q, &sum);
            } else if (args.kv_dtype == args.dtype) {
                memcpy(to, args.dtype == PENSTOCK_F32 ? static_cast<const void*>(x) : y, d * size);
            } else if (args.kv_dtype == PENSTOCK_BF16) {
                kernel.rows->f32_to_bf16(x, reinterpret_cast<uint16_t*>(to), d);
            } else {
                kernel.rows->bf16_to_f32(y, reinterpret_cast<float*>(to), d);
            }
        }
    }
}

// One tile with one key-value head.
class Unit {
public:
    Unit(const Args& args, const penstock_step& step, const Workspace& space, const Tile& tile, int64_t head)
        : args_(args), step_(step), space_(space), tile_(tile), head_(head), group_(group_of(args)),
          first_position_(tile.context - tile.num_queries), num_rows_(tile.num_queries * group_) {}

    // The queries of the tile, row after row.
    void load_queries() const {
        const int64_t size = size_of(args_.dtype), bytes = group_ * args_.head_dim * size;
        for (int64_t q = 0; q < tile_.num_queries; ++q) {
            const int64_t from = (token_of(q) * args_.qkv_stride + head_ * group_ * args_.head_dim) * size;
            memcpy(space_.queries + q * bytes, static_cast<const char*>(args_.qkv) + from, bytes);
        }
    }

    // state = the softmax over tokens [first, last) of the context. While the last chunk is worked on,
    // what gather_after(Chunk&) found is fetched, unless it says false.
    template <typename GatherAfter>
    void attend(int64_t first, int64_t last, const SoftmaxState& state, GatherAfter&& gather_after) const {
        std::fill_n(state.max, num_rows_, -INFINITY);
        std::fill_n(state.sums, num_rows_ * kSumLanes, 0.0f);
        std::fill_n(state.out, num_rows_ * state.out_stride, 0.0f);
        Chunk* chunk = &space_.chunks[0];
        Chunk* next = &space_.chunks[1];
        gather(first, last, *chunk);
        for (int64_t start = first; start < last; start += kChunk) {
            bool more = true;
            if (start + kChunk < last) {
                gather(start + kChunk, last, *next);
            } else {
                more = gather_after(*next);
            }
            take(start, std::min(kChunk, last - start), *chunk, more ? next : nullptr, state);
            std::swap(chunk, next);
        }
    }

    void store(const SoftmaxState& state) const {
        const RowKernels& rows = *kernels().rows;
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int64_t head = head_ * group_ + row % group_;
            const int64_t to = token_of(row / group_) * args_.out_stride + head * args_.head_dim;
            if (args_.dtype == PENSTOCK_F32) {
                rows.finish_f32(state, row, static_cast<float*>(args_.out) + to, args_.head_dim);
            } else {
                rows.finish_bf16(state, row, static_cast<uint16_t*>(args_.out) + to, args_.head_dim);
            }
        }
    }

    int64_t num_rows() const { return num_rows_; }

    // Finds up to kChunk tokens from `start`.
    void gather(int64_t start, int64_t last, Chunk& chunk) const {
        const int32_t* blocks = step_.block_table + tile_.request * step_.block_table_stride;
        const int64_t row_bytes = args_.head_dim * size_of(args_.kv_dtype), num_slots = args_.num_slots;
        const char* keys = static_cast<const char*>(args_.kv) + head_ * num_slots * row_bytes;
        const char* values = keys + args_.num_kv_heads * num_slots * row_bytes;
        const int64_t n = std::min(kChunk, last - start);
        int64_t block = start / step_.block_size, offset = start % step_.block_size;
        for (int64_t i = 0; i < n; ++block, offset = 0) {
            const int64_t slot = blocks[block] * step_.block_size + offset - i;
            for (const int64_t end = std::min(n, i + step_.block_size - offset); i < end; ++i) {
                chunk.keys[i] = keys + (slot + i) * row_bytes;
                chunk.values[i] = values + (slot + i) * row_bytes;
                chunk.slots[i] = slot + i;
            }
        }
        for (int64_t i = n; i < kChunk; ++i) {
            chunk.keys[i] = chunk.values[i] = space_.zeros;
            chunk.slots[i] = chunk.slots[0];  // a finite scale, for a score that nobody sees
        }
        chunk.num_portions = (n + kPanel - 1) / kPanel * (kPortions * kPanel / kChunk);
        if (args_.kv_dtype != PENSTOCK_INT8) return;
        chunk.k_scales = args_.kv_scales + head_ * num_slots;
        chunk.v_scales = chunk.k_scales + args_.num_kv_heads * num_slots;
    }

private:
    int64_t token_of(int64_t query) const {
        return step_.query_start[tile_.request] + tile_.first_query + query;
    }

    // Asks for portions [first, last) of the next chunk to be brought into the second cache while
    // this one is worked on; a little at a time, since a processor that has asked for more lines than
    // it can keep track of does nothing else. Into the first cache (no 2) they come at half the rate.
    // Inlined by force: gcc takes a function that only prefetches for one without effect.
    __attribute__((always_inline)) void fetch(const Chunk* chunk, int64_t first, int64_t last) const {
        if (!chunk) return;
        const bool scaled = args_.kv_dtype == PENSTOCK_INT8;
        const int64_t row_bytes = args_.head_dim * size_of(args_.kv_dtype);
        for (int64_t portion = first; portion < std::min(last, chunk->num_portions); ++portion) {
            const bool of_keys = portion % 4 < 2;
            const int64_t begin = (portion / 4 * 2 + portion % 2) * kPortionRows;
            const void* const* rows = (of_keys ? chunk->keys : chunk->values) + begin;
            for (int64_t i = 0; i < kPortionRows; ++i) {
                for (int64_t byte = 0; byte < row_bytes; byte += 64) {
                    __builtin_prefetch(static_cast<const char*>(rows[i]) + byte, 0, 2);
                }
            }
            if (!scaled) continue;
            const float* scales = of_keys ? chunk->k_scales : chunk->v_scales;
            for (int64_t i = 0; i < kPortionRows; ++i) __builtin_prefetch(scales + chunk->slots[begin + i], 0, 2);
        }
    }

    // Packs a chunk's keys and values; fetches two portions of the next chunk for each of its panels.
    void pack(int64_t num_panels, const Chunk& chunk, const Chunk* next) const {
        const RowKernels& rows = *kernels().rows;
        const int64_t d = args_.head_dim;
        const int64_t format = args_.kv_dtype == PENSTOCK_INT8   ? kKvInt8
                               : args_.kv_dtype == PENSTOCK_BF16 ? kKvBf16
                                                                 : kKvF32;
        const auto pack_panels = [&](auto pack_keys, auto pack_values, auto* keys, auto* values) {
            for (int64_t panel = 0; panel < num_panels; ++panel) {
                const int64_t token = panel * kPanel;
                fetch(next, 2 * panel, 2 * panel + 1);
                pack_keys(chunk.keys + token, 1, d, keys + token * d);
                fetch(next, 2 * panel + 1, 2 * panel + 2);
                pack_values(chunk.values + token, kPanel, d, values + token * kPanel, kChunk * kPanel);
            }
        };
        if (args_.dtype == PENSTOCK_F32) {
            pack_panels(rows.pack_keys_f32[format], rows.pack_values_f32[format],
                        reinterpret_cast<float*>(space_.keys), reinterpret_cast<float*>(space_.values));
        } else {
            pack_panels(rows.pack_keys_bf16[format], rows.pack_values_bf16[format],
                        reinterpret_cast<uint16_t*>(space_.keys), reinterpret_cast<uint16_t*>(space_.values));
        }
    }

    // Adds tokens [start, start + n) to the rows that see any of them.
    void take(int64_t start, int64_t n, const Chunk& chunk, const Chunk* next, const SoftmaxState& state) const {
        const Kernels& kernel = kernels();
        const bool f32 = args_.dtype == PENSTOCK_F32, scaled = args_.kv_dtype == PENSTOCK_INT8;
        const int64_t d = args_.head_dim, size = size_of(args_.dtype), num_panels = (n + kPanel - 1) / kPanel;
        const int64_t first = std::max<int64_t>(0, start - first_position_) * group_, m = num_rows_ - first;
        pack(num_panels, chunk, next);
        fetch(next, 2 * num_panels, kFetchedAtScores);
        const auto gemm = f32 ? kernel.linear.gemm_f32 : kernel.linear.gemm_bf16;
        gemm({m, num_panels, d, space_.queries + first * d * size, d, space_.keys, d * kPanel * size, space_.scores,
              kChunk, false});
        fetch(next, kFetchedAtScores, kFetchedAtSoftmax);
        for (int64_t i = 0; i < kChunk && scaled; ++i) {
            space_.k_scales[i] = chunk.k_scales[chunk.slots[i]];
            space_.v_scales[i] = chunk.v_scales[chunk.slots[i]];
        }
        const SoftmaxState seen = from_row(state, first);
        const SoftmaxChunk softmax{m, group_, first_position_ + first / group_ + 1 - start, space_.scores,
                                   args_.scale * kLog2E, scaled ? space_.k_scales : nullptr,
                                   scaled ? space_.v_scales : nullptr, space_.probabilities, seen};
        (f32 ? kernel.rows->softmax_f32 : kernel.rows->softmax_bf16)(softmax);
        fetch(next, kFetchedAtSoftmax, kPortions);
        gemm({m, width_of(args_) / kPanel, num_panels * kPanel, space_.probabilities, kChunk, space_.values,
              kChunk * kPanel * size, seen.out, seen.out_stride, true});
    }

    const Args& args_;
    const penstock_step& step_;
    const Workspace& space_;
    const Tile& tile_;
    const int64_t head_, group_, first_position_, num_rows_;
};

// Where the partial results of a head and a piece begin.
SoftmaxState partial_of(const Shared& shared, const Tile& tile, int64_t num_rows, int64_t head, int64_t piece) {
    return from_row(shared.partial, tile.first_row + (head * tile.num_pieces + piece) * num_rows);
}

// What a task is: a head of a tile, or one split of it.
struct Task {
    Task(const Shared& shared, int64_t task)
        : tile(find(shared, task)), head((task - tile.first_task) / tile.num_pieces),
          piece(task - tile.first_task - head * tile.num_pieces) {
        for (int64_t i = 0; i < piece; ++i) first = split_end(first);
    }
    static const Tile& find(const Shared& shared, int64_t task) {
        const auto after = [](int64_t value, const Tile& tile) { return value < tile.first_task; };
        return std::upper_bound(shared.tiles, shared.tiles + shared.plan->num_tiles, task, after)[-1];
    }
    int64_t last(int64_t begin) const { return std::min(split_end(begin), tile.context); }

    const Tile& tile;
    int64_t head, piece;
    int64_t first = 0;  // token
};

// Returns the next task, which is taken as soon as its first chunk can be fetched.
int64_t run_task(const Args& args, const penstock_step& step, const Workspace& space, const Shared& shared, Team& team,
                 int64_t index) {
    const Task task(shared, index);
    const Tile& tile = task.tile;
    const Unit unit(args, step, space, tile, task.head);
    int64_t next = -1;
    const auto gather_next = [&](Chunk& chunk) {
        next = team.next(shared.plan->num_tasks);
        if (next < 0) return false;
        const Task other(shared, next);
        Unit(args, step, space, other.tile, other.head).gather(other.first, other.last(other.first), chunk);
        return true;
    };
    unit.load_queries();
    if (tile.num_pieces > 1) {
        const SoftmaxState part = partial_of(shared, tile, unit.num_rows(), task.head, task.piece);
        unit.attend(task.first, task.last(task.first), part, gather_next);
        return next;
    }
    for (int64_t first = 0; first < tile.context; first = split_end(first)) {
        const int64_t last = task.last(first);
        unit.attend(first, last, first == 0 ? space.whole : space.part, [&](Chunk& chunk) {
            if (last == tile.context) return gather_next(chunk);
            unit.gather(last, task.last(last), chunk);
            return true;
        });
        if (first > 0) kernels().rows->merge(unit.num_rows(), space.whole, space.part);
    }
    unit.store(space.whole);
    return next;
}

void merge_pieces(const Args& args, const penstock_step& step, const Workspace& space, const Shared& shared,
                  Team& team) {
    const int64_t num_tasks = shared.plan->num_tiles * args.num_kv_heads;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const Tile& tile = shared.tiles[task / args.num_kv_heads];
        const int64_t head = task % args.num_kv_heads;
        if (tile.num_pieces == 1) continue;
        const Unit unit(args, step, space, tile, head);
        const SoftmaxState whole = partial_of(shared, tile, unit.num_rows(), head, 0);
        for (int64_t piece = 1; piece < tile.num_pieces; ++piece) {
            kernels().rows->merge(unit.num_rows(), whole, partial_of(shared, tile, unit.num_rows(), head, piece));
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
    const int64_t num_tasks = shared.plan->num_tasks;
    for (int64_t task = team.next(num_tasks); task >= 0;) task = run_task(args, step, space, shared, team, task);
    if (!shared.plan->has_pieces) return;
    team.barrier();
    merge_pieces(args, step, space, shared, team);
}

Scratch scratch(const void* op_args, int64_t max_tokens, int64_t, int num_threads) {
    const Args& args = *static_cast<const Args*>(op_args);
    const Workspace space(nullptr, args);
    Shared shared(nullptr, args, num_threads);
    shared.carver.take<Tile>(max_tokens);
    return {space.carver.used, shared.carver.used};
}

const char* check(const void* op_args) {
    const Args& args = *static_cast<const Args*>(op_args);
    if (args.dtype != PENSTOCK_F32 && args.dtype != PENSTOCK_BF16) return "attention: dtype must be F32 or BF16";
    if (args.kv_dtype != PENSTOCK_F32 && args.kv_dtype != PENSTOCK_BF16 && args.kv_dtype != PENSTOCK_INT8) {
        return "attention: kv_dtype must be F32, BF16 or INT8";
    }
    if (!args.qkv || !args.out || !args.kv) return "attention: a pointer is null";
    if (args.kv_dtype == PENSTOCK_INT8 && !args.kv_scales) return "attention: INT8 needs kv_scales";
    if (args.num_heads < 1 || args.num_kv_heads < 1 || args.num_heads % args.num_kv_heads) {
        return "attention: num_heads must be a multiple of num_kv_heads";
    }
    if (args.head_dim < 2 || args.head_dim > 256 || args.head_dim % 2) {
        return "attention: head_dim must be even and at most 256";
    }
    if (args.num_slots < 1) return "attention: no slots";
    if (args.qkv_stride < (args.num_heads + 2 * args.num_kv_heads) * args.head_dim ||
        args.out_stride < args.num_heads * args.head_dim) {
        return "attention: rows overlap";
    }
    if (!std::isfinite(args.scale)) return "attention: scale must be finite";
    return nullptr;
}

}  // namespace

const Op attention_op = {run, scratch, check};

}  // namespace penstock
