// Which work an attention op has, in what pieces, and the memory for it.
//
// A group is the query heads that share a key-value head, or a part of them where there are many and
// little else to share out (multi-query and latent attention). A tile is a run of a request's
// queries, as many as make up to kTileRows rows with a group. A task is a tile with one group, or one
// split of its context where tiles are too few or too unequal for the threads.
//
// Invariant: chunks and splits begin at positions of the context that nothing else has a part in, so
// that a query meets the same sums in the same order in whatever tile and on whatever thread. What
// lies before the first token that any query of a tile sees (a window) belongs to no task.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace penstock::attention {

using Args = penstock_attention_args;

constexpr int64_t kTileRows = 128;      // of a tile, at most, unless one query has more heads
constexpr int64_t kSplit = 512;         // tokens of a split at the beginning of the context
constexpr int64_t kTasksPerThread = 4;  // finer tasks would cost more than an idle end of a thread
constexpr int64_t kPartialBytes = 64 << 20;  // of all splits' results, unless one tile needs more
constexpr int64_t kPackingRows = 4;          // a token is packed in the time of so many rows' work
constexpr int64_t kLeastGroup = 16;          // query heads that a task has left when their group is parted
constexpr int64_t kNoWindow = int64_t{1} << 40;

inline int64_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }
inline int64_t heads_per_kv_head(const Args& args) { return args.num_heads / args.num_kv_heads; }
inline int64_t queries_of(int64_t group) { return std::max<int64_t>(1, kTileRows / group); }
inline int64_t width_of(const Args& args) { return round_up(args.value_dim, kPanel); }
inline int64_t window_of(const Args& args) { return args.window > 0 ? std::min(args.window, kNoWindow) : kNoWindow; }

// The end of the split in which a token lies. Splits grow with their position, so that no context has
// many: 8 in each doubling.
inline int64_t split_end(int64_t token) {
    const int64_t power = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(token)));
    const int64_t size = std::max(kSplit, power / 8);
    return (token / size + 1) * size;
}

// How many splits tokens [first, last) lie in.
inline int64_t count_splits(int64_t first, int64_t last) {
    int64_t count = 0;
    for (; first < last; first = split_end(first)) ++count;
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

inline SoftmaxState from_row(const SoftmaxState& state, int64_t row) {
    return {state.max + row, state.sums + row * kSumLanes, state.out + row * state.out_stride, state.out_stride};
}

// A tile of one request's queries, for all groups.
struct Tile {
    int64_t request, first_query, num_queries;
    int64_t position;    // of its first query
    int64_t begin, end;  // tokens of the context: some query sees the first, some the last
    int64_t num_pieces;  // tasks a group: 1, or the number of splits
    int64_t first_task;
    int64_t first_row;  // in the memory of partial results, if there are several pieces
    int64_t work;       // of a task; an estimate

    int64_t start() const { return begin / kChunk * kChunk; }  // of its first chunk
};

struct Plan {
    int64_t group;       // query heads
    int64_t num_groups;  // of all query heads
    int64_t num_tiles, num_tasks;
    bool has_pieces;
};

// Rows of partial results. At least one tile of one query can be split, however long its context.
inline int64_t partial_capacity(const Args& args, int num_threads) {
    if (num_threads == 1) return 0;
    const int64_t num_splits = count_splits(0, args.num_slots), group = heads_per_kv_head(args);
    const int64_t row_bytes = (width_of(args) + kSumLanes + 1) * static_cast<int64_t>(sizeof(float));
    const int64_t affordable = std::max(kPartialBytes / row_bytes, num_splits * args.num_heads);
    return std::min(kTasksPerThread * num_threads * num_splits * std::max<int64_t>(group, 16), affordable);
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

// Queries of a request, from `first_query` of the `num_new` that are computed.
inline Tile tile_of(const Args& args, int64_t group, int64_t request, int64_t first_query, int64_t num_new,
                    int64_t context) {
    Tile tile{};
    tile.request = request;
    tile.first_query = first_query;
    tile.num_queries = std::min(queries_of(group), num_new - first_query);
    tile.position = context - num_new + first_query;
    tile.begin = args.is_causal ? std::max<int64_t>(0, tile.position + 1 - window_of(args)) : 0;
    tile.end = args.is_causal ? tile.position + tile.num_queries : context;
    tile.num_pieces = 1;
    tile.work = (tile.end - tile.start()) * (tile.num_queries * group + kPackingRows);
    return tile;
}

template <typename Body>
void for_tiles(const Args& args, int64_t group, const penstock_step& step, Body&& body) {
    for (int64_t r = 0; r < step.num_requests; ++r) {
        const int64_t n = step.query_start[r + 1] - step.query_start[r];
        for (int64_t q = 0; q < n; q += queries_of(group)) body(tile_of(args, group, r, q, n, step.context_len[r]));
    }
}

// Half of the heads again and again, while there are fewer tasks than threads.
inline int64_t choose_group(const Args& args, const penstock_step& step, int num_threads) {
    int64_t group = heads_per_kv_head(args), num_tasks = 0;
    if (group < 2 * kLeastGroup) return group;
    for_tiles(args, group, step, [&](const Tile& tile) {
        num_tasks += count_splits(tile.start(), tile.end) * args.num_kv_heads;
    });
    for (; num_tasks < num_threads && group % 2 == 0 && group >= 2 * kLeastGroup; num_tasks *= 2) group /= 2;
    return group;
}

// Cuts tiles that are too much work for one thread into splits, while there is memory for these.
// Returns the rows of partial results.
inline int64_t cut_tiles(const Args& args, int num_threads, int64_t total_work, Tile* tiles, int64_t num_tiles) {
    const int64_t num_rows = partial_capacity(args, num_threads);
    int64_t used_rows = 0;
    for (int64_t i = 0; i < num_tiles && num_threads > 1; ++i) {
        Tile& tile = tiles[i];
        if (tile.work * num_threads * kTasksPerThread <= total_work) continue;
        const int64_t num_splits = count_splits(tile.start(), tile.end);
        const int64_t rows = num_splits * tile.num_queries * args.num_heads;
        if (num_splits == 1 || used_rows + rows > num_rows) continue;
        tile.num_pieces = num_splits;
        tile.work /= num_splits;
        tile.first_row = used_rows;
        used_rows += rows;
    }
    return used_rows;
}

inline void make_plan(const Args& args, const penstock_step& step, int num_threads, const Shared& shared) {
    Plan& plan = *shared.plan;
    plan.group = choose_group(args, step, num_threads);
    plan.num_groups = args.num_heads / plan.group;
    plan.num_tiles = 0;
    int64_t total_work = 0;
    for_tiles(args, plan.group, step, [&](const Tile& tile) {
        shared.tiles[plan.num_tiles++] = tile;
        total_work += tile.work * plan.num_groups;
    });
    Tile* last = shared.tiles + plan.num_tiles;
    plan.has_pieces = cut_tiles(args, num_threads, total_work, shared.tiles, plan.num_tiles) > 0;
    std::sort(shared.tiles, last, [](const Tile& a, const Tile& b) { return a.work > b.work; });
    plan.num_tasks = 0;
    for (Tile* tile = shared.tiles; tile < last; ++tile) {
        tile->first_task = plan.num_tasks;
        plan.num_tasks += tile->num_pieces * plan.num_groups;
    }
}

// Where the partial results of a group and a piece begin.
inline SoftmaxState partial_of(const Shared& shared, const Tile& tile, int64_t group, int64_t piece) {
    const int64_t num_rows = tile.num_queries * shared.plan->group;
    return from_row(shared.partial, tile.first_row + (group * tile.num_pieces + piece) * num_rows);
}

// What a task is: a group of a tile, or one split of it.
struct Task {
    Task(const Shared& shared, int64_t task)
        : tile(find(shared, task)), group((task - tile.first_task) / tile.num_pieces),
          piece(task - tile.first_task - group * tile.num_pieces), first(tile.start()) {
        for (int64_t i = 0; i < piece; ++i) first = split_end(first);
    }
    static const Tile& find(const Shared& shared, int64_t task) {
        const auto after = [](int64_t value, const Tile& tile) { return value < tile.first_task; };
        return std::upper_bound(shared.tiles, shared.tiles + shared.plan->num_tiles, task, after)[-1];
    }
    int64_t last(int64_t begin) const { return std::min(split_end(begin), tile.end); }

    const Tile& tile;
    int64_t group, piece;
    int64_t first;  // token
};

}  // namespace penstock::attention
