#pragma once

// What runs: a launch, its blocks with their shared memory, their threads, and the groups in which those meet.

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace normops::emulator {

#if defined(NORMOPS_EMULATOR_ASAN) || defined(NORMOPS_EMULATOR_TSAN)
constexpr size_t kStack = 256 << 10, kFence = 0;  // the sanitizers guard what malloc returns
#else
constexpr size_t kStack = 64 << 10, kFence = 64;
#endif

// What a thread waits for. Threads meet only where all of this is the same.
struct Point {
  Scope scope;
  const char* name;
  Where where;
  unsigned mask = 0;

  bool operator==(const Point& other) const {
    return scope == other.scope && mask == other.mask && where.line() == other.where.line() &&
           where.column() == other.where.column() && !std::strcmp(where.file_name(), other.where.file_name());
  }
};

struct Block;

struct Thread {
  enum class State { kReady, kWaiting, kReturned };

  Fiber fiber{kStack};
  Block* block = nullptr;
  unsigned number = 0;  // within its block, x fastest
  uint3 index{};
  State state = State::kReady;
  std::optional<Point> point;
  uint64_t value = 0;  // what it brings to a meeting, then what it takes from it
  int source = 0;

  unsigned lane() const { return number % warpSize; }
  bool waits() const { return state == State::kWaiting; }
};

// Threads that wait for each other. Two places for ThreadSanitizer, used in turn: a thread may come to the next meeting
// before another has left the last.
struct Group {
  std::span<Thread*> threads;
  unsigned expected = 0;  // in a grid all of them, otherwise those that have not returned
  unsigned waiting = 0;
  unsigned phase = 0;
  char sync[2] = {};
};

struct Warp {
  std::span<Thread*> threads;
  unsigned alive = 0, waiting = 0;  // lanes
  unsigned phase = 0;
  char sync[2] = {};
};

// Shared memory of one name.
struct Array {
  static constexpr unsigned char kPoison = 0xFF;  // NaN as a float, far out of range as an index
  static constexpr unsigned char kFenced = 0xA5;

  const char* declaration;
  std::string name;
  size_t bytes, alignment;
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, std::free};

  Array(const char* declaration, std::string name, size_t bytes, size_t alignment)
      : declaration(declaration), name(std::move(name)), bytes(bytes), alignment(alignment) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, std::max<size_t>(alignment, 16), bytes + 2 * kFence)) throw std::bad_alloc();
    memory.reset(static_cast<char*>(allocated));
    std::memset(memory.get(), kFenced, kFence);
    std::memset(data() + bytes, kFenced, kFence);
    poison();
  }

  char* data() const { return memory.get() + kFence; }
  void poison() { std::memset(data(), kPoison, bytes); }
  bool intact() const {
    const auto fenced = [](char byte) { return static_cast<unsigned char>(byte) == kFenced; };
    return std::all_of(memory.get(), data(), fenced) && std::all_of(data() + bytes, data() + bytes + kFence, fenced);
  }
};

struct ArrayRequest {
  Block* block;
  const char* declaration;
  std::string_view name;
  size_t bytes, alignment;
  Where where;
};

struct Block {
  uint3 index;
  size_t number;  // among those that run together
  Group* cluster;
  Group group;
  std::vector<Warp> warps{};
  std::deque<Array> arrays{};  // the first is dynamic
  size_t static_bytes = 0;

  Warp& warp_of(const Thread& thread) { return warps[thread.number / warpSize]; }
  Array* find(const char* declaration) {
    for (Array& array : arrays)
      if (array.declaration == declaration) return &array;
    return nullptr;
  }
};

struct Launch {
  const void* kernel;
  const cuda::LaunchConfig& config;
  void (*body)(void*);
  void* arguments;

  Kernel& counts = kernels()[kernel];
  Fiber scheduler{};
  // What the running thread has for the scheduler.
  std::string error{};
  std::optional<ArrayRequest> request{};
  uint64_t random = settings().seed;
  uint64_t spins = 0;  // how often threads have let others run since any of them got on

  // The blocks that run together: one, a cluster or all.
  std::deque<Block> blocks{};
  std::deque<Group> clusters{};
  Group grid{};
  std::vector<Thread*> threads{};
  std::deque<Thread*> ready{};
  std::deque<Array> retired{};

  // A number below `limit`, drawn from the seed.
  size_t draw(size_t limit) {
    if (!settings().seed) return 0;
    random += 0x9E3779B97F4A7C15;
    uint64_t bits = (random ^ random >> 30) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
    return size_t((bits ^ bits >> 31) % limit);
  }
};

}  // namespace normops::emulator
