// Launches the channel engine for slabs that one block can hold, or a cluster.

#include <numeric>

#include "channel.h"
#include "slab_kernels.cuh"
#include "wide_slab_kernels.cuh"

namespace normops::cuda {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// f(kItems), a constant: vectors a thread holds of each tensor. Few as long as there are threads for them.
template <int kItems, int... kMore, typename F>
void with_items(int64_t vectors, const F& f) {
  if constexpr (sizeof...(kMore) > 0) {
    if (vectors > int64_t(kItems) * kSlabThreads) return with_items<kMore...>(vectors, f);
  }
  f(std::integral_constant<int, kItems>{});
}

int64_t lines_of(const Plan& plan) { return plan.over_batch ? plan.cut.lines : plan.group_size; }
int64_t vectors_of(const Plan& plan) { return lines_of(plan) * plan.by_line.divisor(); }

constexpr int kMostForward = 16, kMostBackward = 8;  // items

// f(kSize, kItems). What fits in registers makes forward slabs of 65,536 elements of 16 bits (float 32,768, double
// 16,384, 8,192 where they are not read as vectors) and backward slabs of half as many; in clusters, 8 times as
// many as vectors. With an epilogue there are fewer kernels, of double half as many elements, and no clusters.
template <bool kEpilogue, typename T, typename F>
void with_forward(const Plan& plan, const F& f) {
  const auto with = [&](auto size) { return [&f, size](auto items) { f(size, items); }; };
  const int64_t vectors = vectors_of(plan);
  if (!plan.vectors) {
    with_items<kMostForward>(vectors, with(std::integral_constant<int, 1>{}));
  } else if constexpr (kEpilogue) {
    with_items<4, sizeof(T) == 8 ? 8 : kMostForward>(vectors, with(std::integral_constant<int, kFullVector<T>>{}));
  } else {
    with_items<4, 8, kMostForward>(vectors, with(std::integral_constant<int, kFullVector<T>>{}));
  }
}
template <bool kEpilogue, typename T, typename F>
void with_backward(const Plan& plan, const F& f) {
  const auto with = [&](auto size) { return [&f, size](auto items) { f(size, items); }; };
  const int64_t vectors = vectors_of(plan);
  if (!plan.vectors) {
    with_items<kMostBackward>(vectors, with(std::integral_constant<int, 1>{}));
  } else if constexpr (kEpilogue) {
    with_items<sizeof(T) == 8 ? 4 : kMostBackward>(vectors, with(std::integral_constant<int, kFullVector<T>>{}));
  } else {
    with_items<4, kMostBackward>(vectors, with(std::integral_constant<int, kFullVector<T>>{}));
  }
}

// Vectors of the part of a slab that each of some blocks has. In the backward a channel of a group is the work of one.
int64_t part_of(const Plan& plan, int blocks, bool backward) {
  if (backward && plan.group_size > 1) return ceil_div(lines_of(plan), blocks) * plan.by_line.divisor();
  return ceil_div(vectors_of(plan), blocks);
}

// The blocks that share a slab: one, or those of a cluster; more than there can be where no number of them will do.
constexpr int kMostBlocks = 8;
int blocks_of(const Plan& plan, int64_t most_vectors, bool backward) {
  int blocks = 1;
  while (blocks <= kMostBlocks && part_of(plan, blocks, backward) > most_vectors) blocks *= 2;
  return blocks;
}

Slabs slabs_of(const Plan& plan, int blocks, bool backward) {
  return {Divisor(plan.groups), uint32_t(lines_of(plan)), uint32_t(vectors_of(plan)),
          uint32_t(part_of(plan, blocks, backward))};
}

// Whole warps, enough to hold a block's part.
LaunchConfig config_of(const Plan& plan, int items, int blocks, bool backward, size_t shared_bytes) {
  const int64_t per_thread = ceil_div(part_of(plan, blocks, backward), items);
  return {grid_of(plan.rows * plan.groups * blocks), dim3(unsigned(ceil_div(per_thread, kWarp) * kWarp)), shared_bytes,
          unsigned(blocks)};
}

// Of what is known of each channel, in the types of the arithmetic, and of the lines of a group.
template <typename A>
size_t forward_bytes(const Plan& plan) {
  return 2 * size_t(plan.group_size) * sizeof(A);
}
template <typename A>
size_t backward_bytes(const Plan& plan, bool epilogue) {
  const size_t of_line = plan.group_size > 1 ? 2 * LineUnits(plan.by_line.divisor()).most : 0;
  return size_t(plan.group_size) * (of_line + (epilogue ? 2 : 1)) * sizeof(A);
}

// Wide channels (geometry.h): as many together as are whole vectors.
bool is_wide(const Plan& plan) { return plan.layout == Layout::kChannelsLast && plan.width > 1; }

WideSlabs wide_slabs_of(const Plan& plan, int size) {
  const int64_t channels = size / std::gcd(int64_t(size), plan.width), line = channels * plan.width / size;
  const int64_t samples = plan.cut.positions, depth = std::min<int64_t>(kSlabThreads / line, samples);
  return {Divisor(line), Divisor(plan.width), uint32_t(channels), uint32_t(depth), uint32_t(samples)};
}

// f(slabs, kSize, kItems), if threads can hold them; returns whether they can. kItems is one of two.
template <int kFew, int kMany, typename T, typename F>
bool with_wide(const Plan& plan, const F& f) {
  constexpr int kSize = kFullVector<T>;
  // A vector reaches into one other channel, not two.
  if (!plan.vectors || !plan.over_batch || plan.group_size != plan.width || plan.width < kSize) return false;
  const WideSlabs slabs = wide_slabs_of(plan, kSize);
  if (slabs.depth == 0 || plan.channels % slabs.channels != 0) return false;
  const int64_t items = ceil_div(plan.cut.positions, slabs.depth);
  const auto with = [&](auto most) {
    if (items <= most.value) f(slabs, std::integral_constant<int, kSize>{}, most);
    return items <= most.value;
  };
  return with(std::integral_constant<int, kFew>{}) || with(std::integral_constant<int, kMany>{});
}
template <typename T, typename F>
bool with_wide_forward(const Plan& plan, const F& f) {
  return with_wide<4, kMostForward, T>(plan, f);
}
template <typename T, typename F>
bool with_wide_backward(const Plan& plan, const F& f) {
  return with_wide<4, kMostBackward, T>(plan, f);
}

LaunchConfig wide_config(const Plan& plan, const WideSlabs& slabs) {
  const unsigned threads = slabs.depth * slabs.by_line.divisor();
  return {grid_of(plan.channels / slabs.channels), dim3((threads + kWarp - 1) / kWarp * kWarp)};
}

}  // namespace

template <typename T>
bool slab_fits(const Plan& plan, int device, bool backward, bool epilogue) {
  constexpr size_t kMostBytes = 32 * 1024;
  if (is_wide(plan)) {
    const auto nothing = [](const WideSlabs&, auto, auto) {};
    return !epilogue && (backward ? with_wide_backward<T>(plan, nothing) : with_wide_forward<T>(plan, nothing));
  }
  // A channel over the batch, or a group of channels of a sample: not both.
  if (plan.layout != Layout::kContiguous || (plan.over_batch && plan.group_size > 1)) return false;
  int64_t most = 0;
  const auto note = [&](auto, auto items) { most = int64_t(items.value) * kSlabThreads; };
  if (backward) {
    epilogue ? with_backward<true, T>(plan, note) : with_backward<false, T>(plan, note);
  } else {
    epilogue ? with_forward<true, T>(plan, note) : with_forward<false, T>(plan, note);
  }
  if ((backward ? backward_bytes<Acc<T>>(plan, epilogue) : forward_bytes<Acc<T>>(plan)) > kMostBytes) return false;
  const int blocks = blocks_of(plan, most, backward);
  if (blocks == 1) return true;
  // Clusters, where they are many enough to be worth their barriers. Samples are not counted (kWantedBlocks).
  const int64_t wanted = plan.over_batch ? 128 : 16;
  return plan.vectors && !epilogue && blocks <= kMostBlocks && plan.groups * blocks >= wanted &&
         Device::get(device).clusters;
}

template <typename T, typename A>
void slab_forward(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const ForwardMerge<A>& args,
                  void* stream, const ChannelEpilogue<T>& epilogue) {
  if (is_wide(plan)) {
    with_wide_forward<T>(plan, [&](const WideSlabs& slabs, auto size, auto items) {
      check(launch(wide_slab_forward_kernel<T, size.value, items.value>, wide_config(plan, slabs),
                   static_cast<cudaStream_t>(stream), slabs, x, y, args),
            "wide_slab_forward");
    });
    return;
  }
  const auto run = [&](auto kernel, int items, int blocks, const auto& end) {
    check(launch(kernel, config_of(plan, items, blocks, /*backward=*/false, forward_bytes<A>(plan)),
                 static_cast<cudaStream_t>(stream), plan, slabs_of(plan, blocks, false), x, y, args, end),
          "slab_forward");
  };
  const auto with_end = [&](auto there, const auto& end) {
    with_forward<there.value, T>(plan, [&](auto size, auto items) {
      const int blocks = blocks_of(plan, int64_t(items.value) * kSlabThreads, /*backward=*/false);
      if constexpr (!there.value && size.value > 1 && items.value == kMostForward) {
        if (blocks > 1) {
          return run(slab_forward_kernel<T, size.value, items.value, false, true>, items.value, blocks, end);
        }
      }
      run(slab_forward_kernel<T, size.value, items.value, there.value, false>, items.value, 1, end);
    });
  };
  epilogue ? with_end(std::true_type{}, epilogue) : with_end(std::false_type{}, NoEpilogue{});
}

template <typename T, typename A>
void slab_backward(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                   const BackwardMerge<A>& args, void* stream, const ChannelEpilogue<T>& epilogue) {
  if (is_wide(plan)) {
    with_wide_backward<T>(plan, [&](const WideSlabs& slabs, auto size, auto items) {
      check(launch(wide_slab_backward_kernel<T, size.value, items.value>, wide_config(plan, slabs),
                   static_cast<cudaStream_t>(stream), slabs, dy, x, dx, args),
            "wide_slab_backward");
    });
    return;
  }
  const auto run = [&](auto kernel, int items, int blocks, const auto& end) {
    check(launch(kernel, config_of(plan, items, blocks, /*backward=*/true, backward_bytes<A>(plan, bool(epilogue))),
                 static_cast<cudaStream_t>(stream), plan, slabs_of(plan, blocks, true), dy, x, dx, args, end),
          "slab_backward");
  };
  const auto with_end = [&](auto there, const auto& end) {
    with_backward<there.value, T>(plan, [&](auto size, auto items) {
      const int blocks = blocks_of(plan, int64_t(items.value) * kSlabThreads, /*backward=*/true);
      if constexpr (!there.value && size.value > 1 && items.value == kMostBackward) {
        if (blocks > 1) {
          const auto kernel = plan.group_size > 1
                                  ? slab_backward_kernel<T, size.value, items.value, false, true, true>
                                  : slab_backward_kernel<T, size.value, items.value, false, true, false>;
          return run(kernel, items.value, blocks, end);
        }
      }
      run(slab_backward_kernel<T, size.value, items.value, there.value, false, false>, items.value, 1, end);
    });
  };
  epilogue ? with_end(std::true_type{}, epilogue) : with_end(std::false_type{}, NoEpilogue{});
  if (args.sums) {
    column_sums(args.sums, args.sums + plan.rows * plan.columns, plan.rows, plan.columns, plan.columns, args.dweight,
                args.dbias, stream);
  }
}

#define NORMOPS_INSTANTIATE(T)                                                                                   \
  template bool slab_fits<T>(const Plan&, int, bool, bool);                                                      \
  template void slab_forward(const Plan&, ChannelTensor<const T>, ChannelTensor<T>, const ForwardMerge<Acc<T>>&, \
                             void*, const ChannelEpilogue<T>&);                                                  \
  template void slab_backward(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, ChannelTensor<T>,     \
                              const BackwardMerge<Acc<T>>&, void*, const ChannelEpilogue<T>&);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

}  // namespace normops::cuda
