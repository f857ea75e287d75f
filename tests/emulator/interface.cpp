// What compilers and tests call by name.

#include "messages.h"
#include "traffic.h"

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

void normops_emulator_device(const char* name, int multiprocessors) {
  using namespace normops::emulator;
  settings().device = &architecture(name);
  settings().multiprocessors = multiprocessors;
}

void normops_emulator_dry(bool dry) { normops::emulator::settings().dry = dry; }
void normops_emulator_sample(bool sample) { normops::emulator::settings().sample = sample; }

// Counts begin at 0 again.
void normops_emulator_clear() {
  normops::emulator::forget_traffic();
  for (auto& [kernel, counts] : normops::emulator::kernels()) {
    auto attributes = std::move(counts.attributes);
    counts = {};
    counts.attributes = std::move(attributes);
  }
}

// What kernels read and wrote of some memory since the last clear.
const char* normops_emulator_moved(uint64_t begin, uint64_t bytes) {
  static std::string report;
  report = normops::emulator::moved(begin, bytes);
  return report.c_str();
}

// A line for every instantiation that was launched: launches, blocks, threads, barriers, exchanges, traffic, name.
const char* normops_emulator_report() {
  using namespace normops::emulator;
  static std::string report;
  report.clear();
  for (const auto& [kernel, counts] : kernels()) {
    if (!counts.launches) continue;
    const Traffic& t = counts.traffic;
    for (const int64_t count :
         {counts.launches, counts.blocks, counts.threads, counts.barriers, counts.exchanges, t.read, t.written,
          t.sectors_read, t.sectors_written, t.distinct_read, t.distinct_written, t.chain, t.shared, t.conflicts})
      report += std::to_string(count) + " ";
    report += kernel_name(kernel) + "\n";
  }
  return report.c_str();
}

}  // extern "C"
