// Row kernels with AVX2 and FMA.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "../rows.h"

namespace penstock {

namespace {

constexpr int64_t kLanes = 8;
using Vector = __m256;
using Dwords = __m256i;

inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
// Of NaN and a number, max and min give the second operand.
inline Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector round(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline float total(Vector x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float largest(Vector x) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

inline __m128i eight_words(const uint16_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
inline Vector load(const float* x) { return _mm256_loadu_ps(x); }
inline Vector load(const uint16_t* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_words(x)), 16));
}
inline Vector load(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

// The upper halves of the dwords are x as bf16.
inline __m256i round_to_bf16(Vector x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

inline void store(Vector x, float* out) { _mm256_storeu_ps(out, x); }
inline void store(Vector x, uint16_t* out) {
    const __m256i bits = _mm256_srli_epi32(round_to_bf16(x), 16);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
}
inline void store_dwords(Dwords x, void* out) { _mm256_storeu_si256(static_cast<__m256i*>(out), x); }
template <typename Out>
inline void store_probabilities(Vector x, Out* out) {
    store(x, out);
}

inline Vector keep_first(Vector x, int64_t count, float otherwise) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int32_t kept = static_cast<int32_t>(count < 0 ? 0 : count > kLanes ? kLanes : count);
    const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(kept), lanes);
    return _mm256_blendv_ps(_mm256_set1_ps(otherwise), x, _mm256_castsi256_ps(first));
}
inline Vector drop_first(Vector x, int64_t count, float otherwise) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int32_t dropped = static_cast<int32_t>(count < 0 ? 0 : count > kLanes ? kLanes : count);
    const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(dropped), lanes);
    return _mm256_blendv_ps(x, _mm256_set1_ps(otherwise), _mm256_castsi256_ps(first));
}
inline uint32_t nan_lanes(Vector x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
inline uint32_t equal_lanes(Vector a, Vector b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }

// 2^f for |f| <= 0.5, exact for 0, else within 0.8 + 0.6 ulp: the polynomial's error and its sums'.
inline Vector power_of_fraction(Vector f) {
    Vector p = fma(f, broadcast(0x1.5bba14p-10f), broadcast(0x1.3cea88p-7f));
    p = fma(f, p, broadcast(0x1.c6b752p-5f));
    p = fma(f, p, broadcast(0x1.ebf9bcp-3f));
    p = fma(f, p, broadcast(0x1.62e42ap-1f));
    return fma(f, p, broadcast(1.0f));
}
// In two steps, so that neither power leaves the range of floats; |n| <= 200.
inline Vector scale_by_power(Vector x, Vector n) {
    const __m256i power = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_srai_epi32(power, 1), second = _mm256_sub_epi32(power, first);
    const auto as_float = [&](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23));
    };
    return x * as_float(first) * as_float(second);
}
// For x <= 128.
inline Vector exp2(Vector x) {
    x = max(broadcast(-152.0f), x);
    const Vector n = round(x);
    return scale_by_power(power_of_fraction(x - n), n);
}

// Quarter i: 16 bytes of Out, made of the elements of rows[4 * i] from dimension d.
template <typename Out>
Dwords assemble(const Out* const* rows, int64_t d) {
    const auto quarter = [&](int64_t i) { return reinterpret_cast<const __m128i*>(rows[4 * i] + d); };
    return _mm256_loadu2_m128i(quarter(1), quarter(0));
}

// The upper halves of low's dwords, then those of high's.
inline __m256i upper_halves(__m256i low, __m256i high) {
    const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    return _mm256_permute4x64_epi64(words, 0xd8);
}

// Dwords whose upper halves are the elements as bf16. Small integers need no rounding.
inline __m256i above(const float* x) { return round_to_bf16(load(x)); }
inline __m256i above(const int8_t* x) { return _mm256_castps_si256(load(x)); }

template <typename Out, typename In>
    requires(std::is_same_v<Out, uint16_t> && !std::is_same_v<In, uint16_t>)
Dwords assemble(const In* const* rows, int64_t d) {
    return upper_halves(above(rows[0] + d), above(rows[4] + d));
}

template <typename Out>
    requires std::is_same_v<Out, float>
Dwords assemble(const uint16_t* const* rows, int64_t d) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[0] + d));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[4] + d));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_unpacklo_epi64(low, high)), 16);
}

template <typename Out>
    requires std::is_same_v<Out, float>
Dwords assemble(const int8_t* const* rows, int64_t d) {
    int32_t low, high;
    memcpy(&low, rows[0] + d, sizeof low);
    memcpy(&high, rows[4] + d, sizeof high);
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_setr_epi32(low, high, 0, 0))));
}

inline void transpose(Dwords block[4]) {
    const __m256i a = _mm256_unpacklo_epi32(block[0], block[1]), b = _mm256_unpackhi_epi32(block[0], block[1]);
    const __m256i c = _mm256_unpacklo_epi32(block[2], block[3]), d = _mm256_unpackhi_epi32(block[2], block[3]);
    block[0] = _mm256_unpacklo_epi64(a, c);
    block[1] = _mm256_unpackhi_epi64(a, c);
    block[2] = _mm256_unpacklo_epi64(b, d);
    block[3] = _mm256_unpackhi_epi64(b, d);
}

// kLanes dwords: bf16 of even[i] below, of odd[i] above.
inline Dwords pairs(const uint16_t* even, const uint16_t* odd) {
    const __m128i a = eight_words(even), b = eight_words(odd);
    return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}
template <typename In>
Dwords pairs(const In* even, const In* odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(above(even), 16), above(odd), 0xaa);
}

double sum_above(const float* x, int64_t n, float bound, int64_t* count) {
    double lanes[8] = {};
    int32_t counts[8] = {};
    for (int64_t i = 0; i < n; ++i) {
        const bool kept = x[i] >= bound;
        lanes[i % 8] += kept ? x[i] : 0.0f;
        counts[i % 8] += kept;
    }
    double sum = 0;
    *count = 0;
    for (int lane = 0; lane < 8; ++lane) {
        sum += lanes[lane];
        *count += counts[lane];
    }
    return sum;
}

int64_t select_above(const float* x, int64_t n, float bound, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        out[count] = x[i];
        count += x[i] >= bound;
    }
    return count;
}

#include "rows.inc"

}  // namespace

const RowKernels avx2_rows = kTable;

}  // namespace penstock
