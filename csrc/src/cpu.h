// Which instruction sets this machine runs, asked of the processor and of the system.
#pragma once

#include <cstdint>

namespace penstock {

// Bits 1 << penstock_isa. AMX asks the system for the tile state the first time.
uint64_t detect_isas();

}  // namespace penstock
