#pragma once

// Who and where, in words.

#include "state.h"

namespace normops::emulator {

// What runs, or null.
Thread* running_thread();
Launch* running_launch();

std::string at(const char* file, unsigned line);
inline std::string at(const Where& where) { return at(where.file_name(), where.line()); }
std::string text(uint3 index);
std::string hex(uint64_t value);
std::string kernel_name(const void* kernel);
std::string in_launch();
std::string of_thread(const Thread& thread);
// Block by block.
std::string who_waits();

}  // namespace normops::emulator
