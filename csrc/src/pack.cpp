// Packs weights into panels, quantizing on the way. Baseline code: it runs once per weight, and
// every instruction set reads the same layout.
//
// INT4: the 512 bytes of 64 columns are 8 vectors of [16 rows][4 bytes]. Byte b of row n in vector
// j holds columns 4 j + b (low nibble) and 32 + 4 j + b (high nibble), each as value + 8: one load
// gives four columns of each half, and a half is one group of 32.
#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "ops.h"

namespace penstock {

namespace {

constexpr int64_t kColumns = 64;  // columns are padded to this: one AMX tile of int8
constexpr int64_t kInt4Bytes = 512, kInt4ScaleBytes = 16;

void set_layout(penstock_weight& weight) {
    const bool grouped = weight.format == PENSTOCK_INT4 && weight.group_size > kColumns;
    const int64_t k = round_up(weight.num_columns, grouped ? weight.group_size : kColumns);
    int64_t num_bytes = k / kColumns * (kInt4Bytes + kInt4ScaleBytes);
    if (weight.format == PENSTOCK_F32) num_bytes = k * kPanel * 4;
    if (weight.format == PENSTOCK_BF16) num_bytes = k * kPanel * 2;
    if (weight.format == PENSTOCK_INT8) num_bytes = k * kPanel;
    weight.padded_columns = k;
    weight.panel_bytes = round_up(num_bytes, kAlignment);
    weight.data_bytes = round_up(weight.num_rows, kPanel) / kPanel * weight.panel_bytes;
}

float value_at(const void* source, int32_t dtype, int64_t index) {
    if (dtype == PENSTOCK_F32) {
        float value;
        memcpy(&value, static_cast<const char*>(source) + 4 * index, sizeof value);
        return value;
    }
    uint16_t value;
    memcpy(&value, static_cast<const char*>(source) + 2 * index, sizeof value);
    return dtype == PENSTOCK_BF16 ? bf16_to_f32(value) : f16_to_f32(value);
}

float largest(const float* x, int64_t n) {
    float result = 0;
    for (int64_t i = 0; i < n; ++i) result = std::max(result, std::fabs(x[i]));
    return result;
}

// The group scale in [1, 15] (times `unit`) with the smallest squared error over x[n].
int best_group_scale(const float* x, int64_t n, float unit) {
    float peak = largest(x, n);
    if (peak == 0) return 0;
    // From where the peak would be cut to -8 * 0.75 to where it would use -7 only.
    int low = std::clamp(static_cast<int>(std::floor(peak / (unit * 9.5f))), 1, 15);
    int high = std::clamp(static_cast<int>(std::ceil(peak / (unit * 6.5f))), 1, 15);
    int best = high;
    float best_error = INFINITY;
    for (int scale = low; scale <= high; ++scale) {
        float step = unit * scale, inverse = 1.0f / step, error = 0;
        for (int64_t i = 0; i < n; ++i) {
            float q = std::clamp(std::nearbyint(x[i] * inverse), -8.0f, 7.0f);
            float difference = x[i] - q * step;
            error += difference * difference;
        }
        if (error < best_error) {
            best_error = error;
            best = scale;
        }
    }
    return best;
}

// Where a row of a panel lies.
struct Row {
    char* panel;
    int lane;
    float* scale;
};

void store_f32(const Row& row, const float* x, int64_t k) {
    auto* out = reinterpret_cast<float*>(row.panel);
    for (int64_t i = 0; i < k; ++i) out[i * kPanel + row.lane] = x[i];
}

void store_bf16(const Row& row, const float* x, int64_t k) {
    auto* out = reinterpret_cast<uint16_t*>(row.panel);
    for (int64_t i = 0; i < k; ++i) out[(i / 2 * kPanel + row.lane) * 2 + i % 2] = f32_to_bf16(x[i]);
}

void store_int8(const Row& row, const float* x, int64_t k) {
    float scale = largest(x, k) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    if (!std::isfinite(inverse)) scale = inverse = 0.0f;  // so small that it is nothing
    *row.scale = scale;
    auto* out = reinterpret_cast<uint8_t*>(row.panel);
    for (int64_t i = 0; i < k; ++i) {
        float q = std::clamp(std::nearbyint(x[i] * inverse), -127.0f, 127.0f);
        out[(i / 4 * kPanel + row.lane) * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(q) + 128);
    }
}

void store_int4(const Row& row, const float* x, int64_t k, int64_t group_size) {
    // The unit is such that the widest group has scale 15 and uses the values -7 .. 7 (or -8).
    float unit = largest(x, k) / (15.0f * 7.5f);
    if (!std::isfinite(1.0f / unit)) unit = 0.0f;
    *row.scale = unit;
    auto* values = reinterpret_cast<uint8_t*>(row.panel);
    uint8_t* scales = values + k / kColumns * kInt4Bytes;
    for (int64_t first = 0; first < k; first += group_size) {
        int64_t n = std::min(group_size, k - first);
        int scale = unit > 0 ? best_group_scale(x + first, n, unit) : 0;
        float inverse = scale > 0 ? 1.0f / (unit * scale) : 0.0f;
        for (int64_t i = first; i < first + n; ++i) {
            int value = static_cast<int>(std::clamp(std::nearbyint(x[i] * inverse), -8.0f, 7.0f)) + 8;
            int64_t block = i / kColumns, column = i % kColumns, vector = column % 32 / 4;
            int shift = column < 32 ? 0 : 4;
            uint8_t& byte = values[block * kInt4Bytes + vector * 64 + row.lane * 4 + i % 4];
            byte = static_cast<uint8_t>((byte & ~(15 << shift)) | value << shift);
        }
        for (int64_t half = first / 32; half < (first + n) / 32; ++half) {
            int shift = half % 2 == 0 ? 0 : 4;
            uint8_t& byte = scales[half / 2 * kInt4ScaleBytes + row.lane];
            byte = static_cast<uint8_t>((byte & ~(15 << shift)) | scale << shift);
        }
    }
}

struct PackJob {
    const penstock_pack_args* args;
};

void pack_rows(Team& team, const void* context) {
    const auto& args = *static_cast<const PackJob*>(context)->args;
    const penstock_weight& weight = args.weight;
    const int64_t k = weight.padded_columns;
    std::vector<float> x(k, 0.0f);
    const int64_t num_tasks = (args.num_source_rows + kPanel - 1) / kPanel;
    // Two tasks never write one panel's byte: a task is a run of 16 source rows, which meet at most
    // two panels, and different rows lie in different bytes.
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        int64_t last = std::min<int64_t>((task + 1) * kPanel, args.num_source_rows);
        for (int64_t r = task * kPanel; r < last; ++r) {
            for (int64_t i = 0; i < weight.num_columns; ++i) {
                x[i] = value_at(args.source, args.source_dtype, r * weight.num_columns + i);
            }
            int64_t to = args.first_row + r / kPanel * kPanel * args.panel_step + r % kPanel;
            Row row{static_cast<char*>(weight.data) + to / kPanel * weight.panel_bytes,
                    static_cast<int>(to % kPanel), weight.scales ? weight.scales + to : nullptr};
            switch (weight.format) {
                case PENSTOCK_F32: store_f32(row, x.data(), k); break;
                case PENSTOCK_BF16: store_bf16(row, x.data(), k); break;
                case PENSTOCK_INT8: store_int8(row, x.data(), k); break;
                default: store_int4(row, x.data(), k, weight.group_size);
            }
        }
    }
}

}  // namespace

const char* check_weight(const penstock_weight& weight) {
    const bool quantized = weight.format == PENSTOCK_INT8 || weight.format == PENSTOCK_INT4;
    if (weight.format != PENSTOCK_F32 && weight.format != PENSTOCK_BF16 && !quantized) return "weight: unknown format";
    if (weight.format == PENSTOCK_INT4 && weight.group_size != 32 && weight.group_size != 128) {
        return "weight: groups of 4-bit weights have 32 or 128 columns";
    }
    if (weight.num_rows < 1 || weight.num_columns < 1) return "weight: empty";
    penstock_weight right = weight;
    set_layout(right);
    if (weight.padded_columns != right.padded_columns || weight.panel_bytes != right.panel_bytes) {
        return "weight: its layout was not set";
    }
    if (!weight.data || reinterpret_cast<uintptr_t>(weight.data) % kAlignment) return "weight: data is not aligned";
    if (quantized && !weight.scales) return "weight: no scales";
    return nullptr;
}

void unpack_row(const penstock_weight& weight, int64_t row, float* out) {
    const char* panel = static_cast<const char*>(weight.data) + row / kPanel * weight.panel_bytes;
    const int64_t k = weight.num_columns, lane = row % kPanel;
    const auto* bytes = reinterpret_cast<const uint8_t*>(panel);
    switch (weight.format) {
        case PENSTOCK_F32:
            for (int64_t i = 0; i < k; ++i) out[i] = reinterpret_cast<const float*>(panel)[i * kPanel + lane];
            return;
        case PENSTOCK_BF16:
            for (int64_t i = 0; i < k; ++i) {
                out[i] = bf16_to_f32(reinterpret_cast<const uint16_t*>(panel)[(i / 2 * kPanel + lane) * 2 + i % 2]);
            }
            return;
        case PENSTOCK_INT8:
            for (int64_t i = 0; i < k; ++i) {
                out[i] = weight.scales[row] * (bytes[(i / 4 * kPanel + lane) * 4 + i % 4] - 128);
            }
            return;
        default:
            break;
    }
    const uint8_t* scales = bytes + weight.padded_columns / kColumns * kInt4Bytes;
    for (int64_t i = 0; i < k; ++i) {
        const int64_t block = i / kColumns, column = i % kColumns;
        const int shift = column < 32 ? 0 : 4;
        const int value = (bytes[block * kInt4Bytes + column % 32 / 4 * 64 + lane * 4 + i % 4] >> shift & 15) - 8;
        const int scale = scales[block * kInt4ScaleBytes + lane] >> shift & 15;
        out[i] = weight.scales[row] * static_cast<float>(scale * value);
    }
}

}  // namespace penstock

extern "C" int32_t penstock_weight_layout(penstock_weight* weight) {
    using namespace penstock;
    if (weight->num_rows < 1 || weight->num_columns < 1) {
        set_error("weight: empty");
        return -1;
    }
    set_layout(*weight);
    return 0;
}

extern "C" int32_t penstock_pack(penstock_pool* pool, const penstock_pack_args* args) {
    using namespace penstock;
    const char* problem = check_weight(args->weight);
    const int64_t padded_rows = round_up(args->weight.num_rows, kPanel);
    const int64_t last = args->num_source_rows - 1;
    if (!problem && (args->first_row < 0 || last < 0 ||
                     args->first_row + last / kPanel * kPanel * args->panel_step + last % kPanel >= padded_rows)) {
        problem = "pack: the rows do not fit into the weight";
    }
    if (!problem && (args->panel_step < 1 || (args->panel_step > 1 && args->first_row % kPanel))) {
        problem = "pack: interleaved parts begin with a panel";
    }
    if (!problem && (args->source_dtype < PENSTOCK_F32 || args->source_dtype > PENSTOCK_F16)) {
        problem = "pack: the source must be F32, BF16 or F16";
    }
    if (problem) {
        set_error(problem);
        return -1;
    }
    PackJob job{args};
    pool->run(pack_rows, &job);
    return 0;
}
