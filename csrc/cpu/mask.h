#pragma once

// Masks: which positions of an input are valid. What of a segment is walked is what lies between its first valid
// position and its last. Where some of that is masked, kernels blend it out with the words of a tile (kernels.h): sums
// are then of valid elements alone, and results zero elsewhere, for the price of one more operand.

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace normops::cpu {

struct Run {
  int64_t begin, count;  // positions of a segment

  int64_t end() const { return begin + count; }
};

class Mask {
 public:
  struct Segment {
    const bool* flags;  // of all of its positions, and, where channels are wide, of all elements of one
    Run span;           // what is walked
    int64_t count;      // valid elements of a channel
    bool gaps;          // whether some of the span is masked
  };

  // `valid` has a flag for each position of every sample, in order.
  Mask(const Geometry& g, const bool* valid) : segments_(g.segments()), elements_(g.rows(), 0) {
    for (int64_t k = 0; k < g.segments(); ++k) {
      const bool* const flags = valid + (g.sample_of(k) * g.positions + g.segment_begin(k)) * g.width;
      segments_[k] = segment_of(g, flags, g.segment_count(k));
      elements_[g.row_of(g.sample_of(k))] += segments_[k].count;
    }
  }

  const Segment& segment(int64_t k) const { return segments_[k]; }
  // Valid elements of a channel.
  int64_t elements(int64_t k) const { return segments_[k].count; }
  // The same, of all samples that share a statistic.
  int64_t elements_of_row(int64_t row) const { return elements_[row]; }

 private:
  static Segment segment_of(const Geometry& g, const bool* flags, int64_t positions) {
    const int64_t length = positions * g.width, count = std::count(flags, flags + length, true);
    if (count == 0) return {flags, {0, 0}, 0, false};
    // Blending short lines out takes less time than filling what is left of each with zeros.
    constexpr int64_t kShort = 512;
    Run span{0, positions};
    if (g.layout == Layout::kChannelsLast ? g.width == 1 : positions > kShort) {
      while (!flags[span.begin]) ++span.begin, --span.count;
      while (!flags[span.begin + span.count - 1]) --span.count;
    }
    return {flags, span, count, count < span.count * g.width};
  }

  std::vector<Segment> segments_;
  std::vector<int64_t> elements_;
};

// How many elements share a statistic, of those that are valid. It is asked for every group.
class GroupElements {
 public:
  GroupElements(const Geometry& g, const Mask* mask)
      : mask_(mask), size_(g.group_size()), whole_(g.elements_per_group()) {}
  int64_t of_row(int64_t row) const { return mask_ ? mask_->elements_of_row(row) * size_ : whole_; }

 private:
  const Mask* const mask_;
  const int64_t size_, whole_;
};

// What is valid of the span of a segment, in words. Those of lines that go along positions serve all channels, however
// they are cut into tiles, and are made once. Those of channels_last are as many as kernels find in cache, and are made
// for each tile.
template <typename T>
class MaskWords {
  using A = Acc<T>;

 public:
  class Own {
   public:
    const Valid* get() const { return gaps ? &valid : nullptr; }

   private:
    friend class MaskWords;
    bool gaps = false;
    Valid valid{};
    std::unique_ptr<A[]> memory;
  };

  MaskWords(const Geometry& g, const Mask* mask) : g_(g), mask_(mask) {
    if (mask == nullptr || of_each_tile()) return;
    int64_t size = 0;
    offsets_.reserve(g.segments());
    counts_.resize(g.layout == Layout::kContiguous && g.segment_length > kChunk ? g.segments() * chunks() : 0);
    for (int64_t k = 0; k < g.segments(); ++k) {
      offsets_.push_back(size);
      if (mask->segment(k).gaps) size += rows(k).count * rows(k).length;
    }
    all_.reset(new A[size]);
    for (int64_t k = 0; k < g.segments(); ++k) {
      if (!mask->segment(k).gaps) continue;
      pack(k, all_.get() + offsets_[k]);
      if (!counts_.empty()) count_chunks(k);
    }
  }

  // Of segment k.
  Own operator[](int64_t k) const {
    Own own;
    own.gaps = mask_ && mask_->segment(k).gaps;
    if (!own.gaps) return own;
    const Mask::Segment& segment = mask_->segment(k);
    const WordRows shape = rows(k);
    if (of_each_tile()) {
      own.memory.reset(new A[shape.count * shape.length]);
      pack(k, own.memory.get());
    }
    own.valid = {of_each_tile() ? own.memory.get() : all_.get() + offsets_[k], shape.length, segment.count, nullptr};
    if (!counts_.empty()) own.valid.counts = counts_.data() + k * chunks();
    const bool* const flags = segment.flags + segment.span.begin * g_.width;
    const int64_t length = segment.span.count * g_.width;
    for (int64_t i = 0; i < 4; ++i) {
      const bool* place = std::find(flags + i * length / 4, flags + length, true);
      if (place == flags + length) place = std::find(flags, place, true);
      const int64_t at = place - flags;
      own.valid.few[i] = g_.layout == Layout::kContiguous ? Place{0, at} : Place{at / g_.width, at % g_.width};
    }
    return own;
  }

 private:
  static const Kernels<T>& kernel() { return kernels().of<T>(); }
  bool of_each_tile() const { return g_.layout == Layout::kChannelsLast && g_.width == 1; }
  int64_t chunks() const { return (g_.segment_length + kChunk - 1) / kChunk; }
  Tile tile(int64_t k) const {
    static constexpr Valid some{};
    return {g_.layout, g_.channels, mask_->segment(k).span.count, g_.width, &some};
  }
  WordRows rows(int64_t k) const { return kernel().valid_rows(tile(k)); }

  void pack(int64_t k, A* words) const {
    const Mask::Segment& segment = mask_->segment(k);
    const bool* const flags = segment.flags + segment.span.begin * g_.width;
    kernel().pack_valid(tile(k), flags, words);
  }
  void count_chunks(int64_t k) {
    const Mask::Segment& segment = mask_->segment(k);
    const bool* const flags = segment.flags + segment.span.begin;
    for (int64_t at = 0; at < segment.span.count; at += kChunk) {
      const bool* const end = flags + std::min(at + kChunk, segment.span.count);
      counts_[k * chunks() + at / kChunk] = static_cast<int32_t>(std::count(flags + at, end, true));
    }
  }

  const Geometry& g_;
  const Mask* const mask_;
  std::unique_ptr<A[]> all_;
  std::vector<int64_t> offsets_;
  std::vector<int32_t> counts_;
};

// What of a segment's tile is walked, and which of that is valid.
template <typename T>
class Span {
 public:
  Span(const Tile& whole, const Mask* mask, const MaskWords<T>& words, int64_t segment)
      : run_(mask ? mask->segment(segment).span : Run{0, whole.positions}),
        words_(words[segment]),
        whole_(whole),
        tile{whole.layout, whole.channels, run_.count, whole.width, words_.get()} {}

  template <typename E>
  Lines<E> of(const Lines<E>& x) const {
    if (x.data == nullptr) return x;
    return {tile.layout == Layout::kContiguous ? x.data + run_.begin : x[run_.begin], x.stride};
  }

  // Zero around the span; and within it, where kernels have not blended, but been led by `of`.
  void clear_around(const Lines<T>& y) const {
    if (run_.count == whole_.positions) return;
    const auto clear = [](T* begin, T* end) { std::fill(begin, end, T(0)); };
    if (tile.layout == Layout::kContiguous) {
      for (int64_t c = 0; c < whole_.channels; ++c) {
        clear(y[c], y[c] + run_.begin);
        clear(y[c] + run_.end(), y[c] + whole_.positions);
      }
      return;
    }
    for (int64_t p = 0; p < whole_.positions; ++p) {
      if (p == run_.begin) p = run_.end();
      if (p < whole_.positions) clear(y[p], y[p] + whole_.channels * whole_.width);
    }
  }
  void clear_within(const Lines<T>& y) const {
    if (tile.valid == nullptr) return;
    const std::vector<Acc<T>> ones(tile.channels, Acc<T>(1));
    kernels().of<T>().scale(tile, {of(y).data, y.stride}, of(y), ones.data());
  }

 private:
  const Run run_;
  const typename MaskWords<T>::Own words_;
  const Tile& whole_;

 public:
  const Tile tile;
};

// A mask of lines that are groups of neighbouring channels, where a mask has to be repeated for each of them.
template <typename T>
class JoinedMask {
 public:
  // Where lines are short, and the words of one group serve some others.
  static bool pays(const Geometry& g) { return g.positions <= 64 && g.group_size() > 1 && g.num_groups >= 3; }

  JoinedMask(const Geometry& g, const Mask& mask)
      : g_{g.samples, g.num_groups, g.group_size() * g.positions, g.num_groups, false, g.layout, g.segment_length},
        flags_(new bool[g_.samples * g_.positions]),
        mask_(g_, repeat(g, mask)),
        words_(g_, &mask_) {}

  Span<T> span(const Tile& whole, int64_t segment) const { return {whole, &mask_, words_, segment}; }

 private:
  const bool* repeat(const Geometry& g, const Mask& mask) const {
    bool* next = flags_.get();
    for (int64_t sample = 0; sample < g.samples; ++sample) {
      for (int64_t c = 0; c < g.group_size(); ++c) {
        next = std::copy_n(mask.segment(sample).flags, g.positions, next);
      }
    }
    return flags_.get();
  }

  const Geometry g_;
  const std::unique_ptr<bool[]> flags_;
  const Mask mask_;
  const MaskWords<T> words_;
};

}  // namespace normops::cpu
