// Attention's kinds: windows, score caps, sinks, encoders, latent vectors, and all of them with each
// other, against sums in double precision; and the same bits in whatever batch, steps, blocks and
// threads. What has left a window may be gone from memory, and its blocks without a number.
#include "attention_case.h"
#include "kernels.h"
#include "rows.h"

using namespace penstock;

namespace {

constexpr int32_t kF32 = PENSTOCK_F32, kBf16 = PENSTOCK_BF16, kInt8 = PENSTOCK_INT8;

bool has_tiles(int32_t isa) { return isa == PENSTOCK_AMX || isa == PENSTOCK_AMX_EMULATED; }

Shape with_window(Shape shape, int64_t window) {
    shape.window = window;
    return shape;
}

Shape with_cap(Shape shape, float softcap) {
    shape.softcap = softcap;
    return shape;
}

Shape with_sinks(Shape shape) {
    shape.has_sinks = true;
    return shape;
}

Shape encoder(Shape shape) {
    shape.is_causal = false;
    return shape;
}

Shape latent(Shape shape, int32_t value_dim) {
    shape.latent_values = value_dim;
    return shape;
}

const struct {
    Shape shape;
    int64_t block_size;
    int num_threads;
} kCases[] = {
    {with_window({6, 2, 16, kF32, kF32}, 1), 1, 2},
    {with_window({2, 2, 16, kF32, kF32}, 63), 16, 1},
    {with_window({4, 1, 24, kBf16, kBf16}, 64), 3, 2},
    {with_window({9, 3, 16, kBf16, kInt8}, 65), 16, 2},
    {with_window({4, 2, 32, kF32, kInt8}, 128), 1, 1},
    {with_window({4, 2, 32, kF32, kBf16}, 1000), 16, 2},
    {with_window({2, 1, 8, kF32, kF32}, INT64_MAX), 16, 2},
    {with_cap({4, 2, 24, kF32, kF32}, 3), 16, 2},
    {with_cap({4, 2, 24, kBf16, kInt8}, 50), 3, 1},
    {with_cap({3, 3, 64, kBf16, kBf16}, 0.5f), 16, 1},
    {with_sinks({6, 2, 16, kF32, kF32}), 16, 2},
    {with_sinks({8, 1, 64, kBf16, kBf16}), 3, 1},
    {with_sinks(with_window({8, 2, 64, kBf16, kInt8}, 128)), 16, 2},
    {with_cap(with_window({8, 4, 32, kF32, kF32}, 200), 20), 3, 2},
    {with_sinks(with_cap(with_window({4, 2, 16, kF32, kInt8}, 100), 10)), 1, 2},
    {encoder({4, 2, 16, kF32, kF32}), 16, 2},
    {encoder({3, 3, 64, kBf16, kBf16}), 3, 1},
    {encoder(with_sinks(with_cap({6, 2, 24, kF32, kInt8}, 5))), 1, 2},
    {latent({4, 1, 36, kF32, kF32}, 20), 3, 2},
    {latent({16, 1, 72, kBf16, kBf16}, 64), 16, 2},
    {latent({16, 1, 40, kBf16, kInt8}, 32), 1, 1},
    {latent({5, 1, 24, kF32, kInt8}, 24), 16, 2},
    {latent({6, 1, 18, kF32, kBf16}, 1), 16, 1},
    {latent({128, 1, 10, kBf16, kBf16}, 7), 16, 2},
    {latent({66, 1, 8, kF32, kF32}, 8), 16, 2},
    {latent(with_sinks(with_cap(with_window({32, 1, 20, kF32, kF32}, 70), 8)), 16), 3, 2},
    {latent(encoder({8, 1, 24, kBf16, kInt8}), 16), 16, 2},
};

void test_accuracy() {
    for (const auto& [shape, block_size, num_threads] : kCases) {
        const auto requests = make_requests(shape, {{0, 1}, {700, 1}, {0, 70}, {130, 37}, {1999, 1}, {63, 2}});
        Store store(shape, requests, block_size, 5);
        const Outputs outputs = compute(requests, store, schedule(requests, 1000, true), num_threads);
        check_store(requests, store);
        check_outputs(requests, store, outputs);
    }
}

// As large as they are: DeepSeek-V2-Lite's and DeepSeek-V3's heads, and a wide one.
void test_sizes() {
    const Shape shapes[] = {latent({16, 1, 576, kBf16, kBf16}, 512), latent({128, 1, 576, kBf16, kInt8}, 512),
                            latent({16, 1, 576, kF32, kF32}, 512), {2, 1, 640, kF32, kBf16}};
    for (const Shape& shape : shapes) {
        const auto requests = make_requests(shape, {{0, 9}, {90, 1}});
        Store store(shape, requests, 16, 5);
        const Outputs outputs = compute(requests, store, schedule(requests, 1000, true), 2);
        check_outputs(requests, store, outputs);
    }
}

void test_invariance(int32_t isa) {
    const Shape shapes[] = {
        with_window({4, 2, 16, kF32, kF32}, 100),
        with_window({2, 2, 16, kBf16, kBf16}, 64),
        with_sinks(with_window({6, 2, 16, kBf16, kInt8}, 650)),
        with_sinks(with_cap({4, 1, 24, kBf16, kBf16}, 15)),
        latent({16, 1, 24, kBf16, kBf16}, 16),
        latent(with_sinks({128, 1, 8, kF32, kInt8}), 6),
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
            {16, 1000, true, 4}, {16, 1000, false, 3}, {16, 1, true, 1}, {16, 1, false, 4},
            {1, 7, true, 1},     {3, 64, true, 2},     {64, 33, false, 8},
        };
        for (const auto& [block_size, chunk, together, num_threads] : variants) {
            Store other(shape, requests, block_size, 2);
            const bool forgets = shape.window > 0;
            const Outputs again = compute(requests, other, schedule(requests, chunk, together), num_threads, forgets);
            if (has_tiles(isa) && shape.dtype == kBf16) {  // their bits depend on the number of rows
                if (!forgets) check_outputs(requests, other, again);
                continue;
            }
            char what[100];
            snprintf(what, sizeof what, "%d heads, window %ld: blocks of %ld, steps of %ld, %s, %d threads",
                     shape.num_heads, shape.window, block_size, chunk, together ? "together" : "alone", num_threads);
            check_same(whole, again, what);
        }
    }
}

// An encoder's requests come whole: alone or together.
void test_encoders(int32_t isa) {
    for (const Shape& shape : {encoder({4, 2, 16, kF32, kF32}), encoder({2, 2, 16, kBf16, kInt8})}) {
        const auto requests = make_requests(shape, {{0, 150}, {600, 70}, {0, 1}});
        Store store(shape, requests, 16, 1);
        const Outputs whole = compute(requests, store, schedule(requests, 1000, true), 1);
        for (const int num_threads : {1, 2, 3, 8}) {
            Store other(shape, requests, 5, 2);
            const Outputs again = compute(requests, other, schedule(requests, 1000, false), num_threads);
            if (has_tiles(isa) && shape.dtype == kBf16) continue;
            check_same(whole, again, "encoder");
        }
    }
}

// A window that holds all, no sink, and a cap that is far away change nothing.
void test_no_change() {
    const Shape plain{4, 2, 16, kF32, kF32};
    const auto requests = make_requests(plain, {{0, 70}, {900, 3}});
    const auto computed = [&](const Shape& shape) {
        Store store(shape, requests, 16, 1);
        return compute(requests, store, schedule(requests, 1000, true), 2);
    };
    const Outputs expected = computed(plain);
    check_same(expected, computed(with_window(plain, 903)), "a window as long as the context");
    const Outputs capped = computed(with_cap(plain, 1e6f));
    for (size_t r = 0; r < expected.size(); ++r) {
        for (size_t i = 0; i < expected[r].size(); ++i) CHECK(std::fabs(expected[r][i] - capped[r][i]) < 1e-5f);
    }
}

void test_tanh() {
    std::vector<float> x{0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-30f, -1e-40f, 9.0f, -9.5f, 88.0f, -1e30f};
    for (float value = 1e-6f; value < 12; value *= 1.0003f) x.insert(x.end(), {value, -value});
    std::vector<float> y(x.size());
    kernels().rows->tanh(x.data(), y.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
        const double exact = std::tanh(static_cast<double>(x[i]));
        if (std::isnan(exact)) {
            CHECK(std::isnan(y[i]));
            continue;
        }
        const float near = std::fabs(static_cast<float>(exact));
        const double ulp = std::nextafterf(near, 2.0f) - near;
        CHECK(std::fabs(y[i] - exact) <= 3 * ulp, "tanh(%g) = %g, not %g", x[i], y[i], exact);
    }
}

void test_refusals() {
    const Shape shape = latent({4, 1, 8, kF32, kF32}, 6);
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
    CHECK(!refused([](Args& args) { args.qkv_stride = 32, args.out_stride = 24, args.latent_stride = 8; }));
    CHECK(refused([](Args& args) { args.qkv_stride = 31; }));
    CHECK(refused([](Args& args) { args.out_stride = 23; }));
    CHECK(refused([](Args& args) { args.latent_stride = 7; }));
    CHECK(refused([](Args& args) { args.value_dim = 0; }));
    CHECK(refused([](Args& args) { args.value_dim = 9; }));
    CHECK(refused([](Args& args) { args.num_kv_heads = 2; }));
    CHECK(refused([](Args& args) { args.latent = nullptr; }));  // and value_dim not head_dim
    CHECK(refused([](Args& args) { args.window = -1; }));
    CHECK(refused([](Args& args) { args.is_causal = 2; }));
    CHECK(refused([](Args& args) { args.is_causal = 0, args.window = 5; }));
    CHECK(refused([](Args& args) { args.softcap = -1; }));
    CHECK(refused([](Args& args) { args.softcap = NAN; }));
    CHECK(refused([](Args& args) { args.softcap = INFINITY; }));
    CHECK(refused([](Args& args) { args.softcap = 1e-40f; }));
    penstock_pool_destroy(pool);
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512, PENSTOCK_AMX, PENSTOCK_AMX_EMULATED}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        test_tanh();
        test_accuracy();
        test_sizes();
        test_invariance(isa);
        test_encoders(isa);
        test_no_change();
    }
    test_refusals();
    return failures() != 0;
}
