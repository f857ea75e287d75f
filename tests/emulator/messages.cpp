#include "messages.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <map>
#include <sstream>

namespace normops::emulator {
namespace {

std::string state_of(const Thread& thread) {
  if (thread.state == Thread::State::kReturned) return " have returned";
  if (thread.state == Thread::State::kReady) return " can go on";
  const Point& point = *thread.point;
  const std::string mask = point.mask ? ", mask " + hex(point.mask) : "";
  return std::string(" wait in ") + point.name + " at " + at(point.where) + mask;
}

}  // namespace

std::string at(const char* file, unsigned line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

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

std::string in_launch() {
  return " in " + kernel_name(running_launch()->kernel) + ", launched at " + at(running_launch()->config.where);
}

std::string of_thread(const Thread& thread) {
  return in_launch() + ", block " + text(thread.block->index) + ", thread " + text(thread.index);
}

std::string who_waits() {
  constexpr int kBlocks = 4;
  std::string result;
  int listed = 0;
  for (const Block& block : running_launch()->blocks) {
    const auto threads = block.group.threads;
    if (std::all_of(threads.begin(), threads.end(), [](auto* t) { return t->state == Thread::State::kReturned; }))
      continue;
    if (listed++ == kBlocks) return result + "\n  and in other blocks";
    std::map<std::string, std::string> numbers;
    for (size_t begin = 0, end; begin < threads.size(); begin = end) {
      const std::string state = state_of(*threads[begin]);
      for (end = begin + 1; end < threads.size() && state_of(*threads[end]) == state;) ++end;
      std::string& list = numbers[state];
      list += (list.empty() ? "" : ", ") + std::to_string(begin);
      if (end > begin + 1) list += "-" + std::to_string(end - 1);
    }
    result += "\n  block " + text(block.index) + ":";
    for (const auto& [state, list] : numbers) result += "\n    threads " + list + state;
  }
  return result;
}

}  // namespace normops::emulator
