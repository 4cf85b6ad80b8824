// How near the mixture of experts comes to what the machine can do: a layer in the shape of Qwen1.5-MoE
// (60 experts of 1408, 4 a token, hidden 2048) over steps of several sizes, each with another choice of
// experts. Told is the time of the op and the share of max(bytes / memory, products / peak): bytes are
// those of the chosen experts, each once, memory and peak were measured in the same process.
//
//   experts_bench [threads] [repeats] [tokens ...]
//
// One thread: seconds of work instead of the clock's, for a machine that others use too.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "peaks.h"
#include "penstock_native.h"
#include "pool.h"
#include "routing.h"

namespace {

constexpr int64_t kExperts = 60, kTopK = 4, kHidden = 2048, kSize = 1408;

struct Format {
    const char* name;
    int32_t dtype, group_size, activation_bits;
};

const Format kFormats[] = {
    {"bf16", PENSTOCK_BF16, 0, 16}, {"int8", PENSTOCK_INT8, 0, 8}, {"int4", PENSTOCK_INT4, 128, 8}};

penstock_weight weight_of(const Format& format, int64_t num_rows, int64_t num_columns, char* data, float* scales) {
    penstock_weight w{};
    w.format = format.dtype, w.group_size = format.group_size;
    w.num_rows = num_rows, w.num_columns = num_columns;
    if (penstock_weight_layout(&w)) exit((std::puts(penstock_last_error()), 1));
    w.data = data, w.scales = scales;
    return w;
}

struct Layer {
    penstock_experts_args args{};
    std::vector<float> logits;
    std::vector<uint16_t> x, y;

    Layer(const Format& format, char* arena, float* scales) {
        args.gate_up = weight_of(format, kExperts * 2 * kSize, kHidden, arena, scales);
        args.down = weight_of(format, kExperts * kHidden, kSize, arena + args.gate_up.data_bytes, scales);
        args.num_experts = kExperts, args.top_k = kTopK, args.in_size = kHidden, args.size = kSize;
        args.num_expert_groups = 1, args.activation = PENSTOCK_SILU, args.activation_bits = format.activation_bits;
        args.dtype = PENSTOCK_BF16, args.routed_scale = 1;
        args.x_stride = args.y_stride = kHidden, args.logits_stride = kExperts;
    }

    void draw(int64_t num_tokens, std::mt19937& random_bits) {
        std::normal_distribution<float> normal;
        logits.resize(num_tokens * kExperts);
        for (float& value : logits) value = normal(random_bits);
        x.resize(num_tokens * kHidden);
        y.resize(num_tokens * kHidden);
        fill(reinterpret_cast<char*>(x.data()), 2 * static_cast<int64_t>(x.size()));
        args.logits = logits.data(), args.x = x.data(), args.y = y.data();
    }

    // Of the experts that these logits choose.
    double bytes(int64_t num_tokens) const {
        std::vector<bool> chosen(kExperts);
        int32_t experts[kTopK];
        float factors[kTopK];
        for (int64_t token = 0; token < num_tokens; ++token) {
            penstock::route(args, args.logits + token * kExperts, experts, factors);
            for (const int32_t expert : experts) chosen[expert] = true;
        }
        const auto count = std::count(chosen.begin(), chosen.end(), true);
        return static_cast<double>(count * (args.gate_up.data_bytes + args.down.data_bytes)) / kExperts;
    }
};

void measure(penstock_pool* pool, const Format& format, Layer& layer, const Peaks& peaks, int64_t m, int threads,
             int repeats) {
    std::mt19937 random_bits(5);
    const penstock_op op{PENSTOCK_OP_EXPERTS, &layer.args};
    layer.draw(m, random_bits);
    if (penstock_reserve(pool, &op, 1, m, 0) < 0) exit((std::puts(penstock_last_error()), 1));
    penstock_step step{};
    step.num_tokens = m;
    std::vector<double> times, shares;
    const double peak = format.activation_bits == 16 ? peaks.bf16 : peaks.int8;
    for (int repeat = 0; repeat <= repeats; ++repeat) {
        layer.draw(m, random_bits);
        const double work = 6.0 * static_cast<double>(m * kTopK * kHidden * kSize), num_bytes = layer.bytes(m);
        const double start = seconds(threads == 1);
        penstock_run(pool, &op, 1, &step);
        const double time = seconds(threads == 1) - start;
        if (repeat == 0) continue;
        times.push_back(time);
        shares.push_back(std::max(num_bytes / peaks.bytes, work / peak) / time);
    }
    std::sort(times.begin(), times.end());
    std::sort(shares.begin(), shares.end());
    std::printf("%-5s tokens %5lld  %9.3f ms (median %9.3f)  of the roofline %4.0f %% (median %4.0f)\n", format.name,
                static_cast<long long>(m), times[0] * 1e3, times[times.size() / 2] * 1e3, 100 * shares.back(),
                100 * shares[shares.size() / 2]);
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 2, repeats = argc > 2 ? std::atoi(argv[2]) : 30;
    std::vector<int64_t> rows;
    for (int i = 3; i < argc; ++i) rows.push_back(std::atoll(argv[i]));
    if (rows.empty()) rows = {1, 4, 16, 64, 512};
    constexpr int64_t kArenaBytes = kExperts * 3 * kHidden * kSize * 2;
    penstock_pool* pool = penstock_pool_create(threads, nullptr);
    char* arena = allocate(kArenaBytes, true);
    fill(arena, kArenaBytes);
    std::vector<float> scales(kExperts * 2 * kSize, 0.001f);
    const Peaks peaks = measure_peaks(*pool, arena, kArenaBytes, threads == 1);
    std::printf("%d threads: memory %.1f GB/s, bf16 %.0f, int8 %.0f GOPS\n", threads, peaks.bytes * 1e-9,
                peaks.bf16 * 1e-9, peaks.int8 * 1e-9);
    for (const Format& format : kFormats) {
        Layer layer(format, arena, scales.data());
        for (const int64_t m : rows) {
            measure(pool, format, layer, peaks, m, threads, m > 100 ? std::min(repeats, 5) : repeats);
        }
    }
    penstock_pool_destroy(pool);
    return 0;
}
