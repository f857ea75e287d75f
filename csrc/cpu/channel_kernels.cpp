// Inner loops of the channel engine (Batch-, Instance-, GroupNorm). Compiled once per instruction set.
//
// contiguous: a line is one channel's positions, sums run along it and its coefficients are constants.
// channels_last: a line is one position's channels, sums run across lines and coefficients run along them.

#include <algorithm>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Elements of a channels_last line handled at once: their sums live on the stack and stay in the first-level cache.
constexpr int64_t kBlock = 512;
// Narrow lines are joined up to this length.
constexpr int64_t kJoined = 2 * kNarrowChannels;

// Some channels of a channels_last tile. Where a position's channels are few, `repeat` positions are taken for one
// line, so that lines are not all tail: sums are taken per element of that line and folded, and coefficients are
// repeated.
struct Block {
  int64_t first;     // channel
  int64_t channels;  // distinct ones
  int64_t repeat;
  int64_t positions;

  int64_t length() const { return channels * repeat; }

  // f(position, lines, length) for the lines of whole length, then for what is left.
  template <typename F>
  void each(F f) const {
    const int64_t whole = positions / repeat, left = positions % repeat;
    if (whole > 0) f(int64_t(0), whole, length());
    if (left > 0) f(whole * repeat, int64_t(1), left * channels);
  }

  // `source` holds a value per channel of the block, `target` one per element of the line in pack order; and the
  // reverse, summed.
  template <typename T, typename S>
  void spread(const S* source, Acc<T>* target) const {
    for (int64_t j = 0; j < length(); j += channels) {
      for (int64_t c = 0; c < channels; ++c) target[Pack<T>::position(j + c)] = Acc<T>(source[c]);
    }
  }
  template <typename T>
  void fold(const Acc<T>* source, double* target) const {
    for (int64_t c = 0; c < channels; ++c) target[c] = source[Pack<T>::position(c)];
    for (int64_t j = channels; j < length(); j += channels) {
      for (int64_t c = 0; c < channels; ++c) target[c] += source[Pack<T>::position(j + c)];
    }
  }
};

template <typename F>
void for_blocks(const Tile& tile, F f) {
  const int64_t repeat = std::clamp<int64_t>(kJoined / tile.channels, 1, tile.positions);
  for (int64_t c = 0; c < tile.channels; c += kBlock) {
    f(Block{c, std::min(kBlock, tile.channels - c), repeat, tile.positions});
  }
}

// The lines of a block, `repeat` positions each, from a position on.
template <typename T>
Lines<T> lines_of(const Lines<T>& x, const Block& block, int64_t position) {
  return {x[position] + block.first, x.stride * block.repeat};
}

template <typename T>
void moments(const Tile& tile, Lines<const T> x, double* mean, double* m2) {
  using A = Acc<T>;
  if (tile.layout == Layout::kContiguous) {
    const bool done = if_short<T>(tile.positions, [&](auto packs) {
      ShortLine<T, packs> line(tile.positions);
      for (int64_t c = 0; c < tile.channels; ++c) {
        line.load(x[c]);
        const double center = line.center();
        const auto [low, squares] = line.mean_and_squares();
        mean[c] = center + low;
        m2[c] = squares - low * low * tile.positions;
      }
    });
    for (int64_t c = 0; !done && c < tile.channels; ++c) std::tie(mean[c], m2[c]) = moments_along(x[c], tile.positions);
    return;
  }
  const double inverse = 1.0 / tile.positions;
  for_blocks(tile, [&](const Block& block) {
    alignas(64) A center[kBlock] = {};
    alignas(64) A sums[2][kBlock] = {};
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      const Lines<const T> from = lines_of(x, block, position);
      sum_across<T, 1>(lines, length, center, 0, [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
        s[0] = s[0] + Pack<T>::load(from[line] + j, lanes);
      });
    });
    double* const block_mean = mean + block.first;
    double* const block_m2 = m2 + block.first;
    block.fold<T>(center, block_mean);
    for (int64_t c = 0; c < block.channels; ++c) block_mean[c] = A(block_mean[c] * inverse);
    block.spread<T>(block_mean, center);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      const Lines<const T> from = lines_of(x, block, position);
      sum_across<T, 2>(lines, length, sums[0], kBlock, [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
        const Pack<T> d = (Pack<T>::load(from[line] + j, lanes) - Pack<T>::load_packed(center + j)).masked(lanes);
        s[0] = s[0] + d;
        s[1] = fmadd(d, d, s[1]);
      });
    });
    double first[kBlock];
    block.fold<T>(sums[0], first);
    block.fold<T>(sums[1], block_m2);
    for (int64_t c = 0; c < block.channels; ++c) {
      const double low = first[c] * inverse;
      block_mean[c] += low;
      block_m2[c] -= first[c] * low;
    }
  });
}

template <typename T>
void grad_sums(const Tile& tile, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
               double* sum_dy_x) {
  using A = Acc<T>;
  if (tile.layout == Layout::kContiguous) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      sum_dy[c] = sum_dy_x[c] = 0;
      for (int64_t begin = 0; begin < tile.positions; begin += kChunk) {
        const auto [first, second] =
            sum_along<T, 2>(std::min(kChunk, tile.positions - begin), [&](int64_t j, auto lanes, Pack<T>* s) {
              const Pack<T> g = Pack<T>::load(dy[c] + begin + j, lanes);
              s[0] = s[0] + g;
              s[1] = fmadd(g, Pack<T>::load(x[c] + begin + j, lanes) - center[c], s[1]);
            });
        sum_dy[c] += first;
        sum_dy_x[c] += second;
      }
    }
    return;
  }
  for_blocks(tile, [&](const Block& block) {
    alignas(64) A centers[kBlock] = {};
    alignas(64) A sums[2][kBlock] = {};
    block.spread<T>(center + block.first, centers);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      const Lines<const T> from = lines_of(x, block, position), grads = lines_of(dy, block, position);
      sum_across<T, 2>(lines, length, sums[0], kBlock, [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
        const Pack<T> g = Pack<T>::load(grads[line] + j, lanes);
        s[0] = s[0] + g;
        s[1] = fmadd(g, Pack<T>::load(from[line] + j, lanes) - Pack<T>::load_packed(centers + j), s[1]);
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
  for_blocks(tile, [&](const Block& block) {
    alignas(64) Acc<T> packed[kArrays][kBlock] = {};
    for (int k = 0; k < kArrays; ++k) block.spread<T>(arrays[k] + block.first, packed[k]);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      for (int64_t line = 0; line < lines; ++line) {
        for (int i = 0; i < kInputs; ++i) from[i] = lines_of(inputs[i], block, position)[line];
        run(from, lines_of(out, block, position)[line], length,
            [&](int k, int64_t j) { return Pack<T>::load_packed(packed[k] + j); });
      }
    });
  });
}

template <typename T>
void apply(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k) {
  map<T, 1, 3>(tile, {x}, y, {k.center, k.scale, k.shift},
               [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0] - k[0], k[1], k[2]); });
}

template <typename T>
void grad_apply(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                const BackwardCoefficients<Acc<T>>& k) {
  map<T, 2, 4>(tile, {dy, x}, dx, {k.center, k.scale, k.slope, k.shift},
               [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0], k[1], fmadd(v[1] - k[0], k[2], k[3])); });
}

template <typename T>
void add(Kernels<T>& kernels) {
  kernels.moments = moments<T>;
  kernels.grad_sums = grad_sums<T>;
  kernels.apply = apply<T>;
  kernels.grad_apply = grad_apply<T>;
}

}  // namespace

void add_channel_kernels(KernelTable& table) {
  add(table.f32);
  add(table.f64);
  add(table.f16);
  add(table.bf16);
}

}  // namespace normops::cpu::CPU_CAPABILITY
