// Packs weights into panels, quantizing on the way. Baseline code: it runs once per weight, and
// every instruction set reads the same layout.
//
// INT4: the 512 bytes of 64 columns are 8 vectors of [16 rows][4 bytes]. Byte b of row n in vector
// j holds columns 4 j + b (low nibble) and 32 + 4 j + b (high nibble), each as value + 8: one load
// gives four columns of each half, and a half is one group of 32.
#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "numbers.h"
#include "ops.h"

namespace penstock {

namespace {

constexpr int64_t kColumns = 64;  // columns are padded to this: one AMX tile of int8
constexpr int64_t kInt4Bytes = 512, kInt4ScaleBytes = 16;
constexpr int64_t kMaxSize = int64_t{1} << 28;  // of rows and of columns: no number of bytes overflows

void set_layout(penstock_weight& weight) {
    if (is_coded(weight)) {
        set_codes_layout(weight);
    } else {
        const bool grouped = weight.format == PENSTOCK_INT4 && weight.group_size > kColumns;
        const int64_t k = round_up(weight.num_columns, grouped ? weight.group_size : kColumns);
        int64_t num_bytes = k / kColumns * (kInt4Bytes + kInt4ScaleBytes);
        if (weight.format == PENSTOCK_F32) num_bytes = k * kPanel * 4;
        if (weight.format == PENSTOCK_BF16) num_bytes = k * kPanel * 2;
        if (weight.format == PENSTOCK_INT8) num_bytes = k * kPanel;
        weight.padded_columns = k;
        weight.panel_bytes = round_up(num_bytes, kAlignment);
    }
    weight.data_bytes = round_up(weight.num_rows, kPanel) / kPanel * weight.panel_bytes;
}

// x[n] from any of the source types; zeros up to `padded`.
void read_row(const void* source, int32_t dtype, int64_t n, int64_t padded, float* x) {
    const auto* halves = static_cast<const char*>(source);
    if (dtype == PENSTOCK_F32) {
        memcpy(x, source, n * sizeof(float));
    } else {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t value;
            memcpy(&value, halves + 2 * i, sizeof value);
            x[i] = dtype == PENSTOCK_BF16 ? bf16_to_f32(value) : f16_to_f32(value);
        }
    }
    std::fill(x + n, x + padded, 0.0f);
}

// The largest magnitude; NaN if there is one.
float largest(const float* x, int64_t n) {
    int32_t peak = 0;  // floats of one sign order like integers, NaN above all; and this is vectorized
    for (int64_t i = 0; i < n; ++i) peak = std::max(peak, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu));
    return float_of(static_cast<uint32_t>(peak));
}

inline float rounded_nibble(float x) {
    const float q = (x + kRound) - kRound, low = q > -8.0f ? q : -8.0f;
    return low < 7.0f ? low : 7.0f;
}

// Squared error of x[n] in steps of `step`; n is a multiple of 16, and so many sums run in parallel.
float error_of(const float* x, int64_t n, float step) {
    const float inverse = 1.0f / step;
    float errors[16] = {};
    for (int64_t i = 0; i < n; i += 16) {
        for (int l = 0; l < 16; ++l) {
            const float difference = x[i + l] - rounded_nibble(x[i + l] * inverse) * step;
            errors[l] += difference * difference;
        }
    }
    for (int l = 0; l < 8; ++l) errors[l] += errors[l + 8];
    for (int l = 0; l < 4; ++l) errors[l] += errors[l + 4];
    return (errors[0] + errors[1]) + (errors[2] + errors[3]);
}

// The group scale in [1, 15] (times `unit`) with the smallest squared error over x[n].
int best_group_scale(const float* x, int64_t n, float unit) {
    const float peak = largest(x, n);
    if (peak == 0) return 0;
    // From where the peak would be cut to -8 * 0.75 to where it would use -7 only.
    const int low = std::clamp(static_cast<int>(std::floor(peak / (unit * 9.5f))), 1, 15);
    const int high = std::clamp(static_cast<int>(std::ceil(peak / (unit * 6.5f))), 1, 15);
    int best = high;
    float best_error = INFINITY;
    for (int scale = low; scale <= high; ++scale) {
        const float error = error_of(x, n, unit * static_cast<float>(scale));
        if (error < best_error) {
            best_error = error;
            best = scale;
        }
    }
    return best;
}

// Rows in their own order, 4 bytes of which go to a line of the panel: what each format stores.
void encode_bf16(const float* x, int64_t k, uint16_t* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = f32_to_bf16(x[i]);
}

// `peak` is the row's largest magnitude, finite.
void encode_int8(const float* x, int64_t k, float peak, uint8_t* out, float* row_scale) {
    float scale = peak / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    if (!std::isfinite(inverse)) scale = inverse = 0.0f;  // so small that it is nothing
    *row_scale = scale;
    for (int64_t i = 0; i < k; ++i) {
        const auto q = static_cast<int32_t>(bits_of(x[i] * inverse + kRound) - bits_of(kRound));
        out[i] = static_cast<uint8_t>(std::clamp(q, -127, 127) + 128);
    }
}

// `group_scales` [k / 32], of each half of a block.
void encode_int4(const float* __restrict x, int64_t k, float peak, int64_t group_size, uint8_t* __restrict out,
                 uint8_t* __restrict group_scales, float* row_scale) {
    // The unit is such that the widest group has scale 15 and uses the values -7 .. 7 (or -8).
    float unit = peak / (15.0f * 7.5f);
    if (!std::isfinite(1.0f / unit)) unit = 0.0f;
    *row_scale = unit;
    for (int64_t first = 0; first < k; first += group_size) {
        const int scale = unit > 0 ? best_group_scale(x + first, group_size, unit) : 0;
        const float inverse = scale > 0 ? 1.0f / (unit * static_cast<float>(scale)) : 0.0f;
        for (int64_t half = first; half < first + group_size; half += 32) {
            uint8_t nibbles[32];
            for (int i = 0; i < 32; ++i) {
                const float q = rounded_nibble(x[half + i] * inverse) + 8.0f;
                nibbles[i] = static_cast<uint8_t>(bits_of(q + kRound) & 15u);
            }
            uint8_t* bytes = out + half / kColumns * 32;
            if (half % kColumns == 0) {
                memcpy(bytes, nibbles, sizeof nibbles);
            } else {
                for (int i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(bytes[i] | nibbles[i] << 4);
            }
            group_scales[half / 32] = static_cast<uint8_t>(scale);
        }
    }
}

// Word c of row r to places[r][16 c]: a panel's lines hold 4 bytes of each row.
void interleave(const char* const* rows, uint32_t* const* places, int64_t num_rows, int64_t num_words) {
    for (int64_t c = 0; c < num_words; ++c) {
        for (int64_t r = 0; r < num_rows; ++r) memcpy(places[r] + c * kPanel, rows[r] + 4 * c, 4);
    }
}

// The common case, with a fixed number of rows that lie side by side.
void interleave_panel(const char* const* rows, uint32_t* place, int64_t num_words) {
    for (int64_t c = 0; c < num_words; ++c, place += kPanel) {
        for (int r = 0; r < kPanel; ++r) memcpy(place + r, rows[r] + 4 * c, 4);
    }
}

// Up to 16 source rows and where they go.
struct RowBlock {
    const char* rows[kPanel];
    uint32_t* places[kPanel];
    int64_t num_rows;

    void store(int64_t num_words) const {
        bool side_by_side = num_rows == kPanel;
        for (int64_t r = 1; r < num_rows; ++r) side_by_side = side_by_side && places[r] == places[0] + r;
        if (side_by_side) {
            interleave_panel(rows, places[0], num_words);
        } else {
            interleave(rows, places, num_rows, num_words);
        }
    }
};

// One thread's memory for 16 encoded rows.
struct Encoder {
    const penstock_weight& weight;
    int64_t k = weight.padded_columns, row_bytes = weight.panel_bytes / kPanel;
    std::vector<float> x = std::vector<float>(k);
    std::vector<char> encoded = std::vector<char>(kPanel * row_bytes);
    std::vector<uint8_t> group_scales = std::vector<uint8_t>(k / 32);

    // The row's words; scales go to where they belong in `panel`. Null: not finite, and not to be quantized.
    const char* encode(const void* source, int32_t dtype, int64_t slot, int64_t row, char* panel) {
        char* out = encoded.data() + slot * row_bytes;
        read_row(source, dtype, weight.num_columns, k, x.data());
        auto* bytes = reinterpret_cast<uint8_t*>(out);
        switch (weight.format) {
            case PENSTOCK_F32: memcpy(out, x.data(), k * sizeof(float)); return out;
            case PENSTOCK_BF16: encode_bf16(x.data(), k, reinterpret_cast<uint16_t*>(out)); return out;
            default: break;
        }
        const float peak = largest(x.data(), k);
        if (!std::isfinite(peak)) return nullptr;
        if (weight.format == PENSTOCK_INT8) {
            encode_int8(x.data(), k, peak, bytes, &weight.scales[row]);
            return out;
        }
        encode_int4(x.data(), k, peak, weight.group_size, bytes, group_scales.data(), &weight.scales[row]);
        auto* scales = reinterpret_cast<uint8_t*>(panel) + k / kColumns * kInt4Bytes + row % kPanel;
        for (int64_t block = 0; block < k / kColumns; ++block) {
            const uint8_t *low = &group_scales[2 * block], *high = low + 1;
            scales[block * kInt4ScaleBytes] = static_cast<uint8_t>(*low | *high << 4);
        }
        return out;
    }

    int64_t num_words() const {
        if (weight.format == PENSTOCK_INT4) return k / 8;
        return k * (weight.format == PENSTOCK_F32 ? 4 : weight.format == PENSTOCK_BF16 ? 2 : 1) / 4;
    }
};

struct Packing {
    const penstock_pack_args& args;
    mutable std::atomic<int64_t> refused_row;  // of the source: the first that is not finite; at the start, none
};

void note_smallest(std::atomic<int64_t>& smallest, int64_t value) {
    int64_t seen = smallest.load();
    while (value < seen && !smallest.compare_exchange_weak(seen, value)) {
    }
}

// Two tasks never write one byte: a task is a run of 16 source rows, which meet at most two panels,
// and different rows lie in different words.
void pack_rows(Team& team, const void* context) {
    const auto& packing = *static_cast<const Packing*>(context);
    const penstock_pack_args& args = packing.args;
    const penstock_weight& weight = args.weight;
    const int64_t source_bytes = weight.num_columns * (args.source_dtype == PENSTOCK_F32 ? 4 : 2);
    const bool as_it_is = weight.format == PENSTOCK_BF16 && args.source_dtype == PENSTOCK_BF16 &&
                          weight.num_columns == weight.padded_columns;
    Encoder encoder{weight};
    const int64_t num_tasks = (args.num_source_rows + kPanel - 1) / kPanel;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        RowBlock block{};
        block.num_rows = std::min<int64_t>(kPanel, args.num_source_rows - task * kPanel);
        bool complete = true;
        for (int64_t r = 0; r < block.num_rows && complete; ++r) {
            const int64_t to = args.first_row + task * kPanel * args.panel_step + r;
            char* panel = static_cast<char*>(weight.data) + to / kPanel * weight.panel_bytes;
            const char* source = static_cast<const char*>(args.source) + (task * kPanel + r) * source_bytes;
            block.places[r] = reinterpret_cast<uint32_t*>(panel) + to % kPanel;
            block.rows[r] = as_it_is ? source : encoder.encode(source, args.source_dtype, r, to, panel);
            complete = block.rows[r] != nullptr;
            if (!complete) note_smallest(packing.refused_row, task * kPanel + r);
        }
        if (complete) block.store(encoder.num_words());
    }
}

}  // namespace

namespace {

bool quantized(const penstock_weight& weight) {
    return weight.format == PENSTOCK_INT8 || weight.format == PENSTOCK_INT4;
}

// Null if there is a layout for this, else what is wrong.
const char* check_shape(const penstock_weight& weight) {
    if (weight.format != PENSTOCK_F32 && weight.format != PENSTOCK_BF16 && !quantized(weight) && !is_coded(weight)) {
        return "weight: unknown format";
    }
    if (weight.format == PENSTOCK_INT4 && weight.group_size != 32 && weight.group_size != 128) {
        return "weight: groups of 4-bit weights have 32 or 128 columns";
    }
    if (weight.num_rows < 1 || weight.num_columns < 1) return "weight: empty";
    if (weight.num_rows > kMaxSize || weight.num_columns > kMaxSize) return "weight: too large";
    return is_coded(weight) ? check_codes(weight) : nullptr;
}

}  // namespace

const char* check_weight(const penstock_weight& weight) {
    if (const char* problem = check_shape(weight)) return problem;
    penstock_weight right = weight;
    set_layout(right);
    if (weight.padded_columns != right.padded_columns || weight.panel_bytes != right.panel_bytes) {
        return "weight: its layout was not set";
    }
    if (!weight.data || reinterpret_cast<uintptr_t>(weight.data) % kAlignment) return "weight: data is not aligned";
    if (quantized(weight) && !weight.scales) return "weight: no scales";
    return nullptr;
}

const char* check_rows(const penstock_weight& weight, int64_t first_row, int64_t num_rows, int64_t panel_step) {
    const int64_t padded_rows = round_up(weight.num_rows, kPanel), last = num_rows - 1;
    if (panel_step < 1 || (panel_step > 1 && first_row % kPanel)) return "pack: interleaved parts begin with a panel";
    // In an order in which nothing overflows.
    const bool fits = first_row >= 0 && first_row < padded_rows && last >= 0 && last < padded_rows &&
                      panel_step <= kMaxSize &&
                      first_row + last / kPanel * kPanel * panel_step + last % kPanel < padded_rows;
    return fits ? nullptr : "pack: the rows do not fit into the weight";
}

void unpack_row(const penstock_weight& weight, int64_t row, float* out) {
    if (is_coded(weight)) return unpack_codes(weight, row, out);
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
    if (const char* problem = check_shape(*weight)) {
        set_error(problem);
        return -1;
    }
    set_layout(*weight);
    return 0;
}

extern "C" int32_t penstock_pack(penstock_pool* pool, const penstock_pack_args* args) {
    using namespace penstock;
    const char* problem = pool->problem();
    if (!problem) problem = check_weight(args->weight);
    if (!problem && !args->source) problem = "pack: no source";
    if (!problem && is_coded(args->weight)) problem = "pack: codes are packed by penstock_pack_codes";
    if (!problem) problem = check_rows(args->weight, args->first_row, args->num_source_rows, args->panel_step);
    if (!problem && (args->source_dtype < PENSTOCK_F32 || args->source_dtype > PENSTOCK_F16)) {
        problem = "pack: the source must be F32, BF16 or F16";
    }
    if (problem) {
        set_error(problem);
        return -1;
    }
    constexpr int64_t kNone = INT64_MAX;
    const Packing packing{*args, kNone};
    pool->run(pack_rows, &packing);
    const int64_t row = packing.refused_row;
    if (row == kNone) return 0;
    char message[100];
    snprintf(message, sizeof message, "row %lld of the source is not finite", static_cast<long long>(row));
    set_error(message);
    return -1;
}
