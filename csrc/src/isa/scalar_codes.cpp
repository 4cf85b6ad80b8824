// Codes in plain code: the oracle.
#include "codes_driver.h"

namespace penstock {

namespace {

template <typename T>
void decode(const penstock_weight& w, const void* panel, int64_t first, int64_t last, T* out) {
    const auto* bytes = static_cast<const uint8_t*>(panel);
    const CodeLayout layout = code_layout(w);
    for (int64_t column = first; column < last; ++column) {
        const int64_t to = column - first;
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            float value;
            decode_row(w, layout, bytes, lane, column, column + 1, &value);
            if constexpr (sizeof(T) == 4) {
                out[to * kPanel + lane] = value;
            } else {
                out[(to / 2 * kPanel + lane) * 2 + to % 2] = f32_to_bf16(value);
            }
        }
    }
    clear_padding(w, first, last, out);
}

void gemm_f32(const penstock_weight& w, const Gemm& g) { gemm_pieces<float>(w, g, 0, decode<float>, scalar_linear.gemm_f32); }

void gemm_bf16(const penstock_weight& w, const Gemm& g) {
    gemm_pieces<uint16_t>(w, g, 0, decode<uint16_t>, scalar_linear.gemm_bf16);
}

}  // namespace

const CodeKernels scalar_codes = {decode<float>, decode<uint16_t>, gemm_f32, gemm_bf16, 8, 8};

}  // namespace penstock
