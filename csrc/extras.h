#pragma once

// What the operators take beside torch's arguments: an activation and a residual, which end the pass of a norm, and the
// offset of a weight that is stored as its distance from one, a mask. They travel together.

#include <c10/util/Exception.h>

#include <string_view>

#include "activation.h"
#include "tensors.h"

namespace normops {

using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Mask4 = std::array<bool, 4>;
using OptionalName = std::optional<std::string_view>;

inline Activation as_activation(const OptionalName& name, double negative_slope) {
  if (!name) return {0, negative_slope};
  const int kind = activation_kind(*name);
  TORCH_CHECK_VALUE(kind, "normops: expected activation to be None or one of ", known_activations(), ", got '", *name,
                    "'");
  return {kind, negative_slope};
}

struct Extras {
  Activation activation{};
  OptionalTensor residual{};
  double weight_offset = 0;
  bool memory_efficient = false;  // the backward starts from the output (autograd/restore.h)
  OptionalTensor mask{};          // bool, (N, *positions): what is valid
  // A bit for each dimension of the input along which weight and bias differ. With none, they have their plain shape.
  // Otherwise: (N, C) in channel layers; in row layers the input's shape, but 1 in leading dimensions without a bit.
  int64_t varying = 0;

  bool epilogue() const { return activation || defined(residual); }
  bool any() const { return epilogue() || weight_offset != 0; }
};

// Running statistics that a norm moves by those of its input.
struct Tracking {
  at::Tensor running_mean, running_var;
  double momentum;
};

// Extras for the backward, with what the derivative of the activation is taken from: the output, where the backward
// can do with it and a residual was added, or else the input, with bias and residual.
struct BackwardExtras {
  Activation activation{};
  OptionalTensor bias{};
  OptionalTensor residual{};
  OptionalTensor output{};
  double weight_offset = 0;
  OptionalTensor grad_sum{};  // added to the gradient of the input
  OptionalTensor mask{};
  int64_t varying = 0;
  bool in_place = false;  // the gradient of the input takes the place of the output's

  bool any() const { return activation || weight_offset != 0 || defined(grad_sum) || defined(mask) || varying; }
};

}  // namespace normops
