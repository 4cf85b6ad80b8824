// What packing refuses: numbers that have no quantized form, and arguments that have no layout.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "pack.h"
#include "penstock_native.h"

namespace {

using namespace penstock;

constexpr int64_t kRows = 40, kColumns = 70;

struct Packed {
    penstock_weight weight{};
    std::vector<float> scales = std::vector<float>(48);
    Packed(int32_t format, int32_t group_size) {
        weight.format = format;
        weight.group_size = group_size;
        weight.num_rows = kRows;
        weight.num_columns = kColumns;
        CHECK(penstock_weight_layout(&weight) == 0);
        weight.data = std::aligned_alloc(64, weight.data_bytes);
        memset(weight.data, 0, weight.data_bytes);
        weight.scales = scales.data();
    }
    ~Packed() { std::free(weight.data); }
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;
};

// Numbers with `odd` in row 33 and, a column further, row 17.
std::vector<char> source(int32_t dtype, float odd) {
    std::vector<float> x(kRows * kColumns);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6;
    x[33 * kColumns + 68] = x[17 * kColumns + 69] = odd;
    if (dtype == PENSTOCK_F32) {
        const char* bytes = reinterpret_cast<const char*>(x.data());
        return {bytes, bytes + x.size() * sizeof(float)};
    }
    std::vector<char> halves(x.size() * 2);
    for (size_t i = 0; i < x.size(); ++i) {
        uint16_t half = f32_to_bf16(x[i]);
        if (dtype == PENSTOCK_F16) half = std::isfinite(x[i]) ? 0x3c00 : std::isnan(x[i]) ? 0x7e00 : 0x7c00;
        memcpy(&halves[2 * i], &half, sizeof half);
    }
    return halves;
}

void test_what_is_not_finite(penstock_pool* pool) {
    for (const int32_t dtype : {PENSTOCK_F32, PENSTOCK_BF16, PENSTOCK_F16}) {
        for (const float odd : {NAN, -NAN, INFINITY, -INFINITY}) {
            const std::vector<char> x = source(dtype, odd);
            for (const int32_t group_size : {0, 32, 128}) {
                const int32_t format = group_size > 0 ? PENSTOCK_INT4 : PENSTOCK_INT8;
                const Packed packed(format, group_size);
                const penstock_pack_args args{packed.weight, x.data(), dtype, 1, 0, kRows};
                CHECK(penstock_pack(pool, &args) == -1, "format %d source %d: %g", format, dtype, odd);
                const std::string told = penstock_last_error();
                CHECK(told == "row 17 of the source is not finite", "%s", told.c_str());
                const penstock_pack_args before{packed.weight, x.data(), dtype, 1, 0, 17};
                CHECK(penstock_pack(pool, &before) == 0);
            }
            for (const int32_t format : {PENSTOCK_F32, PENSTOCK_BF16}) {
                const Packed packed(format, 0);
                const penstock_pack_args args{packed.weight, x.data(), dtype, 1, 0, kRows};
                CHECK(penstock_pack(pool, &args) == 0);
                std::vector<float> row(kColumns);
                unpack_row(packed.weight, 17, row.data());
                CHECK(std::isnan(odd) ? std::isnan(row[69]) : row[69] == odd || dtype == PENSTOCK_F16);
            }
        }
    }
}

void test_layouts() {
    const auto refused = [](int32_t format, int32_t group_size, int64_t num_rows, int64_t num_columns) {
        penstock_weight weight{};
        weight.format = format;
        weight.group_size = group_size;
        weight.num_rows = num_rows;
        weight.num_columns = num_columns;
        return penstock_weight_layout(&weight) == -1 && strlen(penstock_last_error()) > 10;
    };
    CHECK(!refused(PENSTOCK_INT4, 32, 1, 1) && !refused(PENSTOCK_INT4, 128, 1, 1) && !refused(PENSTOCK_INT8, 0, 1, 1));
    CHECK(refused(PENSTOCK_INT4, 0, 1, 1) && refused(PENSTOCK_INT4, 64, 1, 1) && refused(PENSTOCK_INT4, 256, 1, 1));
    CHECK(refused(PENSTOCK_F16, 0, 1, 1) && refused(77, 0, 1, 1) && refused(-1, 0, 1, 1));
    CHECK(refused(PENSTOCK_F32, 0, 0, 1) && refused(PENSTOCK_F32, 0, 1, 0));
}

void test_arguments(penstock_pool* pool) {
    const Packed packed(PENSTOCK_INT8, 0);
    const std::vector<char> x = source(PENSTOCK_F32, 1.0f);
    const penstock_pack_args good{packed.weight, x.data(), PENSTOCK_F32, 1, 0, kRows};
    CHECK(penstock_pack(pool, &good) == 0);
    penstock_pack_args args = good;
    args.source = nullptr;
    CHECK(penstock_pack(pool, &args) == -1);
    args = good;
    args.source_dtype = PENSTOCK_INT8;
    CHECK(penstock_pack(pool, &args) == -1);
    args = good;
    args.first_row = 16;
    CHECK(penstock_pack(pool, &args) == -1);
}

}  // namespace

int main() {
    for (const int32_t num_threads : {1, 3}) {
        penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
        test_what_is_not_finite(pool);
        test_arguments(pool);
        penstock_pool_destroy(pool);
    }
    test_layouts();
    return failures() != 0;
}
