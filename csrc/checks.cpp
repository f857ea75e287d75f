#include "checks.h"

namespace normops {

void check_input(const char* op, const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(input.layout() == at::kStrided, op, ": expected input with strided layout, got ",
                              input.layout());
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(input.scalar_type()) && input.element_size() >= 2, op,
                              ": expected input of dtype float16, bfloat16, float32 or float64, got ",
                              input.scalar_type());
}

void check_parameter(const char* op, const char* name, const OptionalTensor& tensor, const at::Tensor& input,
                     c10::SymIntArrayRef shape, const char* meaning) {
  if (!defined(tensor)) return;
  TORCH_CHECK(tensor->sym_sizes().equals(shape), op, ": expected ", name, " of shape ", shape, " (", meaning, "), got ",
              tensor->sym_sizes());
  TORCH_CHECK(at::isFloatingType(tensor->scalar_type()) && tensor->layout() == at::kStrided, op, ": expected ", name,
              " to be a strided tensor of floating dtype, got ", tensor->scalar_type(), " with layout ",
              tensor->layout());
  TORCH_CHECK(tensor->device() == input.device(), op, ": expected ", name, " on the device of input (", input.device(),
              "), got ", tensor->device());
}

void check_channels(const char* op, const at::Tensor& input, std::initializer_list<NamedParameter> parameters,
                    const char* layer_argument) {
  c10::SymInt expected = 0;
  int64_t given = 0;
  std::string names;
  for (const auto& [name, tensor] : parameters) {
    if (!defined(tensor)) continue;
    const auto shape = tensor->sym_sizes();
    if (shape.size() != 1 || shape[0] == input.sym_size(1) || (given > 0 && shape[0] != expected)) return;
    expected = shape[0];
    names += (given++ > 0 ? ", " : "") + std::string(name);
  }
  TORCH_CHECK(given < 2, op, ": expected input with ", expected, " channels (", layer_argument, "; the size of ", names,
              "), got input of shape ", input.sym_sizes());
}

void check_running_stats(const char* op, const OptionalTensor& mean, const OptionalTensor& var,
                         const at::Tensor& input) {
  TORCH_CHECK_VALUE(defined(mean) == defined(var), op,
                    ": expected running_mean and running_var to be both given or both None, got only ",
                    defined(mean) ? "running_mean" : "running_var");
  const c10::SymInt channels = input.sym_size(1);
  for (const auto& [name, stat] : {std::pair("running_mean", &mean), std::pair("running_var", &var)}) {
    check_parameter(op, name, *stat, input, channels, "channels of input");
    TORCH_CHECK(!defined(*stat) || !(*stat)->requires_grad(), op, ": expected ", name,
                " without requires_grad, got one with it: the layer is not differentiable with respect to it");
  }
}

void check_residual(const char* op, const at::Tensor& residual, const at::Tensor& input) {
  TORCH_CHECK_VALUE(residual.sym_sizes().equals(input.sym_sizes()), op, ": expected residual of the shape of input (",
                    input.sym_sizes(), "), got ", residual.sym_sizes(), ": it is not broadcast");
  TORCH_CHECK_TYPE(residual.scalar_type() == input.scalar_type(), op, ": expected residual of the dtype of input (",
                   input.scalar_type(), "), got ", residual.scalar_type(), ": it is not promoted");
  TORCH_CHECK_VALUE(residual.device() == input.device(), op, ": expected residual on the device of input (",
                    input.device(), "), got ", residual.device());
  TORCH_CHECK_TYPE(residual.layout() == at::kStrided, op, ": expected residual with strided layout, got ",
                   residual.layout());
}

Extras check_extras(const char* op, const at::Tensor& input, const OptionalName& activation, double negative_slope,
                    const OptionalTensor& residual, double weight_offset, bool memory_efficient) {
  Extras extras{{0, negative_slope}, residual, weight_offset, memory_efficient};
  if (activation) {
    extras.activation.kind = activation_kind(*activation);
    TORCH_CHECK_VALUE(extras.activation, op, ": expected activation to be None or one of ", known_activations(),
                      ", got '", *activation, "'");
  }
  TORCH_CHECK_VALUE(negative_slope == Activation{}.negative_slope || activation == "leaky_relu", op,
                    ": expected negative_slope only with activation='leaky_relu', got ", negative_slope,
                    activation ? " with '" + std::string(*activation) + "'" : " without an activation");
  if (defined(residual)) check_residual(op, *residual, input);
  if (memory_efficient) {
    TORCH_CHECK_VALUE(!activation || activation == "leaky_relu" || activation == "elu", op,
                      ": expected activation to be None, 'leaky_relu' or 'elu', which can be inverted, with "
                      "memory_efficient=True, got '",
                      *activation, "'");
    TORCH_CHECK_VALUE(activation != "leaky_relu" || negative_slope > 0, op,
                      ": expected negative_slope > 0 with memory_efficient=True, got ", negative_slope);
    TORCH_CHECK_VALUE(!defined(residual), op, ": expected no residual with memory_efficient=True, got one");
  }
  return extras;
}

namespace {

void check_kind(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  check_parameter(op, name, tensor, input, tensor.sym_sizes(), "");
}

}  // namespace

Varying check_varying_rows(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                           const OptionalTensor& weight, const OptionalTensor& bias) {
  const auto sizes = input.sym_sizes();
  const size_t leading = sizes.size() - normalized_shape.size();
  // The tensor in all dimensions of the input, and the leading ones along which it differs.
  const auto see = [&](const char* name, const OptionalTensor& tensor) -> std::pair<OptionalTensor, int64_t> {
    if (!defined(tensor)) return {std::nullopt, 0};
    check_kind(op, name, *tensor, input);
    const auto given = tensor->sym_sizes();
    bool fits = given.size() >= normalized_shape.size() && given.size() <= sizes.size() &&
                given.slice(given.size() - normalized_shape.size()).equals(normalized_shape);
    c10::SymDimVector shape(sizes.size() - std::min(given.size(), sizes.size()), 1);
    shape.insert(shape.end(), given.begin(), given.end());
    int64_t varying = 0;
    for (size_t d = 0; fits && d < leading; ++d) {
      if (shape[d] == 1) continue;
      varying |= int64_t(1) << d;
      fits = shape[d] == sizes[d];
    }
    TORCH_CHECK_VALUE(fits, op, ": expected ", name, " of shape ", normalized_shape,
                      " (normalized_shape), or with dimensions before it that are those of input (", sizes,
                      ") or 1, got ", given);
    return {tensor->reshape_symint(varying ? c10::SymIntArrayRef(shape) : normalized_shape), varying};
  };
  auto [own_weight, weight_varies] = see("weight", weight);
  auto [own_bias, bias_varies] = see("bias", bias);
  const int64_t varying = weight_varies | bias_varies;
  c10::SymDimVector common(sizes.begin(), sizes.end());
  for (size_t d = 0; d < leading; ++d) {
    if (!(varying >> d & 1)) common[d] = 1;
  }
  TORCH_CHECK_VALUE(weight_varies == varying || bias_varies == varying, op,
                    ": expected weight and bias that differ along the same dimensions of input, got shapes ",
                    weight->sym_sizes(), " and ", bias->sym_sizes());
  if (defined(own_weight) && weight_varies != varying) own_weight = own_weight->expand_symint(common);
  if (defined(own_bias) && bias_varies != varying) own_bias = own_bias->expand_symint(common);
  return {own_weight, own_bias, varying};
}

Varying check_varying_channels(const char* op, const at::Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias) {
  const c10::SymDimVector plain{input.sym_size(1)}, own{input.sym_size(0), input.sym_size(1)};
  const auto see = [&](const char* name, const OptionalTensor& tensor) -> OptionalTensor {
    if (!defined(tensor)) return std::nullopt;
    check_kind(op, name, *tensor, input);
    const auto given = tensor->sym_sizes();
    if (given.equals(plain)) return tensor;
    TORCH_CHECK_VALUE(given.size() == 2 && (given[0] == own[0] || given[0] == 1) && given[1] == own[1], op,
                      ": expected ", name, " of shape ", c10::SymIntArrayRef(plain), " (channels of input), or ",
                      c10::SymIntArrayRef(own), " (samples and channels), got ", given);
    return given[0] == 1 ? tensor->reshape_symint(plain) : *tensor;
  };
  Varying result{see("weight", weight), see("bias", bias), 0};
  result.varying = has_more_dimensions(result.weight, 1) || has_more_dimensions(result.bias, 1);
  for (OptionalTensor* parameter : {&result.weight, &result.bias}) {
    if (result.varying && defined(*parameter)) *parameter = (*parameter)->expand_symint(own);
  }
  return result;
}

OptionalTensor check_mask(const char* op, const at::Tensor& input, const OptionalTensor& mask) {
  if (!defined(mask)) return std::nullopt;
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape.erase(shape.begin() + 1);
  TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->layout() == at::kStrided, op,
                    ": expected mask to be a strided tensor of bool, True where input is valid, got ",
                    mask->scalar_type(), " with layout ", mask->layout());
  const auto sizes = mask->sym_sizes();
  bool fits = sizes.size() <= shape.size();
  for (size_t i = 1; fits && i <= sizes.size(); ++i) {
    const c10::SymInt& size = sizes[sizes.size() - i];
    fits = size == shape[shape.size() - i] || size == 1;
  }
  TORCH_CHECK_VALUE(fits, op, ": expected mask of shape ", c10::SymIntArrayRef(shape),
                    " (the input's without channels), or one that can be broadcast to it, got ", sizes);
  TORCH_CHECK_VALUE(mask->device() == input.device(), op, ": expected mask on the device of input (", input.device(),
                    "), got ", mask->device());
  return mask->expand_symint(shape);
}

void check_normalized_shape(const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape) {
  TORCH_CHECK(!normalized_shape.empty(), op, ": expected normalized_shape with at least one entry, got []");
  const auto sizes = input.sym_sizes();
  TORCH_CHECK(sizes.size() >= normalized_shape.size() &&
                  sizes.slice(sizes.size() - normalized_shape.size()).equals(normalized_shape),
              op, ": expected input with a shape that ends in ", normalized_shape, " (normalized_shape), got ", sizes);
}

}  // namespace normops
