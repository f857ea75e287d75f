// Launches the stages of the channel engine.

#include "channel.h"

#include "channel_kernels.cuh"
#include "merge_kernels.cuh"

namespace normops::cuda {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int log2_of(int64_t least) {  // of the next power of two
  int log2 = 0;
  while (int64_t(1) << log2 < least) ++log2;
  return log2;
}

// Blocks that a launch of stages over memory should have before threads are given more to do. Layers that work per
// sample do not count samples, which must not change how sums are cut.
constexpr int64_t kWantedBlocks = 256, kWantedBlocksOfSample = 16;
// And those of a merge, which reads little.
constexpr int64_t kWantedMergeBlocks = 128;

// The most lanes that waste hardly more of them than fewer would, where `vectors` lie side by side.
int best_lanes_log2(int64_t vectors) {
  const auto waste = [&](int log2) { return double(ceil_div(vectors, int64_t(1) << log2) << log2); };
  int best = std::min(5, log2_of(vectors)), fewest = std::min(2, best);
  for (int log2 = best; log2 >= fewest; --log2) {
    if (waste(log2) < waste(best) / 1.125) best = log2;
  }
  return best;
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

LaunchConfig walk_config(const Plan& plan) {
  return {grid_of(plan.rows * plan.cut.chunks * (plan.layout == Layout::kContiguous ? plan.columns : plan.tiles())),
          dim3(plan.threads)};
}

struct MergeLaunch {
  MergeGrid grid;
  LaunchConfig config;

  explicit MergeLaunch(const Plan& plan) {
    const bool grouped = plan.group_size > 1;
    // How a sum is cut, and so its bits, may not depend on how many rows there are: each may be one sample of a batch.
    grid.lanes_log2 = std::min(5, log2_of(grouped ? plan.group_size : plan.columns));
    if (!grouped) {
      while (grid.lanes_log2 > 1 && ceil_div(plan.columns, 1 << grid.lanes_log2) < kWantedMergeBlocks &&
             plan.cut.chunks > kMergeThreads >> grid.lanes_log2) {
        --grid.lanes_log2;
      }
    }
    const int64_t blocks = grouped ? plan.groups : ceil_div(plan.columns, 1 << grid.lanes_log2);
    grid.blocks = Divisor(blocks);
    // Where blocks are many, or samples may be, no more threads than read a batch of chunks each; two warps, as they
    // write the two sums of a lane.
    const bool many = !plan.over_batch || blocks >= 2 * kWantedMergeBlocks;
    const int64_t reading = std::max(ceil_div(plan.cut.chunks, kBatch) << grid.lanes_log2, plan.group_size);
    const int threads = many ? 1 << log2_of(std::clamp<int64_t>(reading, 2 * kWarp, kMergeThreads)) : kMergeThreads;
    config = {grid_of(plan.rows * blocks), dim3(threads)};
  }
};

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

void use_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

bool vectorizable(const Geometry& g, const void* data, const Strides& s, int element_size) {
  const int64_t size = kVectorBytes / element_size;
  const bool lines = g.layout == Layout::kContiguous;
  const auto steps = [&](int64_t extent, int64_t stride) { return extent == 1 || stride % size == 0; };
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (lines ? g.positions : g.channels * g.width) % size == 0 && steps(g.samples, s.sample) &&
         (lines ? steps(g.channels, s.channel) : steps(g.positions, s.position));
}

Plan make_plan(const Geometry& g, int element_size, bool vectors) {
  const int64_t size = vectors ? kVectorBytes / element_size : 1;
  Plan plan{};
  plan.layout = g.layout;
  plan.vectors = vectors;
  plan.over_batch = g.over_batch;
  plan.centered = true;
  plan.rows = g.rows();
  plan.columns = g.channels * g.width;
  plan.group_size = g.group_size() * g.width;
  plan.width = g.width;
  plan.groups = plan.columns / plan.group_size;
  plan.channels = g.channels;
  plan.threads = kWalkThreads;
  Cut& cut = plan.cut;
  cut.positions = g.positions;
  cut.lines = g.samples_per_row();
  cut.lines_per_chunk = 1;
  const int64_t wanted = g.over_batch ? kWantedBlocks : kWantedBlocksOfSample;
  int64_t items = kMostItems;
  const auto spread = [&](auto blocks) {  // fewer items for each thread where that makes blocks
    while (items > 2 && blocks() < wanted) items /= 2;
  };
  int64_t parts = 1, span = g.positions;
  if (g.layout == Layout::kContiguous) {
    const int64_t line = g.positions / size, all = cut.lines * line;
    spread([&] { return plan.columns * ceil_div(all, kWalkThreads * items); });
    plan.threads = int(std::min<int64_t>(kWalkThreads, ceil_div(ceil_div(all, items), kWarp) * kWarp));
    const int64_t capacity = plan.threads * items;
    parts = ceil_div(line, capacity);
    span = ceil_div(line, parts) * size;
    if (parts == 1) cut.lines_per_chunk = std::min(cut.lines, capacity / line);
    plan.by_line = Divisor(std::min<int64_t>(line, INT32_MAX));
    plan.by_tiles = Divisor(1);
  } else {
    const int64_t across = plan.columns / size;
    plan.lanes_log2 = best_lanes_log2(across);
    plan.by_tiles = Divisor(ceil_div(across, int64_t(1) << plan.lanes_log2));
    const int64_t down = kWalkThreads >> plan.lanes_log2;
    spread([&] { return plan.by_tiles.divisor() * cut.lines * ceil_div(g.positions, down * items); });
    parts = ceil_div(g.positions, down * items);
    span = ceil_div(g.positions, parts);
  }
  if (parts > 1) {
    parts = ceil_div(g.positions, span);  // rounding may have left one without anything
    cut.chunks = cut.lines * parts;
    cut.cycle = Divisor(parts);
    cut.line_step = 0, cut.position_step = span;
    cut.full = uint32_t(span), cut.last = uint32_t(g.positions - (parts - 1) * span);
  } else {
    cut.chunks = ceil_div(cut.lines, cut.lines_per_chunk);
    cut.cycle = Divisor(cut.chunks);
    cut.line_step = cut.lines_per_chunk, cut.position_step = 0;
    cut.full = uint32_t(cut.lines_per_chunk * g.positions);
    cut.last = uint32_t((cut.lines - (cut.chunks - 1) * cut.lines_per_chunk) * g.positions);
  }
  plan.by_chunks = Divisor(cut.chunks);
  plan.by_columns = Divisor(plan.columns);
  plan.by_group = Divisor(plan.group_size);
  return plan;
}

template <typename T>
void channel_moments(const Plan& plan, ChannelTensor<const T> x, ChunkMoments* partials, void* stream) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    check(launch(moments_kernel<T, layout.value, size.value>, walk_config(plan), as_stream(stream), plan, x, partials),
          "moments");
  });
}

// f(whether there is one, what the kernel is given of it).
template <typename T, typename F>
void with_epilogue(const ChannelEpilogue<T>& epilogue, const F& f) {
  if (epilogue) {
    f(std::true_type{}, epilogue);
  } else {
    f(std::false_type{}, NoEpilogue{});
  }
}

template <typename T>
void channel_grad_sums(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, const double* mean,
                       ChunkGradients* partials, void* stream, const ChannelEpilogue<T>& epilogue) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    with_epilogue(epilogue, [&](auto there, const auto& end) {
      check(launch(grad_sums_kernel<T, layout.value, size.value, there.value>, walk_config(plan), as_stream(stream),
                   plan, dy, x, mean, partials, end),
            "grad_sums");
    });
  });
}

template <typename A>
void channel_merge(const Plan& plan, const ForwardMerge<A>& args, void* stream) {
  const MergeLaunch merge(plan);
  check(launch(merge_kernel<A>, merge.config, as_stream(stream), plan, merge.grid, args), "merge");
}

template <typename A>
void channel_grad_merge(const Plan& plan, const BackwardMerge<A>& args, void* stream) {
  const MergeLaunch merge(plan);
  check(launch(grad_merge_kernel<A>, merge.config, as_stream(stream), plan, merge.grid, args), "grad_merge");
  if (args.sums) {
    const int64_t channels = plan.channels;
    column_sums(args.sums, args.sums + plan.rows * channels, plan.rows, channels, channels, args.dweight, args.dbias,
                stream);
  }
}

template <typename T, typename A>
void channel_apply(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const Coefficients<A>& coefficients,
                   void* stream, const ChannelEpilogue<T>& epilogue) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    with_epilogue(epilogue, [&](auto there, const auto& end) {
      check(launch(apply_kernel<T, layout.value, size.value, there.value>, walk_config(plan), as_stream(stream), plan,
                   x, y, coefficients, end),
            "apply");
    });
  });
}

template <typename T, typename A>
void channel_grad_apply(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                        const Coefficients<A>& coefficients, void* stream, const ChannelEpilogue<T>& epilogue) {
  with_walk<T>(plan, [&](auto layout, auto size) {
    with_epilogue(epilogue, [&](auto there, const auto& end) {
      check(launch(grad_apply_kernel<T, layout.value, size.value, there.value>, walk_config(plan), as_stream(stream),
                   plan, dy, x, dx, coefficients, end),
            "grad_apply");
    });
  });
}

template <typename S>
void column_sums(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, AnyOutput first_total,
                 AnyOutput second_total, void* stream) {
  if (!first_total && !second_total) return;
  // No fewer lanes than fill the 32 bytes that memory is read by, and more of them where rows are so few that threads
  // below each other would have hardly any.
  constexpr int64_t kFewRows = 4 * kBatch;
  const auto blocks = [&](int log2) { return 2 * ceil_div(columns, int64_t(1) << log2); };
  const auto few = [&](int log2) { return rows <= kFewRows * (kMergeThreads >> log2); };
  int lanes_log2 = 5;
  while (lanes_log2 > 3 && blocks(lanes_log2) < kWantedMergeBlocks) --lanes_log2;
  while (1 << lanes_log2 < kMergeThreads && few(lanes_log2 + 1) && blocks(lanes_log2 + 1) >= kWantedMergeBlocks) {
    ++lanes_log2;
  }
  const dim3 grid(unsigned(ceil_div(columns, 1 << lanes_log2)), 2);
  check(launch(column_sums_kernel<S>, {grid, dim3(kMergeThreads)}, as_stream(stream), first, second, rows, stride,
               columns, lanes_log2, first_total, second_total),
        "column_sums");
}

void update_running_stats(const RunningStats& args, void* stream) {
  const dim3 grid(unsigned(ceil_div(args.channels, kWalkThreads)), 2);
  check(launch(running_stats_kernel, {grid, dim3(kWalkThreads)}, as_stream(stream), args), "update_running_stats");
}

#define NORMOPS_INSTANTIATE(T)                                                                                    \
  template void channel_moments(const Plan&, ChannelTensor<const T>, ChunkMoments*, void*);                       \
  template void channel_grad_sums(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, const double*,     \
                                  ChunkGradients*, void*, const ChannelEpilogue<T>&);                             \
  template void channel_apply(const Plan&, ChannelTensor<const T>, ChannelTensor<T>, const Coefficients<Acc<T>>&, \
                              void*, const ChannelEpilogue<T>&);                                                  \
  template void channel_grad_apply(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, ChannelTensor<T>, \
                                   const Coefficients<Acc<T>>&, void*, const ChannelEpilogue<T>&);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

#define NORMOPS_INSTANTIATE(A)                                                   \
  template void channel_merge(const Plan&, const ForwardMerge<A>&, void*);       \
  template void channel_grad_merge(const Plan&, const BackwardMerge<A>&, void*); \
  template void column_sums<A>(const A*, const A*, int64_t, int64_t, int64_t, AnyOutput, AnyOutput, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
#undef NORMOPS_INSTANTIATE

}  // namespace normops::cuda
