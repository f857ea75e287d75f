// Runs the blocks of a grid: a scheduler that lets one thread run until it waits for others, then any other that can.

#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace normops::emulator {
namespace {

// ---- The device -----------------------------------------------------------------------------------------------------

struct Architecture {
  const char* name;
  int major, minor;
  int shared_per_block;  // what a kernel can ask for by attribute
  int shared_per_multiprocessor;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  unsigned cluster;  // the largest, with the attribute for those above 8
};

constexpr int kThreadsPerBlock = 1024, kSharedUnasked = 48 << 10, kSharedReserved = 1 << 10, kPortableCluster = 8;
constexpr Architecture kArchitectures[] = {
    {"sm_80", 8, 0, 163 << 10, 164 << 10, 2048, 32, 1},    {"sm_86", 8, 6, 99 << 10, 100 << 10, 1536, 16, 1},
    {"sm_89", 8, 9, 99 << 10, 100 << 10, 1536, 24, 1},     {"sm_90", 9, 0, 227 << 10, 228 << 10, 2048, 32, 16},
    {"sm_100", 10, 0, 227 << 10, 228 << 10, 2048, 32, 16}, {"sm_120", 12, 0, 99 << 10, 100 << 10, 1536, 24, 8},
};

const Architecture* architecture(const std::string& name) {
  for (const Architecture& candidate : kArchitectures)
    if (candidate.name == name) return &candidate;
  throw std::runtime_error("emulated CUDA: no architecture " + name);
}

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

struct Settings {
  const Architecture* device = architecture(environment("NORMOPS_EMULATOR_ARCH", "sm_90"));
  // Few, as the blocks of a cooperative grid all run at once; and no power of two, which could hide mistakes.
  int multiprocessors = 3;
  // Threads and blocks run in an order drawn from the seed; with 0, in the order of their numbers.
  uint64_t seed = std::stoull(environment("NORMOPS_EMULATOR_SEED", "1"));
};

Settings& settings() {
  static Settings value;
  return value;
}

struct Kernel {
  std::map<cudaFuncAttribute, int> attributes;
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0, exchanges = 0;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> value;
  return value;
}

// ---- What runs ------------------------------------------------------------------------------------------------------

#if defined(NORMOPS_EMULATOR_ASAN) || defined(NORMOPS_EMULATOR_TSAN)
constexpr size_t kStack = 256 << 10, kGuard = 0;  // the sanitizers guard what malloc returns
#else
constexpr size_t kStack = 64 << 10, kGuard = 64;
#endif

// ThreadSanitizer is told which waits order memory.
void happens_before(void* place) {
#ifdef NORMOPS_EMULATOR_TSAN
  __tsan_release(place);
#endif
  (void)place;
}
void happens_after(void* place) {
#ifdef NORMOPS_EMULATOR_TSAN
  __tsan_acquire(place);
#endif
  (void)place;
}

struct Block;

// What a thread waits for. Threads meet only if all of it is the same.
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

enum class State { kReady, kWaiting, kReturned };

struct Thread {
  explicit Thread() : fiber(kStack) {}

  Fiber fiber;
  Block* block = nullptr;
  unsigned number = 0;  // within its block, x fastest
  uint3 index{};
  State state = State::kReady;
  Point point{};
  uint64_t value = 0;  // what it brings to a meeting, then what it takes from it
  int source = 0;

  unsigned lane() const { return number % warpSize; }
};

// Threads that can wait for each other.
struct Group {
  std::span<Thread*> threads;
  unsigned expected = 0;  // those that have returned count in a grid only
  unsigned waiting = 0;
  char sync[2] = {};  // places for ThreadSanitizer, used in turn
  unsigned phase = 0;
};

struct Warp {
  std::span<Thread*> threads;
  unsigned alive = 0, waiting = 0;  // lanes
  char sync[2] = {};
  unsigned phase = 0;
};

// Shared memory of one name.
struct Array {
  static constexpr unsigned char kPoison = 0xFF;  // NaN as a float, far out of range as an index
  static constexpr unsigned char kFence = 0xA5;

  const char* declaration;
  const char* name;
  size_t bytes;
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, std::free};

  Array(const char* declaration, const char* name, size_t bytes, size_t alignment)
      : declaration(declaration), name(name), bytes(bytes) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, std::max<size_t>(alignment, 16), bytes + 2 * kGuard)) throw std::bad_alloc();
    memory.reset(static_cast<char*>(allocated));
    std::memset(allocated, kFence, bytes + 2 * kGuard);
    poison();
  }

  char* data() const { return memory.get() + kGuard; }
  void poison() { std::memset(data(), kPoison, bytes); }
  bool intact() const {
    const auto fence = [&](const char* begin) {
      return std::all_of(begin, begin + kGuard, [](char c) { return static_cast<unsigned char>(c) == kFence; });
    };
    return fence(memory.get()) && fence(data() + bytes);
  }
};

struct Block {
  uint3 index;
  Group* cluster;
  size_t number;  // among those that run together
  Group group;
  std::vector<Warp> warps;
  std::deque<Array> arrays;  // the first is dynamic
  size_t static_bytes = 0;
};

uint3 unfold(uint64_t number, dim3 size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}
uint64_t volume(dim3 size) { return uint64_t(size.x) * size.y * size.z; }

struct Launch {
  const void* kernel;
  const cuda::LaunchConfig& config;
  void (*body)(void*);
  void* arguments;

  Kernel& counts = kernels()[kernel];
  Fiber scheduler{};
  std::string error{};
  uint64_t random = settings().seed;
  uint64_t spins = 0;

  // The blocks that run together: one, a cluster or all.
  std::deque<Block> blocks{};
  std::deque<Group> clusters{};
  Group grid{};
  std::vector<Thread*> threads{};
  std::deque<Thread*> ready{};
  std::deque<Array> retired{};

  // Any number below `limit`; 0 if the order is not to be drawn.
  size_t draw(size_t limit) {
    if (!settings().seed) return 0;
    random += 0x9E3779B97F4A7C15;
    uint64_t bits = (random ^ random >> 30) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
    return size_t((bits ^ bits >> 31) % limit);
  }
};

std::mutex one_at_a_time;
Launch* current = nullptr;
Thread* running = nullptr;

// ---- Messages -------------------------------------------------------------------------------------------------------

std::string at(const char* file, unsigned line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}
std::string at(const Where& where) { return at(where.file_name(), where.line()); }

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string hex(uint64_t value) {
  std::ostringstream stream;
  stream << "0x" << std::hex << value;
  return stream.str();
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) return "a kernel of internal linkage";
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr),
                                                         std::free);
  return name ? name.get() : info.dli_sname;
}

std::string launch_name() { return kernel_name(current->kernel) + ", launched at " + at(current->config.where); }

// Who waits where, block by block.
std::string waiting_threads() {
  std::string result;
  int listed = 0;
  for (const Block& block : current->blocks) {
    std::map<std::string, std::string> lists;
    const auto threads = block.group.threads;
    for (size_t i = 0; i < threads.size();) {
      const auto describe = [&](const Thread& thread) -> std::string {
        if (thread.state == State::kReturned) return " returned";
        if (thread.state == State::kReady) return " can go on";
        const bool warp = thread.point.scope == Scope::kWarp || thread.point.scope == Scope::kExchange;
        return std::string(" wait in ") + thread.point.name + " at " + at(thread.point.where) +
               (warp ? ", mask " + hex(thread.point.mask) : "");
      };
      const std::string what = describe(*threads[i]);
      size_t end = i + 1;
      while (end < threads.size() && describe(*threads[end]) == what) ++end;
      std::string& list = lists[what];
      list += (list.empty() ? "" : ", ") + std::to_string(i) + (end > i + 1 ? "-" + std::to_string(end - 1) : "");
      i = end;
    }
    if (lists.size() == 1 && threads[0]->state == State::kReturned) continue;
    if (++listed > 4) return result + "\n  and so on";
    result += "\n  block " + text(block.index) + ":";
    for (const auto& [what, list] : lists) result += "\n    threads " + list + what;
  }
  return result;
}

// Leaves the running thread for good; `run` throws. Nothing is unwound: a message may be about any load or store.
[[noreturn]] void stop(const std::string& error) {
  current->error = error;
  running->fiber.switch_to(current->scheduler);
  std::abort();
}

[[noreturn]] void stuck(const std::string& what) { stop(what + " in " + launch_name() + waiting_threads()); }

// ---- Meetings -------------------------------------------------------------------------------------------------------

void make_ready(Thread& thread, uint64_t value) {
  thread.value = value;
  thread.state = State::kReady;
  current->ready.push_back(&thread);
  current->spins = 0;
}

// Lets the group go on if all are there.
void settle(Group& group, Scope scope) {
  if (!group.waiting || group.waiting < group.expected) return;
  const Thread* first = nullptr;
  uint64_t predicates = 0;
  for (const Thread* thread : group.threads) {
    if (thread->state != State::kWaiting) continue;
    if (!first) first = thread;
    if (!(thread->point == first->point)) stuck("threads that should meet wait at different barriers");
    predicates += thread->value;
  }
  for (Thread* thread : group.threads)
    if (thread->state == State::kWaiting && thread->point.scope == scope) make_ready(*thread, predicates);
  group.waiting = 0;
  ++group.phase;
  ++current->counts.barriers;
}

// Lets the lanes that `thread` waits for go on if all of them wait with it. Lanes that have returned are not waited
// for.
void settle(Warp& warp, const Thread& thread) {
  const Point point = thread.point;
  const unsigned lanes = point.mask & warp.alive;
  if (lanes & ~warp.waiting) return;
  uint64_t values[warpSize] = {}, ballot = 0;
  for (Thread* other : warp.threads) {
    if (!(lanes >> other->lane() & 1)) continue;
    if (!(other->point == point)) return;
    values[other->lane()] = other->value;
    ballot |= uint64_t(other->value != 0) << other->lane();
  }
  for (Thread* other : warp.threads) {
    if (!(lanes >> other->lane() & 1)) continue;
    const int source = other->source;
    if (point.scope == Scope::kExchange && source != kBallot && !(lanes >> source & 1))
      stop(std::string(point.name) + " at " + at(point.where) + ": lane " + std::to_string(other->lane()) +
           " reads lane " + std::to_string(source) +
           (point.mask >> source & 1 ? ", which has returned or never was,"
                                     : ", which is not in mask " + hex(point.mask)) +
           " in " + launch_name() + ", block " + text(other->block->index) + ", thread " + text(other->index));
    make_ready(*other, source == kBallot ? ballot : values[source]);
  }
  warp.waiting &= ~lanes;
  ++warp.phase;
  ++(point.scope == Scope::kExchange ? current->counts.exchanges : current->counts.barriers);
}

// Lets the scheduler pick another thread; returns when `settle` has made this one ready.
uint64_t wait(const Point& point, uint64_t value, int source) {
  Thread& self = *running;
  self.point = point;
  self.value = value;
  self.source = source;
  self.state = State::kWaiting;
  char* sync = nullptr;
  const auto meet = [&](auto& group) {
    sync = &group.sync[group.phase & 1];
    if (point.scope != Scope::kExchange) happens_before(sync);
  };
  const auto enter = [&](Group& group) {
    meet(group);
    ++group.waiting;
    settle(group, point.scope);
  };
  if (point.scope == Scope::kBlock) {
    enter(self.block->group);
  } else if (point.scope == Scope::kCluster) {
    enter(*self.block->cluster);
  } else if (point.scope == Scope::kGrid) {
    enter(current->grid);
  } else {
    Warp& warp = self.block->warps[self.number / warpSize];
    meet(warp);
    warp.waiting |= 1u << self.lane();
    settle(warp, self);
  }
  self.fiber.switch_to(current->scheduler);
  if (point.scope != Scope::kExchange) happens_after(sync);
  return self.value;
}

// Every fiber begins here.
void thread_main() {
  Fiber::arrived(current->scheduler);
  current->body(current->arguments);
  Thread& self = *running;
  Block& block = *self.block;
  self.state = State::kReturned;
  current->spins = 0;
  happens_before(current);
  --block.group.expected;
  --block.cluster->expected;
  settle(block.group, Scope::kBlock);
  settle(*block.cluster, Scope::kCluster);
  Warp& warp = block.warps[self.number / warpSize];
  warp.alive &= ~(1u << self.lane());
  for (Thread* other : warp.threads)
    if (warp.waiting >> other->lane() & 1) settle(warp, *other);
#ifndef NORMOPS_EMULATOR_TSAN
  // Shared memory ends with its block; the rest of its cluster must not read on.
  if (!block.group.expected)
    for (Array& array : block.arrays) array.poison();
#endif
  self.fiber.switch_to(current->scheduler);
  std::abort();
}

// ---- Blocks ---------------------------------------------------------------------------------------------------------

Thread* thread_from_pool(size_t i) {
  static std::vector<std::unique_ptr<Thread>> pool;
  while (pool.size() <= i) pool.push_back(std::make_unique<Thread>());
  return pool[i].get();
}

// Runs blocks `first` to `first + count` together, in clusters.
void run_together(Launch& launch, uint64_t first, uint64_t count) {
  const cuda::LaunchConfig& config = launch.config;
  const unsigned size = unsigned(volume(config.block));
  launch.blocks.clear();
  launch.clusters.clear();
  launch.threads.resize(count * size);
  for (uint64_t b = 0; b < count; ++b) {
        Thread** const begin = &launch.threads[b * size];
    if (b % config.cluster == 0) {
      const unsigned threads = config.cluster * size;
      launch.clusters.push_back(Group{.threads = {begin, threads}, .expected = threads});
    }
    Block& block = launch.blocks.emplace_back(
        Block{unfold(first + b, config.grid), &launch.clusters.back(), b, {{begin, size}, size}, {}, {}});
    block.arrays.emplace_back(nullptr, "dynamic shared memory", config.shared_bytes, 16);
    for (unsigned i = 0; i < size; ++i) {
      Thread* thread = begin[i] = thread_from_pool(b * size + i);
      thread->block = &block;
      thread->number = i;
      thread->index = unfold(i, config.block);
      thread->state = State::kReady;
      thread->fiber.start(thread_main);
      launch.ready.push_back(thread);
      if (thread->lane() == 0) block.warps.push_back(Warp{.threads = {begin + i, std::min<size_t>(warpSize, size - i)}});
      block.warps.back().alive |= 1u << thread->lane();
    }
  }
  launch.grid = Group{.threads = launch.threads, .expected = unsigned(launch.threads.size())};

  while (!launch.ready.empty()) {
    std::swap(launch.ready[launch.draw(launch.ready.size())], launch.ready.front());
    running = launch.ready.front();
    launch.ready.pop_front();
    threadIdx = running->index;
    blockIdx = running->block->index;
    launch.scheduler.switch_to(running->fiber);
    if (running->state == State::kReturned) running->fiber.stop();
    running = nullptr;
    if (!launch.error.empty()) throw std::runtime_error("emulated CUDA: " + launch.error);
  }
  for (const Thread* thread : launch.threads)
    if (thread->state != State::kReturned)
      throw std::runtime_error("emulated CUDA: deadlock in " + launch_name() + waiting_threads());
  for (Block& block : launch.blocks)
    for (Array& array : block.arrays) {
      if (!array.intact())
        throw std::runtime_error("emulated CUDA: written outside of " + std::string(array.name) + " (" +
                                 std::to_string(array.bytes) + " bytes) in " + launch_name() + ", block " +
                                 text(block.index));
#ifdef NORMOPS_EMULATOR_TSAN
      // Memory used again by another block would look like a race, and freeing it like a write.
      launch.retired.push_back(std::move(array));
#endif
    }
  launch.counts.blocks += int64_t(count);
  launch.counts.threads += int64_t(count) * size;
}

void require(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

void check_limits(const cuda::LaunchConfig& config, const Kernel& kernel) {
  const Architecture& device = *settings().device;
  const auto attribute = [&](cudaFuncAttribute name, int otherwise) {
    const auto found = kernel.attributes.find(name);
    return found == kernel.attributes.end() ? otherwise : found->second;
  };
  const auto limit = [&](const char* what, uint64_t value, uint64_t most) {
    require(value >= 1 && value <= most, std::string(what) + " is " + std::to_string(value) + ", " + device.name +
                                             " takes 1 to " + std::to_string(most));
  };
  limit("blockDim.x", config.block.x, 1024);
  limit("blockDim.y", config.block.y, 1024);
  limit("blockDim.z", config.block.z, 64);
  limit("threads per block", volume(config.block), kThreadsPerBlock);
  limit("gridDim.x", config.grid.x, (1u << 31) - 1);
  limit("gridDim.y", config.grid.y, 65535);
  limit("gridDim.z", config.grid.z, 65535);
  require(config.shared_bytes <= size_t(device.shared_per_block),
          std::to_string(config.shared_bytes) + " bytes of dynamic shared memory, " + device.name + " has " +
              std::to_string(device.shared_per_block));
  const int asked = attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedUnasked);
  require(config.shared_bytes <= size_t(asked),
          std::to_string(config.shared_bytes) + " bytes of dynamic shared memory, the kernel may use " +
              std::to_string(asked) + " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
  const bool wide = attribute(cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  limit("the cluster's size", config.cluster,
        wide ? device.cluster : std::min<unsigned>(device.cluster, kPortableCluster));
  require(config.grid.x % config.cluster == 0, "gridDim.x is " + std::to_string(config.grid.x) +
                                                   ", not a multiple of the cluster's size, " +
                                                   std::to_string(config.cluster));
  if (config.cooperative)
    limit("blocks of a cooperative grid", volume(config.grid),
          uint64_t(settings().multiprocessors) *
              blocks_per_multiprocessor(int(volume(config.block)), config.shared_bytes));
}

}  // namespace

// ---- What emulator.h declares ---------------------------------------------------------------------------------------

void fail(const std::string& message) {
  if (running)
    stop(message + " in " + launch_name() + ", block " + text(running->block->index) + ", thread " +
         text(running->index));
  throw std::runtime_error("emulated CUDA: " + message + (current ? " in " + launch_name() : ""));
}

void run(const void* kernel, const cuda::LaunchConfig& config, void (*body)(void*), void* arguments) {
  const std::lock_guard lock(one_at_a_time);
  Launch launch{kernel, config, body, arguments};
  struct Current {
    explicit Current(Launch* launch) { current = launch; }
    ~Current() {
      happens_after(current);
      current = nullptr;
    }
  } guard(&launch);
  check_limits(config, launch.counts);
  blockDim = config.block;
  gridDim = config.grid;
  const uint64_t blocks = volume(config.grid);
  const uint64_t together = config.cooperative ? blocks : config.cluster;
  std::vector<uint64_t> order(blocks / together);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint64_t i = 0; i < order.size(); ++i) {
    std::swap(order[i], order[i + launch.draw(order.size() - i)]);
    run_together(launch, order[i] * together, together);
  }
  ++launch.counts.launches;
}

uint64_t barrier(Scope scope, const char* name, uint64_t predicate, const Where& where) {
  if (scope == Scope::kGrid && !current->config.cooperative)
    fail(std::string(name) + " at " + at(where) + " in a grid that is not cooperative");
  return wait({scope, name, where}, predicate, 0);
}

void warp_barrier(unsigned mask, const Where& where) {
  if (!(mask >> lane() & 1)) fail("__syncwarp at " + at(where) + ": mask " + hex(mask) + " lacks the caller");
  wait({Scope::kWarp, "__syncwarp", where, mask}, 0, kBallot);
}

uint64_t exchange(const char* name, unsigned mask, uint64_t value, int source, const Where& where) {
  if (!(mask >> lane() & 1)) fail(std::string(name) + " at " + at(where) + ": mask " + hex(mask) + " lacks the caller");
  return wait({Scope::kExchange, name, where, mask}, value, source);
}

unsigned lane() { return running->lane(); }

void yield() {
  if (!running) return;
  if (++current->spins > 10'000'000) stuck("threads spin and none gets on");
  current->ready.push_back(running);
  running->fiber.switch_to(current->scheduler);
}

namespace {

Array& array_of(Block& block, const char* declaration, const char* name, size_t bytes, size_t alignment,
                const Where& where) {
  for (Array& array : block.arrays)
    if (array.declaration == declaration) {
      happens_after(array.data());
      return array;
    }
  block.static_bytes += bytes;
  require(block.static_bytes <= size_t(kSharedUnasked),
          std::to_string(block.static_bytes) + " bytes of static shared memory with " + name + " at " + at(where) +
              ", the limit is " + std::to_string(kSharedUnasked));
  const size_t total = block.static_bytes + current->config.shared_bytes;
  const bool asked = current->counts.attributes.contains(cudaFuncAttributeMaxDynamicSharedMemorySize);
  const size_t limit = size_t(asked ? settings().device->shared_per_block : kSharedUnasked);
  require(total <= limit, std::to_string(total) + " bytes of shared memory, static and dynamic, with " + name + " at " +
                              at(where) + ", the limit is " + std::to_string(limit));
  Array& array = block.arrays.emplace_back(declaration, name, bytes, alignment);
  happens_before(array.data());
  return array;
}

}  // namespace

void* shared(const char* declaration, const char* name, size_t bytes, size_t alignment, const Where& where) {
  return array_of(*running->block, declaration, name, bytes, alignment, where).data();
}

void* dynamic_shared() { return running->block->arrays.front().data(); }

void* map_shared(const void* pointer, unsigned rank, const Where& where) {
  Block& mine = *running->block;
  require(rank < cluster_size(), "map_shared at " + at(where) + ": rank " + std::to_string(rank) + " in a cluster of " +
                                     std::to_string(cluster_size()));
  Block& other = current->blocks[mine.number / cluster_size() * cluster_size() + rank];
  require(other.group.expected > 0, "map_shared at " + at(where) + ": the block of rank " + std::to_string(rank) +
                                        " has returned, and its shared memory with it");
  const char* const address = static_cast<const char*>(pointer);
  for (Array& array : mine.arrays)
    if (address >= array.data() && address <= array.data() + array.bytes)
      return array_of(other, array.declaration, array.name, array.bytes, 16, where).data() + (address - array.data());
  fail("map_shared at " + at(where) + ": the pointer is not into shared memory of this block");
}

unsigned cluster_size() { return current->config.cluster; }

int attribute(cudaDeviceAttr attribute) {
  const Architecture& device = *settings().device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return kThreadsPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kSharedUnasked;
    case cudaDevAttrWarpSize:
      return warpSize;
    case cudaDevAttrMultiProcessorCount:
      return settings().multiprocessors;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return device.threads_per_multiprocessor;
    case cudaDevAttrComputeCapabilityMajor:
      return device.major;
    case cudaDevAttrComputeCapabilityMinor:
      return device.minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return device.shared_per_multiprocessor;
    case cudaDevAttrCooperativeLaunch:
      return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return device.shared_per_block;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return kSharedReserved;
  }
  fail("no device attribute " + std::to_string(attribute));
}

void set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    require(value >= 0 && value <= settings().device->shared_per_block,
            "cudaFuncSetAttribute asks for " + std::to_string(value) + " bytes of shared memory, " +
                settings().device->name + " has " + std::to_string(settings().device->shared_per_block));
  kernels()[kernel].attributes[attribute] = value;
}

int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const Architecture& device = *settings().device;
  const int whole_warps = (threads + warpSize - 1) / warpSize * warpSize;
  const int by_memory = device.shared_per_multiprocessor / (int(shared_bytes) + kSharedReserved);
  return std::min({device.threads_per_multiprocessor / whole_warps, by_memory, device.blocks_per_multiprocessor});
}

}  // namespace normops::emulator

// ---- What g++ calls where -fsanitize=alignment,null,bounds finds something ------------------------------------------

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation where;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  SourceLocation where;
  const TypeDescriptor *array, *index;
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
  using namespace normops::emulator;
  const std::string what = std::string(data->type->name) + " at " + at(data->where.file, data->where.line);
  if (!pointer) fail("null pointer to " + what);
  fail("misaligned access to " + what + ": address " + hex(pointer) + " is not a multiple of " +
       std::to_string(1 << data->log_alignment));
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  using namespace normops::emulator;
  fail("index " + std::to_string(int64_t(index)) + " is outside of " + data->array->name + " at " +
       at(data->where.file, data->where.line));
}

// ---- For the tests, through ctypes ----------------------------------------------------------------------------------

void normops_emulator_seed(uint64_t seed) { normops::emulator::settings().seed = seed; }

bool normops_emulator_device(const char* architecture, int multiprocessors) {
  using namespace normops::emulator;
  for (const Architecture& candidate : kArchitectures)
    if (!std::strcmp(candidate.name, architecture)) {
      settings().device = &candidate;
      settings().multiprocessors = multiprocessors;
      return true;
    }
  return false;
}

// A line for every instantiation that was launched: launches, blocks, threads, barriers, exchanges, name.
const char* normops_emulator_report() {
  using namespace normops::emulator;
  static std::string report;
  report.clear();
  for (const auto& [kernel, counts] : kernels()) {
    if (!counts.launches) continue;
    for (const int64_t count : {counts.launches, counts.blocks, counts.threads, counts.barriers, counts.exchanges})
      report += std::to_string(count) + " ";
    report += kernel_name(kernel) + "\n";
  }
  return report.c_str();
}

}  // extern "C"
