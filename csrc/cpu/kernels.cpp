#include "kernels.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace normops::cpu {
namespace {

#define NORMOPS_INSTRUCTION_SET(ISA)                    \
  }                                                     \
  namespace ISA {                                       \
  void add_row_forward(KernelTable&);                   \
  void add_row_backward(KernelTable&);                  \
  void add_channel_forward(KernelTable&);               \
  void add_channel_backward(KernelTable&);              \
  void add_epilogue(KernelTable&);                      \
  }                                                     \
  namespace {                                           \
  [[maybe_unused]] void add_##ISA(KernelTable& table) { \
    table.name = #ISA;                                  \
    ISA::add_row_forward(table);                        \
    ISA::add_row_backward(table);                       \
    ISA::add_channel_forward(table);                    \
    ISA::add_channel_backward(table);                   \
    ISA::add_epilogue(table);                           \
  }
#ifdef NORMOPS_BUILT_DEFAULT
NORMOPS_INSTRUCTION_SET(DEFAULT)
#endif
#ifdef NORMOPS_BUILT_AVX2
NORMOPS_INSTRUCTION_SET(AVX2)
#endif
#ifdef NORMOPS_BUILT_AVX512
NORMOPS_INSTRUCTION_SET(AVX512)
#endif
#ifdef NORMOPS_BUILT_AVX512_BF16
NORMOPS_INSTRUCTION_SET(AVX512_BF16)
#endif

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = [] {
    // Torch has already asked the processor, and obeys ATEN_CPU_CAPABILITY. It has no name for AVX512_BF16. Each set
    // takes the place of the one before.
    const std::string capability = at::get_cpu_capability();
    [[maybe_unused]] const bool avx512 = capability == "AVX512", avx2 = avx512 || capability == "AVX2";
    KernelTable chosen{};
#ifdef NORMOPS_BUILT_DEFAULT
    add_DEFAULT(chosen);
#endif
#ifdef NORMOPS_BUILT_AVX2
    if (avx2) add_AVX2(chosen);
#endif
#ifdef NORMOPS_BUILT_AVX512
    if (avx512) add_AVX512(chosen);
#endif
#ifdef NORMOPS_BUILT_AVX512_BF16
    if (avx512 && std::getenv("ATEN_CPU_CAPABILITY") == nullptr && __builtin_cpu_supports("avx512bf16")) {
      add_AVX512_BF16(chosen);
    }
#endif
    TORCH_CHECK(chosen.name, "normops was built without kernels for ", capability, " (NORMOPS_INSTRUCTION_SETS)");
    return chosen;
  }();
  return table;
}

}  // namespace normops::cpu
