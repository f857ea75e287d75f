// Launches the channel engine for slabs that one block can hold.

#include "channel.h"
#include "slab_kernels.cuh"

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

// f(kSize, kItems). What fits in registers makes forward slabs of 65,536 elements of 16 bits (float 32,768, double
// 16,384, 8,192 where they are not read as vectors) and backward slabs of half as many.
template <typename T, typename F>
void with_forward(const Plan& plan, int64_t vectors, const F& f) {
  if (plan.vectors) {
    with_items<4, 8, 16>(vectors, [&](auto items) { f(std::integral_constant<int, kFullVector<T>>{}, items); });
  } else {
    with_items<16>(vectors, [&](auto items) { f(std::integral_constant<int, 1>{}, items); });
  }
}
template <typename T, typename F>
void with_backward(const Plan& plan, int64_t vectors, const F& f) {
  if (plan.vectors) {
    with_items<4, 8>(vectors, [&](auto items) { f(std::integral_constant<int, kFullVector<T>>{}, items); });
  } else {
    with_items<8>(vectors, [&](auto items) { f(std::integral_constant<int, 1>{}, items); });
  }
}

int64_t lines_of(const Plan& plan) { return plan.over_batch ? plan.cut.lines : plan.group_size; }
int64_t vectors_of(const Plan& plan) { return lines_of(plan) * plan.by_line.divisor(); }

Slabs slabs_of(const Plan& plan) {
  return {Divisor(plan.groups), uint32_t(lines_of(plan)), uint32_t(vectors_of(plan))};
}

// Whole warps, enough to hold the slab.
LaunchConfig config_of(const Plan& plan, int items, size_t shared_bytes) {
  const int64_t per_thread = ceil_div(vectors_of(plan), items);
  return {grid_of(plan.rows * plan.groups), dim3(unsigned(ceil_div(per_thread, kWarp) * kWarp)), shared_bytes};
}

// Of what is known of each channel of a group, in the types of the arithmetic.
template <typename A>
size_t forward_bytes(const Plan& plan) {
  return plan.group_size > 1 ? 2 * size_t(plan.group_size) * sizeof(A) : 0;
}
template <typename A>
size_t backward_bytes(const Plan& plan) {
  const LineUnits units(plan.by_line.divisor());
  return plan.group_size > 1 ? size_t(plan.group_size) * (2 * units.most + 1) * sizeof(A) : 0;
}

}  // namespace

template <typename T>
bool slab_fits(const Plan& plan, bool backward) {
  constexpr size_t kMostBytes = 32 * 1024;
  // A channel over the batch, or a group of channels of a sample: not both.
  if (plan.layout != Layout::kContiguous || (plan.over_batch && plan.group_size > 1)) return false;
  int64_t most = 0;
  const auto note = [&](auto, auto items) { most = int64_t(items.value) * kSlabThreads; };
  if (backward) {
    with_backward<T>(plan, vectors_of(plan), note);
  } else {
    with_forward<T>(plan, vectors_of(plan), note);
  }
  return vectors_of(plan) <= most &&
         (backward ? backward_bytes<Acc<T>>(plan) : forward_bytes<Acc<T>>(plan)) <= kMostBytes;
}

template <typename T, typename A>
void slab_forward(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const ForwardMerge<A>& args,
                  void* stream) {
  with_forward<T>(plan, vectors_of(plan), [&](auto size, auto items) {
    check(launch(slab_forward_kernel<T, size.value, items.value>, config_of(plan, items.value, forward_bytes<A>(plan)),
                 static_cast<cudaStream_t>(stream), plan, slabs_of(plan), x, y, args),
          "slab_forward");
  });
}

template <typename T, typename A>
void slab_backward(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                   const BackwardMerge<A>& args, void* stream) {
  with_backward<T>(plan, vectors_of(plan), [&](auto size, auto items) {
    check(
        launch(slab_backward_kernel<T, size.value, items.value>, config_of(plan, items.value, backward_bytes<A>(plan)),
               static_cast<cudaStream_t>(stream), plan, slabs_of(plan), dy, x, dx, args),
        "slab_backward");
  });
  if (args.sums) {
    column_sums(args.sums, args.sums + plan.rows * plan.columns, plan.rows, plan.columns, plan.columns, args.dweight,
                args.dbias, stream);
  }
}

#define NORMOPS_INSTANTIATE(T)                                                                                   \
  template bool slab_fits<T>(const Plan&, bool);                                                                 \
  template void slab_forward(const Plan&, ChannelTensor<const T>, ChannelTensor<T>, const ForwardMerge<Acc<T>>&, \
                             void*);                                                                             \
  template void slab_backward(const Plan&, ChannelTensor<const T>, ChannelTensor<const T>, ChannelTensor<T>,     \
                              const BackwardMerge<Acc<T>>&, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

}  // namespace normops::cuda
