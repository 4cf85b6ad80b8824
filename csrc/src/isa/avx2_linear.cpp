// AVX2 with FMA: a line of a panel is two registers of 8 outputs.
#include <immintrin.h>

#include "../kernels.h"
#include "gemm_driver.h"
#include "linear_plain.h"

namespace penstock {
namespace {

inline __m256i broadcast(const char* p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return _mm256_set1_epi32(value);
}

inline __m256i half_of(const char* line, int half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + half);
}

struct Floats {
    using Sum = __m256;
    static Sum start(const Tile&, int) { return _mm256_setzero_ps(); }
    static Sum load(const void* c) { return _mm256_loadu_ps(static_cast<const float*>(c)); }
    static void store(void* c, Sum sum) { _mm256_storeu_ps(static_cast<float*>(c), sum); }
};

// Each format splits a line's half and a row's 4 bytes once and multiplies the parts.
struct F32 : Floats {
    static constexpr int kRows = 6;
    struct B {
        __m256 value;
    };
    using A = B;
    static B split_b(__m256i b) { return {_mm256_castsi256_ps(b)}; }
    static A split_a(__m256i a) { return {_mm256_castsi256_ps(a)}; }
    static Sum add(Sum sum, const A& a, const B& b) { return _mm256_fmadd_ps(a.value, b.value, sum); }
};

struct Bf16 : Floats {
    static constexpr int kRows = 4;
    struct B {
        __m256 even, odd;
    };
    using A = B;
    static B split_b(__m256i b) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(b, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(b, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static A split_a(__m256i a) { return split_b(a); }
    static Sum add(Sum sum, const A& a, const B& b) {
        return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, sum));
    }
};

// vpmaddubsw would saturate: even and odd bytes are multiplied as 16-bit numbers.
struct Int8 {
    static constexpr int kRows = 4;
    using Sum = __m256i;
    struct B {
        __m256i even, odd;
    };
    using A = B;
    static Sum start(const Tile& t, int row) { return _mm256_set1_epi32(-128 * t.row_sums[row]); }
    static Sum load(const void* c) { return _mm256_loadu_si256(static_cast<const __m256i*>(c)); }
    static void store(void* c, Sum sum) { _mm256_storeu_si256(static_cast<__m256i*>(c), sum); }
    static B split_b(__m256i b) { return {_mm256_and_si256(b, _mm256_set1_epi16(255)), _mm256_srli_epi16(b, 8)}; }
    static A split_a(__m256i a) { return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)}; }
    static Sum add(Sum sum, const A& a, const B& b) {
        const __m256i even = _mm256_madd_epi16(a.even, b.even), odd = _mm256_madd_epi16(a.odd, b.odd);
        return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }
};

template <class F, int R, int P>
void tile(const Tile& t) {
    typename F::Sum sums[R][P][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const char* c = t.c + r * t.c_stride + p * kLine + half * 32;
                sums[r][p][half] = t.accumulate ? F::load(c) : F::start(t, r);
            }
        }
    }
    const char *a = t.a, *b = t.b;
    for (int64_t line = 0; line < t.num_lines; ++line, a += 4, b += kLine) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            if (line % 4 < t.num_ahead) _mm_prefetch(b + p * t.b_stride + t.ahead, _MM_HINT_T0);
            const typename F::B low = F::split_b(half_of(b + p * t.b_stride, 0));
            const typename F::B high = F::split_b(half_of(b + p * t.b_stride, 1));
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const typename F::A value = F::split_a(broadcast(a + r * t.a_stride));
                sums[r][p][0] = F::add(sums[r][p][0], value, low);
                sums[r][p][1] = F::add(sums[r][p][1], value, high);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                F::store(t.c + r * t.c_stride + p * kLine + half * 32, sums[r][p][half]);
            }
        }
    }
}

template <class F>
struct Format {
    static constexpr int64_t kMaxRows = F::kRows, kCutLines = 512, kAheadLines = 64;
    static int64_t panels_for(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
    static TileFunction tile(int64_t rows, int64_t panels) {
        switch (rows) {
            case 1:
                if (panels == 4) return &penstock::tile<F, 1, 4>;
                return panels == 2 ? &penstock::tile<F, 1, 2> : &penstock::tile<F, 1, 1>;
            case 2: return panels == 2 ? &penstock::tile<F, 2, 2> : &penstock::tile<F, 2, 1>;
            case 3: return &penstock::tile<F, 3, 1>;
            case 4: return &penstock::tile<F, 4, 1>;
            case 5: return &penstock::tile<F, kMaxRows < 5 ? 1 : 5, 1>;
            default: return &penstock::tile<F, kMaxRows < 6 ? 1 : 6, 1>;
        }
    }
};

void gemm_f32(const Gemm& g) { drive<Format<F32>>(g, 4, nullptr); }
void gemm_bf16(const Gemm& g) { drive<Format<Bf16>>(g, 2, nullptr); }
void gemm_i8(const Gemm& g, const int32_t* row_sums) { drive<Format<Int8>>(g, 1, row_sums); }

// INT4. A block of 64 columns is 8 lines of nibbles, the first group's low, the second's high. The
// products of nibbles (0 .. 15) and scales (0 .. 15) fit into bytes: one 16-bit multiplication makes
// two of them, and nothing is carried from the lower to the higher.
constexpr int64_t kBlock = 64, kBlockBytes = 512, kScaleBytes = 16;

struct Scales {  // of 8 outputs and one group
    __m256i scale, offset;

    Scales(const uint8_t* scales, bool second) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
        const __m256i both = _mm256_cvtepu8_epi32(bytes);
        const __m256i nibbles = second ? _mm256_srli_epi32(both, 4) : _mm256_and_si256(both, _mm256_set1_epi32(15));
        scale = _mm256_or_si256(nibbles, _mm256_slli_epi32(nibbles, 16));
        offset = _mm256_sub_epi8(_mm256_set1_epi8(-128), _mm256_mullo_epi16(scale, _mm256_set1_epi16(8 * 257)));
    }
    // scale * value + 128 of the low nibbles
    __m256i apply(__m256i half) const {
        const __m256i nibbles = _mm256_and_si256(half, _mm256_set1_epi8(15));
        return _mm256_add_epi8(_mm256_mullo_epi16(nibbles, scale), offset);
    }
};

// One block of a panel to 16 lines of INT8.
inline void block_to_i8(const char* b, const uint8_t* scales, char* out) {
    for (int half = 0; half < 2; ++half) {
        const Scales first(scales + half * 8, false), second(scales + half * 8, true);
        for (int i = 0; i < 8; ++i) {
            const __m256i both = half_of(b + i * kLine, half);
            auto* to = reinterpret_cast<__m256i*>(out + i * kLine) + half;
            _mm256_store_si256(to, first.apply(both));
            _mm256_store_si256(to + 16, second.apply(_mm256_srli_epi16(both, 4)));
        }
    }
}

void i4_to_i8(const void* panel, int64_t k, uint8_t* out) {
    const char* b = static_cast<const char*>(panel);
    const auto* scales = reinterpret_cast<const uint8_t*>(b + k / kBlock * kBlockBytes);
    auto* lines = reinterpret_cast<char*>(out);
    for (int64_t block = 0; block < k / kBlock; ++block) {
        block_to_i8(b + block * kBlockBytes, scales + block * kScaleBytes, lines + block * 16 * kLine);
    }
}

// Some blocks at a time to INT8 in L1.
void gemm_i4(const Gemm& g, const int32_t* row_sums) {
    constexpr int64_t kBlocks = 8;
    alignas(64) char panel[kBlocks * 16 * kLine];
    for (int64_t j = 0; j < g.num_panels; ++j) {
        const char* b = static_cast<const char*>(g.b) + j * g.b_stride;
        const auto* scales = reinterpret_cast<const uint8_t*>(b + g.k / kBlock * kBlockBytes);
        for (int64_t block = 0; block < g.k / kBlock; block += kBlocks) {
            const int64_t left = g.k / kBlock - block, count = left < kBlocks ? left : kBlocks;
            for (int64_t i = 0; i < count; ++i) {
                block_to_i8(b + (block + i) * kBlockBytes, scales + (block + i) * kScaleBytes, panel + i * 16 * kLine);
            }
            Gemm part = g;
            part.num_panels = 1;
            part.k = count * kBlock;
            part.a = static_cast<const char*>(g.a) + block * kBlock;
            part.b = panel;
            part.c = static_cast<int32_t*>(g.c) + j * kPanel;
            part.accumulate = g.accumulate || block > 0;
            drive<Format<Int8>>(part, 1, row_sums);
        }
    }
}

// Half a line of value + 128 to half of two lines of bf16. Integers below 256 are exact in bf16: the
// upper half of the float.
inline void store_bf16(__m256i half, char* out) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256i s = _mm256_xor_si256(half, _mm256_set1_epi8(-128));  // signed
    const auto to_bits = [](__m256i ints) __attribute__((always_inline)) {
        return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(ints, 24)));
    };
    const __m256i v0 = to_bits(_mm256_slli_epi32(s, 24)), v1 = to_bits(_mm256_slli_epi32(s, 16));
    const __m256i v2 = to_bits(_mm256_slli_epi32(s, 8)), v3 = to_bits(s);
    auto* to = reinterpret_cast<__m256i*>(out);
    _mm256_store_si256(to, _mm256_or_si256(_mm256_srli_epi32(v0, 16), _mm256_and_si256(v1, upper)));
    _mm256_store_si256(to + 2, _mm256_or_si256(_mm256_srli_epi32(v2, 16), _mm256_and_si256(v3, upper)));
}

void i8_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    const char* b = static_cast<const char*>(panel);
    char* to = reinterpret_cast<char*>(out);
    for (int64_t i = 0; i < k / 4; ++i, b += kLine, to += 2 * kLine) {
        store_bf16(half_of(b, 0), to);
        store_bf16(half_of(b, 1), to + 32);
    }
}

void i4_to_bf16(const void* panel, int64_t k, uint16_t* out) {
    const char* b = static_cast<const char*>(panel);
    const auto* scales = reinterpret_cast<const uint8_t*>(b + k / kBlock * kBlockBytes);
    for (int64_t block = 0; block < k / kBlock; ++block) {
        alignas(64) char bytes[16 * kLine];
        block_to_i8(b + block * kBlockBytes, scales + block * kScaleBytes, bytes);
        i8_to_bf16(bytes, kBlock, out + block * kBlock * kPanel);
    }
}

}  // namespace

const LinearKernels avx2_linear = {
    gemm_f32,   gemm_bf16,  gemm_i8,
    gemm_i4,    i4_to_i8,   i4_to_bf16,
    i8_to_bf16, quantize_row<float>, quantize_row<uint16_t>,
    finish,
    4,
};

}  // namespace penstock
