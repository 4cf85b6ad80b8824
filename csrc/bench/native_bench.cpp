// How near the linear ops come to what the machine can do: for every format and number of rows the
// time of a step, and the share of the roofline max(bytes / memory, products / peak) that was
// measured in the same process.
//
//   native_bench [--threads N] [--rows 1,4,16] [--formats bf16,int8,...] [--shape up|down|square|head]
//                [--isa NAME] [--repeats N] [--small-pages] [--cpu-time]
//
// --cpu-time, with one thread: seconds of work instead of the clock's, where others use the machine.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "peaks.h"
#include "penstock_native.h"
#include "pool.h"

namespace {

using penstock::kAlignment;

struct Format {
    const char* name;
    int32_t dtype, group_size, activation_bits;
    int32_t code = 0, scale_format = 0, has_minima = 0;  // of codes
};

const Format kFormats[] = {
    {"f32", PENSTOCK_F32, 0, 16},        {"bf16", PENSTOCK_BF16, 0, 16},      {"int8", PENSTOCK_INT8, 0, 8},
    {"int4", PENSTOCK_INT4, 128, 8},     {"int4g32", PENSTOCK_INT4, 32, 8},   {"w8a16", PENSTOCK_INT8, 0, 16},
    {"w4a16", PENSTOCK_INT4, 128, 16},
    // As checkpoints have them; the product is in the format of x, bf16 here.
    {"q4_0", PENSTOCK_CODES4, 32, 16, 0, PENSTOCK_F16},
    {"q4_k", PENSTOCK_CODES4, 32, 16, 0, PENSTOCK_INT8, 1},
    {"gptq", PENSTOCK_CODES4, 128, 16, 0, PENSTOCK_F32, 1},
    {"nf4", PENSTOCK_CODES4, 64, 16, 0, PENSTOCK_F32},
    {"mxfp4", PENSTOCK_CODES4, 32, 16, 0, PENSTOCK_F32},
    {"q6_k", PENSTOCK_CODES8, 16, 16, PENSTOCK_CODE_INT8, PENSTOCK_INT8},
    {"q8_0", PENSTOCK_CODES8, 32, 16, PENSTOCK_CODE_INT8, PENSTOCK_F16},
    {"fp8", PENSTOCK_CODES8, 128, 16, PENSTOCK_CODE_E4M3, PENSTOCK_F32},
};

struct Shape {
    const char* name;
    int64_t num_rows, num_columns;
    int32_t epilogue;
};

const Shape kShapes[] = {
    {"up", 16384, 2048, PENSTOCK_GATED},
    {"down", 2048, 8192, PENSTOCK_STORE},
    {"square", 4096, 4096, PENSTOCK_STORE},
    {"head", 128256, 2048, PENSTOCK_STORE},
};

const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "amx", "amx_emulated"};

struct Options {
    int threads = 2, repeats = 5;
    bool huge_pages = true, cpu_time = false;
    std::string isa, formats = "bf16,int8,int4", shapes = "up,down";
    std::vector<int64_t> rows{1, 2, 4, 8, 16, 32, 64, 256};
};

constexpr int64_t kArenaBytes = 640 << 20;  // far beyond any L3 that one user gets

bool contains(const std::string& list, const char* name) {
    std::istringstream names(list);
    for (std::string one; std::getline(names, one, ',');) {
        if (one == name) return true;
    }
    return false;
}

struct Bench {
    const Options& options;
    penstock_pool* pool;
    char* arena;
    float* scales;
    Peaks peaks;

    // Seconds an op takes: the least of several programs over the whole arena.
    void measure(const Format& format, const Shape& shape, int64_t m) {
        penstock_weight weight{};
        weight.format = format.dtype;
        weight.group_size = format.group_size;
        weight.code = format.code;
        weight.scale_format = format.scale_format;
        weight.has_minima = format.has_minima;
        for (int i = 0; i < 16; ++i) weight.book[i] = static_cast<float>(i - 8);
        weight.num_rows = shape.num_rows;
        weight.num_columns = shape.num_columns;
        weight.scales = scales;
        if (penstock_weight_layout(&weight)) exit((std::puts(penstock_last_error()), 1));
        const double work = 2.0 * m * shape.num_rows * shape.num_columns;
        const int64_t copies = std::max<int64_t>(1, kArenaBytes / weight.data_bytes);
        const int64_t num_ops = std::clamp<int64_t>(static_cast<int64_t>(2e11 / work), 1, copies);
        const int64_t width = shape.epilogue == PENSTOCK_GATED ? shape.num_rows / 2 : shape.num_rows;
        std::vector<uint16_t> x(m * shape.num_columns), y(m * width);
        fill(reinterpret_cast<char*>(x.data()), 2 * static_cast<int64_t>(x.size()));
        std::vector<penstock_linear_args> args(num_ops);
        std::vector<penstock_op> ops(num_ops);
        for (int64_t i = 0; i < num_ops; ++i) {
            weight.data = arena + i * weight.data_bytes / kAlignment * kAlignment;
            penstock_linear_args& one = args[i];
            one.weight = weight;
            one.x = x.data(), one.x_stride = shape.num_columns, one.x_dtype = PENSTOCK_BF16;
            one.y = y.data(), one.y_stride = width, one.y_dtype = PENSTOCK_BF16;
            one.num_groups = 1, one.rows = PENSTOCK_ROWS_TOKENS, one.epilogue = shape.epilogue;
            one.activation = shape.epilogue == PENSTOCK_GATED ? PENSTOCK_SILU : PENSTOCK_IDENTITY;
            one.activation_bits = format.activation_bits;
            one.num_outputs = static_cast<int32_t>(width), one.y_scale = 1;
            ops[i] = {PENSTOCK_OP_LINEAR, &args[i]};
        }
        if (penstock_reserve(pool, ops.data(), num_ops, m, m) < 0) exit((std::puts(penstock_last_error()), 1));
        penstock_step step{};
        step.num_tokens = m;
        std::vector<double> times;
        for (int repeat = 0; repeat <= options.repeats; ++repeat) {
            const double start = seconds(options.cpu_time);
            penstock_run(pool, ops.data(), num_ops, &step);
            if (repeat) times.push_back((seconds(options.cpu_time) - start) / static_cast<double>(num_ops));
        }
        std::sort(times.begin(), times.end());
        report(format, shape, m, static_cast<double>(weight.data_bytes), work, times);
    }

    void report(const Format& format, const Shape& shape, int64_t m, double num_bytes, double work,
                const std::vector<double>& times) {
        const double best = times[0], median = times[times.size() / 2];
        const double peak = format.dtype == PENSTOCK_F32       ? peaks.f32
                            : format.activation_bits == 16 ? peaks.bf16
                                                           : peaks.int8;
        const double memory = num_bytes / peaks.bytes, compute = work / peak;
        std::printf("%-8s %-5s m %5lld  %9.3f ms (median %9.3f)  %6.1f GB/s %4.0f %%  "
                    "%7.1f GOPS %4.0f %%  roofline %4.0f %%\n",
                    format.name, shape.name, static_cast<long long>(m), best * 1e3, median * 1e3,
                    num_bytes / best * 1e-9, 100 * memory / best, work / best * 1e-9, 100 * compute / best,
                    100 * std::max(memory, compute) / best);
        std::fflush(stdout);
    }
};

Options parse(int argc, char** argv) {
    Options o;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag == "--small-pages") {
            o.huge_pages = false;
            continue;
        }
        if (flag == "--cpu-time") {
            o.cpu_time = true;
            continue;
        }
        if (i + 1 >= argc) exit((std::fprintf(stderr, "%s needs a value\n", argv[i]), 2));
        const char* value = argv[++i];
        if (flag == "--threads") o.threads = std::atoi(value);
        else if (flag == "--repeats") o.repeats = std::atoi(value);
        else if (flag == "--isa") o.isa = value;
        else if (flag == "--formats") o.formats = value;
        else if (flag == "--shape") o.shapes = value;
        else if (flag == "--rows") {
            o.rows.clear();
            for (const char* p = value; p; p = std::strchr(p, ','), p = p ? p + 1 : p) o.rows.push_back(std::atoll(p));
        } else exit((std::fprintf(stderr, "unknown option %s\n", argv[i - 1]), 2));
    }
    return o;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse(argc, argv);
    for (int isa = 0; isa < 5; ++isa) {
        if (options.isa == kIsaNames[isa] && penstock_set_isa(isa)) return std::puts(penstock_last_error()), 1;
    }
    penstock_pool* pool = penstock_pool_create(options.threads, nullptr);
    char* arena = allocate(kArenaBytes + (64 << 20), options.huge_pages);
    fill(arena, kArenaBytes + (64 << 20));
    std::vector<float> scales(128256 + 64, 0.001f);
    const Peaks peaks = measure_peaks(*pool, arena, kArenaBytes, options.cpu_time);
    std::printf("%s, %d threads: memory %.1f GB/s, f32 %.0f, bf16 %.0f, int8 %.0f GOPS\n", kIsaNames[penstock_isa()],
                options.threads, peaks.bytes * 1e-9, peaks.f32 * 1e-9, peaks.bf16 * 1e-9, peaks.int8 * 1e-9);
    Bench bench{options, pool, arena, scales.data(), peaks};
    for (const Format& format : kFormats) {
        if (!contains(options.formats, format.name)) continue;
        for (const Shape& shape : kShapes) {
            if (!contains(options.shapes, shape.name)) continue;
            for (const int64_t m : options.rows) bench.measure(format, shape, m);
        }
    }
    penstock_pool_destroy(pool);
    return 0;
}
