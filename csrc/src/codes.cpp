// Codes into panels, and rows of such panels back into numbers. Baseline code: it runs once a weight.
// Nothing is rounded: what the layout cannot hold exactly is refused.
#include "codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "pack.h"

namespace penstock {

namespace {

constexpr int64_t kColumns = 64;  // columns are padded to this
static_assert(kCodeLanes == kPanel);

// The half with exactly this value; false if there is none. NaN is NaN.
bool f16_of(float value, uint16_t* half) {
    const auto sign = static_cast<uint32_t>(std::signbit(value) ? 0x8000 : 0);
    const float magnitude = std::fabs(value);
    uint32_t bits = 0x7e00;
    if (magnitude >= 0x1p-14f) {
        bits = std::isinf(value) ? 0x7c00 : (bits_of(magnitude) - (112u << 23)) >> 13;
        if (bits > 0x7c00) return false;
    } else if (!std::isnan(value)) {
        bits = static_cast<uint32_t>(magnitude * 0x1p24f);  // of a subnormal
    }
    *half = static_cast<uint16_t>(sign | bits);
    return std::isnan(value) || bits_of(f16_to_f32(*half)) == bits_of(value);
}

// Scales or minima of a row as the layout has them: the first of 16, the next `stride` bytes further.
struct ScaleWriter {
    int32_t format;
    float low, high;  // of integers
    bool of_e4m3;

    bool store(float value, uint8_t* scales, int64_t lane) const {
        if (of_e4m3 && std::isfinite(value) && std::isinf(value * kE4m3Factor)) return false;
        if (format == PENSTOCK_F32) {
            memcpy(scales + 4 * lane, &value, sizeof value);
            return true;
        }
        if (format == PENSTOCK_F16) {
            uint16_t half;
            if (!f16_of(value, &half)) return false;
            memcpy(scales + 2 * lane, &half, sizeof half);
            return true;
        }
        if (!(value >= low && value <= high) || value != std::floor(value)) return false;
        scales[lane] = static_cast<uint8_t>(static_cast<int>(value));
        return true;
    }
};

// Every other byte of eight, from the first.
inline uint32_t even_bytes(uint64_t bytes) {
    bytes &= 0x00ff00ff00ff00ffu;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
    return static_cast<uint32_t>(bytes | bytes >> 16);
}

// 8 columns of a row into their line; the other rows' nibbles stay. False: a code has more than 4 bits.
inline bool store_nibbles(const uint8_t* codes, uint8_t* line, int64_t lane) {
    uint64_t bytes;
    memcpy(&bytes, codes, sizeof bytes);
    const int shift = lane < 8 ? 0 : 4;
    uint32_t pair[2];
    memcpy(pair, line + 8 * (lane % 8), sizeof pair);
    const uint32_t others = 0xf0f0f0f0u >> shift;
    pair[0] = (pair[0] & others) | even_bytes(bytes) << shift;
    pair[1] = (pair[1] & others) | even_bytes(bytes >> 8) << shift;
    memcpy(line + 8 * (lane % 8), pair, sizeof pair);
    return (bytes & 0xf0f0f0f0f0f0f0f0u) == 0;
}

inline void store_bytes(const uint8_t* codes, uint8_t* lines, int64_t count, int64_t lane) {
    for (int64_t i = 0; i < count; i += 2) memcpy(lines + (i / 2 * kPanel + lane) * 2, codes + i, 2);
}

enum Refusal { kFine = 0, kCode = 1, kScale = 2 };

// One row into its panel.
struct RowPacker {
    const penstock_pack_codes_args& args;
    const penstock_weight& w = args.weight;
    CodeLayout layout = code_layout(w);
    int64_t num_groups = (w.num_columns + layout.group_columns - 1) / layout.group_columns;
    int64_t num_units = (w.num_columns + kUnitColumns - 1) / kUnitColumns;
    std::vector<uint8_t> padded = std::vector<uint8_t>(w.padded_columns);

    Refusal pack(int64_t row, uint8_t* panel, int64_t lane) {
        memcpy(padded.data(), args.codes + row * w.num_columns, w.num_columns);
        bool fits = true, exact = true;
        const bool of_e4m3 = w.format == PENSTOCK_CODES8 && w.code == PENSTOCK_CODE_E4M3;
        const ScaleWriter scales{w.scale_format, -128, 127, of_e4m3}, minima{w.scale_format, 0, 255, false};
        for (int64_t g = 0; g < num_groups; ++g) {
            const int64_t first = g * layout.group_columns;
            uint8_t* group = panel + layout.offset_of(first);
            exact = exact && scales.store(args.scales[row * num_groups + g], group, lane);
            if (w.has_minima) {
                exact = exact && minima.store(args.minima[row * num_groups + g], group + layout.scale_bytes, lane);
            }
            uint8_t* to = group + layout.head_bytes;
            const uint8_t* from = padded.data() + first;
            if (w.format == PENSTOCK_CODES8) {
                store_bytes(from, to, layout.group_columns, lane);
                continue;
            }
            for (int64_t i = 0; i < layout.group_columns; i += 8) {
                fits = store_nibbles(from + i, to + i * layout.code_bytes, lane) && fits;
            }
        }
        for (int64_t u = 0; layout.unit_bytes && u < num_units; ++u) {
            uint8_t* units = panel + layout.units_at(u * kUnitColumns) + 4 * lane;
            const float unit = args.units[row * num_units + u];
            exact = exact && !(of_e4m3 && std::isfinite(unit) && std::isinf(unit * 128 * kE4m3Factor));
            memcpy(units, &unit, sizeof unit);
            if (w.has_minima) memcpy(units + 4 * kPanel, args.minimum_units + row * num_units + u, sizeof(float));
        }
        return !fits ? kCode : !exact ? kScale : kFine;
    }

    void pack_int8(int64_t row, uint8_t* panel, int64_t lane, int64_t to) {
        const uint8_t* from = args.codes + row * w.num_columns;
        for (int64_t i = 0; i < w.padded_columns; ++i) {
            const int code = i < w.num_columns ? from[i] : 0;
            panel[(i / 4 * kPanel + lane) * 4 + i % 4] = static_cast<uint8_t>(code ^ 0x80);
        }
        w.scales[to] = args.scales[row];
    }
};

struct Packing {
    const penstock_pack_codes_args& args;
    mutable std::atomic<int64_t> refused;  // 4 * row of the source + why, of the first row; at the start, none
};

void note_smallest(std::atomic<int64_t>& smallest, int64_t value) {
    int64_t seen = smallest.load();
    while (value < seen && !smallest.compare_exchange_weak(seen, value)) {
    }
}

// A task is a panel of the weight: rows of one panel share bytes.
void pack_panels(Team& team, const void* context) {
    const auto& packing = *static_cast<const Packing*>(context);
    const penstock_pack_codes_args& args = packing.args;
    RowPacker packer{args};
    const int64_t skipped = args.first_row % kPanel;  // rows of the first panel that are not ours
    const int64_t num_tasks = (skipped + args.num_source_rows + kPanel - 1) / kPanel;
    for (int64_t task = team.next(num_tasks); task >= 0; task = team.next(num_tasks)) {
        const int64_t panel = args.first_row / kPanel + task * args.panel_step;
        auto* data = static_cast<uint8_t*>(args.weight.data) + panel * args.weight.panel_bytes;
        const int64_t first = std::max<int64_t>(task * kPanel - skipped, 0);
        const int64_t last = std::min((task + 1) * kPanel - skipped, args.num_source_rows);
        for (int64_t row = first; row < last; ++row) {
            const int64_t lane = (row + skipped) % kPanel;
            if (args.weight.format == PENSTOCK_INT8) {
                packer.pack_int8(row, data, lane, panel * kPanel + lane);
            } else if (const Refusal why = packer.pack(row, data, lane)) {
                note_smallest(packing.refused, 4 * row + why);
            }
        }
    }
}

const char* check_sources(const penstock_pack_codes_args& args) {
    const penstock_weight& w = args.weight;
    if (w.format != PENSTOCK_CODES4 && w.format != PENSTOCK_CODES8 && w.format != PENSTOCK_INT8) {
        return "pack: codes go into CODES4, CODES8 or INT8";
    }
    if (!args.codes || !args.scales) return "pack: no codes or no scales";
    const bool coded = w.format != PENSTOCK_INT8, with_units = coded && w.scale_format == PENSTOCK_INT8;
    const bool with_minima = coded && w.has_minima;
    if (with_minima != (args.minima != nullptr)) return "pack: minima are given if and only if the weight has them";
    if (with_units != (args.units != nullptr)) return "pack: units are given if and only if scales are INT8";
    if ((with_units && with_minima) != (args.minimum_units != nullptr)) {
        return "pack: units of minima are given if and only if there are INT8 minima";
    }
    return check_rows(w, args.first_row, args.num_source_rows, args.panel_step);
}

}  // namespace

const char* check_codes(const penstock_weight& w) {
    const bool is_integer = w.scale_format == PENSTOCK_INT8;
    if (w.scale_format != PENSTOCK_F32 && w.scale_format != PENSTOCK_F16 && !is_integer) {
        return "weight: scales of codes are F32, F16 or INT8";
    }
    if (w.has_minima != 0 && w.has_minima != 1) return "weight: has_minima is 0 or 1";
    if (w.format == PENSTOCK_CODES8 && (w.code < PENSTOCK_CODE_UINT8 || w.code > PENSTOCK_CODE_E5M2)) {
        return "weight: unknown code";
    }
    if (w.group_size < 0 || (w.group_size != 16 && w.group_size % 32)) {
        return "weight: groups of codes have 16 columns, a multiple of 32, or all";
    }
    if (is_integer && (w.group_size == 0 || kUnitColumns % w.group_size)) {
        return "weight: groups with INT8 scales divide 256 columns";
    }
    return nullptr;
}

void set_codes_layout(penstock_weight& w) {
    const int64_t k = round_up(w.num_columns, kColumns);
    const bool whole = w.group_size == 0 || w.group_size >= k;
    w.padded_columns = whole ? k : round_up(k, std::lcm<int64_t>(kColumns, w.group_size));
    const CodeLayout layout = code_layout(w);
    const int64_t num_units = (w.padded_columns + kUnitColumns - 1) / kUnitColumns;
    const int64_t num_bytes =
        w.padded_columns / layout.group_columns * layout.group_bytes + num_units * layout.unit_bytes;
    w.panel_bytes = round_up(num_bytes, kAlignment);
}

void unpack_codes(const penstock_weight& w, int64_t row, float* out) {
    const CodeLayout layout = code_layout(w);
    const auto* panel = static_cast<const uint8_t*>(w.data) + row / kPanel * w.panel_bytes;
    for (int64_t first = 0; first < w.num_columns; first += layout.group_columns) {
        const int64_t last = std::min(first + layout.group_columns, w.num_columns);
        decode_row(w, layout, panel, row % kPanel, first, last, out + first);
    }
}

}  // namespace penstock

extern "C" int32_t penstock_pack_codes(penstock_pool* pool, const penstock_pack_codes_args* args) {
    using namespace penstock;
    const char* problem = pool->problem();
    if (!problem) problem = check_weight(args->weight);
    if (!problem) problem = check_sources(*args);
    if (problem) {
        set_error(problem);
        return -1;
    }
    constexpr int64_t kNone = INT64_MAX;
    const Packing packing{*args, kNone};
    pool->run(pack_panels, &packing);
    const int64_t refused = packing.refused;
    if (refused == kNone) return 0;
    const char* why = refused % 4 == kCode ? "a code of more than 4 bits" : "a scale that its format does not hold";
    char message[100];
    snprintf(message, sizeof message, "row %lld of the source has %s", static_cast<long long>(refused / 4), why);
    set_error(message);
    return -1;
}
