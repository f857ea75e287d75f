#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../tensors.h"

namespace normops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

inline void save_mask(AutogradContext* ctx, Mask3 mask) {
  ctx->saved_data["output_mask"] = int64_t(mask[0]) | int64_t(mask[1]) << 1 | int64_t(mask[2]) << 2;
}

inline Mask3 saved_mask(AutogradContext* ctx) {
  const int64_t bits = ctx->saved_data["output_mask"].toInt();
  return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
}

}  // namespace normops
