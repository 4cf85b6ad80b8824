#include "peaks.h"

#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "penstock_native.h"

namespace {

constexpr int64_t kLoops = 2000000;

struct Reading {
    const char* data;
    int64_t num_bytes;
};

// Eight streams a thread, as the kernels read panels.
__attribute__((target("avx2"))) void read_all(penstock::Team& team, const void* context) {
    const Reading& job = *static_cast<const Reading*>(context);
    constexpr int64_t kStream = 64 << 10, kStreams = 8, kTask = kStream * kStreams;
    __m256i sum = _mm256_setzero_si256();
    const int64_t num_tasks = job.num_bytes / kTask;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const char* begin = job.data + task * kTask;
        for (int64_t at = 0; at < kStream; at += 64) {
            for (int64_t s = 0; s < kStreams; ++s) {
                const char* line = begin + s * kStream + at;
                _mm_prefetch(line + 512, _MM_HINT_T1);
                sum = _mm256_xor_si256(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(line)));
                sum = _mm256_xor_si256(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(line + 32)));
            }
        }
    }
    volatile int64_t sink = _mm256_extract_epi64(sum, 0);
    (void)sink;
}

// Twelve independent chains of one instruction, in registers.
#define CHAINS(NAME, TARGET, TYPE, SET, NEXT)                                              \
    __attribute__((target(TARGET))) void NAME(penstock::Team&, const void*) {              \
        volatile int one = 1;                                                              \
        const auto a = SET(static_cast<int>(one));                                         \
        TYPE s[12];                                                                        \
        for (int i = 0; i < 12; ++i) s[i] = SET(static_cast<int>(one) + i);                \
        for (int64_t i = 0; i < kLoops; ++i) {                                             \
            s[0] = NEXT(s[0]), s[1] = NEXT(s[1]), s[2] = NEXT(s[2]), s[3] = NEXT(s[3]);    \
            s[4] = NEXT(s[4]), s[5] = NEXT(s[5]), s[6] = NEXT(s[6]), s[7] = NEXT(s[7]);    \
            s[8] = NEXT(s[8]), s[9] = NEXT(s[9]), s[10] = NEXT(s[10]), s[11] = NEXT(s[11]); \
        }                                                                                  \
        volatile TYPE sink;                                                                \
        for (const TYPE& value : s) sink = value;                                          \
        (void)sink;                                                                        \
    }

#define FMA512(S) _mm512_fmadd_ps(a, a, S)
#define DOT_BF16(S) _mm512_dpbf16_ps(S, (__m512bh)a, (__m512bh)a)
#define DOT_INT8(S) _mm512_dpbusd_epi32(S, a, a)
#define FMA256(S) _mm256_fmadd_ps(a, a, S)
#define FLOATS512(V) _mm512_set1_ps(static_cast<float>(V))
#define FLOATS256(V) _mm256_set1_ps(static_cast<float>(V))
CHAINS(chains_f32, "avx512f", __m512, FLOATS512, FMA512)
CHAINS(chains_bf16, "avx512f,avx512bf16", __m512, FLOATS512, DOT_BF16)
CHAINS(chains_int8, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32, DOT_INT8)
CHAINS(chains_avx2, "avx2,fma", __m256, FLOATS256, FMA256)

// Four independent products of tiles, over and over.
__attribute__((target("amx-tile,amx-bf16,amx-int8"))) void chains_amx(penstock::Team&, const void* context) {
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) {
        config[16 + 2 * t] = 64;
        config[48 + t] = 16;
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < kLoops; ++i) {
        if (context) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_release();
}

double rate(penstock::Pool& pool, penstock::Pool::Job job, const void* context, double amount, bool cpu_time) {
    double best = 0;
    for (int repeat = 0; repeat < 4; ++repeat) {
        const double start = seconds(cpu_time);
        pool.run(job, context);
        best = std::max(best, amount / (seconds(cpu_time) - start));
    }
    return best;
}

}  // namespace

double seconds(bool cpu_time) {
    timespec t;
    clock_gettime(cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

Peaks measure_peaks(penstock::Pool& pool, const char* data, int64_t num_bytes, bool cpu_time) {
    const Reading reading{data, num_bytes};
    const double products = static_cast<double>(kLoops) * pool.num_threads();
    const int isa = penstock_isa();
    Peaks p{};
    p.bytes = rate(pool, read_all, &reading, static_cast<double>(num_bytes), cpu_time);
    if (isa == PENSTOCK_SCALAR || isa == PENSTOCK_AVX2) {  // without dot products: as fast as floats
        p.f32 = p.bf16 = p.int8 = rate(pool, chains_avx2, nullptr, products * 12 * 16, cpu_time);
        return p;
    }
    p.f32 = rate(pool, chains_f32, nullptr, products * 12 * 32, cpu_time);
    if (isa == PENSTOCK_AMX) {
        p.bf16 = rate(pool, chains_amx, &reading, products * 4 * 16 * 16 * 64, cpu_time);
        p.int8 = rate(pool, chains_amx, nullptr, products * 4 * 16 * 16 * 128, cpu_time);
    } else {
        p.bf16 = rate(pool, chains_bf16, nullptr, products * 12 * 64, cpu_time);
        p.int8 = rate(pool, chains_int8, nullptr, products * 12 * 128, cpu_time);
    }
    return p;
}

char* allocate(int64_t num_bytes, bool huge_pages) {
    void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) exit((std::fprintf(stderr, "no memory\n"), 1));
    madvise(data, num_bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return static_cast<char*>(data);
}

void fill(char* data, int64_t num_bytes) {
    uint32_t state = 1;
    for (int64_t i = 0; i < num_bytes / 2; ++i) {
        state = state * 1664525u + 1013904223u;
        reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(0x3c00 | (state >> 16 & 0x807f));
    }
}
