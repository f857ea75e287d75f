// Launches the channel engine for slabs that one block can hold.

#include "channel.h"
#include "slab_kernels.cuh"

namespace normops::cuda {
namespace {

// Vectors a thread holds of each tensor: what fits in registers. That makes forward slabs of 32,768 elements (28,672 of
// float, 8,192 of double, or where they are not read as vectors) and backward slabs of 16,384 of 16 bits, 12,288 of
// float (4,096).
template <typename T>
constexpr int forward_items(bool vectors) {
  if (!vectors) return sizeof(T) == 8 ? 8 : 16;
  return sizeof(T) == 4 ? 14 : 8;
}
template <typename T>
constexpr int backward_items(bool vectors) {
  if (!vectors) return 8;
  return sizeof(T) == 4 ? 6 : 4;
}

int64_t pieces_of(const Plan& plan) {
  return plan.over_batch ? plan.cut.total_pieces : plan.group_size * plan.cut.pieces;
}

// Whole warps, enough to hold the slab.
int64_t threads_of(const Plan& plan, int items) {
  const int64_t per_thread = (pieces_of(plan) * plan.lanes + items - 1) / items;
  return (per_thread + kWarp - 1) / kWarp * kWarp;
}

template <typename F>
void with_vectors(bool vectors, const F& f) {
  if (vectors) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace

template <typename T>
bool slab_fits(const Plan& plan, bool backward) {
  // A channel over the batch, or a group of channels of a sample: not both.
  if (plan.layout != Layout::kContiguous || (plan.over_batch && plan.group_size > 1)) return false;
  const int items = backward ? backward_items<T>(plan.vectors) : forward_items<T>(plan.vectors);
  return threads_of(plan, items) <= kSlabThreads;
}

template <typename T, typename A>
void slab_forward(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const ForwardMerge<A>& args,
                  void* stream) {
  with_vectors(plan.vectors, [&](auto vectors) {
    constexpr int kSize = decltype(vectors)::value ? kFullVector<T> : 1;
    constexpr int kItems = forward_items<T>(decltype(vectors)::value);
    const dim3 grid(unsigned(plan.rows * plan.num_groups())), block(unsigned(threads_of(plan, kItems)));
    check(launch(slab_forward_kernel<T, kSize, kItems>, {grid, block}, static_cast<cudaStream_t>(stream), plan, x, y,
                 args),
          "slab_forward");
  });
}

template <typename T, typename A>
void slab_backward(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                   const BackwardMerge<A>& args, void* stream) {
  with_vectors(plan.vectors, [&](auto vectors) {
    constexpr int kSize = decltype(vectors)::value ? kFullVector<T> : 1;
    constexpr int kItems = backward_items<T>(decltype(vectors)::value);
    const dim3 grid(unsigned(plan.rows * plan.num_groups())), block(unsigned(threads_of(plan, kItems)));
    const size_t bytes = plan.group_size > 1 ? size_t(pieces_of(plan)) * 2 * sizeof(A) : 0;
    const auto kernel = slab_backward_kernel<T, kSize, kItems>;
    allow_shared(kernel, bytes);
    check(launch(kernel, {grid, block, bytes}, static_cast<cudaStream_t>(stream), plan, dy, x, dx, args),
          "slab_backward");
  });
  if (args.sums) {
    column_sums(args.sums, args.sums + plan.rows * plan.channels, plan.rows, plan.channels, plan.channels, args.dweight,
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
