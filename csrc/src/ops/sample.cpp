// Draws tokens: temperature, min-p, top-k, top-p, one random number a row. Rows are divided among
// the threads; each is a few passes over the vocabulary, and nothing is sorted but one bucket.
//
// The meaning is that of penstock/engine/sampler.py: truncation by thresholds, ties stay in; the
// draw inverts the cumulative distribution in the order of token ids, summed in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "../kernels.h"
#include "../ops.h"
#include "../rows.h"

namespace penstock {

namespace {

constexpr int kBucketShift = 18;                                 // 32 buckets an octave
constexpr int kNumBuckets = (0x3f800000 >> kBucketShift) + 1;    // weights are at most 1
constexpr int64_t kBlock = 128;

struct Buckets {
    double mass[kNumBuckets];
    int32_t count[kNumBuckets];
};

int bucket_of(float weight) {  // the bits of positive floats are ordered as they are
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return static_cast<int>(bits >> kBucketShift);
}

// One row's memory: its weights, one bucket's weights, the masses.
struct Row {
    float* weights;
    float* members;
    Buckets* buckets;
    int64_t size;
};

int64_t bytes_for(int64_t vocab_size) {
    return 2 * round_up(vocab_size * 4, kAlignment) + round_up(sizeof(Buckets), kAlignment);
}

void fill_buckets(const Row& row) {
    memset(row.buckets, 0, sizeof *row.buckets);
    for (int64_t i = 0; i < row.size; ++i) {
        const int bucket = bucket_of(row.weights[i]);
        row.buckets->mass[bucket] += row.weights[i];
        row.buckets->count[bucket] += 1;
    }
}

// The weights of one bucket, the largest first.
int64_t sort_bucket(const Row& row, int bucket) {
    int64_t num = 0;
    for (int64_t i = 0; i < row.size; ++i) {
        if (bucket_of(row.weights[i]) == bucket) row.members[num++] = row.weights[i];
    }
    std::sort(row.members, row.members + num, std::greater<float>());
    return num;
}

float kth_largest(const Row& row, int64_t k) {
    int bucket = kNumBuckets - 1;
    int64_t above = 0;
    while (above + row.buckets->count[bucket] < k) above += row.buckets->count[bucket--];
    sort_bucket(row, bucket);
    return row.members[k - above - 1];
}

// The smallest weight that top-p leaves of those from `limit` up.
float nucleus_edge(const Row& row, float limit, float top_p) {
    const int lowest = bucket_of(limit);
    double total = 0;
    for (int bucket = kNumBuckets - 1; bucket > lowest; --bucket) total += row.buckets->mass[bucket];
    for (int64_t i = 0; i < row.size; ++i) {
        if (bucket_of(row.weights[i]) == lowest && row.weights[i] >= limit) total += row.weights[i];
    }

    const double target = static_cast<double>(top_p) * total;
    double mass = 0;
    int bucket = kNumBuckets - 1;
    while (bucket > lowest && mass + row.buckets->mass[bucket] < target) mass += row.buckets->mass[bucket--];
    const int64_t num = sort_bucket(row, bucket);
    int64_t place = 0;
    while (place < num - 1 && mass + row.members[place] < target) mass += row.members[place++];
    return std::max(limit, num > 0 ? row.members[place] : limit);
}

double block_sum(const float* weights, int64_t n, float limit) {
    double lanes[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) lanes[i % 4] += weights[i] >= limit ? weights[i] : 0.0f;
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// The token at `draw` of the mass of the weights from `limit` up: never one that was cut off.
int64_t invert(const Row& row, float limit, double draw) {
    double total = 0;
    for (int64_t first = 0; first < row.size; first += kBlock) {
        total += block_sum(row.weights + first, std::min(kBlock, row.size - first), limit);
    }
    const double target = draw * total;
    double mass = 0;
    int64_t last = -1;  // the last token that may be drawn: rounding may leave the target above all
    for (int64_t first = 0; first < row.size; first += kBlock) {
        const int64_t n = std::min(kBlock, row.size - first);
        const double sum = block_sum(row.weights + first, n, limit);
        if (sum > 0 && (mass + sum > target || first + kBlock >= row.size)) {
            double inside = mass;
            for (int64_t i = first; i < first + n; ++i) {
                if (row.weights[i] <= 0 || row.weights[i] < limit) continue;
                inside += row.weights[i];
                last = i;
                if (inside > target) return i;
            }
        } else if (sum > 0) {
            for (int64_t i = first + n - 1; i >= first && last < first; --i) {
                if (row.weights[i] > 0 && row.weights[i] >= limit) last = i;
            }
        }
        mass += sum;
    }
    return last;
}

int64_t draw(const penstock_sample_args& args, int64_t index, const Row& row) {
    const float* logits = args.logits + args.rows[index] * args.stride;
    const float peak = logits[kernels().rows->argmax(logits, row.size)];
    const float inverse = 1.0f / args.temperature[index];
    for (int64_t i = 0; i < row.size; ++i) row.weights[i] = (logits[i] - peak) * inverse;
    kernels().rows->exp(row.weights, row.weights, row.size);

    float limit = args.min_p[index];
    const int64_t k = args.top_k[index];
    const bool ranked = k > 0 && k < row.size, nucleus = args.top_p[index] < 1.0f;
    if (ranked || nucleus) fill_buckets(row);
    if (ranked) limit = std::max(limit, kth_largest(row, k));
    if (nucleus) limit = nucleus_edge(row, limit, args.top_p[index]);
    return invert(row, limit, args.draws[index]);
}

void sample(Team& team, const void* context) {
    const auto& args = *static_cast<const penstock_sample_args*>(context);
    const int64_t bytes = round_up(args.vocab_size * 4, kAlignment);
    char* scratch = team.scratch();
    const Row row{reinterpret_cast<float*>(scratch), reinterpret_cast<float*>(scratch + bytes),
                  reinterpret_cast<Buckets*>(scratch + 2 * bytes), args.vocab_size};
    for (int64_t i = team.next(args.num_rows); i >= 0; i = team.next(args.num_rows)) {
        args.token_ids[i] = draw(args, i, row);
    }
}

}  // namespace

}  // namespace penstock

extern "C" int32_t penstock_sample(penstock_pool* pool, const penstock_sample_args* args) {
    using namespace penstock;
    if (args->vocab_size < 1 || args->num_rows < 0) {
        set_error("sample: no vocabulary");
        return -1;
    }
    if (!pool->reserve(bytes_for(args->vocab_size), 0)) {
        set_error("sample: no memory for its scratch");
        return -1;
    }
    pool->run(sample, args);
    return 0;
}
