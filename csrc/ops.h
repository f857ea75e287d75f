#pragma once

// Operators called from C++, through the dispatcher so that torch.compile and profilers see them.

#include "extras.h"

namespace normops::ops {

at::Tensor fused_layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation = {},
                            double negative_slope = Activation{}.negative_slope, const OptionalTensor& residual = {},
                            double weight_offset = 0, bool memory_efficient = false);
at::Tensor fused_rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                          std::optional<double> eps, OptionalName activation = {},
                          double negative_slope = Activation{}.negative_slope, const OptionalTensor& residual = {},
                          double weight_offset = 0, bool memory_efficient = false, const OptionalTensor& bias = {});
at::Tensor fused_group_norm(const at::Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, OptionalName activation = {},
                            double negative_slope = Activation{}.negative_slope, const OptionalTensor& residual = {},
                            bool memory_efficient = false, const OptionalTensor& mask = {});
at::Tensor fused_channel_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                    double eps, OptionalName activation = {},
                                    double negative_slope = Activation{}.negative_slope,
                                    const OptionalTensor& residual = {}, double weight_offset = 0,
                                    bool memory_efficient = false);
Tensors2 add_layer_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps, double weight_offset);
Tensors2 add_rms_norm(const at::Tensor& input, const at::Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, std::optional<double> eps, double weight_offset);

Tensors3 row_norm(const at::Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool centered, const Extras& extras = {});
Tensors4 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask4 output_mask, const BackwardExtras& extras);
Tensors3 row_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t normalized_ndim,
                           const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, double eps,
                           bool centered, Mask3 output_mask);
Tensors4 add_row_norm(const at::Tensor& input, const at::Tensor& residual, int64_t normalized_ndim,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered,
                      double weight_offset);
Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, c10::SymInt num_groups, bool over_batch,
                      double eps, const Extras& extras = {});
Tensors3 channel_norm_tracked(const at::Tensor& input, const Tracking& tracking, const OptionalTensor& weight,
                              const OptionalTensor& bias, bool over_batch, double eps, const Extras& extras = {});
Tensors4 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask4 output_mask,
                               const BackwardExtras& extras);
Tensors3 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, c10::SymInt num_groups,
                               bool over_batch, double eps, bool input_stats, Mask3 output_mask);
void update_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, c10::SymInt count);
void update_counted_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, const at::Tensor& count);

}  // namespace normops::ops
