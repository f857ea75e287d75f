#pragma once

// Masks: which positions of an input are valid. A mask is a list of runs, of neighbours that are valid, for each
// segment. Sums and statistics are of tiles that hold the valid elements alone: where these lie, if they are one run,
// as those of a padded sequence are, or side by side in memory of their own. What is written is written for everything
// between the first valid position and the last, and zero is put into the gaps while they are in cache.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace normops::cpu {

struct Run {
  int64_t begin, count;  // positions of a segment

  int64_t end() const { return begin + count; }
};

class Mask {
 public:
  // What a segment has of valid positions, and of masked ones: as runs, and, where contiguous lines have short ones,
  // one by one as well.
  struct Positions {
    std::vector<Run> runs;
    std::vector<int32_t> each;
    int64_t count = 0;

    void add(int64_t begin, int64_t end) {
      runs.push_back({begin, end - begin});
      count += end - begin;
    }
    // Those whose flag is `valid`.
    void list(const bool* flags, int64_t length, bool valid) {
      constexpr int64_t kShort = 16;
      if (count >= kShort * static_cast<int64_t>(runs.size())) return;
      each.resize(count);
      int64_t next = 0;
      for (int64_t i = 0; i < length && next < count; ++i) {
        each[next] = static_cast<int32_t>(i);
        next += flags[i] == valid;
      }
    }
  };
  struct Segment {
    Positions valid, masked;
  };

  // `valid` has a flag for each position of every sample, in order.
  Mask(const Geometry& g, const bool* valid) : segments_(g.segments()), positions_(g.rows(), 0) {
    // Where runs begin. Nothing here branches on a flag: nobody could foresee random ones.
    std::vector<int64_t> begins(std::min(g.segment_length, g.positions) + 1);
    for (int64_t k = 0; k < g.segments(); ++k) {
      Segment& segment = segments_[k];
      const bool* const flags = valid + g.sample_of(k) * g.positions + g.segment_begin(k);
      const int64_t length = g.segment_count(k);
      int64_t runs = length > 0;
      for (int64_t i = 1; i < length; ++i) {
        begins[runs] = i;
        runs += flags[i] != flags[i - 1];
      }
      begins[runs] = length;
      segment.valid.runs.reserve(runs / 2 + 1);
      segment.masked.runs.reserve(runs / 2 + 1);
      for (int64_t i = 0; i < runs; ++i) {
        (flags[begins[i]] ? segment.valid : segment.masked).add(begins[i], begins[i + 1]);
      }
      if (g.layout == Layout::kContiguous) {
        segment.valid.list(flags, length, true);
        segment.masked.list(flags, length, false);
      }
      positions_[g.row_of(g.sample_of(k))] += segment.valid.count;
    }
  }

  const Segment& segment(int64_t k) const { return segments_[k]; }
  c10::ArrayRef<Run> runs(int64_t k) const { return segments_[k].valid.runs; }
  int64_t positions(int64_t k) const { return segments_[k].valid.count; }
  // Valid positions of all samples that share a statistic.
  int64_t positions_of_row(int64_t row) const { return positions_[row]; }

 private:
  std::vector<Segment> segments_;
  std::vector<int64_t> positions_;
};

// Of the channels of a group: those that are valid.
inline int64_t elements_per_group(const Geometry& g, const Mask* mask, int64_t row) {
  return mask ? mask->positions_of_row(row) * g.width * g.group_size() : g.elements_per_group();
}

// A part of a tile's positions, and of the lines it is made of.
inline Tile part_of(const Tile& tile, const Run& run) { return {tile.layout, tile.channels, run.count, tile.width}; }
template <typename T>
Lines<T> part_of(const Tile& tile, const Lines<T>& x, const Run& run) {
  if (x.data == nullptr) return x;
  return {tile.layout == Layout::kContiguous ? x.data + run.begin : x[run.begin], x.stride};
}

// From the first valid position to the last.
inline Run span_of(c10::ArrayRef<Run> runs) {
  return runs.empty() ? Run{0, 0} : Run{runs.front().begin, runs.back().end() - runs.front().begin};
}

// f(channel, position, tile, lines...) with some valid elements of a tile, those of channels from `channel` on and, of
// their valid positions, from that of number `position` on; nothing if there are none.
template <typename F, typename... T>
void for_valid(const Tile& tile, const Mask::Segment& segment, const F& f, const Lines<const T>&... operands) {
  const std::vector<Run>& runs = segment.valid.runs;
  if (runs.empty()) return;
  if (runs.size() == 1) {
    f(int64_t{0}, int64_t{0}, part_of(tile, runs[0]), part_of(tile, operands, runs[0])...);
    return;
  }
  // What stays in a cache, and, of lines that sums go across, not too few.
  constexpr int64_t kElements = 16 * 1024, kLines = 64;
  const int64_t positions = segment.valid.count;
  if (tile.layout != Layout::kContiguous) {
    const int64_t length = tile.channels * tile.width;
    const int64_t at_once = std::min(positions, std::max(kLines, kElements / length));
    const std::tuple memory{std::unique_ptr<T[]>(new T[at_once * length])...};
    int64_t first = 0, count = 0;
    const auto flush = [&] {
      std::apply(
          [&](const auto&... own) {
            f(int64_t{0}, first, Tile{tile.layout, tile.channels, count, tile.width},
              Lines<const T>{own.get(), length}...);
          },
          memory);
      first += count;
      count = 0;
    };
    for (const Run& run : runs) {
      for (int64_t i = run.begin; i < run.end(); ++i) {
        std::apply([&](const auto&... own) { (std::copy_n(operands[i], length, own.get() + count * length), ...); },
                   memory);
        if (++count == at_once) flush();
      }
    }
    if (count > 0) flush();
    return;
  }
  const int64_t at_once = std::clamp<int64_t>(kElements / positions, 1, tile.channels);
  const std::vector<int32_t>& indices = segment.valid.each;
  const std::tuple memory{std::unique_ptr<T[]>(new T[at_once * positions])...};
  const auto gather = [&](auto x, auto* to, int64_t first, int64_t channels) {
    for (int64_t c = first; c < first + channels; ++c, to += positions) {
      const auto* const from = x[c];
      if (!indices.empty()) {
        for (int64_t i = 0; i < positions; ++i) to[i] = from[indices[i]];
        continue;
      }
      auto* next = to;
      for (const Run& run : runs) next = std::copy_n(from + run.begin, run.count, next);
    }
  };
  for (int64_t c = 0; c < tile.channels; c += at_once) {
    const int64_t channels = std::min(at_once, tile.channels - c);
    std::apply(
        [&](const auto&... own) {
          (gather(operands, own.get(), c, channels), ...);
          f(c, int64_t{0}, Tile{tile.layout, channels, positions, tile.width}, Lines<const T>{own.get(), positions}...);
        },
        memory);
  }
}

// Zero at the masked positions of a tile.
template <typename T>
void clear_masked(const Tile& tile, const Mask::Segment& segment, const Lines<T>& y) {
  const Mask::Positions& masked = segment.masked;
  if (tile.layout != Layout::kContiguous) {
    for (const Run& gap : masked.runs) {
      for (int64_t i = gap.begin; i < gap.end(); ++i) std::fill_n(y[i], tile.channels * tile.width, T(0));
    }
    return;
  }
  for (int64_t c = 0; c < tile.channels; ++c) {
    T* const line = y[c];
    for (const int32_t i : masked.each) line[i] = T(0);
    if (!masked.each.empty()) continue;
    for (const Run& gap : masked.runs) std::fill_n(line + gap.begin, gap.count, T(0));
  }
}

}  // namespace normops::cpu
