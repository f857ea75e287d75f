// The engines in the place of torch's kernels: aten::native_layer_norm and its siblings, registered below autograd, so
// that everything above (autograd, its double backward, functorch, autocast) stays torch's. Calls that the engines do
// not cover, bad ones among them, go to the kernel that torch had.
//
// What torch's operators return differs from what the engines do: rstd where the channel engine has the variance,
// statistics in other dtypes than float64, gradients in the parameters' dtypes.

#include "accelerate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "ops.h"

namespace normops {
namespace {

using Mask2 = std::array<bool, 2>;

// What is covered. The dtypes are those that torch's kernels take, so that what they refuse is left to them to refuse.

bool covered(const at::Tensor& input) {
  return at::isFloatingType(input.scalar_type()) && input.element_size() >= 2 && input.numel() > 0;
}

bool covered(const OptionalTensor& parameter, const at::Tensor& input, at::IntArrayRef shape) {
  return !defined(parameter) ||
         (parameter->sizes() == shape && parameter->device() == input.device() &&
          (parameter->scalar_type() == input.scalar_type() ||
           (at::isReducedFloatingType(input.scalar_type()) && parameter->scalar_type() == at::kFloat)));
}

bool covered_gradient(const at::Tensor& grad, const at::Tensor& input) {
  return grad.sizes() == input.sizes() && grad.scalar_type() == input.scalar_type() && grad.device() == input.device();
}

bool ends_in(const at::Tensor& input, at::IntArrayRef shape) {
  const auto sizes = input.sizes();
  return !shape.empty() && sizes.size() >= shape.size() && sizes.slice(sizes.size() - shape.size()) == shape;
}

// Statistics and gradients as torch's operators return them.

// The dtype of saved statistics: that of the arithmetic; but torch's CPU kernels, which may get to see them when a
// backward comes after the end of acceleration, know only half precision where all arguments have it.
at::ScalarType saved_type(const at::Tensor& input, at::ArrayRef<const OptionalTensor*> parameters) {
  if (!input.is_cpu() || !at::isReducedFloatingType(input.scalar_type())) return acc_type(input);
  for (const OptionalTensor* parameter : parameters) {
    if (defined(*parameter) && (*parameter)->scalar_type() == at::kFloat) return at::kFloat;
  }
  return input.scalar_type();
}

at::Tensor rstd_of(const at::Tensor& var, double eps) { return (var + eps).rsqrt_(); }

// The variance that, with eps = 0, has this rstd.
at::Tensor var_of(const at::Tensor& rstd) { return rstd.to(at::kDouble).pow(-2); }

at::Tensor like_parameter(const at::Tensor& grad, const OptionalTensor& parameter, const at::Tensor& input) {
  return grad.defined() ? grad.to(defined(parameter) ? parameter->scalar_type() : input.scalar_type()) : grad;
}

// The layers, or nothing where a call is not covered.

std::optional<Tensors3> try_layer_norm(const at::Tensor& input, at::IntArrayRef shape, const OptionalTensor& weight,
                                       const OptionalTensor& bias, double eps) {
  if (!covered(input) || !ends_in(input, shape) || !covered(weight, input, shape) || !covered(bias, input, shape)) {
    return {};
  }
  auto [output, mean, rstd] = ops::row_norm(input, shape.size(), weight, bias, eps, /*centered=*/true);
  const at::ScalarType type = saved_type(input, {&weight, &bias});
  return Tensors3{output, mean.to(type), rstd.to(type)};
}

std::optional<Tensors3> try_layer_norm_backward(const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef shape,
                                                const at::Tensor& mean, const at::Tensor& rstd,
                                                const OptionalTensor& weight, const OptionalTensor& bias, Mask3 mask) {
  if (!covered(input) || !ends_in(input, shape) || !covered_gradient(grad, input) || !covered(weight, input, shape)) {
    return {};
  }
  auto [dx, dweight, dbias] = ops::row_norm_backward(grad, input, shape.size(), mean, rstd, weight, /*eps=*/0,
                                                     /*centered=*/true, mask);
  return Tensors3{dx, like_parameter(dweight, weight, input), like_parameter(dbias, bias, input)};
}

bool covered_group_norm(const at::Tensor& input, int64_t samples, int64_t channels, int64_t positions, int64_t groups) {
  return covered(input) && input.dim() >= 2 && input.size(0) == samples && input.size(1) == channels &&
         input.numel() == samples * channels * positions && groups > 0 && channels % groups == 0;
}

std::optional<Tensors3> try_batch_norm(const at::Tensor& input, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                                       const OptionalTensor& running_var, bool training, double momentum, double eps) {
  if (!covered(input) || input.dim() < 2 || defined(running_mean) != defined(running_var)) return {};
  const int64_t channels = input.size(1), count = input.numel() / channels;
  for (const OptionalTensor* tensor : {&weight, &bias, &running_mean, &running_var}) {
    if (!covered(*tensor, input, channels)) return {};
  }
  const at::ScalarType type = saved_type(input, {&weight, &bias, &running_mean, &running_var});
  if (!training) {
    if (!defined(running_mean)) return {};
    const at::Tensor none = at::empty({0}, input.options().dtype(type));
    return Tensors3{std::get<0>(ops::channel_norm(input, running_mean, running_var, weight, bias, channels,
                                                  /*over_batch=*/true, eps)),
                    none, none.clone()};
  }
  if (count == 1) return {};
  auto [output, mean, var] =
      defined(running_mean) ? ops::channel_norm_tracked(input, {*running_mean, *running_var, momentum}, weight, bias,
                                                        /*over_batch=*/true, eps)
                            : ops::channel_norm(input, std::nullopt, std::nullopt, weight, bias, channels,
                                                /*over_batch=*/true, eps);
  return Tensors3{output, mean.to(type), rstd_of(var, eps).to(type)};
}

std::optional<Tensors3> try_batch_norm_backward(const at::Tensor& grad, const at::Tensor& input,
                                                const OptionalTensor& weight, const OptionalTensor& running_mean,
                                                const OptionalTensor& running_var, const OptionalTensor& mean,
                                                const OptionalTensor& rstd, bool training, double eps, Mask3 mask) {
  const bool given = training ? defined(mean) && defined(rstd) : defined(running_mean) && defined(running_var);
  if (!given || !covered(input) || input.dim() < 2 || !covered_gradient(grad, input) ||
      !covered(weight, input, input.size(1))) {
    return {};
  }
  auto [dx, dweight, dbias] = ops::channel_norm_backward(
      grad, input, training ? *mean : *running_mean, training ? var_of(*rstd) : *running_var, weight, input.size(1),
      /*over_batch=*/true, training ? 0 : eps, /*input_stats=*/training, mask);
  return Tensors3{dx, like_parameter(dweight, weight, input), like_parameter(dbias, weight, input)};
}

// Torch's own kernel of an operator on a device, looked up before ours takes its place.
class Original {
 public:
  Original(const c10::OperatorHandle& op, c10::DispatchKey key) : op_(op), key_(key) {
    if (op.hasComputedKernelForDispatchKey(key)) kernel_.emplace(op.getComputedKernelForDispatchKey(key));
  }

  bool exists() const { return kernel_.has_value(); }

  template <class Result, class... Args>
  Result call(Args... args) const {
    TORCH_CHECK_NOT_IMPLEMENTED(kernel_, op_.operator_name(), ": expected a gradient of the input's shape and dtype; ",
                                "torch has no kernel of its own on ", key_, " to take another");
    torch::jit::Stack stack{c10::IValue(std::move(args))...};
    kernel_->callBoxed(op_, c10::DispatchKeySet(key_), &stack);
    return c10::impl::PopResult<Result>::call(stack);
  }

 private:
  c10::OperatorHandle op_;
  c10::DispatchKey key_;
  std::optional<c10::SafeKernelFunction> kernel_;
};

bool on_cuda(c10::DispatchKeySet keys) { return keys.has(c10::DispatchKey::CUDA); }

// For the device that the dispatcher has chosen.
template <class Op>
const Original& original(c10::DispatchKeySet keys) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload);
  static const Original cpu(op, c10::DispatchKey::CPU), cuda(op, c10::DispatchKey::CUDA);
  return on_cuda(keys) ? cuda : cpu;
}

// One struct for each of torch's operators, with torch's arguments.

struct NativeLayerNorm {
  static constexpr auto name = "aten::native_layer_norm", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& input, at::IntArrayRef shape,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    if (auto results = try_layer_norm(input, shape, weight, bias, eps)) return *results;
    return original<NativeLayerNorm>(keys).call<Tensors3>(input, shape, weight, bias, eps);
  }
};

struct NativeLayerNormBackward {
  static constexpr auto name = "aten::native_layer_norm_backward", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef shape,
                       const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight,
                       const OptionalTensor& bias, Mask3 mask) {
    if (auto grads = try_layer_norm_backward(grad, input, shape, mean, rstd, weight, bias, mask)) return *grads;
    return original<NativeLayerNormBackward>(keys).call<Tensors3>(grad, input, shape, mean, rstd, weight, bias, mask);
  }
};

// F.rms_norm gets here unless input and weight differ in dtype or the input is channels_last.
struct FusedRmsNorm {
  static constexpr auto name = "aten::_fused_rms_norm", overload = "";

  static Tensors2 call(c10::DispatchKeySet keys, const at::Tensor& input, at::IntArrayRef shape,
                       const OptionalTensor& weight, std::optional<double> eps) {
    if (!covered(input) || !ends_in(input, shape) || !covered(weight, input, shape)) {
      return original<FusedRmsNorm>(keys).call<Tensors2>(input, shape, weight, eps);
    }
    auto [output, mean, rstd] =
        ops::row_norm(input, shape.size(), weight, std::nullopt, eps.value_or(default_rms_eps(input)),
                      /*centered=*/false);
    return {output, rstd.to(acc_type(input))};
  }
};

// Torch's forward above is made of other operators on the CPU, so there this is the only kernel of the backward.
struct FusedRmsNormBackward {
  static constexpr auto name = "aten::_fused_rms_norm_backward", overload = "";

  static Tensors2 call(c10::DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef shape,
                       const at::Tensor& rstd, const OptionalTensor& weight, Mask2 mask) {
    if (!covered_gradient(grad, input)) {
      return original<FusedRmsNormBackward>(keys).call<Tensors2>(grad, input, shape, rstd, weight, mask);
    }
    auto [dx, dweight, none] =
        ops::row_norm_backward(grad, input, shape.size(), at::zeros_like(rstd), rstd, weight, /*eps=*/0,
                               /*centered=*/false, {mask[0], mask[1], false});
    return {dx, like_parameter(dweight, weight, input)};
  }
};

struct NativeGroupNorm {
  static constexpr auto name = "aten::native_group_norm", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, int64_t samples, int64_t channels, int64_t positions, int64_t groups,
                       double eps) {
    if (!covered_group_norm(input, samples, channels, positions, groups) || !covered(weight, input, channels) ||
        !covered(bias, input, channels)) {
      return original<NativeGroupNorm>(keys).call<Tensors3>(input, weight, bias, samples, channels, positions, groups,
                                                            eps);
    }
    auto [output, mean, var] =
        ops::channel_norm(input, std::nullopt, std::nullopt, weight, bias, groups, /*over_batch=*/false, eps);
    const at::ScalarType type = saved_type(input, {&weight, &bias});
    return {output, mean.to(type), rstd_of(var, eps).to(type)};
  }
};

struct NativeGroupNormBackward {
  static constexpr auto name = "aten::native_group_norm_backward", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input,
                       const at::Tensor& mean, const at::Tensor& rstd, const OptionalTensor& weight, int64_t samples,
                       int64_t channels, int64_t positions, int64_t groups, Mask3 mask) {
    if (!covered_group_norm(input, samples, channels, positions, groups) || !covered_gradient(grad, input) ||
        !covered(weight, input, channels)) {
      return original<NativeGroupNormBackward>(keys).call<Tensors3>(grad, input, mean, rstd, weight, samples, channels,
                                                                    positions, groups, mask);
    }
    auto [dx, dweight, dbias] = ops::channel_norm_backward(grad, input, mean, var_of(rstd), weight, groups,
                                                           /*over_batch=*/false, /*eps=*/0, /*input_stats=*/true, mask);
    return {dx, like_parameter(dweight, weight, input), like_parameter(dbias, weight, input)};
  }
};

// BatchNorm has several forms in torch; F.batch_norm and F.instance_norm call the first. Two of them differ in name and
// in the type of their running statistics.
template <typename Form, typename RunningStatistic>
struct BatchNormForm {
  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, RunningStatistic running_mean, RunningStatistic running_var,
                       bool training, double momentum, double eps) {
    if (auto results = try_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)) {
      return *results;
    }
    return original<Form>(keys).template call<Tensors3>(input, weight, bias, running_mean, running_var, training,
                                                        momentum, eps);
  }
};

struct NativeBatchNorm : BatchNormForm<NativeBatchNorm, const OptionalTensor&> {
  static constexpr auto name = "aten::native_batch_norm", overload = "";
};

struct NativeBatchNormLegit : BatchNormForm<NativeBatchNormLegit, at::Tensor&> {
  static constexpr auto name = "aten::_native_batch_norm_legit", overload = "";
};

struct NativeBatchNormLegitNoStats {
  static constexpr auto name = "aten::_native_batch_norm_legit", overload = "no_stats";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, bool training, double momentum, double eps) {
    if (auto results = try_batch_norm(input, weight, bias, std::nullopt, std::nullopt, training, momentum, eps)) {
      return *results;
    }
    return original<NativeBatchNormLegitNoStats>(keys).call<Tensors3>(input, weight, bias, training, momentum, eps);
  }
};

struct BatchNormWithUpdate {
  static constexpr auto name = "aten::_batch_norm_with_update", overload = "";

  static Tensors4 call(c10::DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, at::Tensor& running_mean, at::Tensor& running_var, double momentum,
                       double eps) {
    auto results = try_batch_norm(input, weight, bias, running_mean, running_var, /*training=*/true, momentum, eps);
    if (!results) {
      return original<BatchNormWithUpdate>(keys).call<Tensors4>(input, weight, bias, running_mean, running_var,
                                                                momentum, eps);
    }
    auto [output, mean, rstd] = *results;
    return {output, mean, rstd, at::empty({0}, input.options().dtype(at::kByte))};
  }
};

struct NativeBatchNormBackward {
  static constexpr auto name = "aten::native_batch_norm_backward", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input,
                       const OptionalTensor& weight, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& mean, const OptionalTensor& rstd,
                       bool training, double eps, Mask3 mask) {
    if (auto grads =
            try_batch_norm_backward(grad, input, weight, running_mean, running_var, mean, rstd, training, eps, mask)) {
      return *grads;
    }
    return original<NativeBatchNormBackward>(keys).call<Tensors3>(grad, input, weight, running_mean, running_var, mean,
                                                                  rstd, training, eps, mask);
  }
};

struct BatchNormBackward {
  static constexpr auto name = "aten::batch_norm_backward", overload = "";

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input,
                       const at::Tensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                       const OptionalTensor& mean, const OptionalTensor& rstd, bool training, double eps, Mask3 mask,
                       const at::Tensor& reserve) {
    if (auto grads =
            try_batch_norm_backward(grad, input, weight, running_mean, running_var, mean, rstd, training, eps, mask)) {
      return *grads;
    }
    return original<BatchNormBackward>(keys).call<Tensors3>(grad, input, weight, running_mean, running_var, mean, rstd,
                                                            training, eps, mask, reserve);
  }
};

// What F.batch_norm calls on CUDA where torch would take cuDNN, for float32 and float16 among others; in training only.
// cuDNN keeps a reserve for its backward. Ours is empty, and of a shape that cuDNN's never has: it says whose it is.
at::Tensor own_reserve(const at::Tensor& input) { return at::empty({0, 1}, input.options().dtype(at::kByte)); }
bool is_own_reserve(const at::Tensor& reserve) { return reserve.dim() == 2; }

struct CudnnBatchNorm {
  static constexpr auto name = "aten::cudnn_batch_norm", overload = "";

  static Tensors4 call(c10::DispatchKeySet keys, const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, bool training, double momentum, double eps) {
    auto results = try_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps);
    if (!results) {
      return original<CudnnBatchNorm>(keys).call<Tensors4>(input, weight, bias, running_mean, running_var, training,
                                                           momentum, eps);
    }
    auto [output, mean, rstd] = *results;
    return {output, mean, rstd, own_reserve(input)};
  }
};

// It stays when acceleration ends, for backwards of what ran forward under it; others go to cuDNN then.
struct CudnnBatchNormBackward {
  static constexpr auto name = "aten::cudnn_batch_norm_backward", overload = "";
  static inline std::atomic<bool> takes_all = false;

  static Tensors3 call(c10::DispatchKeySet keys, const at::Tensor& input, const at::Tensor& grad,
                       const at::Tensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                       const OptionalTensor& mean, const OptionalTensor& rstd, double eps, const at::Tensor& reserve) {
    if (takes_all || is_own_reserve(reserve)) {
      if (auto grads = try_batch_norm_backward(grad, input, weight, running_mean, running_var, mean, rstd,
                                               /*training=*/true, eps, {true, true, true})) {
        return *grads;
      }
    }
    return original<CudnnBatchNormBackward>(keys).call<Tensors3>(input, grad, weight, running_mean, running_var, mean,
                                                                 rstd, eps, reserve);
  }
};

std::unique_ptr<torch::Library> library(c10::DispatchKey key) {
  return std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
}

// As compile-time functions: a call that is under way while the library goes has nothing of it to miss.
template <class... Ops>
void install(torch::Library& into, c10::DispatchKey key) {
  (original<Ops>(c10::DispatchKeySet(key)), ...);  // before it is hidden
  (into.impl(c10::toString(c10::OperatorName(Ops::name, Ops::overload)).c_str(), TORCH_FN(Ops::call)), ...);
}

std::unique_ptr<torch::Library> install_all(c10::DispatchKey key) {
  auto whole = library(key);
  install<NativeLayerNorm, NativeLayerNormBackward, FusedRmsNorm, NativeGroupNorm, NativeGroupNormBackward,
          NativeBatchNorm, NativeBatchNormLegit, NativeBatchNormLegitNoStats, BatchNormWithUpdate,
          NativeBatchNormBackward, BatchNormBackward>(*whole, key);
  // What ran forward under acceleration may be differentiated after its end, so some kernels are never taken away.
  static std::set<c10::DispatchKey> kept;
  const bool first = kept.insert(key).second;
  const auto keep = [&](auto op) {
    if (first) install<decltype(op)>(*library(key).release(), key);
  };
  if (original<CudnnBatchNorm>(c10::DispatchKeySet(key)).exists()) {
    install<CudnnBatchNorm>(*whole, key);
    keep(CudnnBatchNormBackward{});
  }
  if (original<FusedRmsNormBackward>(c10::DispatchKeySet(key)).exists()) {
    install<FusedRmsNormBackward>(*whole, key);
  } else {
    keep(FusedRmsNormBackward{});  // which hides nothing
  }
  return whole;
}

// Torch says of every replaced kernel that it is replaced, which here is what was asked for.
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

bool has_engine(c10::DispatchKey key) {
  return c10::Dispatcher::singleton().findSchemaOrThrow("normops::_row_norm", "").hasKernelForDispatchKey(key);
}

}  // namespace

void accelerate(bool on) {
  static std::mutex mutex;
  static int64_t users = 0;
  static auto& libraries = *new std::vector<std::unique_ptr<torch::Library>>;  // for as long as torch itself is there
  const std::lock_guard<std::mutex> lock(mutex);
  users += on ? 1 : -1;
  CudnnBatchNormBackward::takes_all = users > 0;
  if (users == 0) libraries.clear();
  if (users == 0 || !libraries.empty()) return;
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  if (has_engine(c10::DispatchKey::CPU)) libraries.push_back(install_all(c10::DispatchKey::CPU));
  if (has_engine(c10::DispatchKey::CUDA)) libraries.push_back(install_all(c10::DispatchKey::CUDA));
}

void switch_acceleration(bool on) {
  static std::mutex mutex;
  static bool is_on = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (on == is_on) return;
  accelerate(on);
  is_on = on;
}

}  // namespace normops
