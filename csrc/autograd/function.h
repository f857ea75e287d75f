#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../tensors.h"

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

// Which of (input, weight, bias) need a gradient. Absent parameters have no edge in the graph, so edges are counted.
inline Mask3 gradients_wanted(AutogradContext* ctx, bool has_weight, bool has_bias) {
  const size_t bias_edge = has_weight ? 2 : 1;
  return {ctx->needs_input_grad(0), has_weight && ctx->needs_input_grad(1),
          has_bias && ctx->needs_input_grad(bias_edge)};
}

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
