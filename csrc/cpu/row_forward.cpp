// Inner loops of the row engine (LayerNorm, RMSNorm), forward. Compiled once per instruction set.

#include <algorithm>
#include <array>
#include <cmath>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
NORMOPS_KERNEL sums_of_squares(const Lines<const T>& x, int64_t count, int64_t length, double* totals) {
  const auto add = [&](int64_t row, int64_t j, auto lanes, Pack<T>* sums) {
    const Pack<T> v = Pack<T>::load(x[row] + j, lanes);
    sums[0] = fmadd(v, v, sums[0]);
  };
  sums_of_lines<T, 1>(count, length, add,
                      [&](int64_t row, const std::array<double, 1>& sums) { totals[row] = sums[0]; });
}

// The arguments are a copy: for all that the compiler knows, a store of a vector may change what lies elsewhere.
template <typename T, bool kWeight, bool kBias>
NORMOPS_KERNEL row_forward(RowForward<T> a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const double inverse = 1.0 / a.length;
  const int64_t at_once = is_short<T>(a.length) ? kTogether<T> : 1;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t last = std::min(first + at_once, end);
    const Lines<const T> rows{a.x[first], a.x.stride};
    double second[kTogether<T>];  // moments
    if (a.centered) {
      moments_of_lines(rows, last - first, a.length, a.mean + first, second);
    } else {
      std::fill_n(a.mean + first, last - first, 0.0);
      sums_of_squares(rows, last - first, a.length, second);
    }
    for (int64_t row = first; row < last; ++row) {
      const T* const x = a.x[row];
      const T* const next = a.x[std::min(row + at_once, end - 1)];
      T* const y = a.y[row];
      const SplitMean<A> split(a.mean[row]);
      const double rstd = 1 / std::sqrt(second[row - first] * inverse + a.eps);
      a.rstd[row] = rstd;
      const Pack<T> center = split.center, scale = A(rstd), shift = A(-split.low * rstd);
      // From the end, where the row is still in cache.
      for (int64_t from = (a.length - 1) / kChunk * kChunk; from >= 0; from -= kChunk) {
        sweep<T, 2>(std::min(kChunk, a.length - from), [&](int64_t i, auto lanes, auto) {
          const int64_t j = from + i;
          if (a.length <= kChunk) prefetch(next + j);
          Pack<T> v = fmadd(Pack<T>::load(x + j, lanes) - center, scale, shift);
          if constexpr (kWeight && kBias) {
            v = fmadd(v, Pack<T>::load_packed(a.weight + j), Pack<T>::load_packed(a.bias + j));
          } else if constexpr (kWeight) {
            v = v * Pack<T>::load_packed(a.weight + j);
          } else if constexpr (kBias) {
            v = v + Pack<T>::load_packed(a.bias + j);
          }
          v.store(y + j, lanes);
        });
      }
    }
  }
}

template <typename T>
void forward(const RowForward<T>& a, int64_t begin, int64_t end) {
  const auto run = a.weight && a.bias ? row_forward<T, true, true>
                   : a.weight         ? row_forward<T, true, false>
                   : a.bias           ? row_forward<T, false, true>
                                      : row_forward<T, false, false>;
  run(a, begin, end);
}

template <typename T>
NORMOPS_KERNEL pack_parameter(const Acc<T>* natural, int64_t length, Acc<T>* packed) {
  sweep<T>(length, [&](int64_t j, auto lanes, auto) { load_natural<T>(natural + j, lanes).store_packed(packed + j); });
}

template <typename T>
NORMOPS_KERNEL widen_parameter(const T* natural, int64_t length, Acc<T>* packed) {
  sweep<T>(length, [&](int64_t j, auto lanes, auto) { Pack<T>::load(natural + j, lanes).store_packed(packed + j); });
}

template <typename T>
void fill_row_forward(Kernels<T>& kernels) {
  kernels.pack_size = Pack<T>::kSize;
  kernels.memory_order = !Pack<T>::kSplit;
  kernels.pack_parameter = pack_parameter<T>;
  kernels.widen_parameter = widen_parameter<T>;
  kernels.row_forward = forward<T>;
}

}  // namespace

void add_row_forward(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_row_forward, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
