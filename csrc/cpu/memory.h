#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <utility>

namespace normops::cpu {

// malloc maps a large block anew, and the system then finds and clears it page by page as it is first written, each
// time by an interrupt: for an output of this size that takes longer than the layer. This asks for all pages at once.
const at::Tensor& prepare_output(const at::Tensor& output);

// New tensors without the dispatcher: it would take longer than the elements of a small input.
inline at::Tensor new_output(const at::Tensor& input, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return prepare_output(at::detail::empty_cpu(input.sizes(), input.scalar_type(), /*pin_memory=*/false, format));
}

// A tensor for dx, in the layout it is to have.
inline at::Tensor place_of_gradient(bool in_place, const at::Tensor& grad_output, const at::Tensor& input,
                                    at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (!in_place) return new_output(input, format);
  TORCH_CHECK(grad_output.sizes() == input.sizes() && grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.is_contiguous(format),
              "normops: expected grad_output, which is to be overwritten, to be ", input.scalar_type(), " of shape ",
              input.sizes(), " and contiguous in ", format, ", got ", grad_output.scalar_type(), " of shape ",
              grad_output.sizes(), " with strides ", grad_output.strides());
  TORCH_CHECK(!at::GradMode::is_enabled() || !grad_output.requires_grad(),
              "normops: grad_output, which is to be overwritten, may not require a gradient");
  at::assert_no_overlap(grad_output, input);
  return grad_output;
}

// The two operators of a backward: with dx in memory of its own, and in the place of dy.
template <auto kBackward, bool kInPlace>
struct Placing;
template <typename Results, typename... Arguments, Results (*kBackward)(bool, Arguments...), bool kInPlace>
struct Placing<kBackward, kInPlace> {
  static Results call(Arguments... arguments) { return kBackward(kInPlace, std::forward<Arguments>(arguments)...); }
};

}  // namespace normops::cpu
