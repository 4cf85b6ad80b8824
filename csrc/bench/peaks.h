// What the machine can do at most, measured: the yardsticks of the benchmarks, and what they measure on.
#pragma once

#include <cstdint>

#include "pool.h"

// A second, all threads of the pool together.
struct Peaks {
    double bytes;            // read from memory
    double f32, bf16, int8;  // operations (two a multiply-add) of the chosen instruction set
};

// Seconds since some moment: of the clock, or (cpu_time) of work that this process did, for a machine
// that others use too.
double seconds(bool cpu_time);

Peaks measure_peaks(penstock::Pool& pool, const char* data, int64_t num_bytes, bool cpu_time);

// Memory to measure on; ends the program if there is none.
char* allocate(int64_t num_bytes, bool huge_pages);
// Small floats in bf16 and in f32, any bytes as integers.
void fill(char* data, int64_t num_bytes);
