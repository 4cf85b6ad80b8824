// Codes with AVX-512: numbers from a table in a register (4 bits), or widened bytes.
//
// Few rows are multiplied as weights are decoded, in registers. Two panels at a time: while the sum
// of one is under way, the other's next line is decoded. bf16 denormals are zeros here, as they are
// for the processor's bf16 products.
#include <immintrin.h>

#include "codes_driver.h"

namespace penstock {
namespace {

constexpr int64_t kLine = 64;

struct Pair {  // of columns: rows 0 to 7 and rows 8 to 15, both columns of a row side by side
    __m512 low, high;
};

// Each form reads kBytes of codes at once, which are kLines pairs of columns. Numbers come 1 / kFactor
// of what they are: the scale makes up for it.
struct Book {
    static constexpr int kBytes = 64, kLines = 4;
    static constexpr float kFactor = 1;
    __m512 book;
    explicit Book(const penstock_weight& w) : book(_mm512_loadu_ps(w.book)) {}
    static __m512i load(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
    // A permutation looks at the lowest 4 bits alone.
    Pair numbers(__m512i codes, int line) const {
        const __m512i low = line ? _mm512_srli_epi32(codes, 8 * line) : codes;
        return {_mm512_permutexvar_ps(low, book), _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * line + 4), book)};
    }
};

struct Bytes {
    static constexpr int kBytes = 32, kLines = 1;
    static constexpr float kFactor = 1;
    explicit Bytes(const penstock_weight&) {}
    static const uint8_t* load(const uint8_t* codes) { return codes; }
    static __m128i half(const uint8_t* codes, int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
    }
    static __m256i all(const uint8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }
    static Pair halves(__m512i f16) {
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(f16)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(f16, 1))};
    }
};

struct Unsigned : Bytes {
    using Bytes::Bytes;
    static __m512 number(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }
    static Pair numbers(const uint8_t* codes, int) { return {number(half(codes, 0)), number(half(codes, 1))}; }
};

struct Signed : Bytes {
    using Bytes::Bytes;
    static __m512 number(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
    static Pair numbers(const uint8_t* codes, int) { return {number(half(codes, 0)), number(half(codes, 1))}; }
};

// As halves of which the exponent is 8 too small; where all bits are set, NaN.
struct E4m3 : Bytes {
    using Bytes::Bytes;
    static constexpr float kFactor = kE4m3Factor;
    static Pair numbers(const uint8_t* codes, int) {
        const __m256i bytes = all(codes);
        const __mmask32 is_number =
            _mm256_cmpneq_epi8_mask(_mm256_or_si256(bytes, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-1));
        const __m512i moved = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 7);
        const __m512i sign = _mm512_and_si512(moved, _mm512_set1_epi16(0x4000));  // one too low
        return halves(_mm512_mask_add_epi16(_mm512_set1_epi16(0x7e00), is_number, moved, sign));
    }
};

struct E5m2 : Bytes {
    using Bytes::Bytes;
    static Pair numbers(const uint8_t* codes, int) { return halves(_mm512_slli_epi16(_mm512_cvtepu8_epi16(all(codes)), 8)); }
};

// 16 scales, each twice: as the numbers of a pair of columns lie.
inline Pair twice(__m512 scales) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return {_mm512_permutexvar_ps(low, scales), _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), scales)};
}

inline Pair load_scales(int32_t format, const uint8_t* scales, const uint8_t* units, bool minima) {
    if (format == PENSTOCK_F32) return twice(_mm512_loadu_ps(scales));
    if (format == PENSTOCK_F16) {
        return twice(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales))));
    }
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m512i integers = minima ? _mm512_cvtepu8_epi32(bytes) : _mm512_cvtepi8_epi32(bytes);
    return twice(_mm512_mul_ps(_mm512_loadu_ps(units), _mm512_cvtepi32_ps(integers)));
}

template <class Form, bool minima>
struct Scales {
    Pair scale, minimum;

    Scales() = default;
    Scales(int32_t format, const CodeLayout& layout, const uint8_t* group, const uint8_t* units)
        : scale(load_scales(format, group, units, false)) {
        if constexpr (Form::kFactor != 1) {
            const __m512 factor = _mm512_set1_ps(Form::kFactor);
            scale = {_mm512_mul_ps(scale.low, factor), _mm512_mul_ps(scale.high, factor)};
        }
        if constexpr (minima) minimum = load_scales(format, group + layout.scale_bytes, units + 4 * kPanel, true);
    }
    Pair apply(Pair numbers) const {
        const Pair products{_mm512_mul_ps(numbers.low, scale.low), _mm512_mul_ps(numbers.high, scale.high)};
        if constexpr (!minima) return products;
        return {_mm512_add_ps(products.low, minimum.low), _mm512_add_ps(products.high, minimum.high)};
    }
};

struct ToFloat {
    using T = float;
    static constexpr int kMaxRows = 4;  // from there on, two products a row cost more than a conversion
    struct Lines {
        __m512 even, odd;
    };
    static Lines lines(Pair p) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return {_mm512_permutex2var_ps(p.low, even, p.high), _mm512_permutex2var_ps(p.low, odd, p.high)};
    }
    static void store(float* out, Lines l) {
        _mm512_storeu_ps(out, l.even);
        _mm512_storeu_ps(out + kPanel, l.odd);
    }
    static __m512 add(__m512 sum, const float* a, Lines l) {
        return _mm512_fmadd_ps(_mm512_set1_ps(a[1]), l.odd, _mm512_fmadd_ps(_mm512_set1_ps(a[0]), l.even, sum));
    }
};

struct ToBf16 {
    using T = uint16_t;
    static constexpr int kMaxRows = 8;
    using Lines = __m512bh;
    static Lines lines(Pair p) { return _mm512_cvtne2ps_pbh(p.high, p.low); }
    static void store(uint16_t* out, Lines l) { _mm512_storeu_si512(out, (__m512i)l); }
    static __m512 add(__m512 sum, const uint16_t* a, Lines l) {
        int32_t both;
        memcpy(&both, a, sizeof both);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(both), l);
    }
};

template <class To, class Form, bool minima>
void decode(const penstock_weight& w, const void* panel, int64_t first, int64_t last, typename To::T* out) {
    const CodeLayout layout = code_layout(w);
    const Form form(w);
    typename To::T* to_line = out;
    for_groups(layout, static_cast<const uint8_t*>(panel), first, last,
               [&](const uint8_t* group, const uint8_t* units, int64_t from, int64_t to) {
                   const Scales<Form, minima> scales(w.scale_format, layout, group, units);
                   const uint8_t* codes = group + layout.head_bytes + from * layout.code_bytes;
                   for (int64_t column = from; column < to; column += 2 * Form::kLines, codes += Form::kBytes) {
                       _mm_prefetch(codes + 32 * kLine, _MM_HINT_T1);
                       const auto loaded = form.load(codes);
#pragma GCC unroll 4
                       for (int i = 0; i < Form::kLines; ++i, to_line += 2 * kPanel) {
                           To::store(to_line, To::lines(scales.apply(form.numbers(loaded, i))));
                       }
                   }
               });
    clear_padding(w, first, last, out);
}

constexpr int kPanels = 2;             // at a time, decoded in registers
constexpr int64_t kAheadBytes = 2048;  // what is fetched of a panel that streams from memory

// Columns [0, last) of kPanels panels with up to R rows, sums in registers all the way. Where there
// are fewer rows, the last one is multiplied again and not stored.
template <class To, class Form, bool minima, int R>
void tile(const penstock_weight& w, const Gemm& g, const uint8_t* b, int64_t last) {
    const CodeLayout layout = code_layout(w);
    const Form form(w);
    const typename To::T* rows[R];
    float* out[R];
    __m512 sums[R][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const int64_t row = r < g.m ? r : g.m - 1;
        rows[r] = static_cast<const typename To::T*>(g.a) + row * g.lda;
        out[r] = static_cast<float*>(g.c) + row * g.ldc;
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            sums[r][p] = g.accumulate ? _mm512_loadu_ps(out[r] + p * kPanel) : _mm512_setzero_ps();
        }
    }
    const int64_t b_stride = g.b_stride;
    int64_t k = 0;
    for_groups(layout, b, 0, last, [&](const uint8_t* group, const uint8_t* units, int64_t, int64_t count) {
        Scales<Form, minima> scales[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            scales[p] = Scales<Form, minima>(w.scale_format, layout, group + p * b_stride, units + p * b_stride);
        }
        // At the end of these panels, fetch the beginning of those after them.
        const uint8_t* codes = group + layout.head_bytes;
        const bool ends = codes + count * layout.code_bytes + kAheadBytes > b + b_stride;
        const int64_t ahead = kAheadBytes + (ends ? (kPanels - 1) * b_stride : 0);
        for (int64_t column = 0; column < count; column += 2 * Form::kLines, codes += Form::kBytes) {
            decltype(form.load(codes)) loaded[kPanels];
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) {
                _mm_prefetch(codes + p * b_stride + ahead, _MM_HINT_T0);
                loaded[p] = form.load(codes + p * b_stride);
            }
#pragma GCC unroll 4
            for (int i = 0; i < Form::kLines; ++i) {
#pragma GCC unroll 4
                for (int p = 0; p < kPanels; ++p) {
                    const auto lines = To::lines(scales[p].apply(form.numbers(loaded[p], i)));
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) sums[r][p] = To::add(sums[r][p], rows[r] + k + 2 * i, lines);
                }
            }
            k += 2 * Form::kLines;
        }
    });
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        if (r >= g.m) break;
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(out[r] + p * kPanel, sums[r][p]);
    }
}

template <class To, class Form, bool minima, int R>
constexpr auto tile_if() {
    using Tile = void (*)(const penstock_weight&, const Gemm&, const uint8_t*, int64_t);
    if constexpr (R <= To::kMaxRows) return Tile{tile<To, Form, minima, R>};
    else return Tile{};
}

template <class To>
struct Functions {
    Decode<typename To::T> decode;
    void (*tiles[5])(const penstock_weight&, const Gemm&, const uint8_t*, int64_t);  // of 1, 2, 4, 6, 8 rows
};

template <class To, class Form, bool minima>
constexpr Functions<To> functions = {
    decode<To, Form, minima>,
    {tile_if<To, Form, minima, 1>(), tile_if<To, Form, minima, 2>(), tile_if<To, Form, minima, 4>(),
     tile_if<To, Form, minima, 6>(), tile_if<To, Form, minima, 8>()}};

template <class To, bool minima>
const Functions<To>& functions_with(const penstock_weight& w) {
    if (w.format == PENSTOCK_CODES4) return functions<To, Book, minima>;
    switch (w.code) {
        case PENSTOCK_CODE_UINT8: return functions<To, Unsigned, minima>;
        case PENSTOCK_CODE_INT8: return functions<To, Signed, minima>;
        case PENSTOCK_CODE_E4M3: return functions<To, E4m3, minima>;
        default: return functions<To, E5m2, minima>;
    }
}

template <class To>
const Functions<To>& functions_of(const penstock_weight& w) {
    return w.has_minima ? functions_with<To, true>(w) : functions_with<To, false>(w);
}

template <class To>
void convert(const penstock_weight& w, const void* panel, int64_t first, int64_t last, typename To::T* out) {
    functions_of<To>(w).decode(w, panel, first, last, out);
}

template <class To>
void gemm(const penstock_weight& w, const Gemm& g, void (*plain)(const Gemm&)) {
    const Functions<To>& f = functions_of<To>(w);
    const int64_t whole = w.num_columns / 64 * 64;  // without padding
    if (g.m > To::kMaxRows) return gemm_pieces(w, g, 0, f.decode, plain);
    int64_t j = 0;
    for (; j + kPanels <= g.num_panels; j += kPanels) {
        Gemm part = g;
        part.num_panels = kPanels;
        part.b = static_cast<const char*>(g.b) + j * g.b_stride;
        part.c = static_cast<float*>(g.c) + j * kPanel;
        f.tiles[g.m == 1 ? 0 : (g.m + 1) / 2](w, part, static_cast<const uint8_t*>(part.b), whole);
        gemm_pieces(w, part, whole, f.decode, plain);
    }
    if (j == g.num_panels) return;
    Gemm part = g;
    part.num_panels = g.num_panels - j;
    part.b = static_cast<const char*>(g.b) + j * g.b_stride;
    part.c = static_cast<float*>(g.c) + j * kPanel;
    gemm_pieces(w, part, 0, f.decode, plain);
}

void gemm_f32(const penstock_weight& w, const Gemm& g) { gemm<ToFloat>(w, g, avx512_linear.gemm_f32); }
void gemm_bf16(const penstock_weight& w, const Gemm& g) { gemm<ToBf16>(w, g, avx512_linear.gemm_bf16); }

}  // namespace

const CodeKernels avx512_codes = {
    convert<ToFloat>, convert<ToBf16>, gemm_f32, gemm_bf16, ToFloat::kMaxRows, ToBf16::kMaxRows,
};

// Tiles serve bf16 from 4 rows on (amx_linear.inc), in an order of their own.
const CodeKernels amx_codes = {convert<ToFloat>, convert<ToBf16>, gemm_f32, gemm_bf16, ToFloat::kMaxRows, 3};
const CodeKernels amx_emulated_codes = amx_codes;

}  // namespace penstock
