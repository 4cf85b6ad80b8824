// Requests, a paged store and steps for the tests of attention, and its sums in double precision.
#pragma once

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

namespace penstock {

struct Shape {
    int32_t num_heads, num_kv_heads, head_dim, dtype, kv_dtype;
    int64_t window = 0;
    float softcap = 0;
    bool has_sinks = false, is_causal = true;
    int32_t latent_values = 0;  // latent attention: value_dim

    int32_t value_dim() const { return latent_values ? latent_values : head_dim; }
    int64_t num_vectors() const { return latent_values ? 1 : 2 * num_kv_heads; }  // of a token in the store
    int64_t width() const { return (num_heads + num_vectors()) * head_dim; }
    int64_t out_width() const { return static_cast<int64_t>(num_heads) * value_dim(); }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
    // Scores without a value: none, one that outweighs all, and such as scores are.
    float sink(int64_t head) const { return head == 0 ? -INFINITY : head == 1 ? 25.0f : 0.7f * (head % 7); }
    // What a query sees of a context of `length` tokens.
    int64_t begin(int64_t position) const { return window ? std::max<int64_t>(0, position + 1 - window) : 0; }
    int64_t end(int64_t position, int64_t length) const { return is_causal ? position + 1 : length; }
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

inline size_t size_of(int32_t dtype) { return dtype == PENSTOCK_F32 ? 4 : dtype == PENSTOCK_BF16 ? 2 : 1; }

inline std::vector<Request> make_requests(const Shape& shape, const std::vector<std::pair<int64_t, int64_t>>& lengths) {
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

// Keys and values in blocks that lie anywhere. What no computed query can see is not there: its blocks
// have no number, all other memory is NaN.
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
        kv.assign(shape.num_vectors() * num_slots * shape.head_dim * size_of(shape.kv_dtype), 0xff);  // NaN
        scales.assign(shape.num_vectors() * num_slots, NAN);
        for (size_t r = 0; r < requests.size(); ++r) {
            const int64_t first = shape.begin(requests[r].prefix);
            for (int64_t block = 0; block < first / block_size; ++block) {
                table[static_cast<int64_t>(r) * stride + block] = INT32_MAX;
            }
            for (int64_t position = first; position < requests[r].prefix; ++position) {
                for (int64_t head = 0; head < shape.num_vectors(); ++head) {
                    const int64_t from = position * shape.width() + (shape.num_heads + head) * shape.head_dim;
                    put(head, slot(static_cast<int64_t>(r), position), &requests[r].qkv[from]);
                }
            }
        }
    }

    int64_t slot(int64_t request, int64_t position) const {
        return table[request * stride + position / block_size] * block_size + position % block_size;
    }

    // What lies before a token is forgotten.
    void forget(int64_t request, int64_t position) {
        for (int64_t i = 0; i < position; ++i) {
            int32_t& block = table[request * stride + i / block_size];
            if (block == INT32_MAX) continue;
            for (int64_t head = 0; head < shape.num_vectors(); ++head) {
                const int64_t row = head * num_slots + slot(request, i);
                const int64_t bytes = shape.head_dim * static_cast<int64_t>(size_of(shape.kv_dtype));
                memset(kv.data() + row * bytes, 0xff, bytes);
                scales[row] = NAN;
            }
            if (i % block_size == block_size - 1) block = INT32_MAX;
        }
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
    std::vector<float> sinks;
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
        sinks.resize(shape.num_heads);
        for (int64_t head = 0; head < shape.num_heads; ++head) sinks[head] = shape.sink(head);
        out.resize(slots.size() * shape.out_width() * size_of(shape.dtype));
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

inline penstock_attention_args args_of(Store& store, StepArrays& arrays) {
    const Shape& shape = store.shape;
    penstock_attention_args args{};
    args.qkv = arrays.qkv.data();
    args.qkv_stride = shape.width();
    if (shape.latent_values) {
        args.latent = arrays.qkv.data() + shape.num_heads * shape.head_dim * size_of(shape.dtype);
        args.latent_stride = shape.width();
    }
    args.out = arrays.out.data();
    args.out_stride = shape.out_width();
    args.kv = store.kv.data();
    args.kv_scales = store.scales.data();
    args.sinks = shape.has_sinks ? arrays.sinks.data() : nullptr;
    args.num_slots = store.num_slots;
    args.window = shape.window;
    args.dtype = shape.dtype;
    args.kv_dtype = shape.kv_dtype;
    args.num_heads = shape.num_heads;
    args.num_kv_heads = shape.num_kv_heads;
    args.head_dim = shape.head_dim;
    args.value_dim = shape.value_dim();
    args.scale = shape.scale();
    args.softcap = shape.softcap;
    args.is_causal = shape.is_causal;
    return args;
}

// Outputs of the computed tokens, a request after the other. If it `forgets`, the store loses what has
// left the window before each step.
inline Outputs compute(const std::vector<Request>& requests, Store& store, const Steps& steps, int num_threads,
                       bool forgets = false) {
    const Shape& shape = store.shape;
    const int64_t width = shape.out_width();
    Outputs outputs;
    for (const Request& request : requests) outputs.emplace_back((request.length - request.prefix) * width);
    penstock_pool* pool = penstock_pool_create(num_threads, nullptr);
    for (const std::vector<Slice>& slices : steps) {
        for (const Slice& slice : slices) {
            if (forgets) store.forget(slice.request, shape.begin(slice.first));
        }
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
inline Steps schedule(const std::vector<Request>& requests, int64_t chunk, bool together) {
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

// One query and head in double precision over tokens [begin, end): out, and the same with |values|,
// [value_dim].
inline void exact(const Store& store, const float* query, int64_t request, int64_t begin, int64_t end, int64_t head,
                  std::vector<double>& out, std::vector<double>& magnitude) {
    const Shape& shape = store.shape;
    const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
    const int64_t value_head = shape.latent_values ? 0 : shape.num_kv_heads + kv_head;
    std::vector<double> scores;
    for (int64_t t = begin; t < end; ++t) {
        double sum = 0;
        for (int64_t d = 0; d < shape.head_dim; ++d) sum += query[d] * store.get(kv_head, store.slot(request, t), d);
        sum *= shape.scale();
        scores.push_back(shape.softcap > 0 ? shape.softcap * std::tanh(sum / shape.softcap) : sum);
    }
    const double sink = shape.has_sinks ? shape.sink(head) : -INFINITY;
    const double peak = std::max(sink, *std::max_element(scores.begin(), scores.end()));
    double total = std::exp(sink - peak);
    out.assign(shape.value_dim(), 0);
    magnitude.assign(shape.value_dim(), 0);
    for (int64_t t = begin; t < end; ++t) {
        const double p = std::exp(scores[t - begin] - peak);
        total += p;
        for (int64_t d = 0; d < shape.value_dim(); ++d) {
            const double value = store.get(value_head, store.slot(request, t), d);
            out[d] += p * value;
            magnitude[d] += p * std::fabs(value);
        }
    }
    for (int64_t d = 0; d < shape.value_dim(); ++d) {
        out[d] /= total;
        magnitude[d] /= total;
    }
}

// Budget: bf16 rounds every probability (2^-8 of it at most) and the output; fp32 sums are held to 1e-5
// (scores of up to some 30, of products in fp32: 30 * 2^-24 * a few).
inline void check_outputs(const std::vector<Request>& requests, const Store& store, const Outputs& outputs) {
    const Shape& shape = store.shape;
    const double share = shape.dtype == PENSTOCK_BF16 ? 0x1p-8 : 0;
    std::vector<double> out, magnitude;
    for (size_t r = 0; r < requests.size(); ++r) {
        const int64_t computed = requests[r].length - requests[r].prefix;
        for (int64_t i = 0; i < computed; i += computed > 20 ? 7 : 1) {
            const int64_t position = requests[r].prefix + i;
            for (int64_t head = 0; head < shape.num_heads; ++head) {
                const float* query = &requests[r].qkv[position * shape.width() + head * shape.head_dim];
                exact(store, query, static_cast<int64_t>(r), shape.begin(position),
                      shape.end(position, requests[r].length), head, out, magnitude);
                for (int64_t d = 0; d < shape.value_dim(); ++d) {
                    const double got = outputs[r][(i * shape.num_heads + head) * shape.value_dim() + d];
                    const double budget = (share + 1e-5) * magnitude[d] + share * std::fabs(out[d]);
                    CHECK(std::fabs(got - out[d]) <= budget, "request %zu position %ld head %ld: %g, not %g (%g)", r,
                          position, head, got, out[d], budget);
                }
            }
        }
    }
}

// What the op wrote: as it came, or within half a step of the integers.
inline void check_store(const std::vector<Request>& requests, const Store& store) {
    const Shape& shape = store.shape;
    for (size_t r = 0; r < requests.size(); ++r) {
        for (int64_t position = requests[r].prefix; position < requests[r].length; ++position) {
            for (int64_t head = 0; head < shape.num_vectors(); ++head) {
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

inline void check_same(const Outputs& expected, const Outputs& got, const char* what) {
    for (size_t r = 0; r < expected.size(); ++r) {
        CHECK(expected[r].size() == got[r].size());
        CHECK(memcmp(expected[r].data(), got[r].data(), expected[r].size() * sizeof(float)) == 0, "request %zu: %s", r,
              what);
    }
}

}  // namespace penstock
