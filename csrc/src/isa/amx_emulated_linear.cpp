// The AMX source on tiles in memory, for tests on machines without AMX.
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

template <typename Dot>
void multiply_tiles(int c, int a, int b, const Dot& dot) {
    for (int r = 0; r < tiles.config.rows[c]; ++r) {
        __m512i sum = _mm512_load_si512(tiles.data[c][r]);
        for (int line = 0; line < tiles.config.rows[b]; ++line) {
            int32_t value;
            memcpy(&value, tiles.data[a][r] + 4 * line, sizeof value);
            sum = dot(sum, _mm512_set1_epi32(value), _mm512_load_si512(tiles.data[b][line]));
        }
        _mm512_store_si512(tiles.data[c][r], sum);
    }
}

void dot_bf16(int c, int a, int b) {
    multiply_tiles(c, a, b, [](__m512i sum, __m512i x, __m512i y) {
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)x, (__m512bh)y));
    });
}

void dot_int8(int c, int a, int b) {
    multiply_tiles(c, a, b, [](__m512i sum, __m512i x, __m512i y) { return _mm512_dpbusd_epi32(sum, y, x); });
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
