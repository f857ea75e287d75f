#pragma once

// What the engines of every device ask of a tensor: its shape as rows or as channels, parameters in the type of the
// arithmetic, and the checks that keep a kernel inside its memory whoever calls it.

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "geometry.h"

namespace normops {

using OptionalTensor = std::optional<at::Tensor>;
using Tensors2 = std::tuple<at::Tensor, at::Tensor>;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Mask3 = std::array<bool, 3>;

// Arithmetic is done in float, and in double for double.
inline at::ScalarType acc_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Torch's default for RMSNorm: the machine epsilon of the arithmetic.
inline double default_rms_eps(const at::Tensor& input) {
  return acc_type(input) == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : std::numeric_limits<float>::epsilon();
}

inline bool defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// A weight or bias as a contiguous tensor of `dtype`, checked to hold `numel` elements; undefined if absent.
at::Tensor as_parameter(const OptionalTensor& tensor, const at::Tensor& input, int64_t numel, at::ScalarType dtype,
                        const char* name);

// The same in the input's own type, if it has that, or else in the type of the arithmetic: torch's conversion takes
// longer than a small input.
at::Tensor as_own_parameter(const OptionalTensor& tensor, const at::Tensor& input, int64_t numel, const char* name);

// (rows, length) of an input whose last `normalized_ndim` dimensions are a row, and the shape of its statistics.
std::pair<int64_t, int64_t> row_shape(const at::Tensor& input, int64_t normalized_ndim);
at::DimVector row_statistics_shape(const at::Tensor& input, int64_t normalized_ndim);

// The matrix of rows, elements adjacent; a copy only where strides do not allow a view.
at::Tensor as_rows(const at::Tensor& input, int64_t rows, int64_t length);

// What the row engine has written, a contiguous tensor, in the memory format that `like` suggests.
at::Tensor in_format_of(const at::Tensor& like, const at::Tensor& rows);

// Shape of the statistics of a channel layer: (num_groups) over the batch, (N, num_groups) per sample.
at::DimVector channel_statistics_shape(const at::Tensor& input, int64_t num_groups, bool over_batch);

// Running statistics of shape (C), statistics of shape (C) or (N, C), taken over `count` values each.
void check_running_update(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, int64_t count);

// A channel layer's tensors seen through one Geometry. The first tensor decides the layout; `tensors` are replaced by
// copies where their strides do not fit it. `samples_apart`: a batch is never taken for one long sample.
struct ChannelView {
  Geometry geometry;
  std::vector<Strides> strides;  // one per tensor
};
ChannelView channel_view(const std::vector<at::Tensor*>& tensors, int64_t num_groups, bool over_batch,
                         bool samples_apart = false);

// The same, with many small contiguous planes seen as wide channels (geometry.h).
ChannelView wide_channel_view(const std::vector<at::Tensor*>& tensors, int64_t num_groups, bool over_batch);

// An input as BatchNorm sees it, for the stages that are operators of their own.
ChannelView batch_view(const std::vector<at::Tensor*>& tensors, bool wide);

}  // namespace normops
