// Inner loops of the channel engine (Batch-, Instance-, GroupNorm), backward. Compiled once per instruction set.

#include <algorithm>
#include <array>

#include "tiles.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

template <typename T, typename Which>
NORMOPS_KERNEL grad_sums_of(const Tile& tile, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
                            double* sum_dy_x, const Which& valid) {
  using A = Acc<T>;
  const auto take = [&](int64_t c, const std::array<double, 2>& sums) {
    sum_dy[c] = sums[0];
    sum_dy_x[c] = sums[1];
  };
  // What is past the end of a line is zero in g already.
  const auto add_pack = [](const Pack<T>& dy, const Pack<T>& deviation, Pack<T>* s, auto clear) {
    const Pack<T> g = clear(dy);
    s[0] = s[0] + g;
    s[1] = fmadd(g, clear(deviation), s[1]);
  };
  const auto add_at = [&](int64_t c, const T* dy, const T* x, auto lanes, Pack<T>* s, int64_t line, int64_t j) {
    add_pack(Pack<T>::load(dy, lanes), Pack<T>::load(x, lanes) - center[c], s,
             [&](const Pack<T>& v) { return valid.clear(v, line, j); });
  };
  if (tile.layout == Layout::kContiguous) {
    const auto add = [&](int64_t c, int64_t j, auto lanes, Pack<T>* s) {
      add_at(c, dy[c] + j, x[c] + j, lanes, s, 0, j);
    };
    sums_of_lines<T, 2>(tile.channels, tile.positions, add, take);
    return;
  }
  if (is_in_runs(tile)) {
    const auto add = [&](int64_t c, int64_t position, int64_t j, auto lanes, Pack<T>* s) {
      const int64_t at = c * tile.width + j;
      add_at(c, dy[position] + at, x[position] + at, lanes, s, position, j);
    };
    sums_of_runs<T, 2>(tile.channels, tile.positions, tile.width, add, take);
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    alignas(64) A centers[kBlock];
    alignas(64) A sums[2][kApart];
    for (A* const sum : sums) std::fill_n(sum, block.padded<T>(), A(0));
    block.spread<T>(center + block.first, centers);
    const auto own = valid.of_blocks(block.length());
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      const int64_t row = position / block.repeat;
      sum_across<T, 2>({block.lines(dy, position), block.lines(x, position)}, lines, length, sums[0], kApart,
                       [&](int64_t line, const Pack<T>* v, int64_t j, auto, Pack<T>* s) {
                         add_pack(v[0], v[1] - Pack<T>::load_packed(centers + j), s,
                                  [&](const Pack<T>& v) { return own.clear(v, row + line, j); });
                       });
    });
    block.fold<T>(sums[0], sum_dy + block.first);
    block.fold<T>(sums[1], sum_dy_x + block.first);
  });
}

template <typename T>
void grad_sums(const Tile& tile, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
               double* sum_dy_x) {
  with_valid<T>(tile, [&](const auto& valid) { grad_sums_of(tile, dy, x, center, sum_dy, sum_dy_x, valid); });
}

template <typename T, typename Which>
NORMOPS_KERNEL grad_apply_of(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                             const BackwardCoefficients<Acc<T>>& k, const Which& valid) {
  const auto f = [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0], k[1], fmadd(v[1] - k[0], k[2], k[3])); };
  map<T, 2, 4>(tile, {dy, x}, dx, {k.center, k.scale, k.slope, k.shift}, f, valid);
}

template <typename T>
void grad_apply(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dx,
                const BackwardCoefficients<Acc<T>>& k) {
  with_valid<T, NORMOPS_PLAIN>(tile, [&](const auto& valid) { grad_apply_of(tile, dy, x, dx, k, valid); });
}

template <typename T, typename Which>
NORMOPS_KERNEL scale_of(const Tile& tile, Lines<const T> dy, Lines<T> dx, const Acc<T>* factor, const Which& valid) {
  map<T, 1, 1>(tile, {dy}, dx, {factor}, [](const Pack<T>* v, const Pack<T>* k) { return v[0] * k[0]; }, valid);
}

template <typename T>
void scale(const Tile& tile, Lines<const T> dy, Lines<T> dx, const Acc<T>* factor) {
  with_valid<T, NORMOPS_PLAIN>(tile, [&](const auto& valid) { scale_of(tile, dy, dx, factor, valid); });
}

template <typename T>
void fill_channel_backward(Kernels<T>& kernels) {
  kernels.grad_sums = grad_sums<T>;
  kernels.grad_apply = grad_apply<T>;
  kernels.scale = scale<T>;
}

}  // namespace

void add_channel_backward(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_channel_backward, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
