// Scratch memory without anything in it that could pass for a number.
#pragma once

#include <cstring>

#include "ops.h"

// What an op may use of the pool's memory becomes NaN, and -1 in integers: whoever reads of it what
// the op did not write is found out. The pool must have reserved it.
inline void poison(penstock::Pool& pool, const penstock::Scratch& scratch) {
    using namespace penstock;
    const auto fill = [](Team& team, const void* context) {
        const auto& size = *static_cast<const Scratch*>(context);
        if (size.thread_bytes > 0) memset(team.scratch(), 0xff, size.thread_bytes);
        if (size.shared_bytes > 0 && team.thread() == 0) memset(team.shared_scratch(), 0xff, size.shared_bytes);
    };
    pool.run(fill, &scratch);
}
