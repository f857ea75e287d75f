// The channel engine's operators on CUDA tensors.

#include "channel.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../composed.h"
#include "glue.h"

namespace normops::cuda {
namespace {

// A small tensor as the merge kernels read it: in its own dtype, and kept alive.
struct Array {
  at::Tensor tensor;
  double absent;

  Array(const OptionalTensor& given, const at::Tensor& input, int64_t numel, double absent, const char* name)
      : tensor(defined(given) ? as_parameter(given, input, numel, given->scalar_type(), name) : at::Tensor()),
        absent(absent) {}
  AnyArray pointer() const {
    if (!tensor.defined()) return {nullptr, ElementType::kFloat, absent};
    return {tensor.const_data_ptr(), element_type(tensor.scalar_type()), absent};
  }
};

// Kernels step from one line of a block to the next in 32 bits. Only short lines have others in their block.
void check_steps(const ChannelView& view, int element_size) {
  constexpr int64_t kLongest = 1024 * 1024;
  const Geometry& g = view.geometry;
  if (g.layout != Layout::kContiguous || !g.over_batch || g.samples == 1 || g.positions * element_size > kLongest)
    return;
  for (const Strides& s : view.strides) {
    TORCH_CHECK(s.sample * element_size <= std::numeric_limits<uint32_t>::max(),
                "normops: expected samples of small planes less than 4 GiB apart, got a stride of ", s.sample);
  }
}

// How the tensors are walked. Contiguous planes that would be walked element by element, as their lengths are no
// multiples of a vector's, are walked as wide channels (geometry.h) where that makes vectors of them, unless `fits`
// says that they go over memory twice only then.
template <typename Fits>
Plan plan_of(ChannelView& view, const std::vector<at::Tensor*>& tensors, int64_t num_groups, bool over_batch,
             const Fits& fits) {
  const int size = int(tensors.front()->element_size());
  const auto plan_as_seen = [&] {
    bool vectors = true;
    for (size_t i = 0; i < tensors.size(); ++i) {
      vectors = vectors && vectorizable(view.geometry, tensors[i]->const_data_ptr(), view.strides[i], size);
    }
    return make_plan(view.geometry, size, vectors);
  };
  check_steps(view, size);
  const Plan plan = plan_as_seen();
  if (plan.vectors || plan.layout != Layout::kContiguous || !over_batch) return plan;
  const ChannelView narrow = view;
  view = wide_channel_view(tensors, num_groups, over_batch);
  const Plan wide = plan_as_seen();
  if (wide.vectors && (fits(wide) || !fits(plan))) return wide;
  view = narrow;
  return plan;
}

// The tensors of a layer seen through one Geometry, where some may be absent.
class Operands {
 public:
  Operands(std::initializer_list<at::Tensor*> tensors) {
    for (at::Tensor* tensor : tensors) {
      if (tensor->defined()) tensors_.push_back(tensor);
    }
  }

  template <typename Fits>
  Plan plan(int64_t num_groups, bool over_batch, const Fits& fits) {
    return plan_of(view, tensors_, num_groups, over_batch, fits);
  }
  const Geometry& look(int64_t num_groups, bool over_batch) {
    view = channel_view(tensors_, num_groups, over_batch);
    return view.geometry;
  }
  template <typename T>
  ChannelTensor<const T> read(const at::Tensor& tensor) const {
    return tensor.defined() ? ChannelTensor<const T>{tensor.const_data_ptr<T>(), strides(tensor)}
                            : ChannelTensor<const T>{};
  }
  template <typename T>
  ChannelTensor<T> write(const at::Tensor& tensor) const {
    return tensor.defined() ? ChannelTensor<T>{tensor.mutable_data_ptr<T>(), strides(tensor)} : ChannelTensor<T>{};
  }

 private:
  const Strides& strides(const at::Tensor& tensor) const {
    for (size_t i = 0;; ++i) {
      if (tensors_[i] == &tensor) return view.strides[i];
    }
  }

  std::vector<at::Tensor*> tensors_;
  ChannelView view;
};

template <typename A>
Coefficients<A> take_coefficients(Scratch& scratch, int64_t count) {
  return {scratch.take<A>(count), scratch.take<A>(count), scratch.take<A>(count), scratch.take<A>(count)};
}

// The running statistics as kernels move them, with statistics of `rows` rows.
RunningStats running_stats(const Tracking& tracking, int64_t count, int64_t rows, const double* mean,
                           const double* var) {
  return {{any_output(tracking.running_mean), any_output(tracking.running_var)},
          {tracking.running_mean.stride(0), tracking.running_var.stride(0)},
          {mean, var},
          {1, double(count) / double(count - 1)},
          tracking.momentum,
          rows,
          tracking.running_mean.size(0)};
}

Tensors3 forward(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                 const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, bool over_batch,
                 double eps, const Extras& extras, const Tracking* tracking) {
  const Here here(input);
  at::Tensor x = input, added = extras.residual.value_or(at::Tensor());
  at::Tensor output = at::empty_like(input, input.suggest_memory_format());
  Operands operands{&x, &output, &added};
  const Geometry g = operands.look(num_groups, over_batch);
  const bool given = defined(given_mean);
  TORCH_CHECK(given == defined(given_var), "normops: expected mean and var to be given together");
  const auto shape = channel_statistics_shape(input, num_groups, over_batch);
  const int64_t count = c10::multiply_integers(shape);
  const auto statistics = input.options().dtype(at::kDouble);
  const Array means(given_mean, input, count, 0, "mean"), vars(given_var, input, count, 0, "var");
  const Array weights(weight, input, g.channels, 1, "weight"), biases(bias, input, g.channels, 0, "bias");
  const at::Tensor mean = at::empty(shape, statistics), var = at::empty(shape, statistics);
  RunningStats running{};
  if (tracking) {
    const int64_t of_each = g.elements() / std::max<int64_t>(1, count);
    check_running_update(tracking->running_mean, tracking->running_var, mean, var, of_each);
    TORCH_CHECK(tracking->running_mean.device() == input.device() && tracking->running_var.device() == input.device(),
                "normops: expected running statistics on ", input.device(), ", got ", tracking->running_mean.device(),
                " and ", tracking->running_var.device());
    running = running_stats(*tracking, of_each, g.rows(), mean.const_data_ptr<double>(), var.const_data_ptr<double>());
  }
  if (g.elements() == 0) {
    const auto fill = [&](const Array& a) {
      return given ? a.tensor.to(at::kDouble, false, true).view(shape) : at::zeros(shape, statistics);
    };
    return {output, fill(means), fill(vars)};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm", [&] {
    using A = Acc<scalar_t>;
    const auto fits = [&](const Plan& plan) {
      return !given && slab_fits<scalar_t>(plan, here.device(), /*backward=*/false, extras.epilogue());
    };
    const Plan plan = operands.plan(num_groups, over_batch, fits);
    const auto from = operands.read<scalar_t>(x);
    const auto to = operands.write<scalar_t>(output);
    ChannelEpilogue<scalar_t> epilogue;
    epilogue.activation = extras.activation.kind;
    epilogue.negative_slope = A(extras.activation.negative_slope);
    epilogue.other = operands.read<scalar_t>(added);
    void* const stream = here.stream();
    ForwardMerge<A> merge{nullptr,
                          means.pointer(),
                          vars.pointer(),
                          weights.pointer(),
                          biases.pointer(),
                          eps,
                          /*reciprocal=*/false,
                          mean.mutable_data_ptr<double>(),
                          var.mutable_data_ptr<double>(),
                          {},
                          over_batch ? running : RunningStats{}};
    if (fits(plan)) {
      slab_forward(plan, from, to, merge, stream, epilogue);
      return;
    }
    ChunkMoments* partials = nullptr;
    const auto lay_out = [&](Scratch scratch) {
      if (!given) merge.partials = partials = scratch.take<ChunkMoments>(plan.partials());
      merge.coefficients = take_coefficients<A>(scratch, plan.rows * plan.columns);
      return scratch.bytes();
    };
    const at::Tensor memory = allocate(input, lay_out(Scratch()));
    lay_out(Scratch(memory.mutable_data_ptr()));
    if (!given) channel_moments(plan, from, partials, stream);
    channel_merge(plan, merge, stream);
    channel_apply<scalar_t, A>(plan, from, to, merge.coefficients, stream, epilogue);
  });
  if (tracking && !over_batch) update_running_stats(running, here.stream());
  return {output, mean, var};
}

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, bool over_batch,
                      double eps, const OptionalTensor& residual, OptionalName activation, double negative_slope) {
  return forward(input, given_mean, given_var, weight, bias, num_groups, over_batch, eps,
                 {as_activation(activation, negative_slope), residual}, nullptr);
}

Tensors3 channel_norm_tracked(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                              const OptionalTensor& weight, const OptionalTensor& bias, bool over_batch,
                              double momentum, double eps, const OptionalTensor& residual, OptionalName activation,
                              double negative_slope) {
  const Tracking tracking{running_mean, running_var, momentum};
  return forward(input, std::nullopt, std::nullopt, weight, bias, input.size(1), over_batch, eps,
                 {as_activation(activation, negative_slope), residual}, &tracking);
}

Tensors4 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, int64_t num_groups, bool over_batch,
                               double eps, bool input_stats, Mask4 output_mask, const OptionalTensor& bias,
                               const OptionalTensor& residual, const OptionalTensor& output, OptionalName activation,
                               double negative_slope) {
  const Here here(input);
  const Activation kind = as_activation(activation, negative_slope);
  const bool from_output = kind && defined(output);
  at::Tensor x = input, dy = grad_output, dx, dresidual, other;
  if (output_mask[0]) dx = at::empty_like(input, input.suggest_memory_format());
  if (output_mask[3]) dresidual = at::empty_like(input, input.suggest_memory_format());
  if (kind) other = (from_output ? output : residual).value_or(at::Tensor());
  Operands operands{&x, &dy, &dx, &dresidual, &other};
  const Geometry g = operands.look(num_groups, over_batch);
  const int64_t count = c10::multiply_integers(channel_statistics_shape(input, num_groups, over_batch));
  const at::Tensor means = as_parameter(mean, input, count, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, count, at::kDouble, "var");
  const Array weights(weight, input, g.channels, 1, "weight"), biases(bias, input, g.channels, 0, "bias");
  const auto options = at::TensorOptions().device(input.device()).dtype(composed::gradient_type(weight, input));
  const bool empty = g.elements() == 0;
  const auto parameter = [&](bool wanted) {
    return !wanted ? at::Tensor() : empty ? at::zeros({g.channels}, options) : at::empty({g.channels}, options);
  };
  const at::Tensor dweight = parameter(output_mask[1]), dbias = parameter(output_mask[2]);
  const Tensors4 results{dx, dweight, dbias, dresidual};
  if (dresidual.defined() && !kind) dresidual.copy_(grad_output);
  const bool over_memory = output_mask[0] || (kind && output_mask[3]);
  const bool parameters = output_mask[1] || output_mask[2];
  if (empty || !(over_memory || parameters)) return results;
  const bool sums_needed = parameters || (input_stats && output_mask[0]);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm_backward", [&] {
        using A = Acc<scalar_t>;
        const auto fits = [&](const Plan& plan) {
          return input_stats && slab_fits<scalar_t>(plan, here.device(), /*backward=*/true, bool(kind));
        };
        const Plan plan = operands.plan(num_groups, over_batch, fits);
        const auto from = operands.read<scalar_t>(x), grad = operands.read<scalar_t>(dy);
        const auto to = operands.write<scalar_t>(dx);
        void* const stream = here.stream();
        ChannelEpilogue<scalar_t> epilogue;
        epilogue.activation = kind.kind;
        epilogue.negative_slope = A(kind.negative_slope);
        if (kind) {
          epilogue.other = operands.read<scalar_t>(other);
          epilogue.from_output = from_output;
          epilogue.bias = biases.pointer();
          epilogue.dresidual = operands.write<scalar_t>(dresidual);
        }
        BackwardMerge<A> merge{nullptr,
                               weights.pointer(),
                               means.const_data_ptr<double>(),
                               vars.const_data_ptr<double>(),
                               eps,
                               /*reciprocal=*/false,
                               input_stats,
                               any_output(dweight),
                               any_output(dbias),
                               nullptr,
                               {}};
        const bool on_chip = fits(plan);
        ChunkGradients* partials = nullptr;
        const auto lay_out = [&](Scratch scratch) {
          if (parameters && plan.rows > 1) merge.sums = scratch.take<double>(2 * plan.rows * plan.channels);
          if (on_chip) return scratch.bytes();
          if (sums_needed) merge.partials = partials = scratch.take<ChunkGradients>(plan.partials());
          merge.coefficients = take_coefficients<A>(scratch, plan.rows * plan.columns);
          if (kind && !from_output) epilogue.coefficients = take_coefficients<A>(scratch, plan.rows * plan.columns);
          return scratch.bytes();
        };
        const size_t bytes = lay_out(Scratch());
        const at::Tensor memory = bytes ? allocate(input, bytes) : at::Tensor();
        if (bytes) lay_out(Scratch(memory.mutable_data_ptr()));
        if (on_chip) {
          slab_backward(plan, grad, from, to, merge, stream, epilogue);
          return;
        }
        if (epilogue.coefficients.scale) {
          ForwardMerge<A> again{};
          again.given_mean = {merge.mean, ElementType::kDouble, 0};
          again.given_var = {merge.var, ElementType::kDouble, 0};
          again.weight = merge.weight;
          again.bias = epilogue.bias;
          again.eps = eps;
          again.coefficients = epilogue.coefficients;
          channel_merge(plan, again, stream);
        }
        if (sums_needed) {
          channel_grad_sums<scalar_t>(plan, grad, from, merge.mean, partials, stream, epilogue);
        }
        channel_grad_merge(plan, merge, stream);
        if (!over_memory) return;
        if (input_stats || kind) {
          channel_grad_apply<scalar_t, A>(plan, grad, from, to, merge.coefficients, stream, epilogue);
        } else {
          // Of the input gradient only scale * dy is left, and x need not be read.
          merge.coefficients.center = merge.coefficients.shift = nullptr;
          channel_apply<scalar_t, A>(plan, grad, to, merge.coefficients, stream);
        }
      });
  return results;
}

// The stages one at a time, per channel and over the batch, for SyncBatchNorm.

Plan batch_plan(ChannelView& view, const std::vector<at::Tensor*>& tensors) {
  return plan_of(view, tensors, view.geometry.num_groups, /*over_batch=*/true, [](const Plan&) { return false; });
}

Tensors2 moments(const at::Tensor& input) {
  const Here here(input);
  at::Tensor x = input;
  auto view = batch_view({&x}, /*wide=*/false);
  const int64_t channels = view.geometry.channels;
  const at::Tensor mean = at::zeros({channels}, input.options().dtype(at::kDouble)), var = at::zeros_like(mean);
  if (view.geometry.elements() == 0) return {mean, var};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_moments", [&] {
    using A = Acc<scalar_t>;
    const Plan plan = batch_plan(view, {&x});
    const at::Tensor memory = allocate(input, plan.partials() * sizeof(ChunkMoments));
    ChunkMoments* const partials = static_cast<ChunkMoments*>(memory.mutable_data_ptr());
    channel_moments<scalar_t>(plan, {x.const_data_ptr<scalar_t>(), view.strides[0]}, partials, here.stream());
    ForwardMerge<A> merge{};
    merge.partials = partials;
    merge.mean = mean.mutable_data_ptr<double>();
    merge.var = var.mutable_data_ptr<double>();
    channel_merge(plan, merge, here.stream());
  });
  return {mean, var};
}

Tensors2 grad_sums(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                   const at::Tensor& var, double eps) {
  const Here here(input);
  at::Tensor x = input, dy = grad_output;
  auto view = batch_view({&x, &dy}, /*wide=*/false);
  const int64_t channels = view.geometry.channels;
  const at::Tensor means = as_parameter(mean, input, channels, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, channels, at::kDouble, "var");
  const at::Tensor sums = at::zeros({2, channels}, means.options());
  if (view.geometry.elements() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_grad_sums", [&] {
      using A = Acc<scalar_t>;
      const Plan plan = batch_plan(view, {&x, &dy});
      const at::Tensor memory = allocate(input, plan.partials() * sizeof(ChunkGradients));
      ChunkGradients* const partials = static_cast<ChunkGradients*>(memory.mutable_data_ptr());
      BackwardMerge<A> merge{};
      merge.partials = partials;
      merge.mean = means.const_data_ptr<double>();
      merge.var = vars.const_data_ptr<double>();
      merge.eps = eps;
      merge.weight.absent = 1;
      merge.sums = sums.mutable_data_ptr<double>();
      channel_grad_sums<scalar_t>(plan, {dy.const_data_ptr<scalar_t>(), view.strides[1]},
                                  {x.const_data_ptr<scalar_t>(), view.strides[0]}, merge.mean, partials, here.stream());
      channel_grad_merge(plan, merge, here.stream());
    });
  }
  return {sums[1].clone(), sums[0].clone()};
}

at::Tensor grad_apply(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                      const at::Tensor& var, const OptionalTensor& weight, const at::Tensor& sum_dy,
                      const at::Tensor& sum_dy_xhat, int64_t count, double eps) {
  const Here here(input);
  at::Tensor x = input, dy = grad_output;
  at::Tensor dx = at::empty_like(input, input.suggest_memory_format());
  auto view = batch_view({&x, &dy, &dx}, /*wide=*/false);
  const int64_t channels = view.geometry.channels;
  const auto statistic = [&](const at::Tensor& tensor, const char* name) {
    return as_parameter(tensor, input, channels, at::kDouble, name);
  };
  const at::Tensor means = statistic(mean, "mean"), vars = statistic(var, "var");
  const at::Tensor dys = statistic(sum_dy, "sum_dy"), dys_xhat = statistic(sum_dy_xhat, "sum_dy_xhat");
  const Array weights(weight, input, channels, 1, "weight");
  if (view.geometry.elements() == 0) return dx;
  TORCH_CHECK(count > 0, "normops: expected count > 0, got ", count);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_grad_apply", [&] {
    using A = Acc<scalar_t>;
    const Plan plan = batch_plan(view, {&x, &dy, &dx});
    BackwardMerge<A> merge{};
    merge.weight = weights.pointer();
    merge.mean = means.const_data_ptr<double>();
    merge.var = vars.const_data_ptr<double>();
    merge.eps = eps;
    merge.input_stats = true;
    merge.total_dy = dys.const_data_ptr<double>();
    merge.total_dy_xhat = dys_xhat.const_data_ptr<double>();
    merge.total_count = double(count);
    const auto lay_out = [&](Scratch scratch) {
      merge.coefficients = take_coefficients<A>(scratch, plan.columns);
      return scratch.bytes();
    };
    const at::Tensor memory = allocate(input, lay_out(Scratch()));
    lay_out(Scratch(memory.mutable_data_ptr()));
    channel_grad_merge(plan, merge, here.stream());
    channel_grad_apply<scalar_t, A>(
        plan, {dy.const_data_ptr<scalar_t>(), view.strides[1]}, {x.const_data_ptr<scalar_t>(), view.strides[0]},
        {dx.mutable_data_ptr<scalar_t>(), view.strides[2]}, merge.coefficients, here.stream());
  });
  return dx;
}

void move_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                        const at::Tensor& var, double momentum, int64_t count) {
  const Here here(running_mean);
  check_running_update(running_mean, running_var, mean, var, count);
  const int64_t channels = running_mean.size(0), rows = mean.dim() == 2 ? mean.size(0) : 1;
  const at::Tensor means = as_parameter(mean, running_mean, rows * channels, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, running_mean, rows * channels, at::kDouble, "var");
  update_running_stats(running_stats({running_mean, running_var, momentum}, count, rows, means.const_data_ptr<double>(),
                                     vars.const_data_ptr<double>()),
                       here.stream());
}

}  // namespace

void add_channel_kernels(torch::Library& library) {
  library.impl("_update_running_stats", move_running_stats);
  library.impl("_channel_norm_tracked", channel_norm_tracked);
  library.impl("_channel_norm", composed_channel_norm<channel_norm>);
  library.impl("_channel_norm_backward", composed_channel_norm_backward<channel_norm_backward>);
  library.impl("_channel_moments", composed_moments<moments>);
  library.impl("_channel_grad_sums", composed_grad_sums<grad_sums>);
  library.impl("_channel_grad_apply", composed_grad_apply<grad_apply>);
}

}  // namespace normops::cuda
