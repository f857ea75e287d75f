#pragma once

// Masks: which positions of an input are valid. A mask is a list of runs, of neighbours that are valid, for each
// segment. Sums and statistics are of tiles that hold the valid elements alone: where these lie, if they are one run,
// as those of a padded sequence are, or side by side in memory of their own. What is written is written for everything
// between the first valid position and the last, and zero is put into the gaps while they are in cache.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <array>
#include <cstring>
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
  // `valid` has a flag for each position of every sample, in order.
  Mask(const Geometry& g, const bool* valid) : segments_(g.segments() + 1), positions_(g.rows(), 0) {
    for (int64_t k = 0; k < g.segments(); ++k) {
      segments_[k] = runs_.size();
      const bool* const flags = valid + g.sample_of(k) * g.positions + g.segment_begin(k);
      const int64_t length = g.segment_count(k);
      const auto find = [&](bool flag, int64_t from) {
        const void* const found = std::memchr(flags + from, flag, length - from);
        return found ? static_cast<const bool*>(found) - flags : length;
      };
      for (int64_t end, begin = find(true, 0); begin < length; begin = find(true, end)) {
        end = find(false, begin);
        runs_.push_back({begin, end - begin});
        positions_[g.row_of(g.sample_of(k))] += end - begin;
      }
    }
    segments_.back() = runs_.size();
  }

  c10::ArrayRef<Run> runs(int64_t segment) const {
    return {runs_.data() + segments_[segment], runs_.data() + segments_[segment + 1]};
  }
  int64_t positions(int64_t segment) const {
    int64_t count = 0;
    for (const Run& run : runs(segment)) count += run.count;
    return count;
  }
  // Valid positions of all samples that share a statistic.
  int64_t positions_of_row(int64_t row) const { return positions_[row]; }

 private:
  std::vector<Run> runs_;
  std::vector<size_t> segments_;  // where their runs begin
  std::vector<int64_t> positions_;
};

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

// Runs of contiguous lines that are so short that their elements are better found one by one.
inline std::vector<int32_t> as_indices(c10::ArrayRef<Run> runs, int64_t positions) {
  constexpr int64_t kShort = 16;
  std::vector<int32_t> indices;
  if (positions >= kShort * static_cast<int64_t>(runs.size())) return indices;
  indices.reserve(positions);
  for (const Run& run : runs) {
    for (int64_t i = run.begin; i < run.end(); ++i) indices.push_back(static_cast<int32_t>(i));
  }
  return indices;
}

// f(channel, tile, lines...) with the valid elements of some channels of a tile, from `channel` on; nothing if there
// are none.
template <typename F, typename... T>
void for_valid(const Tile& tile, c10::ArrayRef<Run> runs, const F& f, const Lines<const T>&... operands) {
  if (runs.empty()) return;
  if (runs.size() == 1) {
    f(int64_t{0}, part_of(tile, runs[0]), part_of(tile, operands, runs[0])...);
    return;
  }
  constexpr int64_t kElements = 16 * 1024;
  int64_t positions = 0;
  for (const Run& run : runs) positions += run.count;
  const bool contiguous = tile.layout == Layout::kContiguous;
  const int64_t at_once = contiguous ? std::clamp<int64_t>(kElements / positions, 1, tile.channels) : tile.channels;
  const std::vector<int32_t> indices = contiguous ? as_indices(runs, positions) : std::vector<int32_t>();
  const int64_t elements = at_once * positions * tile.width;
  const std::tuple memory{std::unique_ptr<T[]>(new T[elements])...};
  const auto gather = [&](auto x, auto* to, int64_t first, int64_t channels) {
    if (!contiguous) {
      for (const Run& run : runs) {
        for (int64_t i = run.begin; i < run.end(); ++i, to += tile.channels * tile.width) {
          std::copy_n(x[i], tile.channels * tile.width, to);
        }
      }
      return;
    }
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
  const int64_t stride = contiguous ? positions : tile.channels * tile.width;
  for (int64_t c = 0; c < tile.channels; c += at_once) {
    const int64_t channels = std::min(at_once, tile.channels - c);
    std::apply(
        [&](const auto&... own) {
          (gather(operands, own.get(), c, channels), ...);
          f(c, Tile{tile.layout, channels, positions, tile.width}, Lines<const T>{own.get(), stride}...);
        },
        memory);
  }
}

// Zero at the masked positions of a tile.
template <typename T>
void clear_masked(const Tile& tile, c10::ArrayRef<Run> runs, const Lines<T>& y) {
  std::vector<Run> gaps;
  int64_t end = 0, masked = 0;
  const auto add = [&](int64_t next) {
    if (next > end) gaps.push_back({end, next - end});
    masked += next - end;
  };
  for (const Run& run : runs) {
    add(run.begin);
    end = run.end();
  }
  add(tile.positions);
  if (tile.layout != Layout::kContiguous) {
    for (const Run& gap : gaps) {
      for (int64_t i = gap.begin; i < gap.end(); ++i) std::fill_n(y[i], tile.channels * tile.width, T(0));
    }
    return;
  }
  const std::vector<int32_t> indices = as_indices(gaps, masked);
  for (int64_t c = 0; c < tile.channels; ++c) {
    for (const int32_t i : indices) y[c][i] = T(0);
    if (!indices.empty()) continue;
    for (const Run& gap : gaps) std::fill_n(y[c] + gap.begin, gap.count, T(0));
  }
}

}  // namespace normops::cpu
