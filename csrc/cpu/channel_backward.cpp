// Inner loops of the channel engine (Batch-, Instance-, GroupNorm), backward. Compiled once per instruction set.

#include <algorithm>
#include <array>

#include "tiles.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
NORMOPS_KERNEL grad_sums(const Tile& tile, Lines<const T> dy, Lines<const T> x, const Acc<T>* center, double* sum_dy,
                         double* sum_dy_x) {
  using A = Acc<T>;
  const auto take = [&](int64_t c, const std::array<double, 2>& sums) {
    sum_dy[c] = sums[0];
    sum_dy_x[c] = sums[1];
  };
  const auto add_pack = [&](int64_t c, const T* dy, const T* x, auto lanes, Pack<T>* s) {
    const Pack<T> g = Pack<T>::load(dy, lanes);
    s[0] = s[0] + g;
    s[1] = fmadd(g, Pack<T>::load(x, lanes) - center[c], s[1]);
  };
  if (tile.layout == Layout::kContiguous) {
    const auto add = [&](int64_t c, int64_t j, auto lanes, Pack<T>* s) { add_pack(c, dy[c] + j, x[c] + j, lanes, s); };
    sums_of_lines<T, 2>(tile.channels, tile.positions, add, take);
    return;
  }
  if (is_in_runs(tile)) {
    const auto add = [&](int64_t c, int64_t position, int64_t j, auto lanes, Pack<T>* s) {
      const int64_t at = c * tile.width + j;
      add_pack(c, dy[position] + at, x[position] + at, lanes, s);
    };
    sums_of_runs<T, 2>(tile.channels, tile.positions, tile.width, add, take);
    return;
  }
  for_blocks<T>(tile, [&](const Block& block) {
    alignas(64) A centers[kBlock];
    alignas(64) A sums[2][kApart];
    for (A* const sum : sums) std::fill_n(sum, block.padded<T>(), A(0));
    block.spread<T>(center + block.first, centers);
    block.each([&](int64_t position, int64_t lines, int64_t length) {
      sum_across<T, 2>({block.lines(dy, position), block.lines(x, position)}, lines, length, sums[0], kApart,
                       [&](int64_t, const Pack<T>* v, int64_t j, auto, Pack<T>* s) {
                         s[0] = s[0] + v[0];
                         s[1] = fmadd(v[0], v[1] - Pack<T>::load_packed(centers + j), s[1]);
                       });
    });
    block.fold<T>(sums[0], sum_dy + block.first);
    block.fold<T>(sums[1], sum_dy_x + block.first);
  });
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
void fill_channel_backward(Kernels<T>& kernels) {
  kernels.grad_sums = grad_sums<T>;
  kernels.grad_apply = grad_apply<T>;
  kernels.scale = scale<T>;
}

}  // namespace

void add_channel_backward(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_channel_backward, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
