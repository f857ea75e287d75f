#pragma once

// The channel engine on CUDA as its glue sees it: stages that may be called one after the other or apart, on plain
// pointers; no torch, no CUDA headers.

#include <cstddef>
#include <cstdint>

#include "../geometry.h"
#include "../statistics.h"

namespace normops::cuda {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

// A small array of any floating dtype, read as double; where it is absent, a constant.
struct AnyArray {
  const void* data;
  ElementType type;
  double absent;
};

template <typename T>
struct ChannelTensor {
  T* data;
  Strides strides;
};

// Moments of a chunk, or, in the backward, sum dy and sum dy * (x - center).
struct ChunkMoments {
  double mean, m2;
};
struct ChunkGradients {
  double dy, dy_x;
};

// How the elements that share a row of statistics and a channel are cut: into lines (a line is a sample's positions),
// those into pieces of `span` positions, and chunks of so many pieces, which may go on over the end of a line.
// It depends on shape, dtype and alignment alone.
struct Cut {
  int64_t positions;  // of a line
  int64_t span;
  int64_t pieces;  // of a line
  int64_t pieces_per_chunk;
  int64_t total_pieces;
  int64_t chunks;

  NORMOPS_HOST_DEVICE int64_t before(int64_t piece) const {
    const int64_t whole = piece / pieces, rest = (piece - whole * pieces) * span;
    return whole * positions + (rest < positions ? rest : positions);
  }
  // Elements of a chunk.
  NORMOPS_HOST_DEVICE int64_t count(int64_t chunk) const {
    const int64_t first = chunk * pieces_per_chunk, last = first + pieces_per_chunk;
    return before(last < total_pieces ? last : total_pieces) - before(first);
  }
};

// A Geometry as kernels walk it.
struct Plan {
  Layout layout;
  bool vectors;  // 16 bytes at a time
  bool over_batch;
  bool centered;  // false: RMSNorm, whose mean is taken to be 0
  int64_t rows;   // of statistics
  int64_t channels;
  int64_t group_size;
  int lanes;  // threads side by side: along a line, or along the channels
  Cut cut;

  int64_t num_groups() const { return channels / group_size; }
  int64_t partials() const { return rows * channels * cut.chunks; }
};

// `vectors`: every tensor that will be walked lies on vector boundaries (see vectorizable).
Plan make_plan(const Geometry& geometry, int element_size, bool vectors);
bool vectorizable(const Geometry& geometry, const void* data, const Strides& strides, int element_size);

// y = (x - center) * scale + shift and dx = scale * dy + slope * (x - center) + shift, one entry per row and channel.
// `center` and `shift` of the former may be null, for 0.
template <typename A>
struct Coefficients {
  A *center, *scale, *slope, *shift;
};

// Stage 1: partials of every chunk.
template <typename T>
void channel_moments(const Plan& plan, ChannelTensor<const T> x, ChunkMoments* partials, void* stream);
// `position_weight`: for rows that are walked as lines, the factor of dy at each position, or null.
template <typename T, typename A>
void channel_grad_sums(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, const double* mean,
                       const A* position_weight, ChunkGradients* partials, void* stream);

// Stage 2: statistics and coefficients. Without partials the statistics are the given ones.
template <typename A>
struct ForwardMerge {
  const ChunkMoments* partials;  // or null
  AnyArray given_mean, given_var;
  AnyArray weight, bias;
  double eps;
  bool reciprocal;  // store rstd instead of the variance
  double* mean;
  double* var;
  Coefficients<A> coefficients;  // slope unused; null: not wanted
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
  bool reciprocal;   // var is rstd
  bool input_stats;  // false: the statistics are constants
  A* dweight;        // null: not wanted
  A* dbias;
  double* sums;  // (2, rows, channels) of dy * xhat and of dy, if wanted or needed for more than one row; or null
  Coefficients<A> coefficients;  // null: not wanted
  // Sums of `total_count` elements, of which this input has a part, in the place of partials; or null.
  const double* total_dy = nullptr;
  const double* total_dy_xhat = nullptr;
  double total_count = 0;
};
template <typename A>
void channel_grad_merge(const Plan& plan, const BackwardMerge<A>& args, void* stream);

// Stage 3. The position parameters belong to rows that are walked as lines.
template <typename T, typename A>
void channel_apply(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const Coefficients<A>& coefficients,
                   const A* position_weight, const A* position_bias, void* stream);
template <typename T, typename A>
void channel_grad_apply(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                        const Coefficients<A>& coefficients, void* stream);

// All stages at once, where all elements that share a statistic fit in one block. Partials and coefficients are not
// used.
template <typename T>
bool slab_fits(const Plan& plan, bool backward);
template <typename T, typename A>
void slab_forward(const Plan& plan, ChannelTensor<const T> x, ChannelTensor<T> y, const ForwardMerge<A>& args,
                  void* stream);
template <typename T, typename A>
void slab_backward(const Plan& plan, ChannelTensor<const T> dy, ChannelTensor<const T> x, ChannelTensor<T> dx,
                   const BackwardMerge<A>& args, void* stream);

// The input gradient of long rows together with the sums for dweight and dbias, (chunks, 2, channels) in `partials`.
// The plan is that of the matrix of rows seen as positions, with the elements of a row as channels.
template <typename T, typename A>
struct LongRowBackward {
  ChannelTensor<const T> dy, x;
  ChannelTensor<T> dx;  // data null: not wanted
  const A* weight;      // or null
  const double* mean;
  const double* rstd;
  Coefficients<A> coefficients;  // one per row
  A* partials;                   // or null
};
template <typename T, typename A>
void long_row_backward(const Plan& plan, const LongRowBackward<T, A>& args, void* stream);

// Column sums in double of two matrices of `rows` rows; null: not wanted.
template <typename S, typename A>
void column_sums(const S* first, const S* second, int64_t rows, int64_t stride, int64_t columns, A* first_total,
                 A* second_total, void* stream);

// running = (1 - momentum) * running + momentum * correction * (statistic averaged over rows), for both statistics.
struct RunningStats {
  void* running[2];  // mean, variance
  ElementType type[2];
  int64_t stride[2];
  const double* statistic[2];  // (rows, channels)
  double correction[2];
  double momentum;
  int64_t rows, channels;
};
void update_running_stats(const RunningStats& args, void* stream);

}  // namespace normops::cuda
