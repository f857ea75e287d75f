// The stages one at a time, per channel and over the batch: between them SyncBatchNorm joins what its ranks have found.
// And the running statistics, which are moved by what the stages have found.

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "../ops.h"
#include "../tensors.h"
#include "channel.h"

namespace normops::cpu {
namespace {

std::pair<at::Tensor, at::Tensor> zero_statistics(const at::Tensor& input) {
  const auto options = input.options().dtype(at::kDouble);
  return {at::zeros({input.size(1)}, options), at::zeros({input.size(1)}, options)};
}

Tensors2 channel_moments(const at::Tensor& input, const OptionalTensor& mask) {
  at::Tensor x = input;
  const at::Tensor flags = as_flags(mask, input);
  const auto view = batch_view({&x}, /*wide=*/true);
  const auto valid = mask_of(view.geometry, flags);
  at::Tensor mean, var;  // which a lambda captures, as clang before 16 does not capture structured bindings
  std::tie(mean, var) = zero_statistics(input);
  if (view.geometry.elements() == 0) return {mean, var};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_moments", [&] {
    channel_forward<scalar_t>(view.geometry, {x.const_data_ptr<scalar_t>(), view.strides[0]}, {}, {{}, 1}, {{}, 0},
                              /*eps=*/1,
                              /*given=*/false, mean.mutable_data_ptr<double>(), var.mutable_data_ptr<double>(), {},
                              valid ? &*valid : nullptr);
  });
  return {mean, var};
}

Tensors2 channel_grad_sums(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                           const at::Tensor& var, double eps, const OptionalTensor& mask) {
  at::Tensor x = input, dy = grad_output;
  const at::Tensor flags = as_flags(mask, input);
  const auto view = batch_view({&x, &dy}, /*wide=*/true);
  const auto valid = mask_of(view.geometry, flags);
  at::Tensor sum_dy, sum_dy_xhat;  // likewise
  std::tie(sum_dy, sum_dy_xhat) = zero_statistics(input);
  const at::Tensor means = as_parameter(mean, input, input.size(1), at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, input.size(1), at::kDouble, "var");
  if (view.geometry.elements() == 0) return {sum_dy, sum_dy_xhat};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_grad_sums", [&] {
    channel_backward<scalar_t>(view.geometry, {dy.const_data_ptr<scalar_t>(), view.strides[1]},
                               {x.const_data_ptr<scalar_t>(), view.strides[0]}, {}, {{}, 1},
                               means.const_data_ptr<double>(), vars.const_data_ptr<double>(), eps, /*given=*/true, {},
                               sum_dy_xhat.mutable_data_ptr<double>(), sum_dy.mutable_data_ptr<double>(), {},
                               valid ? &*valid : nullptr);
  });
  return {sum_dy, sum_dy_xhat};
}

at::Tensor channel_grad_apply(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                              const at::Tensor& var, const OptionalTensor& weight, const at::Tensor& sum_dy,
                              const at::Tensor& sum_dy_xhat, int64_t count, double eps, const OptionalTensor& mask) {
  at::Tensor x = input, dy = grad_output;
  at::Tensor dx = new_like(input);
  const at::Tensor flags = as_flags(mask, input);
  const auto view = batch_view({&x, &dy, &dx}, /*wide=*/true);
  const auto valid = mask_of(view.geometry, flags);
  const auto statistic = [&](const at::Tensor& tensor, const char* name) {
    return as_parameter(tensor, input, input.size(1), at::kDouble, name);
  };
  const at::Tensor means = statistic(mean, "mean"), vars = statistic(var, "var");
  const at::Tensor dys = statistic(sum_dy, "sum_dy"), dys_xhat = statistic(sum_dy_xhat, "sum_dy_xhat");
  if (view.geometry.elements() == 0) return dx;
  TORCH_CHECK(count > 0, "normops: expected count > 0, got ", count);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_grad_apply", [&] {
    const at::Tensor w = as_own_parameter(weight, input, input.size(1), "weight");
    const GradTotals totals{dys.const_data_ptr<double>(), dys_xhat.const_data_ptr<double>(), double(count)};
    channel_backward<scalar_t>(view.geometry, {dy.const_data_ptr<scalar_t>(), view.strides[1]},
                               {x.const_data_ptr<scalar_t>(), view.strides[0]},
                               {dx.mutable_data_ptr<scalar_t>(), view.strides[2]}, {w, 1},
                               means.const_data_ptr<double>(), vars.const_data_ptr<double>(), eps, /*given=*/false,
                               totals, nullptr, nullptr, {}, valid ? &*valid : nullptr);
  });
  return dx;
}

// running = (1 - momentum) * running + momentum * statistic, with the unbiased variance of `count` values; statistics
// per sample are averaged first.
void update_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, double momentum, int64_t count) {
  check_running_update(running_mean, running_var, mean, var, count);
  const int64_t channels = running_mean.size(0), rows = mean.dim() == 2 ? mean.size(0) : 1;
  const auto move = [&](const at::Tensor& running, const at::Tensor& statistic, double correction, const char* name) {
    const at::Tensor values = as_parameter(statistic, running, rows * channels, at::kDouble, name);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, running.scalar_type(), "normops::_update_running_stats", [&] {
          scalar_t* const data = running.mutable_data_ptr<scalar_t>();
          const int64_t stride = running.stride(0);
          const double* const value = values.const_data_ptr<double>();
          for (int64_t c = 0; c < channels; ++c) {
            double sum = 0;
            for (int64_t row = 0; row < rows; ++row) sum += value[row * channels + c];
            scalar_t& target = data[c * stride];
            target = scalar_t((1 - momentum) * double(target) + momentum * correction * (sum / rows));
          }
        });
  };
  move(running_mean, mean, 1, "mean");
  move(running_var, var, double(count) / double(count - 1), "var");
}

// Where the statistics are at hand it is no gain to move the running ones with them.
Tensors3 channel_norm_tracked(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                              const OptionalTensor& weight, const OptionalTensor& bias, bool over_batch,
                              double momentum, double eps, const OptionalTensor& residual, OptionalName activation,
                              double negative_slope) {
  const Tensors3 results = ops::channel_norm(input, std::nullopt, std::nullopt, weight, bias, input.size(1), over_batch,
                                             eps, {as_activation(activation, negative_slope), residual});
  const auto& [output, mean, var] = results;
  update_running_stats(running_mean, running_var, mean, var, momentum,
                       input.numel() / std::max<int64_t>(1, mean.numel()));
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_update_running_stats", update_running_stats);
  m.impl("_channel_norm_tracked", channel_norm_tracked);
  m.impl("_channel_moments", channel_moments);
  m.impl("_channel_grad_sums", channel_grad_sums);
  m.impl("_channel_grad_apply", channel_grad_apply);
}

}  // namespace normops::cpu
