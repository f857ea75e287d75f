#pragma once

#include <algorithm>
#include <cstdint>

namespace normops {

// Where the channels of one position lie: apart by a whole plane, or side by side.
enum class Layout { kContiguous, kChannelsLast };

// Up to this many channels, the positions of a channels_last input lie without gaps between them, and kernels take
// several for one line, up to this length or a little more.
constexpr int64_t kNarrowChannels = 64;
constexpr int64_t kJoined = 2 * kNarrowChannels;

// A contiguous input of many small planes, with statistics over the batch, is seen as channels_last: its samples are
// the positions, and each channel is up to so many neighbours of a line instead of one.
constexpr int64_t kWidest = 256;

// Element strides of an (N, C, S) view. Either position (contiguous) or channel (channels_last) is 1.
struct Strides {
  int64_t sample;
  int64_t channel;
  int64_t position;
};

// The channel engine sees every input as (N samples, C channels, S positions). A statistic belongs to one of
// `num_groups` equal groups of channels, taken over the positions of one sample or of the whole batch:
//
//   BatchNorm      over_batch, num_groups = C
//   InstanceNorm   per sample, num_groups = C
//   GroupNorm      per sample, num_groups = G
//
// The positions of a sample are cut into segments of fixed length: the unit in which statistics are first taken.
// Its length depends on the shape and the dtype alone, so neither the number of threads nor, for the layers that
// work per sample, the number of samples can change a bit of the result.
struct Geometry {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int64_t num_groups;
  bool over_batch;
  Layout layout;
  int64_t segment_length;
  int64_t width = 1;  // elements of a channel at each position: 1, or a small plane

  int64_t group_size() const { return channels / num_groups; }
  int64_t segments_per_sample() const { return (positions + segment_length - 1) / segment_length; }
  int64_t segments() const { return samples * segments_per_sample(); }
  int64_t segment_begin(int64_t segment) const { return segment % segments_per_sample() * segment_length; }
  int64_t segment_count(int64_t segment) const { return std::min(segment_length, positions - segment_begin(segment)); }
  int64_t sample_of(int64_t segment) const { return segment / segments_per_sample(); }

  // Statistics and coefficients have one row for the batch, or one per sample.
  int64_t rows() const { return over_batch ? 1 : samples; }
  int64_t row_of(int64_t sample) const { return over_batch ? 0 : sample; }
  int64_t segments_per_row() const { return samples_per_row() * segments_per_sample(); }
  int64_t samples_per_row() const { return over_batch ? samples : 1; }
  int64_t elements_per_group() const { return samples_per_row() * positions * width * group_size(); }
  int64_t elements() const { return samples * channels * positions * width; }
};

}  // namespace normops
