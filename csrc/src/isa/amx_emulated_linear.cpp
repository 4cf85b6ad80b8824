// The AMX source on tiles in memory, for tests on machines without AMX: sums in the order that Intel's
// manual gives (TDPBF16PS, TDPBSUD), so that bf16 differs from the AVX-512 kernels here as it does
// there. Denormals, which the processor takes for zeros, are kept.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace penstock {
namespace {

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Tiles {
    TileConfig config;
    alignas(64) char data[8][16][64];
};

thread_local Tiles tiles;

void configure(const TileConfig* config) {
    memset(&tiles, 0, sizeof tiles);
    tiles.config = *config;
}

void zero(int t) { memset(tiles.data[t], 0, sizeof tiles.data[t]); }

void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int r = 0; r < tiles.config.rows[t]; ++r) {
        memcpy(tiles.data[t][r], static_cast<const char*>(from) + r * stride, tiles.config.row_bytes[t]);
    }
}

void store(int t, void* to, int64_t stride) {
    for (int r = 0; r < tiles.config.rows[t]; ++r) {
        memcpy(static_cast<char*>(to) + r * stride, tiles.data[t][r], tiles.config.row_bytes[t]);
    }
}

// The 4 bytes of row r of tile a that meet `line` of a panel, in all lanes.
__m512i dword(int a, int r, int line) {
    int32_t value;
    memcpy(&value, tiles.data[a][r] + 4 * line, sizeof value);
    return _mm512_set1_epi32(value);
}

// The even and the odd products of all lines in a chain each, and the sum of both added to c.
void dot_bf16(int c, int a, int b) {
    const auto even = [](__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); };
    const auto odd = [](__m512i pairs) {
        return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    };
    for (int r = 0; r < tiles.config.rows[c]; ++r) {
        __m512 evens = _mm512_setzero_ps(), odds = _mm512_setzero_ps();
        for (int line = 0; line < tiles.config.rows[b]; ++line) {
            const __m512i x = dword(a, r, line), y = _mm512_load_si512(tiles.data[b][line]);
            evens = _mm512_fmadd_ps(even(x), even(y), evens);
            odds = _mm512_fmadd_ps(odd(x), odd(y), odds);
        }
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(tiles.data[c][r]), _mm512_add_ps(evens, odds));
        _mm512_store_ps(tiles.data[c][r], sum);
    }
}

void dot_int8(int c, int a, int b) {
    for (int r = 0; r < tiles.config.rows[c]; ++r) {
        __m512i sum = _mm512_load_si512(tiles.data[c][r]);
        for (int line = 0; line < tiles.config.rows[b]; ++line) {
            sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(tiles.data[b][line]), dword(a, r, line));
        }
        _mm512_store_si512(tiles.data[c][r], sum);
    }
}

}  // namespace
}  // namespace penstock

#define TILE_CONFIGURE(config) configure(config)
#define TILE_RELEASE() memset(&tiles, 255, sizeof tiles)
#define TILE_ZERO(t) zero(t)
#define TILE_LOAD(t, pointer, stride) load(t, pointer, stride)
#define TILE_STORE(t, pointer, stride) store(t, pointer, stride)
#define TILE_DOT_BF16(c, a, b) dot_bf16(c, a, b)
#define TILE_DOT_INT8(c, a, b) dot_int8(c, a, b)
#define kTable amx_emulated_linear

#include "amx_linear.inc"
