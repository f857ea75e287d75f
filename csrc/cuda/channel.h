#pragma once

// The channel engine on CUDA as its glue sees it: stages that may be called one after the other or apart, on plain
// pointers; no torch, no CUDA headers.

#include <cstddef>
#include <cstdint>

#include "../geometry.h"
#include "../statistics.h"
#include "arrays.h"
#include "divisor.h"

namespace normops::cuda {

template <typename T>
struct ChannelTensor {
  T* data;
  Strides strides;
};

// Moments of a chunk, or, in the backward, sum dy and sum dy * (x - center).
struct alignas(16) ChunkMoments {
  double mean, m2;
};
struct alignas(16) ChunkGradients {
  double dy, dy_x;
};

// How the elements that share a row of statistics and a column are cut into chunks, each the work of one block. A line
// is a sample's positions. A chunk is a part of a line, or some whole lines where they are short; the last of a line,
// or of all, has what is left. All of it depends on shape, dtype and alignment alone.
struct Cut {
  int64_t positions;  // of a line
  int64_t lines;
  int64_t chunks;
  int64_t lines_per_chunk;
  // Chunk number c is number c % cycle since the last whole, a line or everything.
  Divisor cycle;
  int64_t line_step, position_step;  // from one to the next
  uint32_t full, last;               // elements

  NORMOPS_HOST_DEVICE uint32_t count(uint32_t number) const { return number + 1 == cycle.divisor() ? last : full; }
  NORMOPS_HOST_DEVICE uint32_t count_of(uint32_t chunk) const {
    cycle.split(chunk);
    return count(chunk);
  }
};

// A Geometry as kernels walk it. A column is a channel, or one element of a wide channel.
struct Plan {
  Layout layout;
  bool vectors;  // 16 bytes at a time
  bool over_batch;
  bool centered;  // false: RMSNorm, whose mean is taken to be 0
  int64_t rows;   // of statistics
  int64_t columns;
  int64_t group_size;  // columns that share a statistic
  int64_t width;       // columns that share parameters
  int64_t groups, channels;
  int threads;     // of a block
  int lanes_log2;  // across: threads side by side along the columns
  Cut cut;
  Divisor by_chunks, by_columns, by_tiles, by_line, by_group;  // by_line: vectors of a line

  int64_t partials() const { return rows * columns * cut.chunks; }
  int64_t tiles() const { return by_tiles.divisor(); }
};

// `vectors`: every tensor that will be walked lies on vector boundaries (see vectorizable).
Plan make_plan(const Geometry& geometry, int element_size, bool vectors);
bool vectorizable(const Geometry& geometry, const void* data, const Strides& strides, int element_size);

// y = (x - center) * scale + shift and dx = scale * dy + slope * (x - center) + shift, one entry per row and column.
// `center` and `shift` of the former may be null, for 0.
template <typename A>
struct Coefficients {
  A *center, *scale, *slope, *shift;
};

// What follows in the same pass: y = activation(norm(x) + residual).
template <typename T>
struct ChannelEpilogue {
  int activation = 0;  // its kind (activation.h)
  Acc<T> negative_slope = 0;
  ChannelTensor<const T> other{};  // the residual, or null; or, in the backward, the output
  // In the backward, to make what came before the activation: x * scale + shift + residual, or else from the output.
  bool from_output = false;
  Coefficients<Acc<T>> coefficients{};  // those of the forward; of slabs, the bias
  AnyArray bias{nullptr, ElementType::kFloat, 0};
  ChannelTensor<T> dresidual{};  // the gradient before the activation, or null

  explicit operator bool() const { return activation != 0 || other.data != nullptr; }
};

// Stage 1: partials of every chunk, (rows, chunks, columns).
template <typename T>
void channel_moments(const Plan& plan, ChannelTensor<const T> x, ChunkMoments* partials, void* stream);
template <typename T>
void channel_grad_sums(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, const double* mean,
                       ChunkGradients* partials, void* stream, const ChannelEpilogue<T>& epilogue = {});

// running = (1 - momentum) * running + momentum * correction * (statistic averaged over rows), for both statistics.
struct RunningStats {
  AnyOutput running[2];  // mean, variance
  int64_t stride[2];
  const double* statistic[2];  // (rows, channels)
  double correction[2];
  double momentum;
  int64_t rows, channels;
};
void update_running_stats(const RunningStats& args, void* stream);

// Stage 2: statistics and coefficients. Without partials the statistics are the given ones.
template <typename A>
struct ForwardMerge {
  const ChunkMoments* partials;  // or null
  AnyArray given_mean, given_var;
  AnyArray weight, bias;
  double eps;
  bool reciprocal;  // store rstd instead of the variance
  double* mean;     // null: not wanted, as var is not
  double* var;
  Coefficients<A> coefficients;  // slope unused; null: not wanted
  RunningStats running{};        // of one row; null: not wanted
};
template <typename A>
void channel_merge(const Plan& plan, const ForwardMerge<A>& args, void* stream);

template <typename A>
struct BackwardMerge {
  const ChunkGradients* partials;  // null: no sums wanted, or totals given
  AnyArray weight;
  const double* mean;
  const double* var;
  double eps;
  bool reciprocal;    // var is rstd
  bool input_stats;   // false: the statistics are constants
  AnyOutput dweight;  // null: not wanted
  AnyOutput dbias;
  double* sums;  // (2, rows, channels) of dy * xhat and of dy, if wanted or needed for more than one row; or null
  Coefficients<A> coefficients;  // null: not wanted
  // Sums of `total_count` elements, of which this input has a part, in the place of partials; or null.
  const double* total_dy = nullptr;
  const double* total_dy_xhat = nullptr;
  double total_count = 0;
};
template <typename A>
void channel_grad_merge(const Plan& plan, const BackwardMerge<A>& args, void* stream);

// Stage 3, in the reverse order of blocks: it begins with what the second-level cache still holds. dx may be null where
// there is an epilogue.
template <typename T, typename A>
void channel_apply(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const Coefficients<A>& coefficients,
                   void* stream, const ChannelEpilogue<T>& epilogue = {});
template <typename T, typename A>
void channel_grad_apply(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                        const Coefficients<A>& coefficients, void* stream, const ChannelEpilogue<T>& epilogue = {});

// All stages at once, where all elements that share a statistic fit in one block or cluster. Partials and coefficients
// are not used.
template <typename T>
bool slab_fits(const Plan& plan, int device, bool backward, bool epilogue);
template <typename T, typename A>
void slab_forward(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const ForwardMerge<A>& args,
                  void* stream, const ChannelEpilogue<T>& epilogue = {});
template <typename T, typename A>
void slab_backward(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                   const BackwardMerge<A>& args, void* stream, const ChannelEpilogue<T>& epilogue = {});

// Column sums in double of two matrices of `rows` rows; null: not wanted.
template <typename S>
void column_sums(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, AnyOutput first_total,
                 AnyOutput second_total, void* stream);

}  // namespace normops::cuda
