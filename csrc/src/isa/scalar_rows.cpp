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

template <typename T>
void norm(float* residual, const T* x, const float* weight, T* out, int64_t size, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (x) residual[i] += number(x[i]);
        squares = std::fma(residual[i], residual[i], squares);
    }
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) store(residual[i] * inverse * weight[i], out[i]);
}

template <typename T>
void rope(const float* angles, T* x, int64_t num_heads, int64_t half) {
    for (int64_t i = 0; i < num_heads * half; ++i) {
        const float cosine = angles[i % half], sine = angles[half + i % half];
        T& low = x[i / half * 2 * half + i % half];
        T& high = (&low)[half];
        const float a = number(low), b = number(high);
        store(a * cosine - b * sine, low);
        store(b * cosine + a * sine, high);
    }
}

void exponentials(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::exp(x[i]);
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
        const int64_t visible = chunk.first_visible + row / chunk.rows_per_query;
        float* scores = chunk.scores + row * kChunk;
        float peak = state.max[row];
        for (int64_t i = 0; i < kChunk; ++i) {
            if (i < visible) {
                scores[i] *= chunk.k_scales ? chunk.scale * chunk.k_scales[i] : chunk.scale;
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
            store(i < visible && chunk.v_scales ? p * chunk.v_scales[i] : p,
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
void finish(const SoftmaxState& state, int64_t row, Out* out, int64_t head_dim) {
    const float inverse = 1.0f / total(state.sums + row * kSumLanes);
    for (int64_t i = 0; i < head_dim; ++i) store(state.out[row * state.out_stride + i] * inverse, out[i]);
}

}  // namespace

const RowKernels scalar_rows = {
    norm<float>,
    norm<uint16_t>,
    rope<float>,
    rope<uint16_t>,
    exponentials,
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
