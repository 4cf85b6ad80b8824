// What a thread does for a tile and a group of query heads: finds the tokens, packs them, multiplies.
//
// Rows are the queries times the heads of the group. The context is taken in chunks of kChunk tokens:
// keys and values are gathered and packed into panels once for all rows, and two small matrix
// products with online softmax between them (Dao et al. 2022) do the rest. For one query of decode
// the same code runs with few rows. With latent attention a token's value is the beginning of its
// key: both are packed from the same bytes, which the second packing finds in the first cache.
#pragma once

#include <cmath>
#include <cstring>

#include "attention_plan.h"
#include "kernels.h"

namespace penstock::attention {

constexpr float kLog2E = 1.44269504f;

// A chunk is fetched in portions of half a panel of keys or values, in the order of their use: about
// as many at each stage of the chunk before as suits its time.
constexpr int64_t kPortionRows = kPanel / 2, kPortions = 2 * kChunk / kPortionRows;
constexpr int64_t kFetchedAtScores = 11, kFetchedAtSoftmax = 13;

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
        const int64_t rows = std::max(kTileRows, heads_per_kv_head(args)), width = width_of(args);
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
    char* zeros;  // the row of a token that does not exist, or that nobody sees
};

// One tile with one group.
class Unit {
public:
    Unit(const Args& args, const penstock_step& step, const Workspace& space, const Plan& plan, const Tile& tile,
         int64_t index)
        : args_(args), step_(step), space_(space), tile_(tile), group_(plan.group), first_head_(index * plan.group),
          kv_head_(first_head_ / heads_per_kv_head(args)), num_rows_(tile.num_queries * plan.group),
          row_bytes_(args.head_dim * size_of(args.kv_dtype)), fetched_(fetched_of(args, row_bytes_)) {}

    // The queries of the tile, row after row.
    void load_queries() const {
        const int64_t size = size_of(args_.dtype), bytes = group_ * args_.head_dim * size;
        for (int64_t q = 0; q < tile_.num_queries; ++q) {
            const int64_t from = (token_of(q) * args_.qkv_stride + first_head_ * args_.head_dim) * size;
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
            const int64_t head = first_head_ + row % group_;
            const int64_t to = token_of(row / group_) * args_.out_stride + head * args_.value_dim;
            const float sink = args_.sinks ? args_.sinks[head] * kLog2E : -INFINITY;
            if (args_.dtype == PENSTOCK_F32) {
                rows.finish_f32(state, row, sink, static_cast<float*>(args_.out) + to, args_.value_dim);
            } else {
                rows.finish_bf16(state, row, sink, static_cast<uint16_t*>(args_.out) + to, args_.value_dim);
            }
        }
    }

    int64_t num_rows() const { return num_rows_; }

    // Finds up to kChunk tokens from `start`. Those before the tile's first are not looked up: what
    // lies before a window may be gone.
    void gather(int64_t start, int64_t last, Chunk& chunk) const {
        const int32_t* blocks = step_.block_table + tile_.request * step_.block_table_stride;
        const int64_t row_bytes = row_bytes_, num_slots = args_.num_slots;
        const int64_t to_values = args_.latent ? 0 : args_.num_kv_heads * num_slots;
        const char* keys = static_cast<const char*>(args_.kv) + kv_head_ * num_slots * row_bytes;
        const char* values = keys + to_values * row_bytes;
        const int64_t n = std::min(kChunk, last - start), hidden = std::max<int64_t>(0, tile_.begin - start);
        int64_t block = (start + hidden) / step_.block_size, offset = (start + hidden) % step_.block_size;
        for (int64_t i = hidden; i < n; ++block, offset = 0) {
            const int64_t slot = blocks[block] * step_.block_size + offset - i;
            for (const int64_t end = std::min(n, i + step_.block_size - offset); i < end; ++i) {
                chunk.keys[i] = keys + (slot + i) * row_bytes;
                chunk.values[i] = values + (slot + i) * row_bytes;
                chunk.slots[i] = slot + i;
            }
        }
        for (int64_t i = 0; i < hidden; ++i) leave_out(i, hidden, chunk);
        for (int64_t i = n; i < kChunk; ++i) leave_out(i, hidden, chunk);
        chunk.num_portions = (n + kPanel - 1) / kPanel * (kPortions * kPanel / kChunk);
        if (args_.kv_dtype != PENSTOCK_INT8) return;
        chunk.k_scales = args_.kv_scales + kv_head_ * num_slots;
        chunk.v_scales = chunk.k_scales + to_values;
    }

private:
    // Which bytes are fetched with the keys, and which with the values: of a latent vector a half each.
    struct Fetched {
        int64_t keys_to, values_from;
    };
    static Fetched fetched_of(const Args& args, int64_t row_bytes) {
        const int64_t half = round_up(row_bytes / 2, kAlignment);
        return args.latent ? Fetched{half, half} : Fetched{row_bytes, 0};
    }

    int64_t token_of(int64_t query) const {
        return step_.query_start[tile_.request] + tile_.first_query + query;
    }

    // Token i is none; `other` is one.
    void leave_out(int64_t i, int64_t other, Chunk& chunk) const {
        chunk.keys[i] = chunk.values[i] = space_.zeros;
        chunk.slots[i] = chunk.slots[other];  // a finite scale, for a score that nobody sees
    }

    // Asks for portions [first, last) of the next chunk to be brought into the second cache while
    // this one is worked on; a little at a time, since a processor that has asked for more lines than
    // it can keep track of does nothing else. Into the first cache (no 2) they come at half the rate.
    // Inlined by force: gcc takes a function that only prefetches for one without effect.
    __attribute__((always_inline)) void fetch(const Chunk* chunk, int64_t first, int64_t last) const {
        if (!chunk) return;
        const bool scaled = args_.kv_dtype == PENSTOCK_INT8;
        for (int64_t portion = first; portion < std::min(last, chunk->num_portions); ++portion) {
            const bool of_keys = portion % 4 < 2;
            const int64_t begin = (portion / 4 * 2 + portion % 2) * kPortionRows;
            const void* const* rows = (of_keys ? chunk->keys : chunk->values) + begin;
            const int64_t from = of_keys ? 0 : fetched_.values_from, to = of_keys ? fetched_.keys_to : row_bytes_;
            for (int64_t i = 0; i < kPortionRows; ++i) {
                for (int64_t byte = from; byte < to; byte += 64) {
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
        const int64_t d = args_.head_dim, value_dim = args_.value_dim;
        const int64_t format = args_.kv_dtype == PENSTOCK_INT8   ? kKvInt8
                               : args_.kv_dtype == PENSTOCK_BF16 ? kKvBf16
                                                                 : kKvF32;
        const auto pack_panels = [&](auto pack_keys, auto pack_values, auto* keys, auto* values) {
            for (int64_t panel = 0; panel < num_panels; ++panel) {
                const int64_t token = panel * kPanel;
                fetch(next, 2 * panel, 2 * panel + 1);
                pack_keys(chunk.keys + token, 1, d, keys + token * d);
                fetch(next, 2 * panel + 1, 2 * panel + 2);
                pack_values(chunk.values + token, kPanel, value_dim, values + token * kPanel, kChunk * kPanel);
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

    // The rows [first, last) that see any of the chunk from `start`. Causal queries see tokens up to
    // their own: the first rows may come too early, the last may have left the chunk behind.
    struct Seers {
        int64_t first, last;
    };
    Seers seers_of(int64_t start) const {
        if (!args_.is_causal) return {0, num_rows_};
        const int64_t behind = start + kChunk + window_of(args_) - 1 - tile_.position;  // the first such query
        return {std::max<int64_t>(0, start - tile_.position) * group_, std::min(tile_.num_queries, behind) * group_};
    }

    // Scores to probabilities; `first` is a query's first row.
    SoftmaxChunk softmax_of(int64_t start, Seers rows, const SoftmaxState& state) const {
        const bool scaled = args_.kv_dtype == PENSTOCK_INT8, causal = args_.is_causal;
        const int64_t end = (causal ? tile_.position + rows.first / group_ + 1 : tile_.end) - start;
        const float scale = args_.softcap > 0 ? args_.scale / args_.softcap : args_.scale * kLog2E;
        return {rows.last - rows.first,
                group_,
                causal ? end - window_of(args_) : 0,
                end,
                causal,
                space_.scores,
                scale,
                args_.softcap * kLog2E,
                scaled ? space_.k_scales : nullptr,
                scaled ? space_.v_scales : nullptr,
                space_.probabilities,
                state};
    }

    // Adds tokens [start, start + n) to the rows that see any of them.
    void take(int64_t start, int64_t n, const Chunk& chunk, const Chunk* next, const SoftmaxState& state) const {
        const Kernels& kernel = kernels();
        const bool f32 = args_.dtype == PENSTOCK_F32, scaled = args_.kv_dtype == PENSTOCK_INT8;
        const int64_t d = args_.head_dim, size = size_of(args_.dtype), num_panels = (n + kPanel - 1) / kPanel;
        const Seers rows = seers_of(start);
        const int64_t m = rows.last - rows.first;
        pack(num_panels, chunk, next);
        fetch(next, 2 * num_panels, kFetchedAtScores);
        const auto gemm = f32 ? kernel.linear.gemm_f32 : kernel.linear.gemm_bf16;
        gemm({m, num_panels, d, space_.queries + rows.first * d * size, d, space_.keys, d * kPanel * size,
              space_.scores, kChunk, false});
        fetch(next, kFetchedAtScores, kFetchedAtSoftmax);
        for (int64_t i = 0; i < kChunk && scaled; ++i) {
            space_.k_scales[i] = chunk.k_scales[chunk.slots[i]];
            space_.v_scales[i] = chunk.v_scales[chunk.slots[i]];
        }
        const SoftmaxState seen = from_row(state, rows.first);
        (f32 ? kernel.rows->softmax_f32 : kernel.rows->softmax_bf16)(softmax_of(start, rows, seen));
        fetch(next, kFetchedAtSoftmax, kPortions);
        gemm({m, width_of(args_) / kPanel, num_panels * kPanel, space_.probabilities, kChunk, space_.values,
              kChunk * kPanel * size, seen.out, seen.out_stride, true});
    }

    const Args& args_;
    const penstock_step& step_;
    const Workspace& space_;
    const Tile& tile_;
    const int64_t group_, first_head_, kv_head_, num_rows_;
    const int64_t row_bytes_;  // of a key or value in the store
    const Fetched fetched_;
};

}  // namespace penstock::attention
