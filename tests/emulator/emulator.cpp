// Runs the blocks of a grid. A thread runs until it waits for others; then the scheduler, which does all the
// bookkeeping on a stack of its own, lets another go on.

#include "emulator.h"

#include <mutex>
#include <numeric>

#include "messages.h"
#include "traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace normops::emulator {
namespace {

std::mutex one_at_a_time;
Launch* current = nullptr;
Thread* running = nullptr;

[[noreturn]] void stop(const std::string& what) { throw std::runtime_error("emulated CUDA: " + what); }

// ---- Meetings: the scheduler's side ---------------------------------------------------------------------------------

void make_ready(Thread& thread, uint64_t value) {
  thread.value = value;
  thread.state = Thread::State::kReady;
  current->ready.push_back(&thread);
  current->spins = 0;
}

// Lets the group go on if all are there.
void settle(Group& group) {
  if (!group.waiting || group.waiting < group.expected) return;
  const Thread* first = nullptr;
  uint64_t predicates = 0;
  for (const Thread* thread : group.threads) {
    if (!thread->waits()) continue;
    if (!first) first = thread;
    if (!(*thread->point == *first->point)) stop("threads wait at different barriers" + in_launch() + who_waits());
    predicates += thread->value;
  }
  for (Thread* thread : group.threads)
    if (thread->waits()) make_ready(*thread, predicates);
  group.waiting = 0;
  ++group.phase;
  ++current->counts.barriers;
}

// Lets the lanes that `thread` waits for go on if all of them wait with it. Lanes that have returned do not count.
void settle(Warp& warp, const Thread& thread) {
  const Point point = *thread.point;
  const unsigned lanes = point.mask & warp.alive;
  if (lanes & ~warp.waiting) return;
  uint64_t values[warpSize] = {}, ballot = 0;
  for (const Thread* other : warp.threads) {
    if (!(lanes >> other->lane() & 1)) continue;
    if (!(*other->point == point)) return;
    values[other->lane()] = other->value;
    ballot |= uint64_t(other->value != 0) << other->lane();
  }
  for (Thread* other : warp.threads) {
    if (!(lanes >> other->lane() & 1)) continue;
    const int source = other->source;
    if (source != kBallot && !(lanes >> source & 1))
      stop(std::string(point.name) + " at " + at(point.where) + " reads lane " + std::to_string(source) +
           (point.mask >> source & 1 ? ", which has returned or never was,"
                                     : ", which is not in mask " + hex(point.mask) + ",") +
           of_thread(*other));
    make_ready(*other, source == kBallot ? ballot : values[source]);
  }
  warp.waiting &= ~lanes;
  ++warp.phase;
  ++(point.scope == Scope::kExchange ? current->counts.exchanges : current->counts.barriers);
}

Group& group_of(const Thread& thread) {
  switch (thread.point->scope) {
    case Scope::kBlock:
      return thread.block->group;
    case Scope::kCluster:
      return *thread.block->cluster;
    default:
      return current->grid;
  }
}

bool in_warp(const Point& point) { return point.scope == Scope::kExchange || point.scope == Scope::kWarp; }

void begin_to_wait(Thread& thread) {
  if (in_warp(*thread.point)) {
    Warp& warp = thread.block->warp_of(thread);
    warp.waiting |= 1u << thread.lane();
    settle(warp, thread);
  } else {
    Group& group = group_of(thread);
    ++group.waiting;
    settle(group);
  }
}

void leave(Thread& thread) {
  Block& block = *thread.block;
  thread.fiber.stop();
  current->spins = 0;
  --block.group.expected;
  --block.cluster->expected;
  settle(block.group);
  settle(*block.cluster);
  Warp& warp = block.warp_of(thread);
  warp.alive &= ~(1u << thread.lane());
  for (const Thread* other : warp.threads)
    if (warp.waiting >> other->lane() & 1) settle(warp, *other);
#ifndef NORMOPS_EMULATOR_TSAN  // it would take this for a write by another thread
  // Shared memory ends with its block: the rest of its cluster must not read on.
  if (!block.group.expected && current->config.cluster > 1)
    for (Array& array : block.arrays) array.poison();
#endif
}

// ---- Meetings: the thread's side ------------------------------------------------------------------------------------

void to_scheduler() { running->fiber.switch_to(current->scheduler); }

// The array of a block that is asked for, made when the first thread comes to its declaration.
char* shared_of(const ArrayRequest& request) {
  Array* array = request.block->find(request.declaration);
  if (!array) {
    current->request = request;
    to_scheduler();
    array = request.block->find(request.declaration);
  }
  acquire(array->data());
  return array->data();
}

uint64_t wait(const Point& point, uint64_t value, int source) {
  Thread& self = *running;
  self.point = point;
  self.value = value;
  self.source = source;
  self.state = Thread::State::kWaiting;
  const auto place = [](auto& group) { return &group.sync[group.phase % 2]; };
  const char* const sync = in_warp(point) ? place(self.block->warp_of(self)) : place(group_of(self));
  const bool orders_memory = point.scope != Scope::kExchange;
  if (orders_memory) release(sync);
  to_scheduler();
  if (orders_memory) acquire(sync);
  return self.value;
}

// Every fiber begins here.
void thread_main() {
  Fiber::arrived(current->scheduler);
  current->body(current->arguments);
  running->state = Thread::State::kReturned;
  release(current);
  to_scheduler();
  std::abort();
}

// ---- Blocks ---------------------------------------------------------------------------------------------------------

uint3 unfold(uint64_t number, dim3 size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

// Threads, and their stacks, are kept for the next block.
Thread* thread_from_pool(size_t i) {
  static std::vector<std::unique_ptr<Thread>> pool;
  while (pool.size() <= i) pool.push_back(std::make_unique<Thread>());
  return pool[i].get();
}

void set_up(Launch& launch, uint64_t first_block, uint64_t count) {
  const cuda::LaunchConfig& config = launch.config;
  const unsigned size = unsigned(volume(config.block));
  launch.blocks.clear();
  launch.clusters.clear();
  launch.threads.resize(count * size);
  for (uint64_t b = 0; b < count; ++b) {
    Thread** const threads = &launch.threads[b * size];
    const unsigned in_cluster = config.cluster * size;
    if (b % config.cluster == 0) launch.clusters.push_back({.threads = {threads, in_cluster}, .expected = in_cluster});
    Block& block = launch.blocks.emplace_back(Block{.index = unfold(first_block + b, config.grid),
                                                    .number = b,
                                                    .cluster = &launch.clusters.back(),
                                                    .group = {.threads = {threads, size}, .expected = size}});
    block.arrays.emplace_back(nullptr, "dynamic shared memory", config.shared_bytes, 16);
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = *(threads[i] = thread_from_pool(b * size + i));
      thread.block = &block;
      thread.number = i;
      thread.index = unfold(i, config.block);
      thread.state = Thread::State::kReady;
      thread.fiber.start(thread_main);
      launch.ready.push_back(&thread);
      if (thread.lane() == 0) block.warps.push_back({.threads = {threads + i, std::min<size_t>(warpSize, size - i)}});
      block.warps.back().alive |= 1u << thread.lane();
    }
  }
  launch.grid = {.threads = launch.threads, .expected = unsigned(launch.threads.size())};
}

void add_array(Launch& launch, const ArrayRequest& request) {
  Block& block = *request.block;
  const std::string name(request.name);
  block.static_bytes += request.bytes;
  check_static_memory(block.static_bytes, launch.config, launch.counts, name + " at " + at(request.where));
  release(block.arrays.emplace_back(request.declaration, name, request.bytes, request.alignment).data());
}

void run_threads(Launch& launch) {
  constexpr uint64_t kSpins = 1'000'000;
  bool answered = false;  // then the same thread goes on
  while (!launch.ready.empty()) {
    if (!answered) std::swap(launch.ready[launch.draw(launch.ready.size())], launch.ready.front());
    answered = false;
    Thread& thread = *launch.ready.front();
    launch.ready.pop_front();
    running = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    launch.scheduler.switch_to(thread.fiber);
    running = nullptr;
    if (!launch.error.empty()) {
      acquire(&launch);
      stop(launch.error);
    }
    if (launch.request) {
      add_array(launch, *launch.request);
      launch.request.reset();
      launch.ready.push_front(&thread);
      answered = true;
      continue;
    }
    switch (thread.state) {
      case Thread::State::kWaiting:
        begin_to_wait(thread);
        break;
      case Thread::State::kReturned:
        leave(thread);
        break;
      case Thread::State::kReady:
        launch.ready.push_back(&thread);
        if (++launch.spins > kSpins) stop("threads spin and none gets on" + in_launch() + who_waits());
    }
  }
  if (std::any_of(launch.threads.begin(), launch.threads.end(), [](const Thread* thread) { return thread->waits(); }))
    stop("deadlock" + in_launch() + who_waits());
}

void tear_down(Launch& launch) {
  for (Block& block : launch.blocks)
    for (Array& array : block.arrays) {
      if (!array.intact())
        stop("written outside of " + array.name + " (" + std::to_string(array.bytes) + " bytes)" + in_launch() +
             ", block " + text(block.index));
#ifdef NORMOPS_EMULATOR_TSAN  // it would take the use of this memory by another block for a race
      launch.retired.push_back(std::move(array));
#endif
    }
  end_of_block(launch.counts.traffic);
  launch.counts.blocks += int64_t(launch.blocks.size());
  launch.counts.threads += int64_t(launch.threads.size());
}

}  // namespace

// ---- What emulator.h declares ---------------------------------------------------------------------------------------

void fail(const std::string& what) {
  if (!running) stop(what + (current ? in_launch() : ""));
  // The thread is left as it stands. Nothing is unwound: this may have been called for any load or store.
  current->error = what + of_thread(*running);
  release(current);
  to_scheduler();
  std::abort();
}

void run(const void* kernel, const cuda::LaunchConfig& config, void (*body)(void*), void* arguments) {
  const std::lock_guard lock(one_at_a_time);
  Launch launch{kernel, config, body, arguments};
  struct Current {
    explicit Current(Launch* launch) { current = launch; }
    ~Current() {
      acquire(current);
      current = nullptr;
    }
  } guard(&launch);
  forget_accesses();
  check_limits(config, launch.counts);
  if (settings().dry) {
    ++launch.counts.launches;
    launch.counts.blocks += int64_t(volume(config.grid));
    launch.counts.threads += int64_t(volume(config.grid) * volume(config.block));
    return;
  }
  blockDim = config.block;
  gridDim = config.grid;
  const uint64_t blocks = volume(config.grid), together = config.cooperative ? blocks : config.cluster;
  std::vector<uint64_t> order(blocks / together);
  std::iota(order.begin(), order.end(), 0);
  const size_t wanted = settings().sample ? std::min<size_t>(1, order.size()) : order.size();
  // At the ends there may be less to do.
  if (settings().sample) std::swap(order[0], order[order.size() / 2]);
  const Kernel before = launch.counts;
  for (size_t i = 0; i < wanted; ++i) {
    std::swap(order[i], order[i + launch.draw(order.size() - i)]);
    set_up(launch, order[i] * together, together);
    run_threads(launch);
    tear_down(launch);
  }
  end_of_launch(launch.counts.traffic);
  if (wanted < order.size()) launch.counts.repeat(before, int64_t(order.size()));
  ++launch.counts.launches;
}

uint64_t barrier(Scope scope, const char* name, uint64_t predicate, const Where& where) {
  if (scope == Scope::kGrid && !current->config.cooperative)
    fail(std::string(name) + " at " + at(where) + " in a grid that is not cooperative");
  return wait({scope, name, where}, predicate, kBallot);
}

uint64_t warp_meeting(Scope scope, const char* name, unsigned mask, uint64_t value, int source, const Where& where) {
  if (!(mask >> lane() & 1)) fail(std::string(name) + " at " + at(where) + ": mask " + hex(mask) + " lacks the caller");
  return wait({scope, name, where, mask}, value, source);
}

unsigned lane() { return running->lane(); }

Thread* running_thread() { return running; }
Launch* running_launch() { return current; }

void yield() { to_scheduler(); }

void* shared(const char* declaration, const char* name, size_t bytes, size_t alignment, const Where& where) {
  return shared_of({running->block, declaration, name, bytes, alignment, where});
}

void* dynamic_shared() { return running->block->arrays.front().data(); }

void* map_shared(const void* pointer, unsigned rank, const Where& where) {
  const std::string call = "map_shared at " + at(where) + ": ";
  require(rank < cluster_size(),
          call + "rank " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster_size()));
  Block& mine = *running->block;
  Block& other = current->blocks[mine.number / cluster_size() * cluster_size() + rank];
  require(other.group.expected > 0,
          call + "the block of rank " + std::to_string(rank) + " has returned, and its shared memory with it");
  const char* const address = static_cast<const char*>(pointer);
  for (const Array& array : mine.arrays)
    if (address >= array.data() && address <= array.data() + array.bytes)
      return shared_of({&other, array.declaration, array.name, array.bytes, array.alignment, where}) +
             (address - array.data());
  fail(call + "the pointer is not into shared memory of this block");
}

unsigned cluster_size() { return current->config.cluster; }

}  // namespace normops::emulator
