// Launches rows that neither a block nor a cluster holds: the first stage of their forward is the channel engine's, and
// so are the merges; what has parameters for each element is a kernel of its own.

#include "long_row.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "channel.h"
#include "long_row_kernels.cuh"
#include "scratch.h"

namespace normops::cuda {
namespace {

// Rows as the channel engine sees them: each is the only channel of its sample; and the matrix of rows with the
// elements of a row as channels.
Geometry rows_as_lines(int64_t rows, int64_t length) {
  return {rows, 1, length, 1, /*over_batch=*/false, Layout::kContiguous, 0};
}
Geometry rows_as_positions(int64_t rows, int64_t length) {
  return {1, length, rows, length, /*over_batch=*/true, Layout::kChannelsLast, 0};
}
template <typename T>
ChannelTensor<T> across(const Rows<T>& rows) {
  return {rows.data, {0, 1, rows.stride}};
}

Plan plan_across(int64_t rows, int64_t length, int element_size, bool vectors) {
  if (length > INT32_MAX) {
    throw std::runtime_error("normops: expected rows of at most 2147483647 elements on CUDA, got " +
                             std::to_string(length));
  }
  const Plan plan = make_plan(rows_as_positions(rows, length), element_size, vectors);
  if (1 << plan.lanes_log2 != kWarp) throw std::logic_error("normops: a warp is to have a row at a time");
  return plan;
}

// kernel(size), a constant, over the blocks of a plan.
template <typename T, typename Kernel, typename Args>
void run_across(const Plan& plan, const Kernel& kernel, const Args& args, void* stream, const char* name) {
  const LaunchConfig config{grid_of(plan.cut.chunks * plan.tiles()), dim3(kWalkThreads)};
  const auto run = [&](auto size) {
    check(launch(kernel(size), config, static_cast<cudaStream_t>(stream), plan, args), name);
  };
  if (plan.vectors) {
    run(std::integral_constant<int, kFullVector<T>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

template <typename T>
struct Forward {
  using A = Acc<T>;
  Plan lines;
  ChunkMoments* partials;
  Coefficients<A> coefficients{};

  Forward(const RowForward<T>& a, Scratch& scratch)
      : lines(make_plan(rows_as_lines(a.rows, a.length), sizeof(T), a.vectors)) {
    lines.centered = a.centered;
    partials = scratch.take<ChunkMoments>(lines.partials());
    auto& c = coefficients;
    for (auto* array : {&c.center, &c.scale, &c.shift}) *array = scratch.take<A>(a.rows);
  }

  void run(const RowForward<T>& a, void* stream) const {
    channel_moments(lines, ChannelTensor<const T>{a.x.data, {a.x.stride, 0, 1}}, partials, stream);
    ForwardMerge<A> merge{};
    merge.partials = partials;
    merge.weight.absent = 1;
    merge.eps = a.eps;
    merge.reciprocal = true;
    merge.mean = a.mean;
    merge.var = a.rstd;
    merge.coefficients = coefficients;
    channel_merge(lines, merge, stream);
    const LongRowForward<T, A> args{across(a.x), across(Rows<T>{a.y, a.length}), a.parameters, coefficients};
    run_across<T>(
        plan_across(a.rows, a.length, sizeof(T), a.vectors),
        [](auto size) { return long_row_forward_kernel<T, size.value>; }, args, stream, "long_row_forward");
  }
};

template <typename T>
struct Backward {
  using A = Acc<T>;
  Plan plan, lines;
  ChunkGradients* partials = nullptr;
  Coefficients<A> coefficients{};
  A* sums = nullptr;  // for dweight and dbias, of several chunks

  Backward(const RowBackward<T>& a, Scratch& scratch)
      : plan(plan_across(a.rows, a.length, sizeof(T), a.vectors)),
        lines(make_plan(rows_as_lines(a.rows, a.length), sizeof(T), a.vectors)) {
    lines.centered = a.centered;
    lines.cut.chunks = plan.tiles();  // a warp's part of a row is a chunk to the merge
    if (a.dx) {
      partials = scratch.take<ChunkGradients>(lines.partials());
      auto& c = coefficients;
      for (auto* array : {&c.center, &c.scale, &c.slope, &c.shift}) *array = scratch.take<A>(a.rows);
    }
    if (plan.cut.chunks > 1 && (a.dweight || a.dbias)) sums = scratch.take<A>(plan.cut.chunks * 2 * a.length);
  }

  void run(const RowBackward<T>& a, void* stream) const {
    if (a.dx) {
      const LongRowSums<T> args{across(a.dy), across(a.x), a.parameters, a.mean, partials};
      run_across<T>(plan, [](auto size) { return long_row_sums_kernel<T, size.value>; }, args, stream, "long_row_sums");
      BackwardMerge<A> merge{};
      merge.partials = partials;
      merge.weight.absent = 1;
      merge.mean = a.mean;
      merge.var = a.rstd;
      merge.reciprocal = merge.input_stats = true;
      merge.coefficients = coefficients;
      channel_grad_merge(lines, merge, stream);
    }
    const LongRowBackward<T, A> args{
        across(a.dy), across(a.x), across(Rows<T>{a.dx, a.length}), a.parameters, a.mean, a.rstd, coefficients, sums,
        a.dweight,    a.dbias};
    run_across<T>(
        plan, [](auto size) { return long_row_backward_kernel<T, size.value>; }, args, stream, "long_row_backward");
    if (plan.cut.chunks == 1) return;
    column_sums(sums, sums + a.length, plan.cut.chunks, 2 * a.length, a.length, a.dweight, a.dbias, stream);
  }
};

}  // namespace

template <typename T>
size_t long_row_forward_scratch(const RowForward<T>& a) {
  Scratch scratch;
  static_cast<void>(Forward<T>(a, scratch));
  return scratch.bytes();
}

template <typename T>
size_t long_row_backward_scratch(const RowBackward<T>& a) {
  Scratch scratch;
  static_cast<void>(Backward<T>(a, scratch));
  return scratch.bytes();
}

template <typename T>
void long_row_forward(const RowForward<T>& a, void* memory, void* stream) {
  Scratch scratch(memory);
  Forward<T>(a, scratch).run(a, stream);
}

template <typename T>
void long_row_backward(const RowBackward<T>& a, void* memory, void* stream) {
  Scratch scratch(memory);
  Backward<T>(a, scratch).run(a, stream);
}

#define NORMOPS_INSTANTIATE(T)                                        \
  template size_t long_row_forward_scratch(const RowForward<T>&);     \
  template size_t long_row_backward_scratch(const RowBackward<T>&);   \
  template void long_row_forward(const RowForward<T>&, void*, void*); \
  template void long_row_backward(const RowBackward<T>&, void*, void*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

}  // namespace normops::cuda
