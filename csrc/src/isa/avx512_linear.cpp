// AVX-512 with VNNI and BF16: a line of a panel is one register, 16 outputs.
//
// One row of a against up to 8 panels, or up to 12 rows against 2: 24 registers of sums, enough to
// hide the latency of a product, and one load of a and b for each product at most.
#include <immintrin.h>

#include "../kernels.h"
#include "gemm_driver.h"
#include "linear_plain.h"

namespace penstock {
namespace {

constexpr int kMaxSums = 24;

inline int32_t load_int(const void* p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

struct F32 {
    using Sum = __m512;
    static Sum start(const Tile&, int) { return _mm512_setzero_ps(); }
    static Sum load(const void* c) { return _mm512_loadu_ps(c); }
    static void store(void* c, Sum sum) { _mm512_storeu_ps(c, sum); }
    static Sum add(Sum sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};

struct Bf16 : F32 {
    static Sum add(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

struct Int8 {
    using Sum = __m512i;
    static Sum start(const Tile& t, int row) { return _mm512_set1_epi32(-128 * t.row_sums[row]); }
    static Sum load(const void* c) { return _mm512_loadu_si512(c); }
    static void store(void* c, Sum sum) { _mm512_storeu_si512(c, sum); }
    static Sum add(Sum sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, b, a); }
};

template <class F, int R, int P>
void tile(const Tile& t) {
    typename F::Sum sums[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            sums[r][p] = t.accumulate ? F::load(t.c + r * t.c_stride + p * kLine) : F::start(t, r);
        }
    }
    const char *a = t.a, *b = t.b;
    const int64_t a_stride = t.a_stride, b_stride = t.b_stride, ahead = t.ahead;
    const auto add_line = [&](int i) __attribute__((always_inline)) {
        __m512i lines[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) lines[p] = _mm512_loadu_si512(b + p * b_stride + i * kLine);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i value = _mm512_set1_epi32(load_int(a + r * a_stride + i * 4));
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) sums[r][p] = F::add(sums[r][p], value, lines[p]);
        }
    };
    int64_t left = t.num_lines;
    for (; left >= 4; left -= 4) {
        for (int i = 0; i < t.num_ahead; ++i) {
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                const char* line = b + p * b_stride + ahead + i * kLine;
                if (P < 4 && t.num_ahead == 4) {
                    _mm_prefetch(line, _MM_HINT_T0);
                } else {
                    _mm_prefetch(line, _MM_HINT_T1);
                }
            }
        }
        add_line(0);
        add_line(1);
        add_line(2);
        add_line(3);
        a += 16;
        b += 4 * kLine;
    }
    for (; left > 0; --left) {
        add_line(0);
        a += 4;
        b += kLine;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) F::store(t.c + r * t.c_stride + p * kLine, sums[r][p]);
    }
}

template <class F, int R, int P>
constexpr TileFunction tile_if() {
    if constexpr (R * P <= kMaxSums) {
        return tile<F, R, P>;
    } else {
        return nullptr;
    }
}

template <class F>
struct Format {
    static constexpr int64_t kMaxRows = 12, kCutLines = 256, kAheadLines = 64;
    static int64_t panels_for(int64_t rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }
    static TileFunction tile(int64_t rows, int64_t panels) {
#define ROW(R) {tile_if<F, R, 1>(), tile_if<F, R, 2>(), tile_if<F, R, 4>(), tile_if<F, R, 8>()}
        static constexpr TileFunction tiles[kMaxRows][4] = {ROW(1), ROW(2), ROW(3), ROW(4),  ROW(5),  ROW(6),
                                                            ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12)};
#undef ROW
        return tiles[rows - 1][__builtin_ctzll(static_cast<unsigned long long>(panels))];
    }
};

void gemm_f32(const Gemm& g) { drive<Format<F32>>(g, 4, nullptr); }
void gemm_bf16(const Gemm& g) { drive<Format<Bf16>>(g, 2, nullptr); }
void gemm_i8(const Gemm& g, const int32_t* row_sums) { drive<Format<Int8>>(g, 1, row_sums); }

// INT4. A block of 64 columns is 8 lines of nibbles, the first group's low, the second's high.
constexpr int64_t kBlock = 64, kBlockBytes = 512, kScaleBytes = 16;
constexpr int64_t kMaxRowsI4 = 12, kCutBlocks = 64;

struct BlockSums {
    int32_t values[kMaxRowsI4][2 * kCutBlocks];
};

// Minus 8 times the sum of each 32 columns: the nibbles are value + 8.
void correct_groups(const char* a, int64_t stride, int64_t num_rows, int64_t num_blocks, BlockSums& out) {
    const __m256i eights = _mm256_set1_epi8(8);
    for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t h = 0; h < 2 * num_blocks; ++h) {
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + r * stride + h * 32));
            const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), eights, q);
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
            out.values[r][h] = -_mm_cvtsi128_si32(s);
        }
    }
}

struct TileI4 {
    const char* a;
    int64_t a_stride;
    const uint8_t* b;       // of the first block
    const uint8_t* scales;  // of the first block
    int64_t b_stride;
    int64_t num_blocks;
    const BlockSums* corrections;
    int32_t* c;
    int64_t ldc;
    bool accumulate;
    int64_t next;  // bytes to the panels after these
};

// A group's sum of a * (value) lies in 16 bits: 32 * 127 * 8 < 2^15. So that its product with the
// scale is one vpdpwssd, whose high halves meet zeros.
template <int R, int P>
void tile_i4(const TileI4& t) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i sums[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            sums[r][p] = t.accumulate ? _mm512_loadu_si512(t.c + r * t.ldc + p * kPanel) : _mm512_setzero_si512();
        }
    }
    const char* a = t.a;
    const uint8_t *b = t.b, *scales = t.scales;
    const int64_t a_stride = t.a_stride, b_stride = t.b_stride;
    constexpr int64_t kAheadBlocks = 16 / P;
    constexpr int kHalves = R <= 2 ? 2 : 1;  // both halves at once as long as registers last
    for (int64_t block = 0; block < t.num_blocks; ++block) {
        // Fetch the blocks after these; at the end of the panels, the first of the next ones.
        const int64_t back = block + kAheadBlocks < t.num_blocks ? 0 : t.num_blocks * kBlockBytes - t.next;
        const int64_t ahead = kAheadBlocks * kBlockBytes - back;
        __m512i scale_pairs[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            _mm_prefetch(scales + p * b_stride + t.next, _MM_HINT_T1);
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + p * b_stride));
            scale_pairs[p] = _mm512_cvtepu8_epi32(bytes);
        }
#pragma GCC unroll 2
        for (int pass = 0; pass < 2; pass += kHalves) {
            __m512i group[kHalves][R][P];
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                    for (int p = 0; p < P; ++p) {
                        group[h][r][p] = _mm512_set1_epi32(t.corrections->values[r][2 * block + pass + h]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                __m512i both[P];
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) {
                    const uint8_t* line = b + p * b_stride + i * kLine;
                    if (pass == 0) _mm_prefetch(line + ahead, _MM_HINT_T1);
                    both[p] = _mm512_loadu_si512(line);
                }
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; ++h) {
                    __m512i nibbles[P];
#pragma GCC unroll 4
                    for (int p = 0; p < P; ++p) {
                        nibbles[p] = _mm512_and_si512(pass + h == 0 ? both[p] : _mm512_srli_epi16(both[p], 4), nibble);
                    }
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) {
                        const char* q = a + r * a_stride + (pass + h) * 32 + i * 4;
                        const __m512i value = _mm512_set1_epi32(load_int(q));
#pragma GCC unroll 4
                        for (int p = 0; p < P; ++p) {
                            group[h][r][p] = _mm512_dpbusd_epi32(group[h][r][p], nibbles[p], value);
                        }
                    }
                }
            }
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) {
                    const __m512i pair = scale_pairs[p];
                    const __m512i scale = pass + h == 0 ? _mm512_and_si512(pair, _mm512_set1_epi32(15))
                                                        : _mm512_srli_epi32(pair, 4);
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) sums[r][p] = _mm512_dpwssd_epi32(sums[r][p], group[h][r][p], scale);
                }
            }
        }
        a += kBlock;
        b += kBlockBytes;
        scales += kScaleBytes;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) _mm512_storeu_si512(t.c + r * t.ldc + p * kPanel, sums[r][p]);
    }
}

using TileI4Function = void (*)(const TileI4&);

template <int R, int P>
constexpr TileI4Function tile_i4_if() {
    if constexpr (R * P <= 12) {
        return tile_i4<R, P>;
    } else {
        return nullptr;
    }
}

#define ROW(R) {tile_i4_if<R, 1>(), tile_i4_if<R, 2>(), tile_i4_if<R, 4>()}
constexpr TileI4Function kTilesI4[kMaxRowsI4][3] = {ROW(1), ROW(2), ROW(3), ROW(4),  ROW(5),  ROW(6),
                                                     ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12)};
#undef ROW

void rows_i4(const Gemm& g, int64_t first, int64_t num_rows) {
    const int64_t num_blocks = g.k / kBlock;
    for (int64_t block = 0; block < num_blocks; block += kCutBlocks) {
        const int64_t count = kCutBlocks < num_blocks - block ? kCutBlocks : num_blocks - block;
        const char* a = static_cast<const char*>(g.a) + first * g.lda + block * kBlock;
        BlockSums corrections;
        correct_groups(a, g.lda, num_rows, count, corrections);
        int64_t panels = num_rows <= 3 ? 4 : num_rows <= 6 ? 2 : 1;
        for (int64_t j = 0; j < g.num_panels; j += panels) {
            while (panels > g.num_panels - j) panels /= 2;
            const uint8_t* b = static_cast<const uint8_t*>(g.b) + j * g.b_stride;
            TileI4 t{a, g.lda, b + block * kBlockBytes, b + num_blocks * kBlockBytes + block * kScaleBytes,
                     g.b_stride, count, &corrections, static_cast<int32_t*>(g.c) + first * g.ldc + j * kPanel,
                     g.ldc, g.accumulate || block > 0, panels * g.b_stride};
            kTilesI4[num_rows - 1][__builtin_ctzll(static_cast<unsigned long long>(panels))](t);
        }
    }
}

void gemm_i4(const Gemm& g, const int32_t*) {
    const int64_t num_tiles = (g.m + kMaxRowsI4 - 1) / kMaxRowsI4;
    for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t first = t * g.m / num_tiles;
        rows_i4(g, first, (t + 1) * g.m / num_tiles - first);
    }
}

// The products of nibbles (0 .. 15) and scales (0 .. 15) fit into bytes: one 16-bit multiplication
// makes two of them, and nothing is carried from the lower to the higher.
struct BlockI4 {
    __m512i first_scale, second_scale, first_offset, second_offset;

    explicit BlockI4(const uint8_t* scales) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
        const __m512i twice = _mm512_or_si512(both, _mm512_slli_epi32(both, 16));  // in both halves
        first_scale = _mm512_and_si512(twice, _mm512_set1_epi16(15));
        second_scale = _mm512_srli_epi16(twice, 4);
        const __m512i eights = _mm512_set1_epi16(8 * 257), middle = _mm512_set1_epi8(-128);
        first_offset = _mm512_sub_epi8(middle, _mm512_mullo_epi16(first_scale, eights));
        second_offset = _mm512_sub_epi8(middle, _mm512_mullo_epi16(second_scale, eights));
    }
    // scale * value + 128 of the low and of the high nibbles
    __m512i low(__m512i line) const { return scaled(line, first_scale, first_offset); }
    __m512i high(__m512i line) const { return scaled(_mm512_srli_epi16(line, 4), second_scale, second_offset); }

    static __m512i scaled(__m512i line, __m512i scale, __m512i offset) {
        const __m512i nibbles = _mm512_and_si512(line, _mm512_set1_epi8(15));
        return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, scale), offset);
    }
};

void i4_to_i8(const void* panel, int64_t k, uint8_t* out) {
    const auto* b = static_cast<const uint8_t*>(panel);
    const uint8_t* scales = b + k / kBlock * kBlockBytes;
    for (int64_t block = 0; block < k / kBlock; ++block) {
        const BlockI4 converter(scales + block * kScaleBytes);
        for (int i = 0; i < 8; ++i) {
            _mm_prefetch(b + 32 * kLine, _MM_HINT_T1);
            const __m512i line = _mm512_loadu_si512(b);
            _mm512_store_si512(out + i * kLine, converter.low(line));
            _mm512_store_si512(out + (i + 8) * kLine, converter.high(line));
            b += kLine;
        }
        out += 16 * kLine;
    }
}

// A line of value + 128 to two of bf16. Integers below 256 are exact in bf16: the upper half of the
// float.
inline void store_bf16(__m512i line, uint16_t* out) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i s = _mm512_xor_si512(line, _mm512_set1_epi8(-128));  // signed
    const auto to_bits = [](__m512i ints) { return _mm512_castps_si512(_mm512_cvtepi32_ps(ints)); };
    const __m512i v0 = to_bits(_mm512_srai_epi32(_mm512_slli_epi32(s, 24), 24));
    const __m512i v1 = to_bits(_mm512_srai_epi32(_mm512_slli_epi32(s, 16), 24));
    const __m512i v2 = to_bits(_mm512_srai_epi32(_mm512_slli_epi32(s, 8), 24));
    const __m512i v3 = to_bits(_mm512_srai_epi32(s, 24));
    _mm512_store_si512(out, _mm512_or_si512(_mm512_srli_epi32(v0, 16), _mm512_and_si512(v1, upper)));
    _mm512_store_si512(out + 32, _mm512_or_si512(_mm512_srli_epi32(v2, 16), _mm512_and_si512(v3, upper)));
}

void i8_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    const auto* b = static_cast<const uint8_t*>(panel);
    for (int64_t i = 0; i < k / 4; ++i, b += kLine, out += 64) {
        _mm_prefetch(b + 32 * kLine, _MM_HINT_T1);
        store_bf16(_mm512_loadu_si512(b), out);
    }
}

void i4_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    const auto* b = static_cast<const uint8_t*>(panel);
    const uint8_t* scales = b + k / kBlock * kBlockBytes;
    for (int64_t block = 0; block < k / kBlock; ++block) {
        const BlockI4 converter(scales + block * kScaleBytes);
        for (int i = 0; i < 8; ++i, b += kLine) {
            _mm_prefetch(b + 32 * kLine, _MM_HINT_T1);
            const __m512i line = _mm512_loadu_si512(b);
            store_bf16(converter.low(line), out + i * 64);
            store_bf16(converter.high(line), out + (i + 8) * 64);
        }
        out += 16 * 64;
    }
}

}  // namespace

const LinearKernels avx512_linear = {
    gemm_f32,   gemm_bf16,  gemm_i8,
    gemm_i4,    i4_to_i8,   i4_to_bf16,
    i8_to_bf16, quantize_row<float>, quantize_row<uint16_t>,
    finish,
    48,
};

}  // namespace penstock
