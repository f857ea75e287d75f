// Inner loops of the channel engine (Batch-, Instance-, GroupNorm). Compiled once per instruction set.
//
// contiguous: a line is one channel's positions, sums run along it and its coefficients are constants.
// channels_last: a line is one position's channels, sums run across lines and coefficients run along them.

#include <algorithm>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Channels handled at once in channels_last: their sums live on the stack and stay in the first-level cache.
constexpr int64_t kChannels = 512;

template <typename F>
void for_channel_blocks(int64_t channels, F f) {
  for (int64_t c = 0; c < channels; c += kChannels) f(c, std::min(kChannels, channels - c));
}

template <typename T>
Lines<T> from(Lines<T> lines, int64_t channel) {
  return {lines.data + channel, lines.stride};
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
  for_channel_blocks(tile.channels, [&](int64_t c, int64_t channels) {
    const Lines<const T> lines = from(x, c);
    alignas(64) A center[kChannels] = {};
    alignas(64) A sums[2][kChannels] = {};
    sum_across<T, 1>(tile.positions, channels, center, 0, [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
      s[0] = s[0] + Pack<T>::load(lines[line] + j, lanes);
    });
    for (A& value : center) value *= A(inverse);
    sum_across<T, 2>(tile.positions, channels, sums[0], kChannels,
                     [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
                       const Pack<T> d = Pack<T>::load(lines[line] + j, lanes) - Pack<T>::load_packed(center + j);
                       s[0] = s[0] + d;
                       s[1] = fmadd(d, d, s[1]);
                     });
    for_pack_order<T>(channels, [&](int64_t j, int64_t at) {
      const double low = sums[0][at] * inverse;
      mean[c + j] = center[at] + low;
      m2[c + j] = sums[1][at] - sums[0][at] * low;
    });
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
  for_channel_blocks(tile.channels, [&](int64_t c, int64_t channels) {
    const Lines<const T> grads = from(dy, c), lines = from(x, c);
    alignas(64) A centers[kChannels] = {};
    alignas(64) A sums[2][kChannels] = {};
    for_pack_order<T>(channels, [&](int64_t j, int64_t at) { centers[at] = center[c + j]; });
    sum_across<T, 2>(tile.positions, channels, sums[0], kChannels,
                     [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
                       const Pack<T> g = Pack<T>::load(grads[line] + j, lanes);
                       s[0] = s[0] + g;
                       s[1] = fmadd(g, Pack<T>::load(lines[line] + j, lanes) - Pack<T>::load_packed(centers + j), s[1]);
                     });
    for_pack_order<T>(channels, [&](int64_t j, int64_t at) {
      sum_dy[c + j] = sums[0][at];
      sum_dy_x[c + j] = sums[1][at];
    });
  });
}

// Calls body(line, j, lanes, coefficients) for every pack of the tile, with the packs of kCount coefficient arrays
// that belong to it.
template <typename T, int kCount, typename Body>
void map(const Tile& tile, const Acc<T>* const (&arrays)[kCount], Body body) {
  if (tile.layout == Layout::kContiguous) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      Pack<T> coefficients[kCount];
      for (int k = 0; k < kCount; ++k) coefficients[k] = arrays[k][c];
      sweep<T, 2>(tile.positions, [&](int64_t j, auto lanes, auto) { body(c, j, lanes, coefficients); });
    }
    return;
  }
  for_channel_blocks(tile.channels, [&](int64_t c, int64_t channels) {
    alignas(64) Acc<T> packed[kCount][kChannels] = {};
    for_pack_order<T>(channels, [&](int64_t j, int64_t at) {
      for (int k = 0; k < kCount; ++k) packed[k][at] = arrays[k][c + j];
    });
    for (int64_t p = 0; p < tile.positions; ++p) {
      sweep<T, 2>(channels, [&](int64_t j, auto lanes, auto) {
        Pack<T> coefficients[kCount];
        for (int k = 0; k < kCount; ++k) coefficients[k] = Pack<T>::load_packed(packed[k] + j);
        body(p, c + j, lanes, coefficients);
      });
    }
  });
}

template <typename T>
void apply(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k) {
  map<T, 3>(tile, {k.center, k.scale, k.shift}, [&](int64_t line, int64_t j, auto lanes, const Pack<T>* k) {
    fmadd(Pack<T>::load(x[line] + j, lanes) - k[0], k[1], k[2]).store(y[line] + j, lanes);
  });
}

template <typename T>
void grad_apply(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                const BackwardCoefficients<Acc<T>>& k) {
  map<T, 4>(tile, {k.center, k.scale, k.slope, k.shift}, [&](int64_t line, int64_t j, auto lanes, const Pack<T>* k) {
    const Pack<T> d = Pack<T>::load(x[line] + j, lanes) - k[0];
    fmadd(Pack<T>::load(dy[line] + j, lanes), k[1], fmadd(d, k[2], k[3])).store(dx[line] + j, lanes);
  });
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
