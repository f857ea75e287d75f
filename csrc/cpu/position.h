#pragma once

// LayerNorm and RMSNorm over the channels of inputs whose positions lie side by side (NCHW): every position has a
// statistic of its own.

#include "../extras.h"

namespace normops::cpu {

// As the operators of rows (row.cpp), with contiguous results.
Tensors3 position_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                       bool centered, const Extras& extras);
Tensors4 position_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                                const at::Tensor& rstd, const OptionalTensor& weight, double eps, bool centered,
                                Mask4 output_mask, const BackwardExtras& extras);

}  // namespace normops::cpu
