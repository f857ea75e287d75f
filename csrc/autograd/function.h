#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../extras.h"
#include "composition.h"
#include "restore.h"

namespace normops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Older torch counts the owners of a node in a shared_ptr and brings its own function to delete it.
template <typename Node>
auto make_node() {
  using Pointer = decltype(std::declval<Node>().getptr());
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// Function::apply without what the outputs of normops do not need: they are new tensors, neither views nor inputs
// written in place, and take no part in forward-mode AD, which has a route of its own. That saves an eighth of the time
// of a small forward. The node is torch's own, so compiled autograd knows it; it would not know constants among the
// outputs if they were marked, so the first `kDifferentiable` have a gradient and the others are left without.
template <typename Function, typename... Args>
variable_list record(const Args&... args) {
  using Node = torch::autograd::CppNode<Function>;
  const auto node = make_node<Node>();
  variable_list inputs;
  inputs.reserve(sizeof...(Args));
  torch::autograd::extract_vars(node->is_variable_input_, inputs, args...);
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->ctx_.set_materialize_grads(false);
  variable_list outputs;
  {
    const at::NoGradGuard no_grad;
    outputs = Function::forward(&node->ctx_, args...);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto index = node->add_input_metadata(outputs[i]);
    if (i < Function::kDifferentiable) torch::autograd::impl::set_gradient_edge(outputs[i], {node, index});
  }
  node->save_variables_to_ctx();
  return outputs;
}

// Which of (input, weight, bias, residual) need a gradient. Absent ones have no edge in the graph, so edges are
// counted.
inline Mask4 gradients_wanted(AutogradContext* ctx, bool has_weight, bool has_bias, bool has_residual,
                              size_t inputs = 1) {
  size_t edge = inputs;
  const auto wanted = [&](bool present) { return present && ctx->needs_input_grad(edge++); };
  const bool weight = wanted(has_weight), bias = wanted(has_bias), residual = wanted(has_residual);
  return {ctx->needs_input_grad(0) || (inputs > 1 && ctx->needs_input_grad(1)), weight, bias, residual};
}

// Whether nobody but the node that was given this gradient has it, or any of its memory, of which it is all.
inline bool is_last_owner(const at::Tensor& grad) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  if (grad.use_count() != 1 || grad.key_set() != kPlain) return false;
  const c10::Storage& storage = grad.storage();
  const bool base = grad.is_view() && grad._base().use_count() == 1;  // which only this view keeps
  // And not, say, that of an array, or copied when it is written.
  const bool allocated = storage.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
  return allocated && storage.nbytes() == grad.nbytes() && storage.use_count() == size_t(base ? 2 : 1);
}

// Has a backward write the gradient of the input where that of the output was, if the node is the last to read that:
// it spares a quarter of the memory traffic, and new memory, which the system may have to clear first. Elsewhere than
// on the CPU, whose allocator keeps nothing, there is little to spare.
class InPlaceOfOutput {
 public:
  // `format` is the layout of the gradient to come; `saved` is what it is made from besides.
  InPlaceOfOutput(bool possible, const at::Tensor& grad, at::MemoryFormat format, const variable_list& saved) {
    if (!possible || at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set()) return;
    if (in_functorch() || has_tangent(grad) || !grad.is_contiguous(format) || !is_last_owner(grad)) return;
    for (const at::Tensor& tensor : saved) {
      if (tensor.defined() && tensor.key_set().has_any(c10::python_ks)) return;
    }
    below_.emplace();
  }

  explicit operator bool() const { return below_.has_value(); }

  // The result is a tensor of its own, also where what it took the place of was a view.
  at::Tensor own(const at::Tensor& dx) const { return below_ && dx.is_view() ? dx.variable_data() : dx; }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;  // such an operator has kernels for the CPU alone
};

// The extras of a layer that has some, in entries that others do without.
inline void save_extras(AutogradContext* ctx, const Extras& extras) {
  if (!extras.activation && extras.weight_offset == 0 && !extras.varying) return;
  ctx->saved_data["activation"] = int64_t(extras.activation.kind);
  ctx->saved_data["negative_slope"] = extras.activation.negative_slope;
  ctx->saved_data["weight_offset"] = extras.weight_offset;
  ctx->saved_data["varying"] = extras.varying;
}

inline BackwardExtras saved_extras(AutogradContext* ctx) {
  const auto& data = ctx->saved_data;
  if (data.find("activation") == data.end()) return {};
  BackwardExtras extras;
  extras.activation = {int(data.at("activation").toInt()), data.at("negative_slope").toDouble()};
  extras.weight_offset = data.at("weight_offset").toDouble();
  extras.varying = data.at("varying").toInt();
  return extras;
}

// The tensors that the derivative of an activation is taken from, behind those that are saved in any case: bias,
// residual, output. Nothing is kept that would not be there without this layer, as long as it can be had from that.
inline void save_for_activation(variable_list& saved, const Extras& extras, const OptionalTensor& bias,
                                const at::Tensor& output) {
  if (!extras.activation) return;
  const bool from_output = defined(extras.residual) && derivative_from_output(extras.activation);
  saved.push_back(from_output ? at::Tensor() : bias.value_or(at::Tensor()));
  saved.push_back(from_output ? at::Tensor() : extras.residual.value_or(at::Tensor()));
  saved.push_back(from_output ? output : at::Tensor());
}

inline void restore_for_activation(BackwardExtras& extras, const variable_list& saved, size_t first) {
  if (!extras.activation) return;
  extras.bias = saved[first];
  extras.residual = saved[first + 1];
  extras.output = saved[first + 2];
}

// What the backward needs of a layer that does not keep its input: the output in the place of the input; bias, two
// places that stay empty, and the inputs that are kept all the same. Their number tells it from other layers.
constexpr size_t kSavedForRestoring = 9;
inline void save_for_restoring(variable_list& saved, const OptionalTensor& bias, const at::Tensor& output,
                               const KeptInputs& kept) {
  saved[0] = output;
  saved.resize(4);
  saved.insert(saved.end(), {bias.value_or(at::Tensor()), {}, {}, kept.index, kept.values});
}
inline KeptInputs kept_inputs(const variable_list& saved) { return {saved[7], saved[8]}; }

// A Function may not return undefined tensors: the results that were asked for, and back to three with the others
// undefined.
inline variable_list only_wanted(const Tensors3& three, Mask3 mask) {
  variable_list wanted;
  if (mask[0]) wanted.push_back(std::get<0>(three));
  if (mask[1]) wanted.push_back(std::get<1>(three));
  if (mask[2]) wanted.push_back(std::get<2>(three));
  return wanted;
}

inline Tensors3 all_three(const variable_list& wanted, Mask3 mask) {
  auto next = wanted.begin();
  const auto take = [&](bool present) { return present ? *next++ : at::Tensor(); };
  at::Tensor first = take(mask[0]), second = take(mask[1]), third = take(mask[2]);
  return {first, second, third};
}

// Three answers in one entry: each entry costs as much time as a small input.
inline void save_mask(AutogradContext* ctx, Mask3 mask) {
  ctx->saved_data["mask"] = int64_t(mask[0]) | int64_t(mask[1]) << 1 | int64_t(mask[2]) << 2;
}

inline Mask3 saved_mask(AutogradContext* ctx) {
  const int64_t bits = ctx->saved_data["mask"].toInt();
  return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
}

}  // namespace normops
