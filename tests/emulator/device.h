#pragma once

// The device that is emulated: what it allows a launch, and what is known of each kernel.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "emulator.h"

namespace normops::emulator {

struct Architecture {
  const char* name;
  int major, minor;
  int shared_per_block;  // what a kernel can ask for by attribute
  int shared_per_multiprocessor;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  int cluster;  // the largest; above 8 only with an attribute
};

constexpr Architecture kArchitectures[] = {
    {"sm_80", 8, 0, 163 << 10, 164 << 10, 2048, 32, 1},    {"sm_86", 8, 6, 99 << 10, 100 << 10, 1536, 16, 1},
    {"sm_89", 8, 9, 99 << 10, 100 << 10, 1536, 24, 1},     {"sm_90", 9, 0, 227 << 10, 228 << 10, 2048, 32, 16},
    {"sm_100", 10, 0, 227 << 10, 228 << 10, 2048, 32, 16}, {"sm_120", 12, 0, 99 << 10, 100 << 10, 1536, 24, 8},
};

// The same for all of them.
constexpr int kThreadsPerBlock = 1024, kSharedUnasked = 48 << 10, kSharedReserved = 1 << 10, kPortableCluster = 8;

inline const Architecture& architecture(const std::string& name) {
  for (const Architecture& candidate : kArchitectures)
    if (candidate.name == name) return candidate;
  throw std::runtime_error("emulated CUDA: no architecture is called " + name);
}

inline std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

struct Settings {
  const Architecture* device = &architecture(environment("NORMOPS_EMULATOR_ARCH", "sm_90"));
  // Few, as the blocks of a cooperative grid all run at once; and no power of two, which could hide mistakes.
  int multiprocessors = 3;
  // Threads and blocks run in an order drawn from the seed; with 0, in the order of their numbers.
  uint64_t seed = std::stoull(environment("NORMOPS_EMULATOR_SEED", "1"));
  // Launches are checked and counted, and nothing is run.
  bool dry = false;
  // Of a launch one block (or cluster) is run, and counted for all of them; results are good for nothing.
  bool sample = false;
};

inline Settings& settings() {
  static Settings value;
  return value;
}

// What was moved, where accesses are counted (traffic.cpp).
struct Traffic {
  int64_t read = 0, written = 0;                    // bytes of global memory that threads asked for
  int64_t sectors_read = 0, sectors_written = 0;    // of 32 bytes, that the accesses of a warp together touch
  int64_t distinct_read = 0, distinct_written = 0;  // sectors of each launch
  int64_t chain = 0;                                // most global loads of one thread
  int64_t shared = 0, conflicts = 0;  // accesses of warps to shared memory, and how many more turns they take
};

struct Kernel {
  std::map<cudaFuncAttribute, int> attributes;
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0, exchanges = 0;
  Traffic traffic;

  // What was counted since `before` counts so many times; but for the chain, which is a thread's.
  void repeat(const Kernel& before, int64_t times) {
    for (const auto count : {&Kernel::blocks, &Kernel::threads, &Kernel::barriers, &Kernel::exchanges}) {
      this->*count += (this->*count - before.*count) * (times - 1);
    }
    for (const auto count :
         {&Traffic::read, &Traffic::written, &Traffic::sectors_read, &Traffic::sectors_written, &Traffic::distinct_read,
          &Traffic::distinct_written, &Traffic::shared, &Traffic::conflicts}) {
      traffic.*count += (traffic.*count - before.traffic.*count) * (times - 1);
    }
  }

  int attribute(cudaFuncAttribute name, int otherwise) const {
    const auto found = attributes.find(name);
    return found == attributes.end() ? otherwise : found->second;
  }
};

inline std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> value;
  return value;
}

inline uint64_t volume(dim3 size) { return uint64_t(size.x) * size.y * size.z; }

inline void require(bool holds, const std::string& otherwise) {
  if (!holds) fail(otherwise);
}

// Fail with what is wrong. Static arrays are found as the kernel comes to them.
void check_limits(const cuda::LaunchConfig& config, const Kernel& kernel);
void check_static_memory(size_t static_bytes, const cuda::LaunchConfig& config, const Kernel& kernel,
                         const std::string& array);

}  // namespace normops::emulator
