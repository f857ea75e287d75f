#pragma once

// Layers whose backward starts from their output, so that the input need not be kept (memory_efficient=True).
//
// An activation that can be inverted gives z = weight * xhat + bias, and that gives x - mean = (z - bias) / weight *
// sqrt(var + eps): an input whose mean is zero, which has the same gradients. Nothing of the mean, however large,
// enters, so no digits are lost to it. Where z says too little of xhat, inputs are kept, channel by channel (of rows:
// position by position).

#include "../extras.h"

namespace normops {

struct KeptInputs {
  at::Tensor index;   // of channels, or of positions in a row; undefined: there are none
  at::Tensor values;  // those of the input: (N, channels, ...) or (rows, positions)
};

// What of the input has to be kept beside the output; nothing is returned where that is all of it. `normalized_ndim` is
// zero for the layers of channels.
std::optional<KeptInputs> inputs_to_keep(const at::Tensor& input, const at::Tensor& output,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         int64_t normalized_ndim, const Extras& extras);

// The input and the mean to go with it.
Tensors2 restored_channels(const at::Tensor& output, const at::Tensor& mean, const at::Tensor& var,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           const Activation& activation, const KeptInputs& kept);
Tensors2 restored_rows(const at::Tensor& output, int64_t normalized_ndim, const at::Tensor& mean,
                       const at::Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Activation& activation, double weight_offset, const KeptInputs& kept);

// Within a backward that is recorded itself: makes a restored input the one that the layer was given.
void connect_to_input(const at::Tensor& restored);

}  // namespace normops
