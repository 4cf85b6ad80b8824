// Products with panels of codes, piece by piece: some columns of a few panels are decoded into L1 and
// multiplied there by the kernel for plain panels. Shared by the instruction sets; all is static.
//
// Sums wait in c between pieces, and a piece is a multiple of what any kernel takes at once: every
// output is the chain of sums that it would be over a whole converted panel.
#pragma once

#include <cstdint>
#include <cstring>

#include "../codes.h"
#include "../kernels.h"

namespace penstock {
namespace {

constexpr int64_t kPieceColumns = 128;
constexpr int64_t kPiecePanels = 4;

// Zeros for columns from `columns` on (relative to out); T float: [k][16], uint16_t: [k / 2][16][2].
template <typename T>
void clear_columns(T* out, int64_t columns, int64_t padded) {
    if (sizeof(T) == 2 && columns % 2) {
        for (int64_t lane = 0; lane < kPanel; ++lane) out[(columns / 2 * kPanel + lane) * 2 + 1] = 0;
        ++columns;
    }
    memset(out + columns * kPanel, 0, (padded - columns) * kPanel * sizeof(T));
}

// Of columns [first, last) at `out`, those behind the matrix.
template <typename T>
void clear_padding(const penstock_weight& w, int64_t first, int64_t last, T* out) {
    if (last <= w.num_columns) return;
    clear_columns(out, w.num_columns > first ? w.num_columns - first : 0, last - first);
}

// Calls piece(group, units, from, to): columns [from, to) of [first, last) in one group, whose bytes
// and the units of whose 256 columns begin there.
template <class Piece>
inline __attribute__((always_inline)) void for_groups(const CodeLayout& layout, const uint8_t* panel, int64_t first,
                                                      int64_t last, const Piece& piece) {
    int64_t start = first / layout.group_columns * layout.group_columns;
    const uint8_t* group = panel + layout.offset_of(start);
    const uint8_t* units = panel + (layout.unit_bytes ? layout.units_at(start) : 0);
    while (start < last) {
        const int64_t end = start + layout.group_columns;
        piece(group, units, first > start ? first - start : 0, (end < last ? end : last) - start);
        start = end;
        group += layout.group_bytes;
        if (layout.unit_bytes && start % kUnitColumns == 0) {
            units = group;
            group += layout.unit_bytes;
        }
    }
}

template <typename T>
using Decode = void (*)(const penstock_weight&, const void*, int64_t, int64_t, T*);

// Columns from `first` on of all panels.
template <typename T>
void gemm_pieces(const penstock_weight& w, const Gemm& g, int64_t first, Decode<T> decode, void (*gemm)(const Gemm&)) {
    alignas(64) T lines[kPiecePanels][kPieceColumns * kPanel];
    for (int64_t j = 0; j < g.num_panels; j += kPiecePanels) {
        const int64_t panels = g.num_panels - j < kPiecePanels ? g.num_panels - j : kPiecePanels;
        const char* b = static_cast<const char*>(g.b) + j * g.b_stride;
        for (int64_t from = first; from < g.k; from += kPieceColumns) {
            const int64_t to = from + kPieceColumns < g.k ? from + kPieceColumns : g.k;
            for (int64_t p = 0; p < panels; ++p) decode(w, b + p * g.b_stride, from, to, lines[p]);
            gemm({g.m, panels, to - from, static_cast<const T*>(g.a) + from, g.lda, lines,
                  static_cast<int64_t>(sizeof lines[0]), static_cast<float*>(g.c) + j * kPanel, g.ldc,
                  g.accumulate || from > 0});
        }
    }
}

}  // namespace
}  // namespace penstock
