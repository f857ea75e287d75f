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
  constexpr int64_t kLongest = 128 * 1024;
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
// says that a plan does not go over memory twice.
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
  if (plan.vectors || plan.layout != Layout::kContiguous || !over_batch || fits(plan)) return plan;
  const ChannelView narrow = view;
  view = wide_channel_view(tensors, num_groups, over_batch);
  const Plan wide = plan_as_seen();
  if (wide.vectors) return wide;
  view = narrow;
  return plan;
}

template <typename A>
Coefficients<A> take_coefficients(Scratch& scratch, int64_t count) {
  return {scratch.take<A>(count), scratch.take<A>(count), scratch.take<A>(count), scratch.take<A>(count)};
}

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, bool over_batch,
                      double eps) {
  const Here here(input);
  at::Tensor x = input;
  at::Tensor output = at::empty_like(input, input.suggest_memory_format());
  const std::vector<at::Tensor*> operands{&x, &output};
  auto view = channel_view(operands, num_groups, over_batch);
  const Geometry g = view.geometry;
  const bool given = defined(given_mean);
  TORCH_CHECK(given == defined(given_var), "normops: expected mean and var to be given together");
  const auto shape = channel_statistics_shape(input, num_groups, over_batch);
  const int64_t count = c10::multiply_integers(shape);
  const auto statistics = input.options().dtype(at::kDouble);
  const Array means(given_mean, input, count, 0, "mean"), vars(given_var, input, count, 0, "var");
  const Array weights(weight, input, g.channels, 1, "weight"), biases(bias, input, g.channels, 0, "bias");
  if (g.elements() == 0) {
    const auto fill = [&](const Array& a) {
      return given ? a.tensor.to(at::kDouble, false, true).view(shape) : at::zeros(shape, statistics);
    };
    return {output, fill(means), fill(vars)};
  }
  const at::Tensor mean = at::empty(shape, statistics), var = at::empty(shape, statistics);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm", [&] {
    using A = Acc<scalar_t>;
    const auto fits = [&](const Plan& plan) { return !given && slab_fits<scalar_t>(plan, /*backward=*/false); };
    const Plan plan = plan_of(view, operands, num_groups, over_batch, fits);
    const ChannelTensor<const scalar_t> from{x.const_data_ptr<scalar_t>(), view.strides[0]};
    const ChannelTensor<scalar_t> to{output.mutable_data_ptr<scalar_t>(), view.strides[1]};
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
                          {}};
    if (fits(plan)) {
      slab_forward(plan, from, to, merge, stream);
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
    channel_apply<scalar_t, A>(plan, from, to, merge.coefficients, nullptr, nullptr, stream);
  });
  return {output, mean, var};
}

Tensors3 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, int64_t num_groups, bool over_batch,
                               double eps, bool input_stats, Mask3 output_mask) {
  const Here here(input);
  at::Tensor x = input, dy = grad_output, dx;
  std::vector<at::Tensor*> operands{&x, &dy};
  if (output_mask[0]) {
    dx = at::empty_like(input, input.suggest_memory_format());
    operands.push_back(&dx);
  }
  auto view = channel_view(operands, num_groups, over_batch);
  const Geometry g = view.geometry;
  const int64_t count = c10::multiply_integers(channel_statistics_shape(input, num_groups, over_batch));
  const at::Tensor means = as_parameter(mean, input, count, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, count, at::kDouble, "var");
  const Array weights(weight, input, g.channels, 1, "weight");
  const auto options = at::TensorOptions().device(input.device()).dtype(composed::gradient_type(weight, input));
  const bool empty = g.elements() == 0;
  const auto parameter = [&](bool wanted) {
    return !wanted ? at::Tensor() : empty ? at::zeros({g.channels}, options) : at::empty({g.channels}, options);
  };
  const at::Tensor dweight = parameter(output_mask[1]), dbias = parameter(output_mask[2]);
  if (empty || !(output_mask[0] || output_mask[1] || output_mask[2])) return {dx, dweight, dbias};
  const bool parameters = output_mask[1] || output_mask[2];
  const bool sums_needed = parameters || input_stats;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm_backward", [&] {
        using A = Acc<scalar_t>;
        const auto fits = [&](const Plan& plan) { return input_stats && slab_fits<scalar_t>(plan, /*backward=*/true); };
        const Plan plan = plan_of(view, operands, num_groups, over_batch, fits);
        const ChannelTensor<const scalar_t> from{x.const_data_ptr<scalar_t>(), view.strides[0]};
        const ChannelTensor<const scalar_t> grad{dy.const_data_ptr<scalar_t>(), view.strides[1]};
        const ChannelTensor<scalar_t> to{data_or_null<scalar_t>(dx), view.strides.back()};
        void* const stream = here.stream();
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
          return scratch.bytes();
        };
        const size_t bytes = lay_out(Scratch());
        const at::Tensor memory = bytes ? allocate(input, bytes) : at::Tensor();
        if (bytes) lay_out(Scratch(memory.mutable_data_ptr()));
        if (on_chip) {
          slab_backward(plan, grad, from, to, merge, stream);
          return;
        }
        if (sums_needed) {
          channel_grad_sums<scalar_t, A>(plan, grad, from, merge.mean, nullptr, partials, stream);
        }
        channel_grad_merge(plan, merge, stream);
        if (!output_mask[0]) return;
        if (input_stats) {
          channel_grad_apply<scalar_t, A>(plan, grad, from, to, merge.coefficients, stream);
        } else {
          // Of the input gradient only scale * dy is left, and x need not be read.
          merge.coefficients.center = merge.coefficients.shift = nullptr;
          channel_apply<scalar_t, A>(plan, grad, to, merge.coefficients, nullptr, nullptr, stream);
        }
      });
  return {dx, dweight, dbias};
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
      channel_grad_sums<scalar_t, A>(plan, {dy.const_data_ptr<scalar_t>(), view.strides[1]},
                                     {x.const_data_ptr<scalar_t>(), view.strides[0]}, merge.mean, nullptr, partials,
                                     here.stream());
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
  update_running_stats(RunningStats{{any_output(running_mean), any_output(running_var)},
                                    {running_mean.stride(0), running_var.stride(0)},
                                    {means.const_data_ptr<double>(), vars.const_data_ptr<double>()},
                                    {1, double(count) / double(count - 1)},
                                    momentum,
                                    rows,
                                    channels},
                       here.stream());
}

}  // namespace

void add_channel_kernels(torch::Library& library) {
  library.impl("_update_running_stats", move_running_stats);
  library.impl("_channel_norm", composed_channel_norm<channel_norm>);
  library.impl("_channel_norm_backward", composed_channel_norm_backward<channel_norm, channel_norm_backward>);
  library.impl("_channel_moments", composed_moments<moments>);
  library.impl("_channel_grad_sums", composed_grad_sums<grad_sums>);
  library.impl("_channel_grad_apply", composed_grad_apply<grad_apply>);
}

}  // namespace normops::cuda
