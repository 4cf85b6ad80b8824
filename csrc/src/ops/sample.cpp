// Chooses tokens: the most likely one, or a draw after temperature, min-p, top-k and top-p with one
// random number a row. Rows are divided among the threads; each is a few passes over the vocabulary,
// and little is sorted.
//
// The meaning is that of penstock/engine/sampler.py: truncation by thresholds, ties stay in; the
// draw inverts the cumulative distribution in the order of token ids, summed in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "../kernels.h"
#include "../numbers.h"
#include "../ops.h"
#include "../rows.h"

namespace penstock {

namespace {

constexpr int kBucketShift = 18;                               // 32 buckets an octave
constexpr int kNumBuckets = (0x3f800000 >> kBucketShift) + 1;  // weights are at most 1
constexpr int64_t kBlock = 128;

struct Buckets {
    double mass[kNumBuckets];
};

// The bits of positive floats are ordered as they are.
int bucket_of(float weight) { return static_cast<int>(bits_of(weight) >> kBucketShift); }

// One row's memory: its weights, those of them that truncation looks at, their masses.
struct Row {
    float* weights;
    float* candidates;
    Buckets* buckets;
    int64_t size;
    int64_t num_candidates;
};

int64_t candidate_bytes(int64_t vocab_size) { return round_up((vocab_size + kPanel) * 4, kAlignment); }

int64_t bytes_for(int64_t vocab_size) {
    return round_up(vocab_size * 4, kAlignment) + candidate_bytes(vocab_size) + round_up(sizeof(Buckets), kAlignment);
}

double mass_above(const float* weights, int64_t n, float bound) {
    int64_t count;
    return kernels().rows->sum_above(weights, n, bound, &count);
}

// Few weights of a language model matter: the candidates are those above the first bound that leaves
// `top_k` of them and `top_p` of the mass.
void find_candidates(Row& row, int64_t top_k, float top_p) {
    float bound = 0.0f;
    const double total = top_p < 1 ? mass_above(row.weights, row.size, 0.0f) : 0.0;
    for (const float trial : {0.05f, 2.5e-3f, 5e-5f, 1e-7f}) {
        int64_t count;
        const double mass = kernels().rows->sum_above(row.weights, row.size, trial, &count);
        // The margin covers the rounding of the sums.
        if (count >= top_k && (top_p >= 1 || mass * (1 - 1e-9) >= top_p * total)) {
            bound = trial;
            break;
        }
    }
    row.num_candidates = kernels().rows->select_above(row.weights, row.size, bound, row.candidates);
}

float kth_largest(const Row& row, int64_t k) {
    std::nth_element(row.candidates, row.candidates + k - 1, row.candidates + row.num_candidates,
                     std::greater<float>());
    return row.candidates[k - 1];
}

void fill_buckets(const Row& row) {
    memset(row.buckets, 0, sizeof *row.buckets);
    for (int64_t i = 0; i < row.num_candidates; ++i) {
        row.buckets->mass[bucket_of(row.candidates[i])] += row.candidates[i];
    }
}

// The smallest weight that top-p leaves of those from `limit` up: the one at which the mass of the
// larger ones and itself reaches the target. Whole buckets are skipped, one is sorted.
float nucleus_edge(Row& row, float limit, float top_p) {
    if (limit > 0) {
        float* end = std::partition(row.candidates, row.candidates + row.num_candidates,
                                    [limit](float weight) { return weight >= limit; });
        row.num_candidates = end - row.candidates;
    }
    // Of all weights: there may be more from `limit` up than were made candidates.
    const double target = static_cast<double>(top_p) * mass_above(row.weights, row.size, limit);
    fill_buckets(row);
    double mass = 0;
    int bucket = kNumBuckets - 1;
    while (bucket > 0 && mass + row.buckets->mass[bucket] < target) mass += row.buckets->mass[bucket--];
    float* end = std::partition(row.candidates, row.candidates + row.num_candidates,
                                [bucket](float weight) { return bucket_of(weight) == bucket; });
    const int64_t num = end - row.candidates;
    if (num == 0) return limit;
    std::sort(row.candidates, end, std::greater<float>());
    int64_t place = 0;
    while (place < num - 1 && mass + row.candidates[place] < target) mass += row.candidates[place++];
    return std::max(limit, row.candidates[place]);
}

// The token at `draw` of the mass of the weights from `limit` up: never one that was cut off.
int64_t invert(const Row& row, float limit, double draw) {
    double total = 0;
    for (int64_t first = 0; first < row.size; first += kBlock) {
        total += mass_above(row.weights + first, std::min(kBlock, row.size - first), limit);
    }
    const double target = draw * total;
    double mass = 0;
    int64_t last = -1;  // the last token that may be drawn: rounding may leave the target above all
    for (int64_t first = 0; first < row.size; first += kBlock) {
        const int64_t n = std::min(kBlock, row.size - first);
        const double sum = mass_above(row.weights + first, n, limit);
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

int64_t choose(const penstock_sample_args& args, int64_t index, Row& row) {
    const float* logits = args.logits + index * args.stride;
    const int64_t likeliest = kernels().rows->argmax(logits, row.size);
    const float peak = logits[likeliest];
    const float inverse = 1.0f / args.temperature[index];  // not finite: zero, or as good as zero
    if (args.temperature[index] <= 0 || !std::isfinite(inverse) || !std::isfinite(peak)) return likeliest;
    for (int64_t i = 0; i < row.size; ++i) row.weights[i] = (logits[i] - peak) * inverse;
    kernels().rows->exp(row.weights, row.weights, row.size);

    float limit = args.min_p[index];
    const int64_t k = args.top_k[index];
    const bool ranked = k > 0 && k < row.size, nucleus = args.top_p[index] < 1.0f;
    if (ranked || nucleus) find_candidates(row, ranked ? k : 0, args.top_p[index]);
    if (ranked) limit = std::max(limit, kth_largest(row, k));
    if (nucleus) limit = nucleus_edge(row, limit, args.top_p[index]);
    return invert(row, limit, args.draws[index]);
}

void sample(Team& team, const void* context) {
    const auto& args = *static_cast<const penstock_sample_args*>(context);
    const int64_t bytes = round_up(args.vocab_size * 4, kAlignment);
    char* scratch = team.scratch();
    Row row{reinterpret_cast<float*>(scratch), reinterpret_cast<float*>(scratch + bytes),
            reinterpret_cast<Buckets*>(scratch + bytes + candidate_bytes(args.vocab_size)), args.vocab_size, 0};
    for (int64_t i = team.next(args.num_rows); i >= 0; i = team.next(args.num_rows)) {
        args.token_ids[i] = choose(args, i, row);
    }
}

const char* check(const penstock_sample_args& args) {
    if (args.vocab_size < 1) return "sample: no vocabulary";
    if (args.num_rows < 0) return "sample: a negative number of rows";
    if (args.num_rows > 1 && args.stride < args.vocab_size) return "sample: rows overlap";
    if (args.num_rows > 0 && !(args.logits && args.temperature && args.top_k && args.top_p && args.min_p &&
                               args.draws && args.token_ids)) {
        return "sample: a pointer is null";
    }
    return nullptr;
}

}  // namespace

}  // namespace penstock

extern "C" int32_t penstock_sample(penstock_pool* pool, const penstock_sample_args* args) {
    using namespace penstock;
    const char* problem = pool->problem();
    if (!problem) problem = check(*args);
    if (!problem && !pool->reserve(bytes_for(args->vocab_size), 0)) problem = "sample: no memory for its scratch";
    if (problem) {
        set_error(problem);
        return -1;
    }
    pool->run(sample, args);
    return 0;
}
