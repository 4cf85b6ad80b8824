// Codes with AVX2: numbers of 4 bits from a table in two registers, or widened bytes. A pair of
// columns is four vectors, each of 4 rows with both columns of a row side by side.
#include <immintrin.h>

#include <cmath>

#include "codes_driver.h"

namespace penstock {
namespace {

constexpr int kQuarters = 4;

inline __m128i load_eight(const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); }

// One NaN for all: its bits survive what rounding adds to them.
inline __m256 plain(__m256 v) { return _mm256_blendv_ps(v, _mm256_set1_ps(NAN), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }

// Each form reads kBytes of codes at once, which are kLines pairs of columns. Numbers come 1 / kFactor
// of what they are: the scale makes up for it.
struct Book {
    static constexpr int kBytes = 64, kLines = 4;
    static constexpr float kFactor = 1;
    __m256 low, high;  // the numbers of codes 0 to 7 and 8 to 15
    explicit Book(const penstock_weight& w)
        : low(plain(_mm256_loadu_ps(w.book))), high(plain(_mm256_loadu_ps(w.book + 8))) {}
    __m256 numbers(const uint8_t* codes, int line, int quarter) const {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + quarter % 2);
        const __m256i index = _mm256_srli_epi32(both, 8 * line + (quarter < 2 ? 0 : 4));
        // A permutation looks at the lowest 3 bits, a blend at the sign: there the fourth goes.
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

// Codes that are integers themselves.
template <bool is_signed>
struct Nibbles {
    static constexpr int kBytes = 64, kLines = 4;
    static constexpr float kFactor = 1;
    explicit Nibbles(const penstock_weight&) {}
    static bool fits(const penstock_weight& w) {
        for (int i = 0; i < 16; ++i) {
            if (w.book[i] != static_cast<float>(is_signed && i >= 8 ? i - 16 : i)) return false;
        }
        return true;
    }
    static __m256 numbers(const uint8_t* codes, int line, int quarter) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + quarter % 2);
        const int shift = 8 * line + (quarter < 2 ? 0 : 4);
        if constexpr (is_signed) {
            return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 28 - shift), 28));
        } else {
            return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(both, shift), _mm256_set1_epi32(15)));
        }
    }
};

struct Bytes {
    static constexpr int kBytes = 32, kLines = 1;
    static constexpr float kFactor = 1;
    explicit Bytes(const penstock_weight&) {}
};

struct Unsigned : Bytes {
    using Bytes::Bytes;
    static __m256 numbers(const uint8_t* codes, int, int quarter) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_eight(codes + 8 * quarter)));
    }
};

struct Signed : Bytes {
    using Bytes::Bytes;
    static __m256 numbers(const uint8_t* codes, int, int quarter) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_eight(codes + 8 * quarter)));
    }
};

// As halves of which the exponent is 8 too small; where all bits are set, NaN.
struct E4m3 : Bytes {
    using Bytes::Bytes;
    static constexpr float kFactor = kE4m3Factor;
    static __m256 numbers(const uint8_t* codes, int, int quarter) {
        const __m128i nan = _mm_set1_epi16(0x3f80);
        const __m128i moved = _mm_slli_epi16(_mm_cvtepu8_epi16(load_eight(codes + 8 * quarter)), 7);
        const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(moved, nan), nan);
        const __m128i halved = _mm_add_epi16(moved, _mm_and_si128(moved, _mm_set1_epi16(0x4000)));  // the sign goes up
        const __m128i all = _mm_or_si128(halved, _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00)));
        return _mm256_cvtph_ps(all);
    }
};

struct E5m2 : Bytes {
    using Bytes::Bytes;
    static __m256 numbers(const uint8_t* codes, int, int quarter) {
        return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), load_eight(codes + 8 * quarter)));
    }
};

// 4 scales, each twice: as the numbers of a pair of columns lie.
inline __m256 load_scales(int32_t format, const uint8_t* scales, const uint8_t* units, int quarter, bool minima) {
    __m128 four;
    if (format == PENSTOCK_F32) {
        four = _mm_loadu_ps(reinterpret_cast<const float*>(scales) + 4 * quarter);
    } else if (format == PENSTOCK_F16) {
        four = _mm_cvtph_ps(load_eight(scales + 8 * quarter));
    } else {
        int32_t bytes;
        memcpy(&bytes, scales + 4 * quarter, sizeof bytes);
        const __m128i packed = _mm_cvtsi32_si128(bytes);
        const __m128i integers = minima ? _mm_cvtepu8_epi32(packed) : _mm_cvtepi8_epi32(packed);
        four = _mm_mul_ps(_mm_loadu_ps(reinterpret_cast<const float*>(units) + 4 * quarter), _mm_cvtepi32_ps(integers));
    }
    return plain(_mm256_set_m128(_mm_unpackhi_ps(four, four), _mm_unpacklo_ps(four, four)));
}

template <class Form, bool minima>
struct Scales {
    __m256 scale[kQuarters], minimum[kQuarters];

    Scales(int32_t format, const CodeLayout& layout, const uint8_t* group, const uint8_t* units) {
        for (int q = 0; q < kQuarters; ++q) {
            scale[q] = load_scales(format, group, units, q, false);
            if constexpr (Form::kFactor != 1) scale[q] = _mm256_mul_ps(scale[q], _mm256_set1_ps(Form::kFactor));
            if constexpr (minima) {
                minimum[q] = load_scales(format, group + layout.scale_bytes, units + 4 * kPanel, q, true);
            }
        }
    }
    __m256 apply(__m256 numbers, int q) const {
        const __m256 products = _mm256_mul_ps(numbers, scale[q]);
        if constexpr (minima) return _mm256_add_ps(products, minimum[q]);
        return products;
    }
};

// Stores half a line of each column of a pair: rows 8 * half to 8 * half + 7.
inline void store_half(float* out, int half, __m256 first, __m256 second) {
    const auto in_order = [](__m256 v) __attribute__((always_inline)) {
        return _mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8);
    };
    const __m256d even = in_order(_mm256_shuffle_ps(first, second, 0x88));
    const __m256d odd = in_order(_mm256_shuffle_ps(first, second, 0xdd));
    _mm256_storeu_ps(out + 8 * half, _mm256_castpd_ps(even));
    _mm256_storeu_ps(out + kPanel + 8 * half, _mm256_castpd_ps(odd));
}

// Rounded to bf16, in the lower halves. NaN, made `plain`, stays NaN.
inline __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_srli_epi32(near, 16);
}

inline void store_half(uint16_t* out, int half, __m256 first, __m256 second) {
    const __m256i words = _mm256_packus_epi32(rounded(first), rounded(second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + half, _mm256_permute4x64_epi64(words, 0xd8));
}

template <typename T, class Form, bool minima>
void decode(const penstock_weight& w, const void* panel, int64_t first, int64_t last, T* out) {
    const CodeLayout layout = code_layout(w);
    const Form form(w);
    T* lines = out;
    for_groups(layout, static_cast<const uint8_t*>(panel), first, last,
               [&](const uint8_t* group, const uint8_t* units, int64_t from, int64_t to) {
                   const Scales<Form, minima> scales(w.scale_format, layout, group, units);
                   const uint8_t* codes = group + layout.head_bytes + from * layout.code_bytes;
                   for (int64_t column = from; column < to; column += 2 * Form::kLines, codes += Form::kBytes) {
                       _mm_prefetch(codes + 2048, _MM_HINT_T0);
#pragma GCC unroll 4
                       for (int i = 0; i < Form::kLines; ++i, lines += 2 * kPanel) {
                           const auto value = [&](int q) __attribute__((always_inline)) {
                               return scales.apply(form.numbers(codes, i, q), q);
                           };
                           store_half(lines, 0, value(0), value(1));
                           store_half(lines, 1, value(2), value(3));
                       }
                   }
               });
    clear_padding(w, first, last, out);
}

template <typename T, bool minima>
Decode<T> decode_with(const penstock_weight& w) {
    if (w.format == PENSTOCK_CODES4) {
        if (Nibbles<false>::fits(w)) return decode<T, Nibbles<false>, minima>;
        return Nibbles<true>::fits(w) ? decode<T, Nibbles<true>, minima> : decode<T, Book, minima>;
    }
    switch (w.code) {
        case PENSTOCK_CODE_UINT8: return decode<T, Unsigned, minima>;
        case PENSTOCK_CODE_INT8: return decode<T, Signed, minima>;
        case PENSTOCK_CODE_E4M3: return decode<T, E4m3, minima>;
        default: return decode<T, E5m2, minima>;
    }
}

template <typename T>
Decode<T> decode_of(const penstock_weight& w) {
    return w.has_minima ? decode_with<T, true>(w) : decode_with<T, false>(w);
}

template <typename T>
void convert(const penstock_weight& w, const void* panel, int64_t first, int64_t last, T* out) {
    decode_of<T>(w)(w, panel, first, last, out);
}

void gemm_f32(const penstock_weight& w, const Gemm& g) {
    gemm_pieces<float>(w, g, 0, decode_of<float>(w), avx2_linear.gemm_f32);
}

void gemm_bf16(const penstock_weight& w, const Gemm& g) {
    gemm_pieces<uint16_t>(w, g, 0, decode_of<uint16_t>(w), avx2_linear.gemm_bf16);
}

}  // namespace

// Decoding is most of the work here, and pieces save no more than a panel's way to L2 and back.
const CodeKernels avx2_codes = {convert<float>, convert<uint16_t>, gemm_f32, gemm_bf16, 2, 2};

}  // namespace penstock
