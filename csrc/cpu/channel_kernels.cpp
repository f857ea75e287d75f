// Inner loops of the channel engine (Batch-, Instance-, GroupNorm). Compiled once per instruction set.
//
// contiguous: a line is one channel's positions, sums run along it and its coefficients are constants.
// channels_last: a line is one position's channels, sums run across lines and coefficients run along them.

#include <algorithm>

#include "pack.h"

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
    for (int64_t c = 0; c < tile.channels; ++c) {
      std::tie(mean[c], m2[c]) = moments_along(x[c], tile.positions);
    }
    return;
  }
  const double n = tile.positions;
  for_channel_blocks(tile.channels, [&](int64_t c, int64_t channels) {
    const Lines<const T> lines = from(x, c);
    alignas(64) A center[kChannels] = {};
    alignas(64) A sums[2][kChannels] = {};
    sum_across<T, 1>(tile.positions, channels, center, 0, [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
      s[0] = s[0] + Pack<T>::load(lines[line] + j, lanes);
    });
    for (int64_t i = 0; i < channels; ++i) center[i] = center[i] / A(n);
    sum_across<T, 2>(tile.positions, channels, sums[0], kChannels,
                     [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
                       const Pack<T> d = Pack<T>::load(lines[line] + j, lanes) - Pack<T>::load(center + j, lanes);
                       s[0] = s[0] + d;
                       s[1] = fmadd(d, d, s[1]);
                     });
    for (int64_t i = 0; i < channels; ++i) {
      mean[c + i] = double(center[i]) + double(sums[0][i]) / n;
      m2[c + i] = double(sums[1][i]) - double(sums[0][i]) * sums[0][i] / n;
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
  for_channel_blocks(tile.channels, [&](int64_t c, int64_t channels) {
    const Lines<const T> grads = from(dy, c), lines = from(x, c);
    alignas(64) A sums[2][kChannels] = {};
    sum_across<T, 2>(tile.positions, channels, sums[0], kChannels,
                     [&](int64_t line, int64_t j, auto lanes, Pack<T>* s) {
                       const Pack<T> g = Pack<T>::load(grads[line] + j, lanes);
                       const Pack<T> d = Pack<T>::load(lines[line] + j, lanes) - Pack<T>::load(center + c + j, lanes);
                       s[0] = s[0] + g;
                       s[1] = fmadd(g, d, s[1]);
                     });
    for (int64_t i = 0; i < channels; ++i) {
      sum_dy[c + i] = sums[0][i];
      sum_dy_x[c + i] = sums[1][i];
    }
  });
}

// Calls body(line, j, lanes, load) for every pack of the tile; load(coefficients) gives the pack of coefficients
// that belongs to it.
template <typename T, typename Body>
void map(const Tile& tile, Body body) {
  if (tile.layout == Layout::kContiguous) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      sweep<T, 2>(tile.positions, [&](int64_t j, auto lanes, auto) {
        body(c, j, lanes, [&](const Acc<T>* coefficients) { return Pack<T>(coefficients[c]); });
      });
    }
    return;
  }
  for (int64_t p = 0; p < tile.positions; ++p) {
    sweep<T, 2>(tile.channels, [&](int64_t j, auto lanes, auto) {
      body(p, j, lanes, [&](const Acc<T>* coefficients) { return Pack<T>::load(coefficients + j, lanes); });
    });
  }
}

template <typename T>
void apply(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k) {
  map<T>(tile, [&](int64_t line, int64_t j, auto lanes, auto load) {
    const Pack<T> d = Pack<T>::load(x[line] + j, lanes) - load(k.center);
    fmadd(d, load(k.scale), load(k.shift)).store(y[line] + j, lanes);
  });
}

template <typename T>
void grad_apply(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                const BackwardCoefficients<Acc<T>>& k) {
  map<T>(tile, [&](int64_t line, int64_t j, auto lanes, auto load) {
    const Pack<T> g = Pack<T>::load(dy[line] + j, lanes);
    const Pack<T> d = Pack<T>::load(x[line] + j, lanes) - load(k.center);
    fmadd(g, load(k.scale), fmadd(d, load(k.slope), load(k.shift))).store(dx[line] + j, lanes);
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
