// The operators of the channel engine on the CPU: tensors and their geometry, masks, results.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "../extras.h"
#include "channel.h"
#include "extremes.h"

namespace normops::cpu {

at::Tensor as_flags(const OptionalTensor& mask, const at::Tensor& input) {
  if (!defined(mask)) return {};
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->device() == input.device() && mask->dim() + 1 == input.dim() &&
                  mask->numel() * input.size(1) == input.numel(),
              "normops: expected a mask of bools for each position of input (", input.sizes(), "), got ",
              mask->scalar_type(), " of shape ", mask->sizes());
  const at::Tensor flags = mask->contiguous();
  // Nothing has no address, which memchr may not be given.
  const bool masks = flags.numel() > 0 && std::memchr(flags.const_data_ptr<bool>(), 0, flags.numel()) != nullptr;
  return masks ? flags : at::Tensor();
}

namespace {

// Elements of a weight or bias.
int64_t parameters_of(const at::Tensor& input, int64_t varying) {
  return input.size(1) * (varying ? input.size(0) : 1);
}

// As torch does for inputs of one value. What has none is not an error, as samples may be there to fill a batch.
void check_counts(const Geometry& g, const Mask& mask, const at::Tensor& input) {
  const char* const op = g.over_batch ? "batch_norm" : g.num_groups == g.channels ? "instance_norm" : "group_norm";
  const GroupElements elements(g, &mask);
  for (int64_t row = 0; row < g.rows(); ++row) {
    TORCH_CHECK_VALUE(
        elements.of_row(row) != 1, op,
        ": expected mask to leave more than 1 value per statistic when training, got 1 in input of shape ",
        input.sizes(), g.over_batch ? "" : ", sample " + std::to_string(row));
  }
}

// A given statistic in float64.
at::Tensor in_double(at::IntArrayRef shape, const OptionalTensor& given, const at::Tensor& input, const char* name) {
  const at::Tensor statistic = new_array(shape);
  const at::Tensor values = as_parameter(given, input, statistic.numel(), given->scalar_type(), name);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "normops::_channel_norm", [&] {
    std::copy_n(values.const_data_ptr<scalar_t>(), values.numel(), statistic.mutable_data_ptr<double>());
  });
  return statistic;
}

// Tensors of the input's shape and type, to be seen through one geometry: undefined ones are left out.
class Operands {
 public:
  explicit Operands(std::initializer_list<at::Tensor*> tensors) {
    for (at::Tensor* tensor : tensors) {
      if (tensor->defined()) tensors_.push_back(tensor);
    }
  }

  ChannelView view(int64_t num_groups, bool over_batch, bool wide, bool per_sample) {
    ChannelView view = wide && !per_sample ? wide_channel_view(tensors_, num_groups, over_batch)
                                           : channel_view(tensors_, num_groups, over_batch, per_sample);
    strides_ = view.strides;
    return view;
  }

  // After `view`.
  template <typename T>
  Operand<const T> input(const at::Tensor& tensor) const {
    if (!tensor.defined()) return {};
    return {tensor.const_data_ptr<T>(), strides_of(tensor)};
  }
  template <typename T>
  Operand<T> output(const at::Tensor& tensor) const {
    if (!tensor.defined()) return {};
    return {tensor.mutable_data_ptr<T>(), strides_of(tensor)};
  }

 private:
  Strides strides_of(const at::Tensor& tensor) const {
    size_t i = 0;
    while (tensors_[i] != &tensor) ++i;
    return strides_[i];
  }

  std::vector<at::Tensor*> tensors_;
  std::vector<Strides> strides_;
};

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, bool over_batch,
                      double eps, const OptionalTensor& residual, OptionalName activation, double negative_slope,
                      const OptionalTensor& mask, int64_t varying) {
  at::Tensor x = input, added = residual.value_or(at::Tensor());
  at::Tensor output = new_like(input);
  const bool given = defined(given_mean);
  Operands operands{&x, &output, &added};
  const at::Tensor flags = as_flags(mask, input);
  const Geometry g = operands.view(num_groups, over_batch, /*wide=*/!given, varying).geometry;
  const auto valid = mask_of(g, flags);
  if (valid && !given) check_counts(g, *valid, input);
  const auto shape = channel_statistics_shape(input, num_groups, over_batch);
  TORCH_CHECK(given == defined(given_var), "normops: expected mean and var to be given together");
  const at::Tensor mean = given ? in_double(shape, given_mean, input, "mean") : new_array(shape);
  const at::Tensor var = given ? in_double(shape, given_var, input, "var") : new_array(shape);
  if (g.elements() == 0) {
    if (!given) {
      mean.zero_();
      var.zero_();
    }
    return {output, mean, var};
  }
  const Activation kind = as_activation(activation, negative_slope);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm", [&] {
    const int64_t numel = parameters_of(input, varying), apart = varying ? g.channels : 0;
    const at::Tensor w = as_own_parameter(weight, input, numel, "weight");
    const at::Tensor b = as_own_parameter(bias, input, numel, "bias");
    channel_forward<scalar_t>(g, operands.input<scalar_t>(x), operands.output<scalar_t>(output), {w, 1, apart},
                              {b, 0, apart}, eps, given, mean.mutable_data_ptr<double>(),
                              var.mutable_data_ptr<double>(), {kind, operands.input<scalar_t>(added)},
                              valid ? &*valid : nullptr);
  });
  return {output, mean, var};
}

bool has_extremes(const at::Tensor& input, const at::Tensor& vars, double eps) {
  if (input.scalar_type() == at::kDouble) return false;
  const double* const var = vars.const_data_ptr<double>();
  return std::any_of(var, var + vars.numel(), [&](double own) { return is_extreme_variance<float>(own + eps); });
}

// Sums as a tensor in the type of the arithmetic; undefined where there are none.
at::Tensor rounded(const double* sums, at::IntArrayRef shape, at::ScalarType type) {
  if (sums == nullptr) return {};
  const at::Tensor result = new_array(shape, type);
  const int64_t length = result.numel();
  if (type == at::kDouble)
    std::copy_n(sums, length, result.mutable_data_ptr<double>());
  else
    std::copy_n(sums, length, result.mutable_data_ptr<float>());
  return result;
}

Tensors4 channel_norm_backward(bool in_place, const at::Tensor& grad_output, const at::Tensor& input,
                               const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                               int64_t num_groups, bool over_batch, double eps, bool input_stats, Mask4 output_mask,
                               const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& output,
                               OptionalName activation, double negative_slope, const OptionalTensor& mask,
                               int64_t varying) {
  const Activation kind = as_activation(activation, negative_slope);
  at::Tensor x = input, dy = grad_output, dx, dresidual, added, y, unwanted;
  const at::Tensor flags = as_flags(mask, input);
  const int64_t count = c10::multiply_integers(channel_statistics_shape(input, num_groups, over_batch));
  const at::Tensor means = as_parameter(mean, input, count, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, count, at::kDouble, "var");
  if (output_mask[0]) dx = place_of_gradient(in_place, grad_output, input, input.suggest_memory_format());
  if (output_mask[3]) dresidual = new_like(input);
  if (kind) {
    added = residual.value_or(at::Tensor());
    y = output.value_or(at::Tensor());
    // Sums over elements that do not lie side by side, or leave the range of float, are taken of what was stored.
    const bool nowhere = !output_mask[0] && !output_mask[3];
    if (nowhere && (flags.defined() || has_extremes(input, vars, eps))) unwanted = new_like(input);
  }
  Operands operands{&x, &dy, &dx, &added, &y, &dresidual, &unwanted};
  const Geometry g = operands.view(num_groups, over_batch, /*wide=*/true, varying).geometry;
  const auto valid = mask_of(g, flags);
  const int64_t numel = parameters_of(input, varying), apart = varying ? g.channels : 0;
  const Scratch<double> sums(2 * numel);
  std::fill_n(sums + 0, 2 * numel, 0.0);
  double* const dweight = output_mask[1] ? sums + 0 : nullptr;
  double* const dbias = output_mask[2] ? sums + numel : nullptr;
  if (g.elements() > 0) {
    if (dresidual.defined() && !kind) {
      dresidual.copy_(grad_output);
      if (flags.defined()) dresidual.masked_fill_(mask->unsqueeze(1).logical_not(), 0);
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm_backward", [&] {
          const at::Tensor w = as_own_parameter(weight, input, numel, "weight");
          const at::Tensor b = kind ? as_own_parameter(bias, input, numel, "bias") : at::Tensor();
          Epilogue<scalar_t> epilogue{kind};
          if (kind) {
            epilogue = {kind,
                        operands.input<scalar_t>(added),
                        operands.input<scalar_t>(y),
                        {b, 0, apart},
                        operands.output<scalar_t>(output_mask[3]   ? dresidual
                                                  : output_mask[0] ? dx
                                                                   : unwanted)};
          }
          channel_backward<scalar_t>(g, operands.input<scalar_t>(dy), operands.input<scalar_t>(x),
                                     operands.output<scalar_t>(dx), {w, 1, apart}, means.const_data_ptr<double>(),
                                     vars.const_data_ptr<double>(), eps, !input_stats, {}, dweight, dbias, epilogue,
                                     valid ? &*valid : nullptr);
        });
  }
  const at::ScalarType type = acc_type(input);
  const int64_t channels = input.size(1);
  const at::DimVector shape = varying ? at::DimVector{input.size(0), channels} : at::DimVector{channels};
  return {dx, rounded(dweight, shape, type), rounded(dbias, shape, type), dresidual};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_channel_norm", channel_norm);
  m.impl("_channel_norm_backward", Placing<channel_norm_backward, false>::call);
  m.impl("_channel_norm_backward_", Placing<channel_norm_backward, true>::call);
}

}  // namespace normops::cpu
