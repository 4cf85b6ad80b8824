// Norms, rotations and sums of rows: the kernels of every instruction set here against double
// precision. The ops that use them: test_row_ops.cpp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "numbers.h"
#include "penstock_native.h"
#include "rows.h"
#include "values.h"

using namespace penstock;

namespace {

// Checks a norm of `values`; errors are relative to what cancels in it.
template <typename Out>
void check_normed(const std::vector<double>& values, const float* weight, const float* bias, bool is_centered,
                  double eps, const Out* out) {
    const double size = static_cast<double>(values.size());
    double mean = 0, squares = 0, peak = 0;
    for (double value : values) mean += is_centered ? value / size : 0;
    for (double value : values) squares += (value - mean) * (value - mean);
    for (double value : values) peak = std::max(peak, std::fabs(value));
    const double inverse = 1 / std::sqrt(squares / size + eps);
    for (size_t i = 0; i < values.size(); ++i) {
        const double w = weight ? weight[i] : 1, b = bias ? bias[i] : 0;
        const double exact = (values[i] - mean) * inverse * w + b;
        // 2048 squares in at most 2048 steps: the mean is within 2^-15, mostly far better.
        const double room = (std::fabs(values[i] - mean) + (is_centered ? peak : 0)) * inverse * std::fabs(w) * 4e-6;
        CHECK(std::fabs(value_of(out[i]) - exact) <= room + std::fabs(exact) * rounding(Out{}) + std::fabs(b) * 1e-7,
              "size %zu at %zu: %.9g, not %.9g", values.size(), i, value_of(out[i]), exact);
    }
}

template <typename T, typename Out>
void test_norm_of(const RowKernels& rows, int64_t size, bool has_residual, bool has_x, bool is_centered,
                  float x_scale) {
    std::vector<float> residual = numbers(size);
    const std::vector<float> before = residual, weight = numbers(size), bias = numbers(size);
    const std::vector<T> x = as<T>(numbers(size));
    for (int given = 0; given < 4; ++given) {
        const float *w = given & 1 ? weight.data() : nullptr, *b = given & 2 ? bias.data() : nullptr;
        std::vector<Out> y(size);
        residual = before;
        rows.norm[sizeof(T) == 2][sizeof(Out) == 2]({has_residual ? residual.data() : nullptr,
                                                     has_x ? x.data() : nullptr, x_scale, w, b, y.data(), size, 1e-5f,
                                                     is_centered});
        std::vector<double> values(size);
        for (int64_t i = 0; i < size; ++i) {
            const float number = static_cast<float>(value_of(x[i]));
            if (has_residual) {
                const float sum = has_x ? std::fma(number, x_scale, before[i]) : before[i];
                CHECK(residual[i] == sum);
            }
            values[i] = has_residual ? residual[i] : number;
        }
        check_normed(values, w, b, is_centered, 1e-5f, y.data());
    }
}

template <typename T, typename Out>
void test_norm(const RowKernels& rows) {
    for (int64_t size : {1, 7, 16, 63, 64, 65, 100, 576, 2048}) {
        for (bool is_centered : {false, true}) {
            test_norm_of<T, Out>(rows, size, true, true, is_centered, 1);
            test_norm_of<T, Out>(rows, size, true, true, is_centered, 0.22f);
            test_norm_of<T, Out>(rows, size, true, false, is_centered, 0);
            test_norm_of<T, Out>(rows, size, false, true, is_centered, 0);
        }
    }
}

// Numbers whose squares are 16 million: mean square less squared mean would leave nothing of them.
void test_far_from_zero(const RowKernels& rows) {
    for (int64_t size : {33, 100}) {
        const std::vector<float> x = numbers(size, 3999, 4001);
        std::vector<float> y(size);
        rows.norm[0][0]({nullptr, x.data(), 1, nullptr, nullptr, y.data(), size, 0, true});
        double mean = 0, squares = 0;
        for (float value : x) mean += value / static_cast<double>(size);
        for (float value : x) squares += (value - mean) * (value - mean);
        for (int64_t i = 0; i < size; ++i) {
            const double exact = (x[i] - mean) / std::sqrt(squares / static_cast<double>(size));
            CHECK(std::fabs(y[i] - exact) < 0.02, "%g, not %g", y[i], exact);
        }
    }
}

template <typename T>
void test_norm_runs(const RowKernels& rows) {
    for (int64_t size : {1, 20, 64, 80, 128, 512}) {
        for (int64_t num_runs : {1, 3, 16, 17, 40}) {
            for (bool is_centered : {false, true}) {
                for (int64_t weight_stride : {int64_t{0}, size, int64_t{-1}}) {
                    const std::vector<float> weights = numbers(num_runs * size);
                    const float* weight = weight_stride < 0 ? nullptr : weights.data();
                    std::vector<T> x = as<T>(numbers(num_runs * size)), alone = x;
                    const std::vector<T> before = x;
                    rows.norm_runs[sizeof(T) == 2](
                        {x.data(), num_runs, size, weight, weight_stride, 1e-6f, is_centered});
                    for (int64_t run = 0; run < num_runs; ++run) {
                        const float* own = weight ? weight + run * weight_stride : nullptr;
                        T* numbers = alone.data() + run * size;
                        rows.norm[sizeof(T) == 2][sizeof(T) == 2](
                            {nullptr, numbers, 1, own, nullptr, numbers, size, 1e-6f, is_centered});
                        const T* first = before.data() + run * size;
                        const std::vector<double> values(first, first + size);
                        if (sizeof(T) == 4) {
                            check_normed(values, own, nullptr, is_centered, 1e-6f, x.data() + run * size);
                        }
                    }
                    CHECK(x == alone, "runs of %ld are not the norms of each", size);
                }
            }
        }
    }
}

template <typename T>
void test_add(const RowKernels& rows) {
    for (int64_t size : {1, 15, 16, 100}) {
        for (float scale : {1.0f, -0.3f}) {
            std::vector<float> residual = numbers(size);
            const std::vector<float> before = residual;
            const std::vector<T> x = as<T>(numbers(size));
            rows.add[sizeof(T) == 2](residual.data(), x.data(), scale, size);
            for (int64_t i = 0; i < size; ++i) {
                CHECK(residual[i] == std::fma(static_cast<float>(value_of(x[i])), scale, before[i]));
            }
        }
    }
}

template <typename T, typename Kernel>
void test_rope(Kernel kernel) {
    for (int64_t half : {1, 4, 16, 32, 40, 64}) {
        for (int64_t kept : {0, 1, 24}) {  // numbers of a head that are not rotated
            const int64_t num_heads = 3, stride = 2 * half + kept;
            std::vector<float> angles(2 * half);
            for (int64_t i = 0; i < half; ++i) {
                const float angle = uniform(-9, 9);
                angles[i] = std::cos(angle);
                angles[half + i] = std::sin(angle);
            }
            std::vector<T> x = as<T>(numbers(num_heads * stride));
            const std::vector<T> before = x;
            kernel(angles.data(), x.data(), num_heads, stride, half);
            for (int64_t i = 0; i < num_heads * half; ++i) {
                const int64_t low = i / half * stride + i % half, high = low + half;
                const double a = value_of(before[low]), b = value_of(before[high]);
                const double cosine = angles[i % half], sine = angles[half + i % half];
                const double error = (std::fabs(a) + std::fabs(b)) * 2e-7;
                const double first = a * cosine - b * sine, second = b * cosine + a * sine;
                CHECK(std::fabs(value_of(x[low]) - first) <= error + std::fabs(first) * rounding(T{}));
                CHECK(std::fabs(value_of(x[high]) - second) <= error + std::fabs(second) * rounding(T{}));
            }
            for (int64_t i = 0; i < num_heads * stride; ++i) {
                if (i % stride >= 2 * half) CHECK(x[i] == before[i], "what lies behind changed");
            }
        }
    }
}

}  // namespace

int main() {
    for (int32_t isa : {PENSTOCK_SCALAR, PENSTOCK_AVX2, PENSTOCK_AVX512}) {
        if (penstock_set_isa(isa)) continue;
        std::printf("isa %d\n", isa);
        const RowKernels& rows = *kernels().rows;
        test_norm<float, float>(rows);
        test_norm<float, uint16_t>(rows);
        test_norm<uint16_t, float>(rows);
        test_norm<uint16_t, uint16_t>(rows);
        test_far_from_zero(rows);
        test_norm_runs<float>(rows);
        test_norm_runs<uint16_t>(rows);
        test_add<float>(rows);
        test_add<uint16_t>(rows);
        test_rope<float>(rows.rope_f32);
        test_rope<uint16_t>(rows.rope_bf16);
    }
    return failures() != 0;
}
