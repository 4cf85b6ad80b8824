// AMX: the processor's tiles. The system permitted their use when the instruction set was found
// (cpu.cpp); the tiles' state belongs to a thread and is set up and released inside each product.
#include <immintrin.h>

#include <cstdint>

namespace penstock {
namespace {

struct alignas(64) TileConfig {  // as ldtilecfg reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

}  // namespace
}  // namespace penstock

// GCC 12 believes that loading the configuration reads 8 bytes and that loading tiles reads
// nothing: without the barriers it may leave out or delay what was stored before.
#define COMPILER_BARRIER() asm volatile("" ::: "memory")
#define TILE_CONFIGURE(config) \
    COMPILER_BARRIER();        \
    _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, pointer, stride) _tile_loadd(t, pointer, stride)
#define TILE_STORE(t, pointer, stride) _tile_stored(t, pointer, stride)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_DOT_INT8(c, a, b) _tile_dpbsud(c, a, b)
#define kTable amx_linear

#include "amx_linear.inc"
