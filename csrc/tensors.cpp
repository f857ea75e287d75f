#include "tensors.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

namespace normops {
namespace {

// Segments of a channels_last input are short enough to be shared among threads, within limits that keep float sums
// exact and cheap the guess at the mean, the sums and the merge that each of them takes. Where lines are long they come
// in fours, so that few of them make equal shares; a channel's positions are split only when they are very many.
constexpr int64_t kSegmentBytes = 256 * 1024;
constexpr int64_t kFewestLines = 32, kMostLines = 256;
constexpr int64_t kEqualShares = 4;
constexpr int64_t kContiguousSegment = 32 * 1024;
// Planes are seen as wide channels where there are so many samples.
constexpr int64_t kFewestSamples = 8;

// The strides of t as (N, C, S), if one stride steps through all of S.
std::optional<Strides> strides_of(const at::Tensor& t) {
  if (t.numel() == 0) return Strides{};
  std::optional<int64_t> step;  // zero is a step too: that of an expanded dimension
  int64_t extent = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (!step) step = t.stride(d);
    if (t.stride(d) != *step * extent) return std::nullopt;
    extent *= t.size(d);
  }
  return Strides{t.stride(0), t.stride(1), step.value_or(0)};
}

int64_t positions_of(const at::Tensor& t) {
  int64_t positions = 1;
  for (int64_t d = 2; d < t.dim(); ++d) positions *= t.size(d);
  return positions;
}

bool fits(const Strides& s, const Geometry& g) {
  if (g.elements() == 0) return true;
  if (g.layout == Layout::kContiguous) {
    const bool grouped = !g.over_batch && g.num_groups < g.channels;
    return (s.position == 1 || g.positions == 1) && (s.channel == g.positions || !grouped);
  }
  const int64_t line = g.positions == 1 ? s.sample : s.position;
  const bool gaps = line != g.channels && (g.positions > 1 || g.samples > 1);
  return s.channel == 1 && !(gaps && g.channels <= kNarrowChannels);
}

}  // namespace

at::Tensor as_parameter(const OptionalTensor& tensor, const at::Tensor& input, int64_t numel, at::ScalarType dtype,
                        const char* name) {
  if (!defined(tensor)) return {};
  TORCH_CHECK(
      tensor->numel() == numel && tensor->device() == input.device() && at::isFloatingType(tensor->scalar_type()),
      "normops: expected ", name, " with ", numel, " floating elements on ", input.device(), ", got ", tensor->numel(),
      " of ", tensor->scalar_type(), " on ", tensor->device());
  // Asked first: even a conversion that does nothing is a trip through the dispatcher.
  return tensor->scalar_type() == dtype && tensor->is_contiguous() ? *tensor : tensor->to(dtype).contiguous();
}

at::Tensor as_own_parameter(const OptionalTensor& tensor, const at::Tensor& input, int64_t numel, const char* name) {
  const bool own = defined(tensor) && tensor->scalar_type() == input.scalar_type();
  return as_parameter(tensor, input, numel, own ? input.scalar_type() : acc_type(input), name);
}

std::pair<int64_t, int64_t> row_shape(const at::Tensor& input, int64_t normalized_ndim) {
  TORCH_CHECK(normalized_ndim >= 1 && normalized_ndim <= input.dim(), "normops: expected normalized_ndim in [1, ",
              input.dim(), "], got ", normalized_ndim);
  int64_t rows = 1, length = 1;
  for (int64_t d = 0; d < input.dim(); ++d) (d < input.dim() - normalized_ndim ? rows : length) *= input.size(d);
  return {rows, length};
}

at::DimVector row_statistics_shape(const at::Tensor& input, int64_t normalized_ndim) {
  at::DimVector shape(input.sizes().begin(), input.sizes().end());
  std::fill(shape.end() - normalized_ndim, shape.end(), 1);
  return shape;
}

at::Tensor as_rows(const at::Tensor& input, int64_t rows, int64_t length) {
  if (input.dim() == 2 && input.size(0) == rows && input.stride(1) == 1) return input;
  const at::Tensor matrix = input.reshape({rows, length});
  return length > 1 && matrix.stride(1) != 1 ? matrix.contiguous() : matrix;
}

at::Tensor in_format_of(const at::Tensor& like, const at::Tensor& rows) {
  const at::MemoryFormat format = like.suggest_memory_format();
  if (!rows.defined() || format == at::MemoryFormat::Contiguous) return rows;
  return at::empty_like(rows, format).copy_(rows);
}

at::DimVector channel_statistics_shape(const at::Tensor& input, int64_t num_groups, bool over_batch) {
  if (over_batch) return {num_groups};
  return {input.size(0), num_groups};
}

void check_running_update(const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& mean,
                          const at::Tensor& var, int64_t count) {
  TORCH_CHECK(running_mean.dim() == 1 && running_mean.sizes() == running_var.sizes() && mean.sizes() == var.sizes() &&
                  mean.dim() >= 1 && mean.dim() <= 2 && mean.size(-1) == running_mean.size(0),
              "normops: expected running statistics of shape (C) and statistics of shape (C) or (N, C), got ",
              running_mean.sizes(), ", ", running_var.sizes(), ", ", mean.sizes(), " and ", var.sizes());
  const int64_t samples = mean.dim() == 2 ? mean.size(0) : 1;
  TORCH_CHECK(count > 1 && samples > 0, "normops: expected more than 1 value per channel, got ", count, " in ", samples,
              " samples");
}

ChannelView channel_view(const std::vector<at::Tensor*>& tensors, int64_t num_groups, bool over_batch,
                         bool samples_apart) {
  const at::Tensor& input = *tensors.front();
  TORCH_CHECK(input.dim() >= 2, "normops: expected input with at least 2 dimensions, got ", input.dim());
  const at::MemoryFormat format = input.suggest_memory_format();
  Geometry g{};
  g.samples = input.size(0);
  g.channels = input.size(1);
  g.positions = positions_of(input);
  g.num_groups = num_groups;
  g.over_batch = over_batch;
  TORCH_CHECK(num_groups > 0 ? g.channels % num_groups == 0 : g.channels == 0,
              "normops: expected num_groups to divide ", g.channels, " channels, got ", num_groups);
  TORCH_CHECK(!over_batch || num_groups == g.channels, "normops: expected a group for each of ", g.channels,
              " channels that share statistics over the batch, got ", num_groups);
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  g.layout = g.channels > 1 && (channels_last || g.positions == 1) ? Layout::kChannelsLast : Layout::kContiguous;

  std::vector<Strides> strides;
  for (at::Tensor* tensor : tensors) {
    TORCH_CHECK(tensor->sizes() == input.sizes() && tensor->scalar_type() == input.scalar_type() &&
                    tensor->device() == input.device(),
                "normops: expected a ", input.scalar_type(), " tensor of shape ", input.sizes(), " on ", input.device(),
                ", got ", tensor->scalar_type(), " of shape ", tensor->sizes(), " on ", tensor->device());
    auto found = strides_of(*tensor);
    if (!found || !fits(*found, g)) {
      *tensor = tensor->contiguous(format);
      found = strides_of(*tensor);
    }
    strides.push_back(*found);
  }

  // A batch of channels_last samples that follow each other is one long sample to a layer that works over the batch.
  const bool one_sample = g.layout == Layout::kChannelsLast && over_batch && !samples_apart &&
                          std::all_of(strides.begin(), strides.end(), [&](const Strides& s) {
                            return g.positions == 1 || s.sample == s.position * g.positions;
                          });
  if (one_sample) {
    if (g.positions == 1) {
      for (Strides& s : strides) s.position = s.sample;
    }
    g.positions *= g.samples;
    g.samples = 1;
  }
  const int64_t line_bytes = std::max<int64_t>(1, g.channels * input.element_size());
  const int64_t positions_per_line = std::max<int64_t>(1, kJoined / std::max<int64_t>(1, g.channels));
  g.segment_length = g.layout == Layout::kContiguous
                         ? kContiguousSegment
                         : std::clamp(kSegmentBytes / line_bytes, kFewestLines, kMostLines * positions_per_line);
  if (g.layout == Layout::kChannelsLast && positions_per_line == 1 && g.positions > g.segment_length) {
    const int64_t wanted = (g.segments_per_sample() + kEqualShares - 1) / kEqualShares * kEqualShares;
    const int64_t most = std::max<int64_t>(1, g.positions / kFewestLines);
    const int64_t shares = std::min(wanted, most < kEqualShares ? most : most / kEqualShares * kEqualShares);
    g.segment_length = (g.positions + shares - 1) / shares;
  }
  return {g, strides};
}

ChannelView wide_channel_view(const std::vector<at::Tensor*>& tensors, int64_t num_groups, bool over_batch) {
  ChannelView view = channel_view(tensors, num_groups, over_batch);
  Geometry& g = view.geometry;
  const bool small_planes = g.layout == Layout::kContiguous && over_batch && g.samples >= kFewestSamples &&
                            g.positions > 1 && g.positions <= kWidest &&
                            std::all_of(view.strides.begin(), view.strides.end(),
                                        [&](const Strides& s) { return s.position == 1 && s.channel == g.positions; });
  if (small_planes) {
    g.layout = Layout::kChannelsLast;
    g.width = g.positions;
    g.positions = g.samples;
    g.samples = 1;
    g.segment_length = kMostLines;
    for (Strides& s : view.strides) s.position = s.sample;
  }
  return view;
}

ChannelView batch_view(const std::vector<at::Tensor*>& tensors, bool wide) {
  const at::Tensor& input = *tensors.front();
  const int64_t channels = input.dim() < 2 ? 0 : input.size(1);
  return wide ? wide_channel_view(tensors, channels, /*over_batch=*/true)
              : channel_view(tensors, channels, /*over_batch=*/true);
}

}  // namespace normops
