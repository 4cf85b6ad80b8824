// Drives register tiles over a Gemm: which rows and panels a tile has, in which order they come,
// and what is fetched ahead. Shared by the instruction sets with vector registers; every source
// has its own copy (all is static).
//
// A panel is a sequence of 64-byte lines; a line meets 4 bytes of each row of a (one float, two
// bf16 or four int8). With one tile of rows, lines are read once and stream from memory in several
// panels at a time; with more tiles, panels are cut so that what all tiles share stays in L1, and
// the next cut is fetched meanwhile. Sums wait in c between cuts: the chain of sums stays one.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace penstock {
namespace {

constexpr int64_t kLine = 64;

struct Tile {
    const char* a;
    int64_t a_stride;  // bytes
    const char* b;
    int64_t b_stride;  // bytes, from panel to panel
    int64_t num_lines;
    char* c;           // 4-byte values
    int64_t c_stride;  // bytes
    bool accumulate;
    const int32_t* row_sums;  // int8 only
    int64_t ahead;            // fetch the line so many bytes after the current one ...
    int num_ahead;            // ... for so many of every 4 lines
};

using TileFunction = void (*)(const Tile&);

// `Format` gives kMaxRows, panels_for(rows) (a power of two), tile(rows, panels), kCutLines and
// kAheadLines, of all panels together.
template <class Format>
void drive(const Gemm& g, int64_t value_size, const int32_t* row_sums) {
    const int64_t num_tiles = (g.m + Format::kMaxRows - 1) / Format::kMaxRows;
    const int64_t num_lines = g.k * value_size / 4;
    int64_t panels = Format::panels_for((g.m + num_tiles - 1) / num_tiles);
    for (int64_t j = 0; j < g.num_panels; j += panels) {
        while (panels > g.num_panels - j) panels /= 2;
        const bool last_panels = j + panels >= g.num_panels;
        // One tile: all but the last lines in one go; the last ones fetch the next panels' first.
        const int64_t ahead = Format::kAheadLines / panels;
        const int64_t tail = num_lines > 2 * ahead ? ahead : 0;
        int64_t cut = num_tiles > 1 ? Format::kCutLines : num_lines - tail;
        for (int64_t line = 0; line < num_lines; line += cut) {
            cut = cut < num_lines - line ? cut : num_lines - line;
            const bool last_cut = line + cut >= num_lines;
            Tile tile{};
            tile.b = static_cast<const char*>(g.b) + j * g.b_stride + line * kLine;
            tile.b_stride = g.b_stride;
            tile.num_lines = cut;
            tile.accumulate = g.accumulate || line > 0;
            tile.ahead = num_tiles > 1 ? cut * kLine : ahead * kLine;
            if (last_cut && (num_tiles > 1 || tail)) tile.ahead = panels * g.b_stride - line * kLine;
            for (int64_t t = 0; t < num_tiles; ++t) {
                const int64_t first = t * g.m / num_tiles, last = (t + 1) * g.m / num_tiles;
                tile.a = static_cast<const char*>(g.a) + first * g.lda * value_size + line * 4;
                tile.a_stride = g.lda * value_size;
                tile.c = static_cast<char*>(g.c) + (first * g.ldc + j * kPanel) * 4;
                tile.c_stride = g.ldc * 4;
                tile.row_sums = row_sums ? row_sums + first : nullptr;
                tile.num_ahead = num_tiles == 1 ? 4 : t < 2 ? 2 : 0;
                if (last_cut && last_panels) tile.num_ahead = 0;
                Format::tile(last - first, panels)(tile);
                tile.ahead += 2 * kLine;
            }
        }
    }
}

}  // namespace
}  // namespace penstock
