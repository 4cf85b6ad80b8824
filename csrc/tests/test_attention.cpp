// Attention against sums in double precision, and against itself: alone, in a batch, in chunks, token
// by token, with other blocks and other numbers of threads the results are the same bits.
// Windows, caps, sinks, encoders and latent vectors: test_attention_kinds.cpp.
#include "attention_case.h"

using namespace penstock;

namespace {

void test_accuracy() {
    const int32_t f32 = PENSTOCK_F32, bf16 = PENSTOCK_BF16, int8 = PENSTOCK_INT8;
    const struct {
        Shape shape;
        int64_t block_size;
        int num_threads;
    } cases[] = {
        {{2, 2, 8, f32, f32}, 1, 1},     {{6, 2, 64, f32, f32}, 16, 2},    {{4, 1, 80, f32, bf16}, 3, 1},
        {{8, 1, 64, f32, int8}, 64, 2},  {{3, 3, 64, bf16, bf16}, 16, 2},  {{9, 3, 64, bf16, bf16}, 1, 1},
        {{8, 2, 128, bf16, bf16}, 3, 1}, {{8, 1, 256, bf16, bf16}, 64, 2}, {{4, 1, 80, bf16, int8}, 16, 1},
        {{2, 2, 8, bf16, int8}, 1, 2},   {{8, 2, 64, bf16, int8}, 16, 1},  {{2, 1, 10, bf16, f32}, 5, 1},
        {{3, 1, 6, f32, int8}, 7, 1},    {{150, 1, 2, bf16, bf16}, 16, 1},
    };
    for (const auto& [shape, block_size, num_threads] : cases) {
        const auto requests = make_requests(shape, {{0, 1}, {700, 1}, {0, 70}, {130, 37}, {2999, 1}, {63, 2}});
        Store store(shape, requests, block_size, 5);
        const Outputs outputs = compute(requests, store, schedule(requests, 1000, true), num_threads);
        check_store(requests, store);
        check_outputs(requests, store, outputs);
    }
}

void test_invariance(int32_t isa) {
    const bool tiles = isa == PENSTOCK_AMX || isa == PENSTOCK_AMX_EMULATED;
    const Shape shapes[] = {
        {2, 1, 16, PENSTOCK_F32, PENSTOCK_F32},
        {4, 1, 64, PENSTOCK_BF16, PENSTOCK_BF16},
        {6, 2, 16, PENSTOCK_BF16, PENSTOCK_INT8},
        {2, 2, 24, PENSTOCK_BF16, PENSTOCK_BF16},
    };
    for (const Shape& shape : shapes) {
        const auto requests = make_requests(shape, {{0, 150}, {1100, 40}, {2100, 1}});
        Store store(shape, requests, 16, 1);
        const Outputs whole = compute(requests, store, schedule(requests, 1000, true), 1);
        const struct {
            int64_t block_size, chunk;
            bool together;
            int num_threads;
        } variants[] = {
            {16, 1000, true, 4}, {16, 1000, false, 1}, {16, 1000, false, 3}, {16, 1, true, 1}, {16, 1, false, 4},
            {1, 7, true, 1},     {3, 64, true, 2},     {64, 33, false, 4},   {5000, 50, true, 3},
        };
        for (const auto& [block_size, chunk, together, num_threads] : variants) {
            Store other(shape, requests, block_size, 2);
            const Outputs again = compute(requests, other, schedule(requests, chunk, together), num_threads);
            if (tiles && shape.dtype == PENSTOCK_BF16) {  // their bits depend on the number of rows
                check_outputs(requests, other, again);
                continue;
            }
            char what[80];
            snprintf(what, sizeof what, "head_dim %d: blocks of %ld, steps of %ld, %s, %d threads", shape.head_dim,
                     block_size, chunk, together ? "together" : "alone", num_threads);
            check_same(whole, again, what);
        }
    }
}

void test_refusals() {
    const Shape shape{4, 2, 8, PENSTOCK_F32, PENSTOCK_F32};
    const auto requests = make_requests(shape, {{0, 1}});
    Store store(shape, requests, 16, 1);
    StepArrays arrays(requests, store, {{0, 0, 1}});
    penstock_pool* pool = penstock_pool_create(1, nullptr);
    const auto refused = [&](auto change) {
        penstock_attention_args args = args_of(store, arrays);
        change(args);
        const penstock_op op{PENSTOCK_OP_ATTENTION, &args};
        return penstock_reserve(pool, &op, 1, 1, 0) < 0;
    };
    using Args = penstock_attention_args;
    CHECK(!refused([](Args&) {}));
    CHECK(refused([](Args& args) { args.num_heads = 3; }));
    CHECK(refused([](Args& args) { args.num_kv_heads = 0; }));
    CHECK(refused([](Args& args) { args.head_dim = 7; }));
    CHECK(refused([](Args& args) { args.head_dim = args.value_dim = 642; }));
    CHECK(refused([](Args& args) { args.dtype = PENSTOCK_INT8; }));
    CHECK(refused([](Args& args) { args.kv_dtype = PENSTOCK_F16; }));
    CHECK(refused([](Args& args) { args.kv = nullptr; }));
    CHECK(refused([](Args& args) { args.kv_dtype = PENSTOCK_INT8, args.kv_scales = nullptr; }));
    CHECK(refused([](Args& args) { args.qkv_stride = 63; }));
    CHECK(refused([](Args& args) { args.out_stride = 31; }));
    CHECK(refused([](Args& args) { args.num_slots = 0; }));
    CHECK(refused([](Args& args) { args.scale = NAN; }));
    penstock_pool_destroy(pool);
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512, PENSTOCK_AMX, PENSTOCK_AMX_EMULATED}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        test_accuracy();
        test_invariance(isa);
    }
    test_refusals();
    return failures() != 0;
}
