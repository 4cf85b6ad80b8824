// Attention against sums in double precision, and against itself: alone, in a batch, in chunks, token
// by token, with other blocks and other numbers of threads the results are the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "penstock_native.h"
#include "poison.h"

using namespace penstock;

namespace {

struct Shape {
    int32_t num_heads, num_kv_heads, head_dim, dtype, kv_dtype;
    int64_t width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

// `prefix` tokens lie in the store already, the others are computed.
struct Request {
    int64_t prefix, length;
    std::vector<float> qkv;  // [length, width], as the dtype can hold
};

// Tokens [first, last) of a request in a step.
struct Slice {
    int64_t request, first, last;
};
using Steps = std::vector<std::vector<Slice>>;
using Outputs = std::vector<std::vector<float>>;

size_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }

std::vector<Request> make_requests(const Shape& shape, const std::vector<std::pair<int64_t, int64_t>>& lengths) {
    std::mt19937 generator(11);
    std::normal_distribution<float> normal;
    std::vector<Request> requests;
    for (const auto& [prefix, computed] : lengths) {
        requests.push_back({prefix, prefix + computed, {}});
        std::vector<float>& x = requests.back().qkv;
        x.resize(requests.back().length * shape.width());
        for (float& value : x) {
            value = 1.5f * normal(generator);
            if (shape.dtype == PENSTOCK_BF16) value = bf16_to_f32(f32_to_bf16(value));
        }
    }
    return requests;
}

// Keys and values in blocks that lie anywhere.
class Store {
public:
    Store(const Shape& shape, const std::vector<Request>& requests, int64_t block_size, unsigned seed)
        : shape(shape), block_size(block_size) {
        stride = 1;
        for (const Request& request : requests) stride = std::max(stride, request.length / block_size + 2);
        std::vector<int32_t> blocks(stride * requests.size() + 3);
        std::iota(blocks.begin(), blocks.end(), 0);
        std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
        num_slots = static_cast<int64_t>(blocks.size()) * block_size;
        table.assign(blocks.begin(), blocks.begin() + stride * static_cast<int64_t>(requests.size()));
        kv.assign(2 * shape.num_kv_heads * num_slots * shape.head_dim * size_of(shape.kv_dtype), 0x7f);  // large or NaN
        scales.assign(2 * shape.num_kv_heads * num_slots, NAN);
        for (size_t r = 0; r < requests.size(); ++r) {
            for (int64_t position = 0; position < requests[r].prefix; ++position) {
                for (int64_t head = 0; head < 2 * shape.num_kv_heads; ++head) {
                    const int64_t from = position * shape.width() + (shape.num_heads + head) * shape.head_dim;
                    put(head, slot(static_cast<int64_t>(r), position), &requests[r].qkv[from]);
                }
            }
        }
    }

    int64_t slot(int64_t request, int64_t position) const {
        return table[request * stride + position / block_size] * block_size + position % block_size;
    }

    // Element d of what is stored for a key head, or after those a value head.
    double get(int64_t head, int64_t slot, int64_t d) const {
        const int64_t row = head * num_slots + slot, at = row * shape.head_dim + d;
        if (shape.kv_dtype == PENSTOCK_F32) return reinterpret_cast<const float*>(kv.data())[at];
        if (shape.kv_dtype == PENSTOCK_BF16) return bf16_to_f32(reinterpret_cast<const uint16_t*>(kv.data())[at]);
        return static_cast<double>(scales[row]) * reinterpret_cast<const int8_t*>(kv.data())[at];
    }

    Shape shape;
    int64_t block_size, stride, num_slots;
    std::vector<int32_t> table;
    std::vector<unsigned char> kv;
    std::vector<float> scales;

private:
    void put(int64_t head, int64_t slot, const float* x) {
        const int64_t row = head * num_slots + slot;
        float peak = 0;
        for (int64_t d = 0; d < shape.head_dim; ++d) peak = std::max(peak, std::fabs(x[d]));
        scales[row] = peak / 127;
        for (int64_t d = 0; d < shape.head_dim; ++d) {
            const int64_t at = row * shape.head_dim + d;
            if (shape.kv_dtype == PENSTOCK_F32) reinterpret_cast<float*>(kv.data())[at] = x[d];
            else if (shape.kv_dtype == PENSTOCK_BF16) reinterpret_cast<uint16_t*>(kv.data())[at] = f32_to_bf16(x[d]);
            else reinterpret_cast<int8_t*>(kv.data())[at] = static_cast<int8_t>(std::nearbyint(x[d] / peak * 127));
        }
    }
};

// The arrays of one step.
struct StepArrays {
    std::vector<int64_t> slots;
    std::vector<int32_t> query_start{0}, context, table;
    std::vector<char> qkv, out;
    penstock_step step{};

    StepArrays(const std::vector<Request>& requests, const Store& store, const std::vector<Slice>& slices) {
        const Shape& shape = store.shape;
        for (const Slice& slice : slices) {
            for (int64_t position = slice.first; position < slice.last; ++position) {
                slots.push_back(store.slot(slice.request, position));
                const float* x = &requests[slice.request].qkv[position * shape.width()];
                for (int64_t i = 0; i < shape.width(); ++i) {
                    const uint16_t half = f32_to_bf16(x[i]);
                    const void* value = shape.dtype == PENSTOCK_F32 ? static_cast<const void*>(x + i) : &half;
                    const char* bytes = static_cast<const char*>(value);
                    qkv.insert(qkv.end(), bytes, bytes + size_of(shape.dtype));
                }
            }
            query_start.push_back(static_cast<int32_t>(slots.size()));
            context.push_back(static_cast<int32_t>(slice.last));
            const auto row = store.table.begin() + slice.request * store.stride;
            table.insert(table.end(), row, row + store.stride);
        }
        out.resize(slots.size() * shape.num_heads * shape.head_dim * size_of(shape.dtype));
        step.num_tokens = static_cast<int64_t>(slots.size());
        step.num_requests = static_cast<int64_t>(slices.size());
        step.block_size = store.block_size;
        step.block_table_stride = store.stride;
        step.slot_mapping = slots.data();
        step.query_start = query_start.data();
        step.context_len = context.data();
        step.block_table = table.data();
    }
};

penstock_attention_args args_of(Store& store, StepArrays& arrays) {
    const Shape& shape = store.shape;
    return {arrays.qkv.data(), shape.width(), arrays.out.data(), static_cast<int64_t>(shape.num_heads) * shape.head_dim,
            store.kv.data(), store.scales.data(), store.num_slots, shape.dtype, shape.kv_dtype, shape.num_heads,
            shape.num_kv_heads, shape.head_dim, shape.scale()};
}

// Outputs of the computed tokens, a request after the other.
Outputs compute(const std::vector<Request>& requests, Store& store, const Steps& steps, int num_threads) {
    const Shape& shape = store.shape;
    const int64_t width = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    Outputs outputs;
    for (const Request& request : requests) outputs.emplace_back((request.length - request.prefix) * width);
    penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
    for (const std::vector<Slice>& slices : steps) {
        StepArrays arrays(requests, store, slices);
        const penstock_attention_args args = args_of(store, arrays);
        const penstock_op op{PENSTOCK_OP_ATTENTION, &args};
        CHECK(penstock_reserve(pool, &op, 1, arrays.step.num_tokens, 0) >= 0, "%s", penstock_last_error());
        poison(*pool, attention_op.scratch(&args, arrays.step.num_tokens, 0, num_threads));
        CHECK(penstock_run(pool, &op, 1, &arrays.step) == 0);
        int64_t token = 0;
        for (const Slice& slice : slices) {
            for (int64_t position = slice.first; position < slice.last; ++position, ++token) {
                float* to = &outputs[slice.request][(position - requests[slice.request].prefix) * width];
                for (int64_t i = 0; i < width; ++i) {
                    to[i] = shape.dtype == PENSTOCK_F32
                                ? reinterpret_cast<const float*>(arrays.out.data())[token * width + i]
                                : bf16_to_f32(reinterpret_cast<const uint16_t*>(arrays.out.data())[token * width + i]);
                }
            }
        }
    }
    penstock_pool_destroy(pool);
    return outputs;
}

// Every request's tokens in steps of at most `chunk`, all requests together or one after the other.
Steps schedule(const std::vector<Request>& requests, int64_t chunk, bool together) {
    Steps steps;
    for (int64_t done = 0, any = 1; together && any; done += chunk) {
        std::vector<Slice> slices;
        for (size_t r = 0; r < requests.size(); ++r) {
            const int64_t first = requests[r].prefix + done, last = std::min(first + chunk, requests[r].length);
            if (first < last) slices.push_back({static_cast<int64_t>(r), first, last});
        }
        any = !slices.empty();
        if (any) steps.push_back(slices);
    }
    for (size_t r = 0; r < requests.size() && !together; ++r) {
        for (int64_t first = requests[r].prefix; first < requests[r].length; first += chunk) {
            steps.push_back({{static_cast<int64_t>(r), first, std::min(first + chunk, requests[r].length)}});
        }
    }
    return steps;
}

// One query and head in double precision: out, and the same with |values|, [head_dim].
void exact(const Store& store, const float* query, int64_t request, int64_t context, int64_t kv_head,
           std::vector<double>& out, std::vector<double>& magnitude) {
    const Shape& shape = store.shape;
    std::vector<double> scores(context);
    for (int64_t t = 0; t < context; ++t) {
        double sum = 0;
        for (int64_t d = 0; d < shape.head_dim; ++d) sum += query[d] * store.get(kv_head, store.slot(request, t), d);
        scores[t] = sum * shape.scale();
    }
    const double peak = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    out.assign(shape.head_dim, 0);
    magnitude.assign(shape.head_dim, 0);
    for (int64_t t = 0; t < context; ++t) {
        const double p = std::exp(scores[t] - peak);
        total += p;
        for (int64_t d = 0; d < shape.head_dim; ++d) {
            const double value = store.get(shape.num_kv_heads + kv_head, store.slot(request, t), d);
            out[d] += p * value;
            magnitude[d] += p * std::fabs(value);
        }
    }
    for (int64_t d = 0; d < shape.head_dim; ++d) {
        out[d] /= total;
        magnitude[d] /= total;
    }
}

// Budget: bf16 rounds every probability (2^-8 of it at most) and the output; fp32 sums are held to 1e-5
// (scores of up to some 30, of products in fp32: 30 * 2^-24 * a few).
void check_outputs(const std::vector<Request>& requests, const Store& store, const Outputs& outputs) {
    const Shape& shape = store.shape;
    const double share = shape.dtype == PENSTOCK_BF16 ? 0x1p-8 : 0;
    std::vector<double> out, magnitude;
    for (size_t r = 0; r < requests.size(); ++r) {
        const int64_t computed = requests[r].length - requests[r].prefix;
        for (int64_t i = 0; i < computed; i += computed > 20 ? 7 : 1) {
            const int64_t position = requests[r].prefix + i;
            for (int64_t head = 0; head < shape.num_heads; ++head) {
                const float* query = &requests[r].qkv[position * shape.width() + head * shape.head_dim];
                const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
                exact(store, query, static_cast<int64_t>(r), position + 1, kv_head, out, magnitude);
                for (int64_t d = 0; d < shape.head_dim; ++d) {
                    const double got = outputs[r][(i * shape.num_heads + head) * shape.head_dim + d];
                    const double budget = (share + 1e-5) * magnitude[d] + share * std::fabs(out[d]);
                    CHECK(std::fabs(got - out[d]) <= budget, "request %zu position %ld head %ld: %g, not %g (%g)", r,
                          position, head, got, out[d], budget);
                }
            }
        }
    }
}

// What the op wrote: as it came, or within half a step of the integers.
void check_store(const std::vector<Request>& requests, const Store& store) {
    const Shape& shape = store.shape;
    for (size_t r = 0; r < requests.size(); ++r) {
        for (int64_t position = requests[r].prefix; position < requests[r].length; ++position) {
            for (int64_t head = 0; head < 2 * shape.num_kv_heads; ++head) {
                const float* x = &requests[r].qkv[position * shape.width() + (shape.num_heads + head) * shape.head_dim];
                const int64_t slot = store.slot(static_cast<int64_t>(r), position);
                double allowed = 0;
                if (shape.kv_dtype == PENSTOCK_INT8) {
                    float peak = 0;
                    for (int64_t d = 0; d < shape.head_dim; ++d) peak = std::max(peak, std::fabs(x[d]));
                    const double scale = store.scales[head * store.num_slots + slot];
                    CHECK(std::fabs(scale - peak / 127.0) <= 1e-6 * scale);
                    allowed = 0.501 * scale;
                }
                for (int64_t d = 0; d < shape.head_dim; ++d) {
                    const float value = shape.kv_dtype == PENSTOCK_BF16 ? bf16_to_f32(f32_to_bf16(x[d])) : x[d];
                    CHECK(std::fabs(store.get(head, slot, d) - value) <= allowed);
                }
            }
        }
    }
}

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
            for (size_t r = 0; r < requests.size(); ++r) {
                CHECK(memcmp(whole[r].data(), again[r].data(), whole[r].size() * sizeof(float)) == 0,
                      "head_dim %d: blocks of %ld, steps of %ld, %s, %d threads", shape.head_dim, block_size, chunk,
                      together ? "together" : "alone", num_threads);
            }
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
    CHECK(refused([](Args& args) { args.head_dim = 258; }));
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
