// Launches the stages of the channel engine.

#include "channel.h"

#include "channel_kernels.cuh"
#include "merge_kernels.cuh"

namespace normops::cuda {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int power_of_two(int64_t least) {
  int lanes = 1;
  while (lanes < kWarp && lanes < least) lanes *= 2;
  return lanes;
}

template <typename T>
int vector_size(bool vectors) {
  return vectors ? kFullVector<T> : 1;
}

// f(layout, size), both constants.
template <typename T, typename F>
void with_walk(const Plan& plan, const F& f) {
  const auto with_size = [&](auto size) {
    if (plan.layout == Layout::kContiguous) {
      f(std::integral_constant<Layout, Layout::kContiguous>{}, size);
    } else {
      f(std::integral_constant<Layout, Layout::kChannelsLast>{}, size);
    }
  };
  if (plan.vectors) {
    with_size(std::integral_constant<int, kFullVector<T>>{});
  } else {
    with_size(std::integral_constant<int, 1>{});
  }
}

template <typename T>
LaunchConfig walk_config(const Plan& plan) {
  const int64_t chunks = plan.rows * plan.cut.chunks;
  const int64_t blocks = plan.layout == Layout::kContiguous
                             ? ceil_div(chunks * plan.channels * plan.lanes, kWalkThreads)
                             : chunks * ceil_div(plan.channels, int64_t(plan.lanes) * vector_size<T>(plan.vectors));
  return {dim3(unsigned(blocks)), dim3(kWalkThreads)};
}

LaunchConfig merge_config(const Plan& plan) {
  const int64_t width = plan.group_size > 1 ? plan.group_size : kMergeColumns;
  return {dim3(unsigned(plan.rows * ceil_div(plan.channels, width))), dim3(kMergeColumns, kMergeRows)};
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

void use_device(int index) { Device::use(index); }

bool vectorizable(const Geometry& g, const void* data, const Strides& s, int element_size) {
  const int64_t size = kVectorBytes / element_size;
  const bool lines = g.layout == Layout::kContiguous;
  const auto steps = [&](int64_t extent, int64_t stride) { return extent == 1 || stride % size == 0; };
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && (lines ? g.positions : g.channels) % size == 0 &&
         steps(g.samples, s.sample) && (lines ? steps(g.channels, s.channel) : steps(g.positions, s.position));
}

Plan make_plan(const Geometry& g, int element_size, bool vectors) {
  const int size = vectors ? kVectorBytes / element_size : 1;
  Plan plan{g.layout, vectors, g.over_batch, /*centered=*/true, g.rows(), g.channels, g.group_size(), 1, {}};
  Cut& cut = plan.cut;
  cut.positions = g.positions;
  if (g.layout == Layout::kContiguous) {
    plan.lanes = power_of_two(ceil_div(g.positions, size));
    cut.span = int64_t(plan.lanes) * size;
    cut.pieces_per_chunk = items_of(g.layout, size);
  } else {
    plan.lanes = power_of_two(ceil_div(g.channels, size));
    cut.span = int64_t(kWalkThreads / plan.lanes) * items_of(g.layout, size);
    cut.pieces_per_chunk = 1;
  }
  cut.pieces = ceil_div(g.positions, cut.span);
  cut.total_pieces = g.samples_per_row() * cut.pieces;
  cut.chunks = ceil_div(cut.total_pieces, cut.pieces_per_chunk);
  return plan;
}

template <typename T>
void channel_moments(const Plan& plan, ChannelTensor<const T> x, ChunkMoments* partials, void* stream) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    check(
        launch(moments_kernel<T, layout.value, size.value>, walk_config<T>(plan), as_stream(stream), plan, x, partials),
        "moments");
  });
}

template <typename T, typename A>
void channel_grad_sums(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, const double* mean,
                       const A* position_weight, ChunkGradients* partials, void* stream) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    check(launch(grad_sums_kernel<T, layout.value, size.value>, walk_config<T>(plan), as_stream(stream), plan, dy, x,
                 mean, position_weight, partials),
          "grad_sums");
  });
}

template <typename A>
void channel_merge(const Plan& plan, const ForwardMerge<A>& args, void* stream) {
  check(launch(merge_kernel<A>, merge_config(plan), as_stream(stream), plan, args), "merge");
}

template <typename A>
void channel_grad_merge(const Plan& plan, const BackwardMerge<A>& args, void* stream) {
  check(launch(grad_merge_kernel<A>, merge_config(plan), as_stream(stream), plan, args), "grad_merge");
  if (args.sums && (args.dweight || args.dbias)) {
    column_sums(args.sums, args.sums + plan.rows * plan.channels, plan.rows, plan.channels, plan.channels, args.dweight,
                args.dbias, stream);
  }
}

template <typename T, typename A>
void channel_apply(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const Coefficients<A>& coefficients,
                   const A* position_weight, const A* position_bias, void* stream) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    check(launch(apply_kernel<T, layout.value, size.value>, walk_config<T>(plan), as_stream(stream), plan, x, y,
                 coefficients, position_weight, position_bias),
          "apply");
  });
}

template <typename T, typename A>
void channel_grad_apply(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                        const Coefficients<A>& coefficients, void* stream) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    check(launch(grad_apply_kernel<T, layout.value, size.value>, walk_config<T>(plan), as_stream(stream), plan, dy, x,
                 dx, coefficients),
          "grad_apply");
  });
}

template <typename T, typename A>
void long_row_backward(const Plan& plan, const LongRowBackward<T, A>& args, void* stream) {
  const auto run = [&](auto size) {
    check(launch(long_row_backward_kernel<T, size.value>, walk_config<T>(plan), as_stream(stream), plan, args),
          "long_row_backward");
  };
  if (plan.vectors) {
    run(std::integral_constant<int, kFullVector<T>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

template <typename S, typename A>
void column_sums(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, A* first_total,
                 A* second_total, void* stream) {
  if (first_total == nullptr && second_total == nullptr) return;
  const dim3 grid(unsigned(ceil_div(columns, kSumColumns)), 2);
  check(launch(column_sums_kernel<S, A>, {grid, dim3(kSumColumns, kSumRows)}, as_stream(stream), first, second, rows,
               stride, columns, first_total, second_total),
        "column_sums");
}

void update_running_stats(const RunningStats& args, void* stream) {
  const dim3 grid(unsigned(ceil_div(args.channels, kWalkThreads)), 2);
  check(launch(running_stats_kernel, {grid, dim3(kWalkThreads)}, as_stream(stream), args), "update_running_stats");
}

#define NORMOPS_INSTANTIATE(T)                                                                                    \
  template void channel_moments(const Plan&, ChannelTensor<const T>, ChunkMoments*, void*);                       \
  template void channel_grad_sums(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, const double*,     \
                                  const Acc<T>*, ChunkGradients*, void*);                                         \
  template void channel_apply(const Plan&, ChannelTensor<const T>, ChannelTensor<T>, const Coefficients<Acc<T>>&, \
                              const Acc<T>*, const Acc<T>*, void*);                                               \
  template void channel_grad_apply(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, ChannelTensor<T>, \
                                   const Coefficients<Acc<T>>&, void*);                                           \
  template void long_row_backward(const Plan&, const LongRowBackward<T, Acc<T>>&, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

#define NORMOPS_INSTANTIATE(A)                                                   \
  template void channel_merge(const Plan&, const ForwardMerge<A>&, void*);       \
  template void channel_grad_merge(const Plan&, const BackwardMerge<A>&, void*); \
  template void column_sums(const double*, const double*, int64_t, int64_t, int64_t, A*, A*, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
#undef NORMOPS_INSTANTIATE
template void column_sums(const float*, const float*, int64_t, int64_t, int64_t, float*, float*, void*);

}  // namespace normops::cuda
