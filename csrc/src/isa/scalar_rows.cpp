// The oracle: every kernel as plainly as it can be written.
#include "../rows.h"

#include <cmath>

#include "../kernels.h"
#include "../numbers.h"

namespace penstock {

namespace {

// One value of type T as a number, and back.
float number(float value) { return value; }
float number(uint16_t value) { return bf16_to_f32(value); }
float number(int8_t value) { return value; }
void store(float value, float& out) { out = value; }
void store(float value, uint16_t& out) { out = f32_to_bf16(value); }

// out = norm(x) * weight + bias.
template <typename T, typename Out>
void norm_numbers(const T* x, Out* out, int64_t size, float eps, bool is_centered, const float* weight,
                  const float* bias) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; is_centered && i < size; ++i) sum += number(x[i]);
    const float mean = sum / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) {
        const float off = number(x[i]) - mean;
        squares = std::fma(off, off, squares);
    }
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) {
        const float normed = (number(x[i]) - mean) * inverse;
        store((weight ? normed * weight[i] : normed) + (bias ? bias[i] : 0.0f), out[i]);
    }
}

template <typename T>
void add(float* residual, const void* x, float scale, int64_t size) {
    for (int64_t i = 0; i < size; ++i) residual[i] = std::fma(number(static_cast<const T*>(x)[i]), scale, residual[i]);
}

template <typename T, typename Out>
void norm(const NormRow& row) {
    Out* out = static_cast<Out*>(row.out);
    if (row.residual) {
        if (row.x) add<T>(row.residual, row.x, row.x_scale, row.size);
        norm_numbers(row.residual, out, row.size, row.eps, row.is_centered, row.weight, row.bias);
    } else {
        norm_numbers(static_cast<const T*>(row.x), out, row.size, row.eps, row.is_centered, row.weight, row.bias);
    }
}

template <typename T>
void norm_runs(const NormRuns& runs) {
    T* x = static_cast<T*>(runs.x);
    for (int64_t run = 0; run < runs.num_runs; ++run) {
        const float* weight = runs.weight ? runs.weight + run * runs.weight_stride : nullptr;
        norm_numbers(x + run * runs.size, x + run * runs.size, runs.size, runs.eps, runs.is_centered, weight, nullptr);
    }
}

template <typename T>
void rope(const float* angles, T* x, int64_t num_heads, int64_t head_stride, int64_t half) {
    for (int64_t i = 0; i < num_heads * half; ++i) {
        const float cosine = angles[i % half], sine = angles[half + i % half];
        T& low = x[i / half * head_stride + i % half];
        T& high = (&low)[half];
        const float a = number(low), b = number(high);
        store(a * cosine - b * sine, low);
        store(b * cosine + a * sine, high);
    }
}

void exponentials(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::exp(x[i]);
}

void hyperbolic_tangents(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::tanh(x[i]);
}

void to_bf16(const float* x, uint16_t* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = f32_to_bf16(x[i]);
}

void to_f32(const uint16_t* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(x[i]);
}

double sum_above(const float* x, int64_t n, float bound, int64_t* count) {
    double sum = 0;
    *count = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (!(x[i] >= bound)) continue;  // nor NaN
        sum += x[i];
        ++*count;
    }
    return sum;
}

int64_t select_above(const float* x, int64_t n, float bound, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (x[i] >= bound) out[count++] = x[i];
    }
    return count;
}

int64_t argmax(const float* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (std::isnan(x[i])) return i;
        if (x[i] > x[best]) best = i;
    }
    return best;
}

// Elements of type Out that a dword of a panel holds.
template <typename Out>
constexpr int64_t kWidth = 4 / sizeof(Out);

template <typename In, typename Out>
void pack_keys(const void* const* rows, int64_t num_panels, int64_t head_dim, Out* out) {
    for (int64_t token = 0; token < num_panels * kPanel; ++token) {
        const In* row = static_cast<const In*>(rows[token]);
        Out* panel = out + token / kPanel * head_dim * kPanel;
        for (int64_t d = 0; d < head_dim; ++d) {
            const int64_t to = (d / kWidth<Out> * kPanel + token % kPanel) * kWidth<Out> + d % kWidth<Out>;
            store(number(row[d]), panel[to]);
        }
    }
}

template <typename In, typename Out>
void pack_values(const void* const* rows, int64_t num_tokens, int64_t head_dim, Out* out, int64_t panel_stride) {
    const int64_t padded = (head_dim + kPanel - 1) / kPanel * kPanel;
    for (int64_t token = 0; token < num_tokens; ++token) {
        const In* row = static_cast<const In*>(rows[token]);
        for (int64_t d = 0; d < padded; ++d) {
            const int64_t to = (token / kWidth<Out> * kPanel + d % kPanel) * kWidth<Out> + token % kWidth<Out>;
            store(d < head_dim ? number(row[d]) : 0.0f, out[d / kPanel * panel_stride + to]);
        }
    }
}

template <typename Out>
void softmax(const SoftmaxChunk& chunk) {
    const SoftmaxState& state = chunk.state;
    for (int64_t row = 0; row < chunk.num_rows; ++row) {
        const int64_t moved = row / chunk.rows_per_query * chunk.step;
        const auto is_seen = [&](int64_t i) { return i >= chunk.begin + moved && i < chunk.end + moved; };
        float* scores = chunk.scores + row * kChunk;
        float peak = state.max[row];
        for (int64_t i = 0; i < kChunk; ++i) {
            if (is_seen(i)) {
                scores[i] *= chunk.k_scales ? chunk.scale * chunk.k_scales[i] : chunk.scale;
                if (chunk.cap > 0) scores[i] = chunk.cap * std::tanh(scores[i]);
                peak = std::fmax(peak, scores[i]);
            } else {
                scores[i] = -INFINITY;
            }
        }
        const float base = peak == -INFINITY ? 0.0f : peak;
        const float factor = std::exp2(state.max[row] - base);
        float* sums = state.sums + row * kSumLanes;
        for (int64_t lane = 0; lane < kSumLanes; ++lane) sums[lane] *= factor;
        float* out = state.out + row * state.out_stride;
        for (int64_t i = 0; i < state.out_stride; ++i) out[i] *= factor;
        for (int64_t i = 0; i < kChunk; ++i) {
            const float p = std::exp2(scores[i] - base);
            sums[i % kSumLanes] += p;
            store(is_seen(i) && chunk.v_scales ? p * chunk.v_scales[i] : p,
                  static_cast<Out*>(chunk.probabilities)[row * kChunk + i]);
        }
        state.max[row] = peak;
    }
}

float total(const float* sums) {
    float result = 0;
    for (int64_t lane = 0; lane < kSumLanes; ++lane) result += sums[lane];
    return result;
}

void merge(int64_t num_rows, const SoftmaxState& into, const SoftmaxState& part) {
    for (int64_t row = 0; row < num_rows; ++row) {
        if (part.max[row] == -INFINITY) continue;  // it sees nothing of the part
        const float peak = std::fmax(into.max[row], part.max[row]);
        const float base = peak == -INFINITY ? 0.0f : peak;
        const float kept = std::exp2(into.max[row] - base), added = std::exp2(part.max[row] - base);
        into.max[row] = peak;
        for (int64_t i = 0; i < kSumLanes; ++i) {
            float& sum = into.sums[row * kSumLanes + i];
            sum = std::fma(part.sums[row * kSumLanes + i], added, sum * kept);
        }
        for (int64_t i = 0; i < into.out_stride; ++i) {
            float& value = into.out[row * into.out_stride + i];
            value = std::fma(part.out[row * part.out_stride + i], added, value * kept);
        }
    }
}

template <typename Out>
void finish(const SoftmaxState& state, int64_t row, float sink, Out* out, int64_t size) {
    const float peak = std::fmax(state.max[row], sink), kept = std::exp2(state.max[row] - peak);
    const float inverse = kept / std::fma(total(state.sums + row * kSumLanes), kept, std::exp2(sink - peak));
    for (int64_t i = 0; i < size; ++i) store(state.out[row * state.out_stride + i] * inverse, out[i]);
}

}  // namespace

const RowKernels scalar_rows = {
    {{norm<float, float>, norm<float, uint16_t>}, {norm<uint16_t, float>, norm<uint16_t, uint16_t>}},
    {norm_runs<float>, norm_runs<uint16_t>},
    {add<float>, add<uint16_t>},
    rope<float>,
    rope<uint16_t>,
    exponentials,
    hyperbolic_tangents,
    to_bf16,
    to_f32,
    argmax,
    sum_above,
    select_above,
    {pack_keys<float, float>, pack_keys<uint16_t, float>, pack_keys<int8_t, float>},
    {pack_keys<float, uint16_t>, pack_keys<uint16_t, uint16_t>, pack_keys<int8_t, uint16_t>},
    {pack_values<float, float>, pack_values<uint16_t, float>, pack_values<int8_t, float>},
    {pack_values<float, uint16_t>, pack_values<uint16_t, uint16_t>, pack_values<int8_t, uint16_t>},
    softmax<float>,
    softmax<uint16_t>,
    merge,
    finish<float>,
    finish<uint16_t>,
};

}  // namespace penstock
