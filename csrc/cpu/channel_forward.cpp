// Inner loops of the channel engine (Batch-, Instance-, GroupNorm), forward. Compiled once per instruction set.

#include <algorithm>

#include "tiles.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

template <typename T, typename Which>
NORMOPS_KERNEL moments_of(const Tile& tile, Lines<const T> x, double* mean, double* m2, const Which& valid) {
  using A = Acc<T>;
  if (tile.layout == Layout::kContiguous) {
    moments_of_lines(x, tile.channels, tile.positions, mean, m2, valid);
    return;
  }
  if (is_in_runs(tile)) {
    moments_of_runs(x, tile.channels, tile.positions, tile.width, mean, m2, valid);
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    double* const block_mean = mean + block.first;
    double* const block_m2 = m2 + block.first;
    alignas(64) A center[kBlock];
    if (valid.all()) {
      // The first guess: the mean of a few lines from all over the tile.
      constexpr int64_t kFew = 8;
      const int64_t few = std::min(kFew, block.whole_lines()), step = block.whole_lines() / few;
      const Lines<const T> all = block.lines(x, 0), some{all.data, all.stride * step};
      sweep<T>(block.length(), [&](int64_t j, auto lanes, auto) {
        Pack<T> sum;
        for (int64_t line = 0; line < few; ++line) sum = sum + Pack<T>::load(some[line] + j, lanes);
        sum.store_packed(center + j);
      });
      block.fold<T>(center, block_mean);
      const double few_inverse = 1.0 / (few * block.repeat * block.width);
      for (int64_t c = 0; c < block.channels; ++c) block_mean[c] = A(block_mean[c] * few_inverse);
    } else {
      const T* places[4];
      for (int64_t c = 0; c < block.channels; ++c) {
        for (int i = 0; i < 4; ++i) {
          const Place place = valid.few(i, {});
          places[i] = x[place.position] + (block.first + c) * block.width + place.offset;
        }
        block_mean[c] = mean_of_four(places);
      }
    }

    const auto own = valid.of_blocks(block.length());
    const double inverse = 1.0 / valid.count(tile.positions * tile.width);
    double first[kBlock];
    bool near = false;
    for (int pass = 0; pass < 2 && !near; ++pass) {
      alignas(64) A sums[2][kApart];
      for (A* const sum : sums) std::fill_n(sum, block.padded<T>(), A(0));
      block.spread<T>(block_mean, center);
      block.each([&](int64_t position, int64_t lines, int64_t length) {
        const int64_t row = position / block.repeat;
        sum_across<T, 2>({block.lines(x, position)}, lines, length, sums[0], kApart,
                         [&](int64_t line, const Pack<T>* v, int64_t j, auto lanes, Pack<T>* s) {
                           const Pack<T> d =
                               (v[0] - Pack<T>::load_packed(center + j)).masked(own.lanes(row + line, j, lanes));
                           s[0] = s[0] + d;
                           s[1] = fmadd(d, d, s[1]);
                         });
      });
      block.fold<T>(sums[0], first);
      block.fold<T>(sums[1], block_m2);
      int64_t far = 0;  // counted, as compilers make vectors of that
      for (int64_t c = 0; c < block.channels; ++c) far += !guess_was_near(first[c], block_m2[c], inverse);
      near = far == 0;
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
void moments(const Tile& tile, Lines<const T> x, double* mean, double* m2) {
  with_valid<T>(tile, [&](const auto& valid) { moments_of(tile, x, mean, m2, valid); });
}

template <typename T, typename Which>
NORMOPS_KERNEL apply_of(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k,
                        const Which& valid) {
  const auto f = [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0] - k[0], k[1], k[2]); };
  map<T, 1, 3>(tile, {x}, y, {k.center, k.scale, k.shift}, f, valid);
}

template <typename T>
void apply(const Tile& tile, Lines<const T> x, Lines<T> y, const ForwardCoefficients<Acc<T>>& k) {
  with_valid<T, NORMOPS_PLAIN>(tile, [&](const auto& valid) { apply_of(tile, x, y, k, valid); });
}

template <typename T>
void fill_channel_forward(Kernels<T>& kernels) {
  kernels.valid_rows = valid_rows<T>;
  kernels.pack_valid = pack_valid<T>;
  kernels.moments = moments<T>;
  kernels.apply = apply<T>;
}

}  // namespace

void add_channel_forward(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_channel_forward, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
