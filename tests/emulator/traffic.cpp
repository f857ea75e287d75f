#include "traffic.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "messages.h"

namespace normops::emulator {

namespace {

constexpr uint64_t kSector = 32, kBanks = 32, kBank = 4;

struct Access {
  uint64_t address;
  uint32_t bytes;
  uint32_t lane;
};

// Threads run one after the other, so that the accesses of a warp that belong together are found again by where in the
// code they are and how often their thread has been there.
struct Moment {
  const void* code;
  uint32_t visit, warp;
  bool write, shared;

  bool operator==(const Moment&) const = default;
};
struct Hash {
  size_t operator()(const Moment& m) const {
    return std::hash<const void*>()(m.code) * 31 + (uint64_t(m.visit) << 20) + m.warp * 2 + m.write;
  }
};

struct Visits {
  std::unordered_map<const void*, uint32_t> of_code;
  int64_t loads = 0;
};

std::unordered_map<Moment, std::vector<Access>, Hash> moments;
std::unordered_map<const Thread*, Visits> visits;
std::unordered_set<uint64_t> distinct[2];

// Bytes read and written of each line of memory, kernel by kernel. Tensors begin with a line.
constexpr uint64_t kLine = 64;
std::map<const void*, std::unordered_map<uint64_t, std::array<int64_t, 2>>> lines;

// Of an access of a warp: how many turns its banks take, given that wider ones are taken in parts of the warp.
int64_t turns(const std::vector<Access>& accesses) {
  int64_t total = 0;
  const uint32_t lanes = std::min<uint32_t>(32, 128 / std::max<uint32_t>(accesses.front().bytes, 4));
  for (uint32_t first = 0; first < 32; first += lanes) {
    std::array<std::set<uint64_t>, kBanks> words;
    for (const Access& access : accesses) {
      if (access.lane < first || access.lane >= first + lanes) continue;
      for (uint64_t word = access.address / kBank; word <= (access.address + access.bytes - 1) / kBank; ++word) {
        words[word % kBanks].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    total += int64_t(most);
  }
  return total;
}

int64_t fewest_turns(const std::vector<Access>& accesses) {
  uint64_t first = UINT64_MAX;
  std::set<uint64_t> words;
  for (const Access& access : accesses) {
    first = std::min(first, access.address);
    for (uint64_t word = access.address / kBank; word <= (access.address + access.bytes - 1) / kBank; ++word) {
      words.insert(word);
    }
  }
  return int64_t((words.size() + kBanks - 1) / kBanks);
}

// Special registers, and the arguments of the launch, which is on the stack of the caller.
bool of_emulator(uint64_t address) {
  constexpr uint64_t kCaller = 64 << 10;
  for (const auto& [begin, bytes] : {std::pair<const void*, size_t>{&threadIdx, sizeof(threadIdx)},
                                     {&blockIdx, sizeof(blockIdx)},
                                     {&blockDim, sizeof(blockDim)},
                                     {&gridDim, sizeof(gridDim)},
                                     {running_launch(), kCaller}}) {
    if (address - uint64_t(begin) < bytes) return true;
  }
  return false;
}

void note(const void* code, uint64_t address, uint32_t bytes, bool write) {
  Thread* const thread = running_thread();
  if (!thread) return;
  if (thread->fiber.holds(address) || of_emulator(address)) return;
  uint64_t place = address;
  bool shared = false;
  for (const Array& array : thread->block->arrays) {
    const uint64_t begin = uint64_t(array.data());
    if (address >= begin && address < begin + array.bytes) {
      shared = true;
      place = address - begin;
    }
  }
  Visits& mine = visits[thread];
  if (!shared && !write) ++mine.loads;
  if (!shared) lines[running_launch()->kernel][address / kLine][write] += bytes;
  const uint32_t warp = thread->number / warpSize;
  moments[{code, mine.of_code[code]++, warp, write, shared}].push_back({place, bytes, thread->lane()});
}

}  // namespace

void end_of_block(Traffic& traffic) {
  for (const auto& [moment, accesses] : moments) {
    if (moment.shared) {
      traffic.shared += 1;
      traffic.conflicts += std::max<int64_t>(0, turns(accesses) - fewest_turns(accesses));
      continue;
    }
    std::set<uint64_t> sectors;
    int64_t bytes = 0;
    for (const Access& access : accesses) {
      bytes += access.bytes;
      for (uint64_t s = access.address / kSector; s <= (access.address + access.bytes - 1) / kSector; ++s) {
        sectors.insert(s);
      }
    }
    (moment.write ? traffic.written : traffic.read) += bytes;
    (moment.write ? traffic.sectors_written : traffic.sectors_read) += int64_t(sectors.size());
    distinct[moment.write].insert(sectors.begin(), sectors.end());
  }
  for (const auto& [thread, counted] : visits) traffic.chain = std::max(traffic.chain, counted.loads);
  moments.clear();
  visits.clear();
}

void end_of_launch(Traffic& traffic) {
  traffic.distinct_read += int64_t(distinct[0].size());
  traffic.distinct_written += int64_t(distinct[1].size());
  for (auto& sectors : distinct) sectors.clear();
}

// A line for every kernel: bytes read and written of some memory, name.
std::string moved(uint64_t begin, uint64_t bytes) {
  std::string report;
  for (const auto& [kernel, of_kernel] : lines) {
    std::array<int64_t, 2> total{};
    for (const auto& [line, counts] : of_kernel) {
      if (line * kLine < begin || line * kLine >= begin + bytes) continue;
      total[0] += counts[0];
      total[1] += counts[1];
    }
    report += std::to_string(total[0]) + " " + std::to_string(total[1]) + " " + kernel_name(kernel) + "\n";
  }
  return report;
}

void forget_traffic() { lines.clear(); }

void forget_accesses() {
  moments.clear();
  visits.clear();
  for (auto& sectors : distinct) sectors.clear();
}

}  // namespace normops::emulator

// ---- What g++ calls for every access
// ---------------------------------------------------------------------------------

#define NORMOPS_ACCESS(bytes)                                                         \
  void __asan_load##bytes##_noabort(void* at) {                                       \
    normops::emulator::note(__builtin_return_address(0), uint64_t(at), bytes, false); \
  }                                                                                   \
  void __asan_store##bytes##_noabort(void* at) {                                      \
    normops::emulator::note(__builtin_return_address(0), uint64_t(at), bytes, true);  \
  }

extern "C" {

NORMOPS_ACCESS(1)
NORMOPS_ACCESS(2)
NORMOPS_ACCESS(4)
NORMOPS_ACCESS(8)
NORMOPS_ACCESS(16)
void __asan_loadN_noabort(void* at, uint64_t bytes) {
  normops::emulator::note(__builtin_return_address(0), uint64_t(at), uint32_t(bytes), false);
}
void __asan_storeN_noabort(void* at, uint64_t bytes) {
  normops::emulator::note(__builtin_return_address(0), uint64_t(at), uint32_t(bytes), true);
}
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}

}  // extern "C"
