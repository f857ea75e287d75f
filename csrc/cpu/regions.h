#pragma once

// How the stages of the channel engine are cut into regions and shared among threads.

#include <c10/util/FunctionRef.h>

#include <algorithm>

#include "cache.h"
#include "kernels.h"
#include "parallel.h"

namespace normops::cpu {

// A contiguous input is walked in blocks of channels, of which each sample has a run of memory. The processor fetches
// ahead only once a run is under way, so runs are long, if those of all samples fit in half of a cache. Small planes
// are read a few kilobytes at a time in any case (kBlock in tiles.h).
constexpr int64_t kShortestRun = 4 * 1024, kLongestRun = 64 * 1024;
inline int64_t run_bytes(const Geometry& g) {
  return g.width > 1 ? kShortestRun
                     : std::clamp(second_level_cache() / 2 / g.samples_per_row(), kShortestRun, kLongestRun);
}

// What a thread takes at a time where no group has to be kept together.
constexpr int64_t kBatchBytes = 64 * 1024;
// Channels merged by one thread at a time; and so few that one thread prepares them all, without a meeting of threads.
constexpr int64_t kMergeChannels = 64, kPreparedByOne = 4096;

// Some segments by some channels, of whole groups wherever rows are whole or channels come in several regions.
struct Region {
  int64_t first_segment, last_segment;
  int64_t first_channel, last_channel;
};

enum class Order { kForwards, kBackwards };

using Stage = c10::function_ref<void(const Region&)>;

// f(region) for regions of `segments` by `channels`, shared among threads.
inline void for_regions(const Geometry& g, int64_t segments, int64_t channels, Order order, Stage f) {
  const int64_t across = (g.channels + channels - 1) / channels;
  const int64_t down = (g.segments() + segments - 1) / segments;
  const int64_t elements = g.elements() / std::max<int64_t>(1, across * down);
  parallel(across * down, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = order == Order::kForwards ? i : begin + end - 1 - i;
      const int64_t segment = at / across * segments, channel = at % across * channels;
      f(Region{segment, std::min(segment + segments, g.segments()), channel, std::min(channel + channels, g.channels)});
    }
  });
}

// f(segment, tile) for every segment of a region.
template <typename F>
void for_tiles(const Geometry& g, const Region& r, Order order, const F& f) {
  for (int64_t i = r.first_segment; i < r.last_segment; ++i) {
    const int64_t k = order == Order::kForwards ? i : r.first_segment + r.last_segment - 1 - i;
    f(k, Tile{g.layout, r.last_channel - r.first_channel, g.segment_count(k), g.width});
  }
}

// f(row, group, channel) for every group of a region: its row, its statistic, its first channel.
template <typename F>
void for_groups(const Geometry& g, const Region& r, const F& f) {
  const int64_t row_segments = g.segments_per_row(), size = g.group_size();
  for (int64_t row = r.first_segment / row_segments; row * row_segments < r.last_segment; ++row) {
    int64_t group = row * g.num_groups + r.first_channel / size;
    for (int64_t c = r.first_channel; c < r.last_channel; c += size) f(row, group++, c);
  }
}

// Runs the stages: prepare (if there is one), reduce, merge and coefficients for a group, and then apply, which begins
// where reduce ended, as that is still in cache. A thread takes a group through all stages if there are enough of them
// for all threads. Otherwise every stage is shared among all threads in turn. With statistics given there is no order
// to keep: memory is read once, and the sums of the backward pass are merged at the end. All ways do the same
// arithmetic.
inline void run_stages(const Geometry& g, int64_t element_size, bool given, Stage prepare, Stage reduce, Stage merge,
                       Stage coefficients, Stage apply) {
  const int64_t row_segments = g.segments_per_row();
  const auto channels_of = [&](int64_t bytes, int64_t bytes_per_channel) {
    const int64_t wanted = bytes / std::max<int64_t>(1, bytes_per_channel);
    return std::min(g.channels, round_up(std::max<int64_t>(1, wanted), g.group_size()));
  };
  const int64_t few_channels = channels_of(kMergeChannels, 1);
  if (given) {
    const bool lines = g.layout == Layout::kChannelsLast && g.width == 1;
    const int64_t positions = std::min(g.positions, g.segment_length) * g.width;
    const int64_t channels = lines ? g.channels : channels_of(kBatchBytes, positions * element_size);
    for_regions(g, row_segments, few_channels, Order::kForwards, [&](const Region& r) {
      if (prepare) prepare(r);
      coefficients(r);
    });
    for_regions(g, 1, channels, Order::kForwards, [&](const Region& r) {
      reduce(r);
      apply(r);
    });
    for_regions(g, row_segments, few_channels, Order::kForwards, merge);
    return;
  }
  // A run of memory that belongs to one channel: a position's, in channels_last only where it is wide.
  const int64_t run = g.layout == Layout::kContiguous ? g.positions : g.width;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + g.elements() / kElementsPerThread);
  int64_t channels = run > 1 ? channels_of(run_bytes(g), run * element_size) : g.channels;
  int64_t regions = g.rows() * at::divup(g.channels, channels);
  if (run > 1 && g.over_batch) {  // as many for each thread
    channels = at::divup(g.channels, round_up(regions, threads));
    regions = at::divup(g.channels, channels);
  }
  if (regions % threads == 0 || regions >= 4 * threads) {
    for_regions(g, row_segments, channels, Order::kForwards, [&](const Region& r) {
      if (prepare) prepare(r);
      reduce(r);
      merge(r);
      coefficients(r);
      apply(r);
    });
    return;
  }
  if (prepare && g.rows() * g.channels <= kPreparedByOne) {
    prepare(Region{0, g.segments(), 0, g.channels});
  } else if (prepare) {
    for_regions(g, row_segments, few_channels, Order::kForwards, prepare);
  }
  for_regions(g, 1, channels, Order::kForwards, reduce);
  for_regions(g, row_segments, few_channels, Order::kForwards, [&](const Region& r) {
    merge(r);
    coefficients(r);
  });
  for_regions(g, 1, channels, Order::kBackwards, apply);
}

}  // namespace normops::cpu
