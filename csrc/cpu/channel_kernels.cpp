// Inner loops of the channel engine (Batch-, Instance-, GroupNorm). Compiled once per instruction set.
//
// contiguous: a line is one channel's positions, sums run along it and its coefficients are constants.
// channels_last: a line is one position's channels, sums run across lines and coefficients run along them.

#include <algorithm>
#include <numeric>

#include "activation_kernels.h"
#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Elements of a channels_last line handled at once: their sums live on the stack and stay in the first-level cache.
// Lines are rarely longer: they are read whole, in the order of memory.
constexpr int64_t kBlock = 2048;
static_assert(kWidest <= kBlock);

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

  // f(position, lines, length) for the lines of whole length, then for what is left.
  template <typename F>
  void each(F f) const {
    f(int64_t(0), whole_lines(), length());
    const int64_t left = positions % repeat;
    if (left > 0) f(positions - left, int64_t(1), left * period());
  }

  // The lines from a position on, `repeat` positions each.
  template <typename T>
  Lines<T> lines(const Lines<T>& x, int64_t position) const {
    return {x[position] + first * width, x.stride * repeat};
  }

  // `source` holds a value per channel of the block, `target` one per element of the line in pack order.
  template <typename T, typename S>
  void spread(const S* source, Acc<T>* target) const {
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
  void fold(const Acc<T>* source, double* target) const {
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

// Positions taken for one line: as many as fill whole packs, if a block holds them.
template <typename T>
int64_t positions_per_line(const Tile& tile) {
  if (tile.width > 1 || tile.channels > kNarrowChannels) return 1;
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

template <typename T>
NORMOPS_KERNEL moments(const Tile& tile, Lines<const T> x, double* mean, double* m2) {
  using A = Acc<T>;
  if (tile.layout == Layout::kContiguous) {
    const bool done = if_short<T>(tile.positions, [&](auto packs) {
      ShortLines<T, packs> lines(tile.positions);
      for (int64_t c = 0; c < tile.channels; c += lines.kCount) {
        const int64_t count = std::min<int64_t>(lines.kCount, tile.channels - c);
        lines.take_moments(/*centered=*/true, [&](int64_t i) { return x[c + std::min(i, count - 1)]; });
        std::copy_n(lines.mean, count, mean + c);
        std::copy_n(lines.m2, count, m2 + c);
      }
    });
    for (int64_t c = 0; !done && c < tile.channels; ++c) std::tie(mean[c], m2[c]) = moments_along(x[c], tile.positions);
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    double* const block_mean = mean + block.first;
    double* const block_m2 = m2 + block.first;
    alignas(64) A center[kBlock];
    // The first guess: the mean of a few lines from all over the tile.
    constexpr int64_t kFew = 8;
    const int64_t few = std::min(kFew, block.whole_lines()), step = block.whole_lines() / few;
    const Lines<const T> all = block.lines(x, 0), some{all.data, all.stride * step};
    std::fill_n(center, block.padded<T>(), A(0));
    sum_across<T, 1>({some}, few, block.length(), center, 0,
                     [](int64_t, const Pack<T>* v, int64_t, auto, Pack<T>* s) { s[0] = s[0] + v[0]; });
    block.fold<T>(center, block_mean);
    const double few_inverse = 1.0 / (few * block.repeat * block.width);
    for (int64_t c = 0; c < block.channels; ++c) block_mean[c] = A(block_mean[c] * few_inverse);

    const double inverse = 1.0 / (tile.positions * tile.width);
    double first[kBlock];
    bool near = false;
    for (int pass = 0; pass < 2 && !near; ++pass) {
      alignas(64) A sums[2][kBlock];
      for (A* const sum : sums) std::fill_n(sum, block.padded<T>(), A(0));
      block.spread<T>(block_mean, center);
      block.each([&](int64_t position, int64_t lines, int64_t length) {
        sum_across<T, 2>({block.lines(x, position)}, lines, length, sums[0], kBlock,
                         [&](int64_t, const Pack<T>* v, int64_t j, auto lanes, Pack<T>* s) {
                           const Pack<T> d = (v[0] - Pack<T>::load_packed(center + j)).masked(lanes);
                           s[0] = s[0] + d;
                           s[1] = fmadd(d, d, s[1]);
                         });
      });
      block.fold<T>(sums[0], first);
      block.fold<T>(sums[1], block_m2);
      near = true;
      for (int64_t c = 0; c < block.channels; ++c) near &= guess_was_near(first[c], block_m2[c], inverse);
      for (int64_t c = 0; pass == 0 && !near && c < block.channels; ++c) {
        if (!guess_was_near(first[c], block_m2[c], inverse)) block_mean[c] = A(block_mean[c] + first[c] * inverse);
      }
    }
    for (int64_t c = 0; c < block.channels; ++c) {
      const double low = first[c] * inverse;
      block_mean[c] += low;
      block_m2[c] -= first[c] * low;
    }
  });
}

template <typename T>
NORMOPS_KERNEL grad_sums(const Tile& tile, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
                         double* sum_dy_x) {
  using A = Acc<T>;
  if (tile.layout == Layout::kContiguous) {
    std::fill_n(sum_dy, tile.channels, 0.0);
    std::fill_n(sum_dy_x, tile.channels, 0.0);
    for (int64_t c = 0; c < tile.channels; c += kLinesTogether<T>) {
      const int64_t lines = std::min<int64_t>(kLinesTogether<T>, tile.channels - c);
      for (int64_t begin = 0; begin < tile.positions; begin += kHalfChunk) {
        const auto sums = sums_along<T, 2, kLinesTogether<T>, kUnrolled>(
            lines, std::min(kHalfChunk, tile.positions - begin), [&](int64_t i, int64_t j, auto lanes, Pack<T>* s) {
              const Pack<T> g = Pack<T>::load(dy[c + i] + begin + j, lanes);
              s[0] = s[0] + g;
              s[1] = fmadd(g, Pack<T>::load(x[c + i] + begin + j, lanes) - center[c + i], s[1]);
            });
        for (int64_t i = 0; i < lines; ++i) {
          sum_dy[c + i] += sums[2 * i];
          sum_dy_x[c + i] += sums[2 * i + 1];
        }
      }
    }
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    alignas(64) A centers[kBlock];
    alignas(64) A sums[2][kBlock];
    for (A* const sum : sums) std::fill_n(sum, block.padded<T>(), A(0));
    block.spread<T>(center + block.first, centers);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      sum_across<T, 2>({block.lines(dy, position), block.lines(x, position)}, lines, length, sums[0], kBlock,
                       [&](int64_t, const Pack<T>* v, int64_t j, auto, Pack<T>* s) {
                         s[0] = s[0] + v[0];
                         s[1] = fmadd(v[0], v[1] - Pack<T>::load_packed(centers + j), s[1]);
                       });
    });
    block.fold<T>(sums[0], sum_dy + block.first);
    block.fold<T>(sums[1], sum_dy_x + block.first);
  });
}

// out = f(values, coefficients) for every pack of the tile: `values` from each of the inputs, `coefficients` from
// each of the arrays, which hold one value per channel.
template <typename T, int kInputs, int kArrays, typename F>
void map(const Tile& tile, const Lines<const T> (&inputs)[kInputs], Lines<T> out,
         const Acc<T>* const (&arrays)[kArrays], F f) {
  const auto run = [&](const T* const(&from)[kInputs], T* to, int64_t length, auto load) {
    sweep<T, 2>(length, [&](int64_t j, auto lanes, auto) {
      Pack<T> values[kInputs], coefficients[kArrays];
      for (int i = 0; i < kInputs; ++i) values[i] = Pack<T>::load(from[i] + j, lanes);
      for (int k = 0; k < kArrays; ++k) coefficients[k] = load(k, j);
      f(values, coefficients).store(to + j, lanes);
    });
  };
  const T* from[kInputs];
  if (tile.layout == Layout::kContiguous) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      for (int i = 0; i < kInputs; ++i) from[i] = inputs[i][c];
      Pack<T> constants[kArrays];
      for (int k = 0; k < kArrays; ++k) constants[k] = arrays[k][c];
      run(from, out[c], tile.positions, [&](int k, int64_t) { return constants[k]; });
    }
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    alignas(64) Acc<T> packed[kArrays][kBlock];
    for (int k = 0; k < kArrays; ++k) block.spread<T>(arrays[k] + block.first, packed[k]);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      for (int64_t line = 0; line < lines; ++line) {
        for (int i = 0; i < kInputs; ++i) from[i] = block.lines(inputs[i], position)[line];
        run(from, block.lines(out, position)[line], length,
            [&](int k, int64_t j) { return Pack<T>::load_packed(packed[k] + j); });
      }
    });
  });
}

template <typename T>
NORMOPS_KERNEL apply(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k) {
  map<T, 1, 3>(tile, {x}, y, {k.center, k.scale, k.shift},
               [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0] - k[0], k[1], k[2]); });
}

template <typename T>
NORMOPS_KERNEL grad_apply(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                          const BackwardCoefficients<Acc<T>>& k) {
  map<T, 2, 4>(tile, {dy, x}, dx, {k.center, k.scale, k.slope, k.shift},
               [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0], k[1], fmadd(v[1] - k[0], k[2], k[3])); });
}

template <typename T>
NORMOPS_KERNEL scale(const Tile& tile, Lines<const T> dy, Lines<T> dx, const Acc<T>* factor) {
  map<T, 1, 1>(tile, {dy}, dx, {factor}, [](const Pack<T>* v, const Pack<T>* k) { return v[0] * k[0]; });
}

template <typename T>
void add(Kernels<T>& kernels) {
  kernels.moments = moments<T>;
  kernels.grad_sums = grad_sums<T>;
  kernels.apply = apply<T>;
  kernels.grad_apply = grad_apply<T>;
  kernels.scale = scale<T>;
  add_activation_kernels(kernels);
}

}  // namespace

void add_channel_kernels(KernelTable& table) {
#ifndef __AVX512BF16__  // which only bfloat16 has a use for
  add(table.f32);
  add(table.f64);
  add(table.f16);
#endif
  add(table.bf16);
}

}  // namespace normops::cpu::CPU_CAPABILITY
