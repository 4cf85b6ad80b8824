// Weights as codes: converters and products of every instruction set against an oracle that
// computes each weight from the format's definition, and products against sums in double precision.
//
// Weights are exact: value = number * scale + minimum in floats, rounded twice, and once more to bf16.
// A float sum of k products in any order is within k * 2^-24 of the sum of their magnitudes (Higham
// 2002, section 3.1).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "coded.h"
#include "codes.h"
#include "kernels.h"
#include "numbers.h"
#include "ops.h"
#include "pack.h"
#include "penstock_native.h"
#include "poison.h"

namespace {

using namespace penstock;

const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "amx", "amx_emulated"};

std::vector<Kind> kinds() {
    std::vector<Kind> all;
    for (int code = -1; code < 4; ++code) {
        for (const int32_t group_size : {16, 32, 64, 96, 128, 256, 0}) {
            for (const int32_t scale_format : {PENSTOCK_F32, PENSTOCK_F16, PENSTOCK_INT8}) {
                if (scale_format == PENSTOCK_INT8 && (group_size == 0 || group_size == 96)) continue;
                for (int32_t minima = 0; minima < 2; ++minima) {
                    const int32_t format = code < 0 ? PENSTOCK_CODES4 : PENSTOCK_CODES8;
                    all.push_back({format, code < 0 ? 0 : code, group_size, scale_format, minima});
                }
            }
        }
    }
    return all;
}

std::vector<int> isas() {
    std::vector<int> found;
    for (int isa = 0; isa < 5; ++isa) {
        if (penstock_available_isas() >> isa & 1) found.push_back(isa);
    }
    return found;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Rows and whole panels as numbers, in every instruction set; padding is zero whatever the scales are.
void check_values(const Packed& p, const std::string& name) {
    const penstock_weight& w = p.w;
    const int64_t k = w.padded_columns;
    std::vector<float> row(w.num_columns);
    for (int64_t r = 0; r < w.num_rows; ++r) {
        unpack_row(w, r, row.data());
        for (int64_t i = 0; i < w.num_columns; ++i) {
            CHECK(same(row[i], p.value(r, i)), "%s row %d column %d", name.c_str(), int(r), int(i));
        }
    }
    for (const int isa : isas()) {
        CHECK(penstock_set_isa(isa) == 0);
        const CodeKernels& kernel = *kernels().codes;
        for (int64_t panel = 0; panel * 16 < w.num_rows; ++panel) {
            const char* b = static_cast<const char*>(w.data) + panel * w.panel_bytes;
            const bool all = panel == 0;
            const int64_t first = all ? 0 : pick(k / 16) * 16, last = all ? k : first + 16 * (1 + pick((k - first) / 16));
            Buffer<float> floats((last - first) * 16);
            Buffer<uint16_t> halves((last - first) * 16);
            kernel.to_f32(w, b, first, last, floats.data);
            kernel.to_bf16(w, b, first, last, halves.data);
            for (int64_t i = first; i < last; ++i) {
                for (int64_t lane = 0; lane < 16; ++lane) {
                    const bool padding = i >= w.num_columns || panel * 16 + lane >= w.num_rows;
                    const float right = padding ? 0.0f : p.value(panel * 16 + lane, i);
                    const int64_t at = i - first;
                    const float got = floats[at * 16 + lane];
                    const float rounded = bf16_to_f32(halves[(at / 2 * 16 + lane) * 2 + at % 2]);
                    CHECK(same(got, right) && same(rounded, bf16_to_f32(f32_to_bf16(right))),
                          "%s %s column %d lane %d: %.9g and %.9g, not %.9g", kIsaNames[isa], name.c_str(), int(i),
                          int(lane), got, rounded, right);
                }
            }
        }
    }
}

// Products in as few passes as the kernel takes have the bits of a conversion and the plain kernel.
template <typename T>
void check_fused(const Packed& p, int64_t m, int isa, const std::string& name) {
    CHECK(penstock_set_isa(isa) == 0);
    const penstock_weight& w = p.w;
    const CodeKernels& codes = *kernels().codes;
    const int64_t k = w.padded_columns, lda = k + 2, panels = (w.num_rows + 15) / 16, ldc = panels * 16 + 3;
    Buffer<T> a(m * lda), converted(panels * k * 16);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < w.num_columns; ++j) {
            if constexpr (sizeof(T) == 2) a[i * lda + j] = f32_to_bf16(normal());
            else a[i * lda + j] = normal();
        }
    }
    for (int64_t j = 0; j < panels; ++j) {
        const char* b = static_cast<const char*>(w.data) + j * w.panel_bytes;
        if constexpr (sizeof(T) == 2) codes.to_bf16(w, b, 0, k, converted.data + j * k * 16);
        else codes.to_f32(w, b, 0, k, converted.data + j * k * 16);
    }
    for (const bool accumulate : {false, true}) {
        Buffer<float> c(m * ldc), right(m * ldc);
        for (int64_t i = 0; i < m * ldc; ++i) c[i] = right[i] = normal();
        Gemm gemm{m, panels, k, a.data, lda, w.data, w.panel_bytes, c.data, ldc, accumulate};
        Gemm plain{m, panels, k, a.data, lda, converted.data, k * 16 * int64_t{sizeof(T)}, right.data, ldc, accumulate};
        if constexpr (sizeof(T) == 2) codes.gemm_bf16(w, gemm), kernels().linear.gemm_bf16(plain);
        else codes.gemm_f32(w, gemm), kernels().linear.gemm_f32(plain);
        CHECK(memcmp(c.data, right.data, m * ldc * sizeof(float)) == 0, "%s %s m %d: products in one pass differ",
              kIsaNames[isa], name.c_str(), int(m));
    }
}

void test_kinds() {
    const int64_t shapes[][2] = {{33, 100}, {16, 64}, {80, 288}, {17, 640}, {64, 517}, {5, 33}};
    int turn = 0;
    for (const Kind& kind : kinds()) {
        const auto& shape = shapes[turn++ % 6];
        const Packed p(kind, shape[0], shape[1]);
        const std::string name = kind.name() + " [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + "]";
        check_values(p, name);
        for (const int isa : isas()) {
            CHECK(penstock_set_isa(isa) == 0);
            const int64_t few_f32 = kernels().codes->max_rows_f32, few_bf16 = kernels().codes->max_rows_bf16;
            for (int64_t m = 1; m <= few_f32; ++m) check_fused<float>(p, m, isa, name);
            for (int64_t m = 1; m <= few_bf16; ++m) check_fused<uint16_t>(p, m, isa, name);
        }
    }
}

// Codes and scales that are not finite, and padding behind them.
void test_what_is_not_finite() {
    for (const Kind& kind : {Kind{PENSTOCK_CODES8, PENSTOCK_CODE_E4M3, 32, PENSTOCK_F16, 0},
                             Kind{PENSTOCK_CODES8, PENSTOCK_CODE_E5M2, 128, PENSTOCK_F32, 1},
                             Kind{PENSTOCK_CODES4, 0, 0, PENSTOCK_F16, 1}}) {
        Packed p(kind, 33, 77);
        const bool is_book = kind.format == PENSTOCK_CODES4;
        const uint8_t odd[] = {0x7f, 0xff, 0x7c, 0xfc};
        for (int i = 0; i < 4 && !is_book; ++i) p.codes[20 * 77 + 73 + i] = odd[i];
        const float odd_scales[] = {float_of(kind.scale_format == PENSTOCK_F16 ? 0x7fffe000 : 0x7fffffff), INFINITY, -INFINITY, 0x1p-24f};
        for (int i = 0; i < 4; ++i) {  // rows 1, 9, 17, 25; positive codes, so that the sum is infinite
            p.scales[(i * 8 + 1) * p.num_groups + p.num_groups - 1] = odd_scales[i];
            std::fill_n(&p.codes[(i * 8 + 1) * 77], 77, uint8_t{1});
        }
        if (is_book) p.w.book[9] = float_of(0xffffffff), p.codes[30 * 77 + 5] = 9, p.w.book[1] = 1.5f;
        if (kind.has_minima) p.minima[(26 + 1) * p.num_groups - 1] = NAN;
        p.pack(2);
        check_values(p, kind.name() + " not finite");
        for (const int isa : isas()) {  // a row of ones: what is not finite comes through, nothing else
            CHECK(penstock_set_isa(isa) == 0);
            std::vector<uint16_t> x(128);
            for (int i = 0; i < 77; ++i) x[i] = f32_to_bf16(1.0f);
            std::vector<float> y(48);
            const Gemm gemm{1, 3, 128, x.data(), 128, p.w.data, p.w.panel_bytes, y.data(), 48, false};
            kernels().codes->gemm_bf16(p.w, gemm);
            CHECK(std::isinf(y[9]) && y[9] > 0 && std::isinf(y[17]) && y[17] < 0);
            for (int64_t r = 0; r < 33; ++r) {
                double sum = 0;
                for (int64_t i = 0; i < 77; ++i) sum += p.value(r, i);
                CHECK(std::isnan(sum) ? std::isnan(y[r]) : std::isinf(sum) ? y[r] == sum : std::isfinite(y[r]),
                      "%s %s row %d: %g, not %g", kIsaNames[isa], kind.name().c_str(), int(r), y[r], sum);
            }
        }
    }
}

// One linear op over the first `m` of some rows.
std::vector<float> linear(const Packed& p, const std::vector<float>& x, int32_t x_dtype, int64_t first, int64_t m,
                          int threads) {
    const int64_t k = p.w.num_columns;
    std::vector<uint16_t> halves(m * k);
    for (int64_t i = 0; i < m * k; ++i) halves[i] = f32_to_bf16(x[first * k + i]);
    std::vector<float> y(m * p.w.num_rows);
    penstock_linear_args args{};
    args.weight = p.w;
    args.x = x_dtype == PENSTOCK_F32 ? static_cast<const void*>(x.data() + first * k) : halves.data();
    args.x_stride = k, args.y = y.data(), args.y_stride = p.w.num_rows, args.num_groups = 1;
    args.x_dtype = x_dtype, args.y_dtype = PENSTOCK_F32, args.activation_bits = 16;
    args.num_outputs = static_cast<int32_t>(p.w.num_rows), args.y_scale = 1;
    const penstock_op op{PENSTOCK_OP_LINEAR, &args};
    CHECK(penstock_reserve(pools[threads], &op, 1, m, m) >= 0, "%s", penstock_last_error());
    poison(*pools[threads], linear_op.scratch(&args, m, m, threads));
    penstock_step step{};
    step.num_tokens = m;
    CHECK(penstock_run(pools[threads], &op, 1, &step) == 0, "%s", penstock_last_error());
    return y;
}

// Against double precision, and: a row alone has the bits that it has in a batch of any size.
void test_linear() {
    const Kind some[] = {{PENSTOCK_CODES4, 0, 32, PENSTOCK_F16, 0},
                         {PENSTOCK_CODES4, 0, 32, PENSTOCK_INT8, 1},
                         {PENSTOCK_CODES4, 0, 128, PENSTOCK_F32, 1},
                         {PENSTOCK_CODES8, PENSTOCK_CODE_INT8, 16, PENSTOCK_INT8, 0},
                         {PENSTOCK_CODES8, PENSTOCK_CODE_E4M3, 128, PENSTOCK_F32, 0}};
    for (const Kind& kind : some) {
        const Packed p(kind, 101, 330);
        const int64_t n = p.w.num_rows, k = p.w.num_columns;
        std::vector<float> x(40 * k);
        for (float& value : x) value = bf16_to_f32(f32_to_bf16(normal()));
        for (const int isa : isas()) {
            CHECK(penstock_set_isa(isa) == 0);
            for (const int32_t x_dtype : {PENSTOCK_F32, PENSTOCK_BF16}) {
                const bool tiles = x_dtype == PENSTOCK_BF16 && isa >= PENSTOCK_AMX;
                const std::string name = std::string(kIsaNames[isa]) + " " + kind.name() + " x " + std::to_string(x_dtype);
                const std::vector<float> y = linear(p, x, x_dtype, 0, 40, 2);
                for (int64_t i = 0; i < 40; i += 13) {
                    for (int64_t r = 0; r < n; ++r) {
                        double sum = 0, magnitude = 0;
                        for (int64_t j = 0; j < k; ++j) {
                            const float exact = p.value(r, j);
                            const double weight = x_dtype == PENSTOCK_F32 ? exact : bf16_to_f32(f32_to_bf16(exact));
                            sum += weight * x[i * k + j], magnitude += std::fabs(weight * x[i * k + j]);
                        }
                        CHECK(std::fabs(y[i * n + r] - sum) <= magnitude * static_cast<double>(k) * 0x1p-24,
                              "%s row %d output %d: %.9g, not %.9g", name.c_str(), int(i), int(r), y[i * n + r], sum);
                    }
                }
                for (int64_t m = 1; m <= 40; ++m) {
                    if (tiles && m < 4) continue;  // another order of sums than of 40 rows: amx_linear.inc
                    const int64_t first = pick(41 - m);
                    const std::vector<float> part = linear(p, x, x_dtype, first, m, static_cast<int>(1 + pick(3)));
                    CHECK(memcmp(part.data(), &y[first * n], part.size() * sizeof(float)) == 0,
                          "%s: rows %d + %d differ alone", name.c_str(), int(first), int(m));
                }
            }
        }
    }
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 3; ++threads) pools.push_back(penstock_pool_create(threads, nullptr));
    test_what_is_not_finite();
    test_kinds();
    test_linear();
    for (penstock_pool* pool : pools) penstock_pool_destroy(pool);
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
