// Embedding, angles, rotations, norms, sums and copies as ops: against plain loops and the kernels
// (test_norms.cpp), with threads, strides and tokens that are alone; and what they refuse.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "ops.h"
#include "penstock_native.h"
#include "rows.h"
#include "values.h"

using namespace penstock;

namespace {

template <typename T>
constexpr int32_t dtype_of = sizeof(T) == 4 ? PENSTOCK_F32 : PENSTOCK_BF16;

void run(int num_threads, int64_t kind, const void* args, const penstock_step& step) {
    const penstock_op op{kind, args};
    penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
    CHECK(penstock_reserve(pool, &op, 1, step.num_tokens, step.num_logit_rows) >= 0, "%s", penstock_last_error());
    CHECK(penstock_run(pool, &op, 1, &step) == 0);
    penstock_pool_destroy(pool);
}

constexpr int64_t kTokens = 9;

penstock_step step_of(int64_t num_tokens, const int64_t* ids = nullptr, const int64_t* positions = nullptr) {
    penstock_step step{};
    step.num_tokens = num_tokens;
    step.input_ids = ids;
    step.positions = positions;
    return step;
}

void test_embed_op(int num_threads) {
    constexpr int64_t kSize = 70, kVocab = 100, kPositions = 5;
    const std::vector<float> table = numbers(kVocab * kSize), added = numbers(kPositions * kSize);
    int64_t ids[kTokens], positions[kTokens];
    for (int64_t i = 0; i < kTokens; ++i) {
        ids[i] = static_cast<int64_t>(generator() % kVocab);
        positions[i] = i;
    }
    penstock_weight weight{};
    weight.format = PENSTOCK_F32;
    weight.num_rows = kVocab;
    weight.num_columns = kSize;
    CHECK(penstock_weight_layout(&weight) == 0);
    weight.data = aligned_alloc(64, weight.data_bytes);
    penstock_pool* pool = penstock_pool_create(1, nullptr);
    const penstock_pack_args packing{weight, table.data(), PENSTOCK_F32, 1, 0, kVocab};
    CHECK(penstock_pack(pool, &packing) == 0);
    penstock_pool_destroy(pool);
    for (bool has_positions : {false, true}) {
        for (float scale : {1.0f, 26.5f}) {
            std::vector<float> out(kTokens * 80, 7);
            const penstock_embed_args args{weight, out.data(), 80, has_positions ? added.data() : nullptr,
                                           has_positions ? kPositions : 0, scale, 0};
            run(num_threads, PENSTOCK_OP_EMBED, &args, step_of(kTokens, ids, positions));
            for (int64_t i = 0; i < kTokens * 80; ++i) {
                const int64_t token = i / 80, column = i % 80;
                if (column >= kSize) {
                    CHECK(out[i] == 7, "wrote behind a row");
                    continue;
                }
                const float exact = scale * table[ids[token] * kSize + column];
                const int64_t row = positions[token] < kPositions ? positions[token] : kPositions - 1;
                CHECK(out[i] == (has_positions ? exact + added[row * kSize + column] : exact));
            }
        }
    }
    free(weight.data);
}

// The rows of an op's result, all tokens at once and each alone, are the same bits.
template <typename T, typename Args>
void check_alone(int64_t kind, const Args& args, std::vector<T>& x, int64_t stride, const std::vector<T>& before,
                 int num_threads, void (*shift)(Args&, T*, int64_t)) {
    run(num_threads, kind, &args, step_of(kTokens));
    const std::vector<T> together = x;
    x = before;
    for (int64_t token = kTokens - 1; token >= 0; --token) {
        Args one = args;
        shift(one, x.data() + token * stride, token);
        run(1, kind, &one, step_of(1));
    }
    CHECK(x == together, "op %ld: a row depends on its batch", kind);
}

void test_angles_op(int num_threads) {
    int64_t positions[kTokens];
    for (int64_t i = 0; i < kTokens; ++i) positions[i] = i * 1237;
    const std::vector<float> frequencies = numbers(12, 0.001f, 1);
    for (float scale : {1.0f, 1.35f}) {
        std::vector<float> angles(kTokens * 24);
        const penstock_angles_args args{frequencies.data(), angles.data(), 12, scale, 0};
        run(num_threads, PENSTOCK_OP_ANGLES, &args, step_of(kTokens, nullptr, positions));
        for (int64_t i = 0; i < kTokens * 12; ++i) {
            const double angle = static_cast<float>(positions[i / 12]) * frequencies[i % 12];
            CHECK(std::fabs(angles[i / 12 * 24 + i % 12] - scale * std::cos(angle)) < 3e-7);
            CHECK(std::fabs(angles[i / 12 * 24 + 12 + i % 12] - scale * std::sin(angle)) < 3e-7);
        }
    }
}

// 3 heads of 26, the first at 5, of which 24 are rotated, in rows of 85: the last ends with its row.
template <typename T>
void test_rope_op(int num_threads) {
    const std::vector<float> angles = numbers(kTokens * 24, -1, 1);
    std::vector<T> x = as<T>(numbers(kTokens * 85)), expected = x;
    const std::vector<T> before = x;
    const penstock_rope_args args{angles.data(), x.data(), 85, 12, 5, 28, 3, dtype_of<T>};
    run(num_threads, PENSTOCK_OP_ROPE, &args, step_of(kTokens));
    for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t head = 0; head < 3; ++head) {
            T* from = expected.data() + token * 85 + 5 + head * 28;
            if constexpr (sizeof(T) == 4) kernels().rows->rope_f32(angles.data() + token * 24, from, 1, 24, 12);
            else kernels().rows->rope_bf16(angles.data() + token * 24, from, 1, 24, 12);
        }
    }
    CHECK(x == expected);
}

template <typename T>
void test_norm_ops(int num_threads) {
    constexpr int64_t kSize = 70;
    const std::vector<float> weight = numbers(kSize), bias = numbers(kSize);
    std::vector<T> x = as<T>(numbers(kTokens * 80)), expected(kTokens * 72), out(kTokens * 72);
    std::vector<float> residual = numbers(kTokens * 90), copy = residual;
    for (int32_t kind : {PENSTOCK_RMS_NORM, PENSTOCK_LAYER_NORM}) {
        for (bool has_residual : {true, false}) {
            const penstock_norm_args args{has_residual ? residual.data() : nullptr, 90, x.data(), 80, weight.data(),
                                          bias.data(), out.data(), 72, kSize, 1e-6f, 0.5f, kind, dtype_of<T>,
                                          dtype_of<T>, 0};
            run(num_threads, PENSTOCK_OP_NORM, &args, step_of(kTokens));
            for (int64_t token = 0; token < kTokens; ++token) {
                kernels().rows->norm[sizeof(T) == 2][sizeof(T) == 2](
                    {has_residual ? copy.data() + token * 90 : nullptr, x.data() + token * 80, 0.5f, weight.data(),
                     bias.data(), expected.data() + token * 72, kSize, 1e-6f, kind == PENSTOCK_LAYER_NORM});
            }
            CHECK(residual == copy && out == expected);
        }
    }

    // 5 runs of 14 from 3 on, of which each has its own weights.
    const std::vector<T> before = x;
    const penstock_slice_norm_args slices{x.data(), 80, 3, 5, 14, weight.data(), 14, 1e-6f, PENSTOCK_RMS_NORM,
                                          dtype_of<T>, 0};
    check_alone<T, penstock_slice_norm_args>(
        PENSTOCK_OP_SLICE_NORM, slices, x, 80, before, num_threads,
        [](penstock_slice_norm_args& one, T* row, int64_t) { one.x = row; });
    for (int64_t i = 0; i < kTokens * 80; ++i) {
        if (i % 80 < 3 || i % 80 >= 73) CHECK(x[i] == before[i], "not of a run");
    }
    for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t run = 0; run < 5; ++run) {
            const int64_t first = token * 80 + 3 + run * 14;
            T normed[14];
            kernels().rows->norm[sizeof(T) == 2][sizeof(T) == 2]({nullptr, before.data() + first, 1,
                                                                  weight.data() + run * 14, nullptr, normed, 14, 1e-6f,
                                                                  false});
            CHECK(std::equal(normed, normed + 14, x.data() + first));
        }
    }
}

template <typename T>
void test_add_copy_ops(int num_threads) {
    const std::vector<T> x = as<T>(numbers(kTokens * 40));
    std::vector<float> residual = numbers(kTokens * 50);
    const std::vector<float> before = residual;
    const penstock_add_args add{residual.data(), 50, x.data(), 40, 33, 0.7f, dtype_of<T>};
    run(num_threads, PENSTOCK_OP_ADD, &add, step_of(kTokens));
    for (int64_t i = 0; i < kTokens * 50; ++i) {
        const float number = static_cast<float>(value_of(x[i / 50 * 40 + (i % 50 < 33 ? i % 50 : 0)]));
        CHECK(residual[i] == (i % 50 < 33 ? std::fma(number, 0.7f, before[i]) : before[i]));
    }

    for (int64_t from_group_stride : {9, 0, 3}) {
        std::vector<T> to = as<T>(numbers(kTokens * 60)), expected = to;
        const penstock_copy_args copy{x.data(), 40, from_group_stride, to.data(), 60, 11, 4, 6, dtype_of<T>, 0};
        run(num_threads, PENSTOCK_OP_COPY, &copy, step_of(kTokens));
        for (int64_t i = 0; i < kTokens * 4 * 6; ++i) {
            const int64_t token = i / 24, group = i % 24 / 6, at = i % 6;
            expected[token * 60 + group * 11 + at] = x[token * 40 + group * from_group_stride + at];
        }
        CHECK(to == expected);
    }
}

struct Refusals {
    Refusals() : pool(penstock_pool_create(1, nullptr)) {}
    ~Refusals() { penstock_pool_destroy(pool); }

    // `good` is served; not so with `change` made to it.
    template <typename Args>
    void of(int64_t kind, const Args& good, std::initializer_list<void (*)(Args&)> changes) const {
        const auto refused = [&](const Args& args) {
            const penstock_op op{kind, &args};
            return penstock_reserve(pool, &op, 1, 1, 1) < 0;
        };
        CHECK(!refused(good), "op %ld: %s", kind, penstock_last_error());
        int64_t index = 0;
        for (auto change : changes) {
            Args args = good;
            change(args);
            CHECK(refused(args), "op %ld, change %ld", kind, index);
            ++index;
        }
    }

    penstock_pool* pool;
};

void test_refusals() {
    const Refusals refusals;
    static float x[64];
    const penstock_norm_args norm{x, 8, x, 8, x, nullptr, x, 8, 8, 1e-5f, 1, 0, PENSTOCK_F32, PENSTOCK_F32, 0};
    refusals.of<penstock_norm_args>(
        PENSTOCK_OP_NORM, norm,
        {[](auto& a) { a.dtype = PENSTOCK_INT8; }, [](auto& a) { a.out_dtype = PENSTOCK_F16; },
         [](auto& a) { a.residual_stride = 7; }, [](auto& a) { a.x_stride = 7; }, [](auto& a) { a.out_stride = 7; },
         [](auto& a) { a.eps = NAN; }, [](auto& a) { a.kind = 2; }, [](auto& a) { a.x_scale = 0; },
         [](auto& a) { a.x_scale = INFINITY; }, [](auto& a) { a.residual = nullptr, a.x = nullptr; },
         [](auto& a) { a.out = nullptr; }, [](auto& a) { a.size = 0; }});
    const penstock_slice_norm_args slices{x, 20, 2, 3, 6, x, 0, 1e-5f, 0, PENSTOCK_F32, 0};
    refusals.of<penstock_slice_norm_args>(
        PENSTOCK_OP_SLICE_NORM, slices,
        {[](auto& a) { a.first = 3; }, [](auto& a) { a.first = -1; }, [](auto& a) { a.num_runs = 4; },
         [](auto& a) { a.weight_stride = 5; }, [](auto& a) { a.eps = -1; }, [](auto& a) { a.x = nullptr; },
         [](auto& a) { a.size = int64_t{1} << 62; }, [](auto& a) { a.num_runs = int64_t{1} << 62; },
         [](auto& a) { a.kind = -1; }, [](auto& a) { a.dtype = PENSTOCK_F16; }, [](auto& a) { a.size = 0; }});
    const penstock_angles_args angles{x, x, 4, 1, 0};
    refusals.of<penstock_angles_args>(PENSTOCK_OP_ANGLES, angles,
                                      {[](auto& a) { a.half = 0; }, [](auto& a) { a.scale = 0; },
                                       [](auto& a) { a.scale = NAN; }, [](auto& a) { a.out = nullptr; }});
    const penstock_rope_args rope{x, x, 20, 4, 2, 10, 2, PENSTOCK_F32};  // ends with number 20
    refusals.of<penstock_rope_args>(
        PENSTOCK_OP_ROPE, rope,
        {[](auto& a) { a.first = 3; }, [](auto& a) { a.first = -1; }, [](auto& a) { a.head_stride = 7; },
         [](auto& a) { a.num_heads = 3; }, [](auto& a) { a.half = 0; }, [](auto& a) { a.stride = 19; },
         [](auto& a) { a.dtype = PENSTOCK_INT8; }, [](auto& a) { a.angles = nullptr; }});
    const penstock_add_args add{x, 8, x, 8, 8, 1, PENSTOCK_F32};
    refusals.of<penstock_add_args>(PENSTOCK_OP_ADD, add,
                                   {[](auto& a) { a.scale = 0; }, [](auto& a) { a.size = 9; },
                                    [](auto& a) { a.x = nullptr; }, [](auto& a) { a.size = 0; },
                                    [](auto& a) { a.dtype = PENSTOCK_F16; }});
    const penstock_copy_args copy{x, 20, 0, x, 20, 8, 2, 8, PENSTOCK_F32, 0};
    refusals.of<penstock_copy_args>(
        PENSTOCK_OP_COPY, copy,
        {[](auto& a) { a.to_group_stride = 7; }, [](auto& a) { a.to_group_stride = 13; },
         [](auto& a) { a.from_group_stride = 13; }, [](auto& a) { a.from_group_stride = -1; },
         [](auto& a) { a.size = 21; }, [](auto& a) { a.num_groups = 0; }, [](auto& a) { a.from = nullptr; },
         [](auto& a) { a.num_groups = 3; }});
    const penstock_embed_args embed{};
    const penstock_op op{PENSTOCK_OP_EMBED, &embed};
    CHECK(penstock_reserve(refusals.pool, &op, 1, 1, 1) < 0);
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        for (int num_threads : {1, 2, 3}) {
            test_embed_op(num_threads);
            test_angles_op(num_threads);
            test_rope_op<float>(num_threads);
            test_rope_op<uint16_t>(num_threads);
            test_norm_ops<float>(num_threads);
            test_norm_ops<uint16_t>(num_threads);
            test_add_copy_ops<float>(num_threads);
            test_add_copy_ops<uint16_t>(num_threads);
        }
    }
    test_refusals();
    return failures() != 0;
}
