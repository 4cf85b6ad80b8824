// What a linear op does beside its products: activations over all floats but few, soft caps, and
// block-diagonal maps, in every instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "kernels.h"
#include "numbers.h"
#include "ops.h"
#include "packed.h"
#include "penstock_native.h"
#include "poison.h"

namespace {

using namespace penstock;

// A block-diagonal map is each of its blocks by itself, bit by bit.
void test_groups() {
    struct {
        int64_t groups, outputs, columns, x_gap, y_gap;
    } const shapes[] = {{16, 32, 64, 0, 0}, {3, 37, 100, 5, 3}, {5, 16, 192, 64, 0}, {2, 200, 33, 0, 1}};
    for (const Format& format : kFormats) {
        for (const auto& shape : shapes) {
            const int64_t group_rows = (shape.outputs + 15) / 16 * 16;
            const Packed packed(format, (shape.groups - 1) * group_rows + shape.outputs, shape.columns);
            std::vector<float> bias(shape.groups * group_rows);
            for (float& value : bias) value = normal();
            for (const int64_t m : {1, 3, 21, 100}) {
                const bool x_floats = pick(2);
                penstock_linear_args args{};
                args.weight = packed.weight;
                args.bias = pick(2) ? bias.data() : nullptr;
                args.num_groups = shape.groups;
                // One x for all groups, now and then.
                args.x_group_stride = pick(5) ? shape.columns + shape.x_gap : 0;
                args.x_stride = (shape.groups - 1) * args.x_group_stride + shape.columns + pick(3);
                args.y_group_stride = shape.outputs + shape.y_gap;
                args.y_stride = (shape.groups - 1) * args.y_group_stride + shape.outputs + pick(3);
                args.x_dtype = x_floats ? PENSTOCK_F32 : PENSTOCK_BF16;
                args.y_dtype = PENSTOCK_F32;
                args.activation = kActivations[pick(6)];
                args.activation_bits = format.activation_bits;
                args.num_outputs = static_cast<int32_t>(shape.outputs);
                args.y_scale = 0.5f;
                Buffer<float> x(m * args.x_stride), y(m * args.y_stride), one(m * shape.outputs);
                for (int64_t i = 0; i < m * args.x_stride; ++i) {
                    if (x_floats) x[i] = normal();
                    else reinterpret_cast<uint16_t*>(x.data)[i] = f32_to_bf16(normal());
                }
                args.x = x.data, args.y = y.data;
                penstock_step step{};
                step.num_tokens = m;
                const auto run = [&](const penstock_linear_args& a, int threads) {
                    const penstock_op op{PENSTOCK_OP_LINEAR, &a};
                    CHECK(penstock_reserve(pools[threads], &op, 1, m, 0) > 0, "%s", penstock_last_error());
                    poison(*pools[threads], linear_op.scratch(&a, m, 0, threads));
                    CHECK(penstock_run(pools[threads], &op, 1, &step) == 0, "%s", penstock_last_error());
                };
                for (int isa = 0; isa < 5; ++isa) {
                    if (!(penstock_available_isas() >> isa & 1)) continue;
                    CHECK(penstock_set_isa(isa) == 0);
                    for (int64_t i = 0; i < m * args.y_stride; ++i) y[i] = -77;
                    run(args, static_cast<int>(1 + pick(3)));
                    for (int64_t g = 0; g < shape.groups; ++g) {
                        penstock_linear_args single = args;
                        const int64_t panel = g * group_rows / 16;
                        single.weight.num_rows = shape.outputs;
                        single.weight.data = static_cast<char*>(args.weight.data) + panel * args.weight.panel_bytes;
                        if (args.weight.scales) single.weight.scales = args.weight.scales + panel * 16;
                        if (args.bias) single.bias = args.bias + panel * 16;
                        single.num_groups = 1;
                        single.x = static_cast<const char*>(args.x) + g * args.x_group_stride * (x_floats ? 4 : 2);
                        single.y = one.data, single.y_stride = shape.outputs;
                        run(single, 1);
                        bool same = true;
                        for (int64_t i = 0; i < m; ++i) {
                            const float* row = &y[i * args.y_stride + g * args.y_group_stride];
                            same = same && !memcmp(row, &one[i * shape.outputs], shape.outputs * 4);
                            const bool last = g + 1 == shape.groups;  // what lies between is not touched
                            if (!last && shape.y_gap) same = same && row[shape.outputs] == -77;
                        }
                        CHECK(same, "%s %s m %lld group %lld of %lld", format.name, kIsaNames[isa],
                              static_cast<long long>(m), static_cast<long long>(g),
                              static_cast<long long>(shape.groups));
                    }
                }
            }
        }
    }
}

// One row of numbers through the epilogue.
std::vector<float> finished(const std::vector<float>& c, int32_t activation, bool gated, float softcap) {
    std::vector<float> y(gated ? c.size() / 2 : c.size());
    Finish out{};
    out.c = c.data();
    out.gated = gated;
    out.activation = activation;
    out.y_scale = 1;
    out.softcap = softcap;
    out.num_outputs = static_cast<int64_t>(y.size());
    out.y = y.data();
    kernels().linear.finish(out);
    return y;
}

// Every activation over all floats but few, against double; the same bits in every instruction set.
void test_activations() {
    std::vector<float> x;
    for (int i = -120000; i <= 120000; ++i) x.push_back(static_cast<float>(i) * 1e-3f);
    for (uint32_t bits = 0; bits < 0x7f800000u; bits += 9973) {
        x.push_back(float_of(bits));
        x.push_back(float_of(bits | 0x80000000u));
    }
    while (x.size() % 16) x.push_back(0);
    std::vector<float> pairs;  // panels of gates, and of ones (SWIGLU_OAI: of zeros)
    for (size_t i = 0; i < x.size(); i += 16) {
        pairs.insert(pairs.end(), x.begin() + i, x.begin() + i + 16);
        pairs.insert(pairs.end(), 16, 1.0f);
    }
    for (const int32_t activation : kActivations) {
        const bool oai = activation == PENSTOCK_SWIGLU_OAI;
        const double floor = activation == PENSTOCK_GELU_TANH || oai ? 2e-9 : 1e-12;
        std::vector<float> gates = pairs;
        if (oai) {
            for (size_t i = 16; i < gates.size(); i += 32) std::fill_n(&gates[i], 16, 0.0f);
        }
        std::vector<float> oracle;
        for (int isa = 0; isa < 5; ++isa) {
            if (!(penstock_available_isas() >> isa & 1)) continue;
            CHECK(penstock_set_isa(isa) == 0);
            const std::vector<float> y = finished(gates, activation, true, 0);
            if (oracle.empty()) oracle = y;
            CHECK(same_bits(y, oracle.data()), "%s: activation %d differs", kIsaNames[isa], activation);
            if (!oai) CHECK(same_bits(finished(x, activation, false, 0), y.data()), "activation %d", activation);
        }
        for (size_t i = 0; i < x.size(); ++i) {
            const double right = activated(activation, x[i]);
            if (std::fabs(right) > 3.4e38) continue;
            CHECK(std::fabs(oracle[i] - right) <= 2e-6 * std::fabs(right) + floor,
                  "activation %d of %.9g: %.9g, not %.9g", activation, x[i], oracle[i], right);
        }
        const int32_t alone = oai ? PENSTOCK_SILU : activation;  // the other is for gates
        const std::vector<float> ends = finished({-INFINITY, INFINITY, NAN, -NAN}, alone, false, 0);
        CHECK(activation == PENSTOCK_IDENTITY || ends[0] == 0, "activation %d of -infinity: %g", activation, ends[0]);
        CHECK(ends[1] == INFINITY && ends[2] != ends[2] && ends[3] != ends[3], "activation %d", activation);
    }
    std::vector<float> oracle;
    for (int isa = 0; isa < 5; ++isa) {
        if (!(penstock_available_isas() >> isa & 1)) continue;
        CHECK(penstock_set_isa(isa) == 0);
        const std::vector<float> y = finished(x, PENSTOCK_IDENTITY, false, 30);
        if (oracle.empty()) oracle = y;
        CHECK(same_bits(y, oracle.data()), "%s: softcap differs", kIsaNames[isa]);
    }
    for (size_t i = 0; i < x.size(); ++i) {
        const double right = 30 * std::tanh(x[i] / 30.0);
        CHECK(std::fabs(oracle[i] - right) <= 2e-6 * std::fabs(right) + 1e-37, "softcap of %.9g: %.9g", x[i],
              oracle[i]);
    }
    const std::vector<float> ends = finished({-INFINITY, INFINITY, NAN, -NAN}, PENSTOCK_IDENTITY, false, 30);
    CHECK(ends[0] == -30 && ends[1] == 30 && ends[2] != ends[2] && ends[3] != ends[3]);
}

// GPT-OSS: both halves are clipped, before anything else.
void test_clipped_gates() {
    const float gates[] = {-9, -7, -1, 0, 2, 7, 7.5f, 1e30f, -1e30f, -INFINITY, INFINITY};
    const float ups[] = {-INFINITY, -1e9f, -7.5f, -3, 0, 1, 7, 8, INFINITY};
    for (const float gate : gates) {
        for (const float up : ups) {
            std::vector<float> c(32, gate);
            std::fill_n(&c[16], 16, up);
            const float got = finished(c, PENSTOCK_SWIGLU_OAI, true, 0)[3];
            const double right =
                gate == -INFINITY ? 0 : activated(PENSTOCK_SWIGLU_OAI, gate) * (std::fmax(-7, std::fmin(7, up)) + 1);
            CHECK(std::fabs(got - right) <= 3e-6 * std::fabs(right) + 1e-8, "%g, %g: %g, not %g", gate, up, got, right);
        }
    }
    std::vector<float> c(32, 1.0f);
    c[20] = NAN;
    c[7] = NAN;
    const std::vector<float> y = finished(c, PENSTOCK_SWIGLU_OAI, true, 0);
    CHECK(y[4] != y[4] && y[7] != y[7] && y[3] == y[3]);
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 3; ++threads) pools.push_back(penstock_pool_create(threads, nullptr));
    test_activations();
    test_clipped_gates();
    test_groups();
    for (penstock_pool* pool : pools) penstock_pool_destroy(pool);
    if (failures()) std::printf("%d failures\n", failures());
    return failures() != 0;
}
