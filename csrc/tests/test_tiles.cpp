// The order of sums in AMX tiles of bf16 is the published one (Intel's Software Developer's Manual,
// TDPBF16PS): for 32 columns the even and the odd products are a chain of fused sums each, and the sum
// of the two is added to the result.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "numbers.h"
#include "penstock_native.h"

using namespace penstock;

namespace {

float expected(const uint16_t* a, const uint16_t* panel, int64_t k, int64_t lane, float sum) {
    for (int64_t first = 0; first < k; first += 32) {
        float parts[2] = {0, 0};
        for (int64_t i = first; i < first + 32; ++i) {
            const float weight = bf16_to_f32(panel[(i / 2 * kPanel + lane) * 2 + i % 2]);
            parts[i % 2] = std::fma(bf16_to_f32(a[i]), weight, parts[i % 2]);
        }
        sum += parts[0] + parts[1];
    }
    return sum;
}

void test_order(int64_t m, int64_t num_panels, int64_t k, bool accumulate) {
    std::mt19937 generator(3);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> a(m * k), b(num_panels * k * kPanel);
    for (auto* values : {&a, &b}) {
        for (uint16_t& value : *values) value = f32_to_bf16(normal(generator));
    }
    const int64_t width = num_panels * kPanel;
    std::vector<float> c(m * width);
    for (float& value : c) value = normal(generator);
    const std::vector<float> before = c;
    kernels().linear.gemm_bf16({m, num_panels, k, a.data(), k, b.data(), k * kPanel * 2, c.data(), width, accumulate});
    for (int64_t i = 0; i < m * width; ++i) {
        const int64_t row = i / width, panel = i % width / kPanel;
        const float right = expected(&a[row * k], &b[panel * k * kPanel], k, i % kPanel, accumulate ? before[i] : 0);
        CHECK(bits_of(c[i]) == bits_of(right), "m %ld k %ld: %g, not %g", static_cast<long>(m), static_cast<long>(k),
              c[i], right);
    }
}

}  // namespace

int main() {
    for (const int32_t isa : {PENSTOCK_AMX, PENSTOCK_AMX_EMULATED}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        for (const int64_t m : {4, 16, 33, 50}) {
            for (const int64_t k : {32, 64, 1056}) {
                test_order(m, 3, k, false);
                test_order(m, 2, k, true);
            }
        }
    }
    return failures() != 0;
}
