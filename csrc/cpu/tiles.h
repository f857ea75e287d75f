#pragma once

// How the channel engine's kernels walk a tile.
//
// contiguous: a line is one channel's positions, sums run along it and its coefficients are constants.
// channels_last: a line is one position's channels, sums run across lines and coefficients run along them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Elements of a channels_last line handled at once: their sums live on the stack and stay in the first-level cache.
// Lines are rarely longer: they are read whole, in the order of memory.
constexpr int64_t kBlock = 2048;
static_assert(kWidest <= kBlock);
// From one of several such arrays to the next. A whole number of pages, which kBlock is, would have them compete with
// each other, and with the line, for the same few places of the first-level cache.
constexpr int64_t kApart = kBlock + 80;

// Some channels of a channels_last tile. Where a position's channels are few, `repeat` positions are taken for one
// line, so that lines are not all tail: sums are taken per element of that line and folded, and coefficients are
// repeated.
struct Block {
  int64_t first;     // channel
  int64_t channels;  // distinct ones
  int64_t width;     // neighbours that belong to one channel
  int64_t repeat;
  int64_t positions;

  int64_t period() const { return channels * width; }
  int64_t length() const { return period() * repeat; }
  int64_t whole_lines() const { return positions / repeat; }
  template <typename T>
  int64_t padded() const {
    return (length() + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize;
  }

  // f(position, lines, length) for the lines of whole length, then for what is left: in a loop, so that there is one f.
  template <typename F>
  void each(F f) const {
    struct Part {
      int64_t position, lines, length;
    };
    const int64_t left = positions % repeat;
    const Part parts[] = {{0, whole_lines(), length()}, {positions - left, 1, left * period()}};
    for (const Part& part : parts) {
      if (part.length > 0) f(part.position, part.lines, part.length);
    }
  }

  // The lines from a position on, `repeat` positions each.
  template <typename T>
  Lines<T> lines(const Lines<T>& x, int64_t position) const {
    return {x[position] + first * width, x.stride * repeat};
  }

  // `source` holds a value per channel of the block, `target` one per element of the line in pack order.
  template <typename T, typename S>
  NORMOPS_KERNEL spread(const S* source, Acc<T>* target) const {
    alignas(64) Acc<T> natural[kBlock];
    if (width == 1) {
      std::copy_n(source, channels, natural);
    } else {
      for (int64_t c = 0; c < channels; ++c) std::fill_n(natural + c * width, width, Acc<T>(source[c]));
    }
    for (int64_t r = 1; r < repeat; ++r) std::copy_n(natural, period(), natural + r * period());
    std::fill(natural + length(), natural + padded<T>(), Acc<T>(0));
    for (int64_t j = 0; j < length(); j += Pack<T>::kSize)
      load_natural<T>(natural + j, Full{}).store_packed(target + j);
  }

  // The reverse, summed: `target` has one value per channel.
  template <typename T>
  NORMOPS_KERNEL fold(const Acc<T>* source, double* target) const {
    using A = Acc<T>;
    alignas(64) A natural[kBlock];
    for (int64_t j = 0; j < length(); j += Pack<T>::kSize)
      store_natural<T>(Pack<T>::load_packed(source + j), natural + j, Full{});
    std::fill_n(target, channels, 0.0);
    for (int64_t r = 0; r < repeat; ++r) {
      const A* const own = natural + r * period();
      if (width == 1) {
        for (int64_t c = 0; c < channels; ++c) target[c] += own[c];
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        target[c] += sum_along<A, 1>(width, [&](int64_t j, auto lanes, Pack<A>* sums) {
          sums[0] = sums[0] + Pack<A>::load(own + c * width + j, lanes);
        })[0];
      }
    }
  }
};

// Whether wide channels are taken one after the other: there are too few positions to spread coefficients over a line,
// and to fold sums of its elements, for.
inline bool is_in_runs(const Tile& tile) { return tile.width > 1 && tile.positions < 16; }

// Positions taken for one line: as many as fill whole packs, if a block holds them.
template <typename T>
int64_t positions_per_line(const Tile& tile) {
  // A word for each position does for lines of one.
  if (tile.width > 1 || tile.channels > kNarrowChannels || (tile.valid && tile.channels >= Pack<T>::kSize)) return 1;
  const int64_t unit = Pack<T>::kSize / std::gcd(Pack<T>::kSize, tile.channels);
  const int64_t unit_length = unit * tile.channels;
  if (unit_length > kBlock) return kBlock / tile.channels;
  return unit * std::max<int64_t>(1, kJoined / unit_length);
}

template <typename T, typename F>
void for_blocks(const Tile& tile, F f) {
  const int64_t repeat = std::min(positions_per_line<T>(tile), tile.positions), channels = kBlock / tile.width;
  for (int64_t c = 0; c < tile.channels; c += channels) {
    f(Block{c, std::min(channels, tile.channels - c), tile.width, repeat, tile.positions});
  }
}

// The words of a tile (kernels.h): a row for all contiguous lines, and for each line of a channels_last tile. There
// they repeat themselves: small planes do, with every channel, but begin elsewhere in a pack unless it is a multiple of
// packs; a position's channels are all alike.
template <typename T>
WordRows valid_rows(const Tile& tile) {
  constexpr int64_t kSize = Pack<T>::kSize;
  if (tile.layout == Layout::kContiguous) return {1, round_up(tile.positions, kSize)};
  if (tile.width > 1) return {tile.positions, std::min(std::lcm(tile.width, kSize), kBlock)};
  const int64_t repeat = positions_per_line<T>(tile);
  return {round_up(tile.positions, repeat) / repeat, repeat > 1 ? round_up(repeat * tile.channels, kSize) : kSize};
}

template <typename T>
NORMOPS_KERNEL pack_valid(const Tile& tile, const bool* flags, Acc<T>* words) {
  using A = Acc<T>;
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int64_t kSize = Pack<T>::kSize;
  const WordRows rows = valid_rows<T>(tile);
  const bool same = tile.layout == Layout::kChannelsLast && tile.width == 1;  // of all channels
  const int64_t repeat = same ? positions_per_line<T>(tile) : 1;
  if (same && repeat == 1) {
    A none_or_all[2] = {};
    std::memset(none_or_all + 1, 0xff, sizeof(A));
    for (int64_t row = 0; row < rows.count; ++row) Pack<T>(none_or_all[flags[row]]).store_packed(words + row * kSize);
    return;
  }
  bool line[kBlock + kSize];
  for (int64_t row = 0; row < rows.count; ++row) {
    const bool* from = line;
    int64_t length = rows.length;
    if (tile.layout == Layout::kContiguous) {
      from = flags;
      length = tile.positions;
    } else if (!same) {
      for (int64_t j = 0; j < length; j += tile.width) {
        std::copy_n(flags + row * tile.width, std::min(tile.width, length - j), line + j);
      }
    } else {
      length = 0;
      for (int64_t p = row * repeat; p < std::min((row + 1) * repeat, tile.positions); ++p, length += tile.channels) {
        std::fill_n(line + length, tile.channels, flags[p]);
      }
    }
    for (int64_t j = 0; j < length; j += kSize) {
      bool last[kSize] = {};
      const bool* own = from + j;
      if (length - j < kSize) own = std::copy_n(own, length - j, last) - (length - j);
      Bits bits[kSize];
      for (int64_t i = 0; i < kSize; ++i) bits[i] = -Bits(own[i]);
      A natural[kSize];
      std::memcpy(natural, bits, sizeof bits);
      load_natural<T>(natural, Full{}).store_packed(words + row * rows.length + j);
    }
  }
}

// Those elements that a tile's words say; or all of them where masks are asked for and there is none.
template <typename T>
class SomeValid {
 public:
  explicit SomeValid(const Tile& tile)
      : valid_(tile.valid),
        words_(valid_ ? static_cast<const Acc<T>*>(valid_->words) : nullptr),
        stride_(!valid_ || tile.layout == Layout::kContiguous ? 0 : valid_->row) {}

  NORMOPS_INLINE bool all() const { return kRare<T> && !valid_; }

  // Of a line, or of a run at a position.
  NORMOPS_INLINE const Acc<T>* words(int64_t line, int64_t j) const {
    return all() ? nullptr : words_ + line * stride_ + j;
  }
  template <typename Lanes>
  NORMOPS_INLINE Marked<T, Lanes> lanes(int64_t line, int64_t j, Lanes lanes) const {
    return {lanes, words(line, j)};
  }
  NORMOPS_INLINE Pack<T> clear(const Pack<T>& values, int64_t line, int64_t j) const {
    return values.masked_by(words(line, j));
  }
  NORMOPS_INLINE int64_t count(int64_t whole) const { return all() ? whole : valid_->count; }
  NORMOPS_INLINE int64_t count(int64_t begin, int64_t size) const {
    if (all()) return size;
    return valid_->counts ? valid_->counts[begin / kChunk] : valid_->count;
  }
  NORMOPS_INLINE Place few(int i, const Place& otherwise) const { return all() ? otherwise : valid_->few[i]; }

  // The same along the lines of a block, where words are fewer than a line.
  class OfBlocks {
   public:
    OfBlocks(const SomeValid& base, int64_t length) : base_(base) {
      int64_t phase = 0;
      for (int64_t j = 0; j < length; j += Pack<T>::kSize) {
        phases_[j / Pack<T>::kSize] = static_cast<int32_t>(phase);
        phase += Pack<T>::kSize;
        if (!base.all() && phase == base.valid_->row) phase = 0;
      }
    }
    template <typename Lanes>
    NORMOPS_INLINE Marked<T, Lanes> lanes(int64_t line, int64_t j, Lanes lanes) const {
      return {lanes, base_.words(line, phases_[j / Pack<T>::kSize])};
    }
    NORMOPS_INLINE Pack<T> clear(const Pack<T>& values, int64_t line, int64_t j) const {
      return values.masked_by(base_.words(line, phases_[j / Pack<T>::kSize]));
    }

   private:
    const SomeValid base_;
    int32_t phases_[kBlock / Pack<T>::kSize];
  };
  OfBlocks of_blocks(int64_t length) const { return {*this, length}; }

 private:
  const Valid* const valid_;
  const Acc<T>* const words_;
  const int64_t stride_;
};

// f(what of the tile is valid)
template <typename T, bool kAsk = kRare<T>, typename F>
NORMOPS_INLINE void with_valid(const Tile& tile, const F& f) {
  if (kAsk || tile.valid)
    f(SomeValid<T>(tile));
  else if constexpr (!kAsk)
    f(AllValid{});
}

// out = f(values, coefficients) for every pack of the tile: `values` from each of the inputs, `coefficients` from
// each of the arrays, which hold one value per channel. `out` is of the inputs' type or of the arithmetic's, and zero
// where it is not valid.
template <typename T, int kInputs, int kArrays, typename Out, typename F, typename Which = AllValid>
void map(const Tile& tile, const Lines<const T> (&inputs)[kInputs], Lines<Out> out,
         const Acc<T>* const (&arrays)[kArrays], F f, const Which& valid = {}) {
  const auto run = [&](const T* const(&from)[kInputs], Out* to, int64_t length, auto load, auto clear) {
    sweep<T, 2>(length, [&](int64_t j, auto lanes, auto) {
      Pack<T> values[kInputs], coefficients[kArrays];
      for (int i = 0; i < kInputs; ++i) values[i] = Pack<T>::load(from[i] + j, lanes);
      for (int k = 0; k < kArrays; ++k) coefficients[k] = load(k, j);
      const Pack<T> result = clear(f(values, coefficients), j);
      if constexpr (std::is_same_v<Out, T>)
        result.store(to + j, lanes);
      else
        store_natural<T>(result, to + j, lanes);
    });
  };
  const T* from[kInputs];  // of the line at hand
  const auto one_channel = [&](int64_t c, int64_t line, Out* to, int64_t length) {
    Pack<T> constants[kArrays];
    for (int k = 0; k < kArrays; ++k) constants[k] = arrays[k][c];
    run(
        from, to, length, [&](int k, int64_t) { return constants[k]; },
        [&](const Pack<T>& result, int64_t j) { return valid.clear(result, line, j); });
  };
  if (tile.layout == Layout::kContiguous) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      for (int i = 0; i < kInputs; ++i) from[i] = inputs[i][c];
      one_channel(c, 0, out[c], tile.positions);
    }
    return;
  }
  if (is_in_runs(tile)) {
    for (int64_t position = 0; position < tile.positions; ++position) {
      for (int64_t c = 0; c < tile.channels; ++c) {
        for (int i = 0; i < kInputs; ++i) from[i] = inputs[i][position] + c * tile.width;
        one_channel(c, position, out[position] + c * tile.width, tile.width);
      }
    }
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    alignas(64) Acc<T> packed[kArrays][kApart];
    for (int k = 0; k < kArrays; ++k) block.spread<T>(arrays[k] + block.first, packed[k]);
    const auto own = valid.of_blocks(block.length());
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      for (int64_t line = 0; line < lines; ++line) {
        for (int i = 0; i < kInputs; ++i) from[i] = block.lines(inputs[i], position)[line];
        const int64_t row = position / block.repeat + line;
        run(
            from, block.lines(out, position)[line], length,
            [&](int k, int64_t j) { return Pack<T>::load_packed(packed[k] + j); },
            [&](const Pack<T>& result, int64_t j) { return own.clear(result, row, j); });
      }
    });
  });
}

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
