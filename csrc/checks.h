#pragma once

// Checks of the arguments of the public operators. Messages name the operator, the argument, what was expected and
// what came; the type of the exception is the one torch raises.

#include "extras.h"

namespace normops {

// A strided tensor of a floating dtype.
void check_input(const char* op, const at::Tensor& input);

// A floating tensor of the given shape on the input's device, or absent.
void check_parameter(const char* op, const char* name, const OptionalTensor& tensor, const at::Tensor& input,
                     c10::SymIntArrayRef shape, const char* meaning);

struct NamedParameter {
  const char* name;
  const OptionalTensor& tensor;
};

// Where several parameters agree with each other and not with the input, it is the input that is wrong: the message
// says so, and names the argument of the layer that gave them their size. Other disagreements are left to
// check_parameter.
void check_channels(const char* op, const at::Tensor& input, std::initializer_list<NamedParameter> parameters,
                    const char* layer_argument);

// Running statistics: both or neither, of shape (C), not differentiable.
void check_running_stats(const char* op, const OptionalTensor& mean, const OptionalTensor& var,
                         const at::Tensor& input);

// A residual like the input; an activation that is known, and a slope only where there is a use for it; nothing that
// cannot be inverted with memory_efficient.
Extras check_extras(const char* op, const at::Tensor& input, const OptionalName& activation, double negative_slope,
                    const OptionalTensor& residual, double weight_offset, bool memory_efficient);
// Parameters that differ between samples, or along other dimensions, as private operators take them (extras.h): of one
// shape, or absent.
struct Varying {
  OptionalTensor weight, bias;
  int64_t varying = 0;
};
// Weight and bias of row layers of which one has more dimensions than `normalized_shape`: broadcast to the input.
Varying check_varying_rows(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                           const OptionalTensor& weight, const OptionalTensor& bias);
// Weight and bias of channel layers of which one is (N, C).
Varying check_varying_channels(const char* op, const at::Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias);
inline bool has_more_dimensions(const OptionalTensor& parameter, size_t plain) {
  return defined(parameter) && parameter->dim() > int64_t(plain);
}

// A mask of bools, seen in the shape (N, *positions) to which it is broadcast; or none.
OptionalTensor check_mask(const char* op, const at::Tensor& input, const OptionalTensor& mask);
void check_residual(const char* op, const at::Tensor& residual, const at::Tensor& input);

// input.shape[-k:] == normalized_shape, which has k >= 1 entries.
void check_normalized_shape(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape);

}  // namespace normops
