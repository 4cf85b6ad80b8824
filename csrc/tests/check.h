// The smallest test harness: CHECK prints what failed and goes on; main returns failures().
#pragma once

#include <cstdio>

inline int& failures() {
    static int count = 0;
    return count;
}

#define CHECK(condition, ...)                                                     \
    do {                                                                          \
        if (!(condition) && ++failures() <= 20) {                                 \
            std::printf("%s:%d: %s  ", __FILE__, __LINE__, #condition);           \
            __VA_OPT__(std::printf(__VA_ARGS__);)                                 \
            std::printf("\n");                                                    \
        }                                                                         \
    } while (false)
