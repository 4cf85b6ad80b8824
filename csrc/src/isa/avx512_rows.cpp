// Row kernels with AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "../rows.h"

namespace penstock {

namespace {

constexpr int64_t kLanes = 16;
using Vector = __m512;
using Dwords = __m512i;

inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// Of NaN and a number, max and min give the second operand.
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector round(Vector x) { return _mm512_roundscale_ps(x, 0); }
inline float total(Vector x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vector x) { return _mm512_reduce_max_ps(x); }

inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
inline Vector load(const uint16_t* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vector load(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

// The upper halves of the dwords are x as bf16. Not vcvtneps2bf16, which takes denormals for zero.
inline __m512i round_to_bf16(Vector x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}

inline void store(Vector x, float* out) { _mm512_storeu_ps(out, x); }
inline void store(Vector x, uint16_t* out) {
    const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
}
inline void store_dwords(Dwords x, void* out) { _mm512_storeu_si512(out, x); }

// Here the instruction serves: vdpbf16ps, which reads these, takes denormals for zero as well.
inline void store_probabilities(Vector x, uint16_t* out) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
}
inline void store_probabilities(Vector x, float* out) { store(x, out); }

inline Vector keep_first(Vector x, int64_t count, float otherwise) {
    const __mmask16 kept = count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
    return _mm512_mask_mov_ps(_mm512_set1_ps(otherwise), kept, x);
}
inline Vector drop_first(Vector x, int64_t count, float otherwise) {
    const __mmask16 dropped = count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
    return _mm512_mask_mov_ps(x, dropped, _mm512_set1_ps(otherwise));
}
inline uint32_t nan_lanes(Vector x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline uint32_t equal_lanes(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

// 2^f for |f| <= 0.5, exact for 0, else within 0.8 + 0.6 ulp: the polynomial's error and its sums'.
inline Vector power_of_fraction(Vector f) {
    Vector p = fma(f, broadcast(0x1.5bba14p-10f), broadcast(0x1.3cea88p-7f));
    p = fma(f, p, broadcast(0x1.c6b752p-5f));
    p = fma(f, p, broadcast(0x1.ebf9bcp-3f));
    p = fma(f, p, broadcast(0x1.62e42ap-1f));
    return fma(f, p, broadcast(1.0f));
}
inline Vector scale_by_power(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }
inline Vector exp2(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 0);  // x - round(x); 0 for -inf
    return scale_by_power(power_of_fraction(f), x - f);
}

// Quarter i: 16 bytes of Out, made of the elements of rows[4 * i] from dimension d.
template <typename Out>
Dwords assemble(const Out* const* rows, int64_t d) {
    const auto quarter = [&](int64_t i) { return reinterpret_cast<const __m128i*>(rows[4 * i] + d); };
    const __m256i low = _mm256_loadu2_m128i(quarter(1), quarter(0)), high = _mm256_loadu2_m128i(quarter(3), quarter(2));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m128i two_halves(const void* low, const void* high) {
    const __m128 first = _mm_castsi128_ps(_mm_loadl_epi64(static_cast<const __m128i*>(low)));
    return _mm_castps_si128(_mm_loadh_pi(first, static_cast<const __m64*>(high)));
}

// The upper halves of low's dwords, then those of high's.
inline __m512i upper_halves(__m512i low, __m512i high) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, odd, high);
}

template <typename Out>
    requires std::is_same_v<Out, uint16_t>
Dwords assemble(const int8_t* const* rows, int64_t d) {
    const auto half = [&](int64_t i) {
        const __m128i bytes = two_halves(rows[8 * i] + d, rows[8 * i + 4] + d);
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));  // exact in 8 bits
    };
    return upper_halves(half(0), half(1));
}

template <typename Out>
    requires std::is_same_v<Out, uint16_t>
Dwords assemble(const float* const* rows, int64_t d) {
    const auto half = [&](int64_t i) {
        const Vector x = _mm512_castps256_ps512(_mm256_loadu_ps(rows[8 * i] + d));
        return round_to_bf16(_mm512_insertf32x8(x, _mm256_loadu_ps(rows[8 * i + 4] + d), 1));
    };
    return upper_halves(half(0), half(1));
}

template <typename Out>
    requires std::is_same_v<Out, float>
Dwords assemble(const uint16_t* const* rows, int64_t d) {
    const __m256i bits = _mm256_set_m128i(two_halves(rows[8] + d, rows[12] + d), two_halves(rows[0] + d, rows[4] + d));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

template <typename Out>
    requires std::is_same_v<Out, float>
Dwords assemble(const int8_t* const* rows, int64_t d) {
    int32_t bytes[4];
    for (int64_t i = 0; i < 4; ++i) memcpy(&bytes[i], rows[4 * i] + d, 4);
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(all)));
}

inline void transpose(Dwords block[4]) {
    const __m512i a = _mm512_unpacklo_epi32(block[0], block[1]), b = _mm512_unpackhi_epi32(block[0], block[1]);
    const __m512i c = _mm512_unpacklo_epi32(block[2], block[3]), d = _mm512_unpackhi_epi32(block[2], block[3]);
    block[0] = _mm512_unpacklo_epi64(a, c);
    block[1] = _mm512_unpackhi_epi64(a, c);
    block[2] = _mm512_unpacklo_epi64(b, d);
    block[3] = _mm512_unpackhi_epi64(b, d);
}

// kLanes dwords: bf16 of even[i] below, of odd[i] above.
inline Dwords pairs(const uint16_t* even, const uint16_t* odd) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_permutex2var_epi16(low, order, high);
}
// Dwords whose upper halves are the elements as bf16. Small integers need no rounding.
inline __m512i above(const float* x) { return round_to_bf16(load(x)); }
inline __m512i above(const int8_t* x) { return _mm512_castps_si512(load(x)); }
template <typename In>
Dwords pairs(const In* even, const In* odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(above(even), 16), above(odd));
}

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

double sum_above(const float* x, int64_t n, float bound, int64_t* count) {
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    *count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(first_lanes(n - i), values, _mm512_set1_ps(bound), _CMP_GE_OQ);
        const __m512 terms = _mm512_maskz_mov_ps(kept, values);
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(terms)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(terms, 1)));
        *count += __builtin_popcount(kept);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
}

int64_t select_above(const float* x, int64_t n, float bound, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(first_lanes(n - i), values, _mm512_set1_ps(bound), _CMP_GE_OQ);
        if (kept == 0) continue;  // most: and compressing straight to memory is slow on some processors
        _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(kept, values));
        count += __builtin_popcount(kept);
    }
    return count;
}

#include "rows.inc"

}  // namespace

const RowKernels avx512_rows = kTable;

}  // namespace penstock
