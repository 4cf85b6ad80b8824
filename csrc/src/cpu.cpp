#include "cpu.h"

#include "penstock_native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace penstock {

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool bit(unsigned value, int index) { return value >> index & 1; }

uint64_t saved_state() {
    if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool tiles_permitted() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

uint64_t detect_isas() {
    uint64_t found = 1u << PENSTOCK_SCALAR;
    const uint64_t state = saved_state();
    const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    if (!ymm || !bit(extended.b, 5) || !bit(basic.c, 12) || !bit(basic.c, 29)) return found;  // AVX2, FMA, F16C
    found |= 1u << PENSTOCK_AVX2;
    // F, DQ, BW, VL, VNNI, BF16: Ice Lake has no BF16 and runs the AVX2 sources.
    const bool avx512 = bit(extended.b, 16) && bit(extended.b, 17) && bit(extended.b, 30) && bit(extended.b, 31) &&
                        bit(extended.c, 11) && bit(more.a, 5);
    if (!zmm || !avx512) return found;
    found |= 1u << PENSTOCK_AVX512;
    found |= 1u << PENSTOCK_AMX_EMULATED;  // for tests: AMX sources on AVX-512 with tiles in memory
    const bool amx = bit(extended.d, 22) && bit(extended.d, 24) && bit(extended.d, 25);  // bf16, tile, int8
    if (tiles && amx && tiles_permitted()) found |= 1u << PENSTOCK_AMX;
    return found;
}

}  // namespace penstock

#else

namespace penstock {

uint64_t detect_isas() { return 1u << PENSTOCK_SCALAR; }

}  // namespace penstock

#endif
