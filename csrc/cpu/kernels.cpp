#include "kernels.h"

#include <ATen/Version.h>

#include <cstdlib>
#include <string>

namespace normops::cpu {

#define NORMOPS_DECLARE_KERNELS(ISA)      \
  namespace ISA {                         \
  void add_row_kernels(KernelTable&);     \
  void add_channel_kernels(KernelTable&); \
  }
NORMOPS_DECLARE_KERNELS(DEFAULT)
#ifdef NORMOPS_X86
NORMOPS_DECLARE_KERNELS(AVX2)
NORMOPS_DECLARE_KERNELS(AVX512)
NORMOPS_DECLARE_KERNELS(AVX512_BF16)
#endif

const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable chosen;
#ifdef NORMOPS_X86
    // Torch has already asked the processor, and obeys ATEN_CPU_CAPABILITY. It has no name for AVX512_BF16.
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      chosen.name = "AVX512";
      AVX512::add_row_kernels(chosen);
      AVX512::add_channel_kernels(chosen);
      if (std::getenv("ATEN_CPU_CAPABILITY") == nullptr && __builtin_cpu_supports("avx512bf16")) {
        chosen.name = "AVX512_BF16";
        AVX512_BF16::add_row_kernels(chosen);
        AVX512_BF16::add_channel_kernels(chosen);
      }
      return chosen;
    }
    if (capability == "AVX2") {
      chosen.name = "AVX2";
      AVX2::add_row_kernels(chosen);
      AVX2::add_channel_kernels(chosen);
      return chosen;
    }
#endif
    chosen.name = "DEFAULT";
    DEFAULT::add_row_kernels(chosen);
    DEFAULT::add_channel_kernels(chosen);
    return chosen;
  }();
  return table;
}

}  // namespace normops::cpu
