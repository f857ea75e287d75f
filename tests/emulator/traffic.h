#pragma once

// Counts what threads read and write, where the kernels are compiled so that g++ calls a function for every access
// (-fsanitize=kernel-address with calls; no sanitizer is linked). Otherwise nothing calls it, and the counts stay 0.

#include "state.h"

namespace normops::emulator {

// Of the block whose threads have all returned; of the launch.
void end_of_block(Traffic& traffic);
void end_of_launch(Traffic& traffic);
void forget_accesses();

// Of all launches since the last call of the other: a line for every kernel with the bytes that it read and wrote of
// some memory, and its name.
std::string moved(uint64_t begin, uint64_t bytes);
void forget_traffic();

}  // namespace normops::emulator
