// What autocast does to the public operators: what it does to torch's own. On CUDA, layer_norm, rms_norm and group_norm
// take their arguments to float32; everything else, and everything on the CPU, keeps its dtype.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../ops.h"

namespace normops {
namespace {

template <auto* op, typename Signature = std::remove_pointer_t<decltype(op)>>
using InFloat32 = typename at::autocast::WrapFunction<at::autocast::CastPolicy::fp32, c10::DeviceType::CUDA, Signature,
                                                      Signature, op>::type;

}  // namespace

TORCH_LIBRARY_IMPL(normops, AutocastCUDA, m) {
  m.impl("layer_norm", TORCH_FN(InFloat32<ops::layer_norm>::call));
  m.impl("group_norm", TORCH_FN(InFloat32<ops::group_norm>::call));
  // Torch 2.11 leaves rms_norm in the dtype it comes in.
  const auto theirs = c10::Dispatcher::singleton().findSchemaOrThrow("aten::rms_norm", "");
  if (theirs.hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA)) {
    m.impl("rms_norm", TORCH_FN(InFloat32<ops::rms_norm>::call));
  }
}

}  // namespace normops
