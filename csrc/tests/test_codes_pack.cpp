// Packing of weights as codes: where parts go, how much memory a weight takes, and what is refused.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "coded.h"
#include "numbers.h"
#include "pack.h"
#include "penstock_native.h"

namespace {

using namespace penstock;

// Parts packed one after the other, by many threads, beginning anywhere and in turns of panels.
void test_places() {
    for (const Kind& kind : {Kind{PENSTOCK_CODES4, 0, 32, PENSTOCK_INT8, 1}, Kind{PENSTOCK_CODES8, 1, 64, PENSTOCK_F16, 0}}) {
        const Packed whole(kind, 155, 70);
        Coded parts(kind, 155, 70);
        const int64_t starts[] = {0, 7, 30, 111, 155};
        for (const int i : {2, 0, 3, 1}) {
            penstock_pack_codes_args args = whole.args();
            const int64_t row = starts[i];
            args.weight = parts.w;
            memcpy(args.weight.book, whole.w.book, sizeof args.weight.book);
            args.first_row = row, args.num_source_rows = starts[i + 1] - row;
            args.codes += row * 70, args.scales += row * whole.num_groups;
            if (args.minima) args.minima += row * whole.num_groups;
            if (args.units) args.units += row * whole.num_units;
            if (args.minimum_units) args.minimum_units += row * whole.num_units;
            CHECK(penstock_pack_codes(pools[3], &args) == 0, "%s", penstock_last_error());
        }
        CHECK(memcmp(parts.data->data, whole.data->data, whole.w.data_bytes) == 0, "%s: parts", kind.name().c_str());

        Coded turns(kind, 64, 70);
        const Packed gate(kind, 32, 70), up(kind, 32, 70);
        for (const Packed* part : {&gate, &up}) {
            penstock_pack_codes_args args = part->args();
            args.weight = turns.w;
            memcpy(args.weight.book, gate.w.book, sizeof args.weight.book);
            args.panel_step = 2, args.first_row = part == &gate ? 0 : 16;
            CHECK(penstock_pack_codes(pools[2], &args) == 0, "%s", penstock_last_error());
        }
        for (int64_t panel = 0; panel < 4; ++panel) {
            const Packed& part = panel % 2 ? up : gate;
            CHECK(memcmp(turns.data->data + panel * turns.w.panel_bytes,
                         part.data->data + panel / 2 * turns.w.panel_bytes, turns.w.panel_bytes) == 0,
                  "%s: panel %d", kind.name().c_str(), int(panel));
        }
    }
}

// Codes of 8 bits with one scale a row are INT8 as they are.
void test_int8() {
    penstock_weight w{};
    w.format = PENSTOCK_INT8, w.num_rows = 37, w.num_columns = 70;
    CHECK(penstock_weight_layout(&w) == 0);
    Buffer<char> data(w.data_bytes);
    Buffer<float> scales(48);
    w.data = data.data, w.scales = scales.data;
    std::vector<uint8_t> codes(37 * 70);
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i);
    std::vector<float> source(37);
    for (float& scale : source) scale = normal();
    const penstock_pack_codes_args args{w, codes.data(), source.data(), nullptr, nullptr, nullptr, 0, 37, 1, 0};
    CHECK(penstock_pack_codes(pools[2], &args) == 0, "%s", penstock_last_error());
    std::vector<float> row(70);
    for (int64_t r = 0; r < 37; ++r) {
        unpack_row(w, r, row.data());
        for (int64_t i = 0; i < 70; ++i) {
            CHECK(row[i] == source[r] * static_cast<float>(static_cast<int8_t>(codes[r * 70 + i])));
        }
    }
    for (int64_t i = 70; i < 128; ++i) CHECK(static_cast<uint8_t>(data[(i / 4 * 16 + 5) * 4 + i % 4]) == 128);
}

void test_layouts() {
    const auto refused = [](const Kind& kind, int64_t num_rows = 1, int64_t num_columns = 1) {
        penstock_weight w{};
        w.format = kind.format, w.code = kind.code, w.group_size = kind.group_size;
        w.scale_format = kind.scale_format, w.has_minima = kind.has_minima;
        w.num_rows = num_rows, w.num_columns = num_columns;
        return penstock_weight_layout(&w) == -1 && strlen(penstock_last_error()) > 10;
    };
    const Kind good{PENSTOCK_CODES8, 1, 32, PENSTOCK_F16, 1};
    CHECK(!refused(good) && !refused(good, 1 << 28, 1 << 28));
    CHECK(refused(good, (1 << 28) + 1) && refused(good, 1, (1 << 28) + 1) && refused(good, 0) && refused(good, 1, 0));
    for (const int32_t group_size : {-32, 8, 17, 40, 48, -1}) CHECK(refused({PENSTOCK_CODES8, 1, group_size, 0, 0}));
    for (const int32_t group_size : {0, 96, 192, 512}) {
        CHECK(refused({PENSTOCK_CODES4, 0, group_size, PENSTOCK_INT8, 0}));
        CHECK(!refused({PENSTOCK_CODES4, 0, group_size, PENSTOCK_F16, 0}));
    }
    CHECK(!refused({PENSTOCK_CODES4, 0, INT32_MAX / 32 * 32, PENSTOCK_F32, 1}, 1 << 28, 1 << 28));
    CHECK(refused({PENSTOCK_CODES8, -1, 32, 0, 0}) && refused({PENSTOCK_CODES8, 4, 32, 0, 0}));
    CHECK(refused({PENSTOCK_CODES8, 1, 32, PENSTOCK_BF16, 0}) && refused({PENSTOCK_CODES8, 1, 32, PENSTOCK_INT4, 0}));
    CHECK(refused({PENSTOCK_CODES8, 1, 32, 0, 2}) && refused({PENSTOCK_CODES8, 1, 32, 0, -1}));
}

// Bits a weight of what is published: no more than these.
void test_state() {
    const auto bits = [](const Kind& kind) {
        penstock_weight w{};
        w.format = kind.format, w.code = kind.code, w.group_size = kind.group_size;
        w.scale_format = kind.scale_format, w.has_minima = kind.has_minima;
        w.num_rows = 2048, w.num_columns = 8192;
        CHECK(penstock_weight_layout(&w) == 0);
        return static_cast<double>(w.data_bytes) * 8 / (2048 * 8192);
    };
    CHECK(bits({PENSTOCK_CODES4, 0, 32, PENSTOCK_F16, 0}) == 4.5);     // Q4_0
    CHECK(bits({PENSTOCK_CODES4, 0, 32, PENSTOCK_INT8, 1}) == 4.75);   // Q4_K
    CHECK(bits({PENSTOCK_CODES8, 1, 16, PENSTOCK_INT8, 0}) == 8.625);  // Q6_K
    CHECK(bits({PENSTOCK_CODES8, 1, 32, PENSTOCK_F16, 0}) == 8.5);     // Q8_0
    CHECK(bits({PENSTOCK_CODES4, 0, 128, PENSTOCK_F32, 1}) == 4.5);    // GPTQ, AWQ
    CHECK(bits({PENSTOCK_CODES4, 0, 64, PENSTOCK_F32, 0}) == 4.5);     // nf4
    CHECK(bits({PENSTOCK_CODES8, 2, 128, PENSTOCK_F32, 0}) == 8.25);   // fp8 in blocks
    CHECK(bits({PENSTOCK_CODES8, 2, 0, PENSTOCK_F32, 0}) < 8.01);      // fp8 by rows
}

void test_arguments() {
    const Packed p({PENSTOCK_CODES4, 0, 32, PENSTOCK_INT8, 1}, 40, 70);
    const auto refused = [&](const Packed& from, auto change) {
        penstock_pack_codes_args args = from.args();
        change(args);
        return penstock_pack_codes(pools[2], &args) == -1 && strlen(penstock_last_error()) > 10;
    };
    CHECK(!refused(p, [](auto&) {}));
    CHECK(refused(p, [](auto& a) { a.codes = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.scales = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.minima = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.units = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.minimum_units = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.first_row = 9; }));
    CHECK(refused(p, [](auto& a) { a.first_row = -1; }));
    CHECK(refused(p, [](auto& a) { a.num_source_rows = 0; }));
    CHECK(refused(p, [](auto& a) { a.num_source_rows = INT64_MAX; }));
    CHECK(refused(p, [](auto& a) { a.panel_step = 0; }));
    CHECK(refused(p, [](auto& a) { a.panel_step = 2; }));
    CHECK(refused(p, [](auto& a) { a.panel_step = INT32_MAX; }));
    CHECK(refused(p, [](auto& a) { a.weight.data = nullptr; }));
    CHECK(refused(p, [](auto& a) { a.weight.padded_columns += 64; }));
    CHECK(refused(p, [](auto& a) { a.weight.format = PENSTOCK_BF16; }));
    const penstock_pack_args plain{p.w, p.scales.data(), PENSTOCK_F32, 1, 0, 1};
    CHECK(penstock_pack(pools[1], &plain) == -1);

    const auto told = [&](const Kind& kind, auto change) -> std::string {
        Packed odd(kind, 40, 70);
        change(odd);
        const penstock_pack_codes_args args = odd.args();
        return penstock_pack_codes(pools[3], &args) == -1 ? penstock_last_error() : "";
    };
    const Kind integers{PENSTOCK_CODES4, 0, 32, PENSTOCK_INT8, 1}, halves{PENSTOCK_CODES8, 0, 0, PENSTOCK_F16, 1};
    const std::string code = "row 17 of the source has a code of more than 4 bits";
    const std::string scale = "row 17 of the source has a scale that its format does not hold";
    CHECK(told(integers, [](Packed& o) { o.codes[17 * 70 + 69] = 16, o.codes[39 * 70] = 255; }) == code);
    for (const float odd : {128.0f, -129.0f, 0.5f, NAN, INFINITY, 1e30f}) {
        CHECK(told(integers, [&](Packed& o) { o.scales[17 * 3 + 2] = odd; }) == scale, "%g", odd);
    }
    for (const float odd : {256.0f, -1.0f}) {
        CHECK(told(integers, [&](Packed& o) { o.minima[17 * 3] = odd; }) == scale, "%g", odd);
    }
    for (const float odd : {1.0f + 0x1p-11f, 65536.0f, 0x1p-25f, 3 * 0x1p-25f, 1e30f, -65520.0f}) {
        CHECK(told(halves, [&](Packed& o) { o.scales[17] = odd; }) == scale, "%g", odd);
        CHECK(told(halves, [&](Packed& o) { o.minima[17] = odd; }) == scale, "%g", odd);
    }
    const Kind e4m3{PENSTOCK_CODES8, PENSTOCK_CODE_E4M3, 0, PENSTOCK_F32, 0};
    CHECK(told(e4m3, [&](Packed& o) { o.scales[17] = -0x1p120f; }) == scale);
    CHECK(told(e4m3, [&](Packed& o) { o.scales[17] = std::nextafterf(0x1p120f, 0), o.scales[18] = INFINITY; }) == "");
    const Kind units{PENSTOCK_CODES8, PENSTOCK_CODE_E4M3, 32, PENSTOCK_INT8, 0};
    CHECK(told(units, [&](Packed& o) { o.units[17] = 0x1p113f; }) == scale);
    for (const float fine : {65504.0f, -0.0f, 0x1p-24f, 1023 * 0x1p-24f, 0x1p-14f, INFINITY, NAN}) {
        CHECK(told(halves, [&](Packed& o) { o.scales[17] = fine; }) == "", "%g", fine);
    }
    penstock_linear_args args{};
    std::vector<float> x(70), y(40);
    args.weight = p.w, args.x = x.data(), args.y = y.data(), args.x_stride = 70, args.y_stride = 40;
    args.num_groups = 1, args.num_outputs = 40, args.y_scale = 1, args.activation_bits = 8;
    const penstock_op op{PENSTOCK_OP_LINEAR, &args};
    CHECK(penstock_reserve(pools[1], &op, 1, 1, 1) == -1);
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 3; ++threads) pools.push_back(penstock_pool_create(threads, nullptr));
    test_layouts();
    test_state();
    test_places();
    test_int8();
    test_arguments();
    for (penstock_pool* pool : pools) penstock_pool_destroy(pool);
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
