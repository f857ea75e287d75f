// Inner loops of the row engine (LayerNorm, RMSNorm). Compiled once per instruction set.

#include <array>
#include <cmath>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Asks for what is read after the results of now are stored: memory and arithmetic then take their time together.
template <typename T>
NORMOPS_INLINE void prefetch(const T* address) {
  __builtin_prefetch(address, 0, 2);
}

template <typename T>
NORMOPS_KERNEL sums_of_squares(const Lines<const T>& x, int64_t count, int64_t length, double* totals) {
  const auto add = [&](int64_t row, int64_t j, auto lanes, Pack<T>* sums) {
    const Pack<T> v = Pack<T>::load(x[row] + j, lanes);
    sums[0] = fmadd(v, v, sums[0]);
  };
  sums_of_lines<T, 1>(count, length, add,
                      [&](int64_t row, const std::array<double, 1>& sums) { totals[row] = sums[0]; });
}

template <typename T, bool kWeight, bool kBias>
NORMOPS_KERNEL row_forward(const RowForward<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const double inverse = 1.0 / a.length;
  const int64_t at_once = is_short<T>(a.length) ? kAbreast<T> : 1;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t last = std::min(first + at_once, end);
    const Lines<const T> rows{a.x[first], a.x.stride};
    double second[kAbreast<T>];  // moments
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

// dx = rstd * g + slope * (x - center) + shift (statistics.h), and xhat = (x - center) * rstd + low.
template <typename T>
struct RowCoefficients {
  Acc<T> center, rstd, low, slope = 0, shift = 0;
  double mean_low, exact_rstd;

  RowCoefficients() = default;
  RowCoefficients(double mean, double rstd) : rstd(Acc<T>(rstd)), exact_rstd(rstd) {
    const SplitMean<Acc<T>> split(mean);
    center = split.center;
    mean_low = split.low;
    low = Acc<T>(-mean_low * rstd);
  }

  // From the sums over the row of g and g * (x - center).
  void set_sums(double sum_g, double sum_g_x, double inverse, bool centered) {
    const double sum_g_xhat = (sum_g_x - mean_low * sum_g) * exact_rstd;
    const InputGradient gradient(exact_rstd, mean_low, sum_g * inverse, sum_g_xhat * inverse, centered);
    slope = Acc<T>(gradient.slope);
    shift = Acc<T>(gradient.shift);
  }
};

// dx = rstd * g + slope * (x - center) + shift for `count` rows, which the first walk brings into the cache, and the
// coefficients of these rows.
template <typename T, bool kWeight>
NORMOPS_INLINE void rows_backward(const RowBackward<T>& a, int64_t row, int64_t count, RowCoefficients<T>* c) {
  const auto load_scaled = [&](const T* dy, int64_t j, auto lanes) {
    const Pack<T> g = Pack<T>::load(dy + j, lanes);
    if constexpr (kWeight)
      return g * Pack<T>::load_packed(a.weight + j);
    else
      return g;
  };
  for (int64_t r = 0; r < count; ++r) c[r] = RowCoefficients<T>(a.mean[row + r], a.rstd[row + r]);
  if (a.dx.data == nullptr) return;
  const double inverse = 1.0 / a.length;
  const auto add = [&](int64_t r, int64_t j, auto lanes, Pack<T>* s) {
    const Pack<T> g = load_scaled(a.dy[row + r], j, lanes);
    s[0] = s[0] + g;
    s[1] = fmadd(g, Pack<T>::load(a.x[row + r] + j, lanes) - c[r].center, s[1]);
  };
  sums_of_lines<T, 2>(count, a.length, add, [&](int64_t r, const std::array<double, 2>& sums) {
    c[r].set_sums(sums[0], sums[1], inverse, a.centered);
  });
  for (int64_t r = 0; r < count; ++r) {
    const T* const dy = a.dy[row + r];
    const T* const x = a.x[row + r];
    T* const dx = a.dx[row + r];
    const Pack<T> center = c[r].center, rstd = c[r].rstd, slope = c[r].slope, shift = c[r].shift;
    sweep<T, 2>(a.length, [&](int64_t j, auto lanes, auto) {
      const Pack<T> g = load_scaled(dy, j, lanes);
      fmadd(g, rstd, fmadd(Pack<T>::load(x + j, lanes) - center, slope, shift)).store(dx + j, lanes);
    });
  }
}

// dx row by row, so that memory is read and written in turns; and then, for some rows together, the sums for dweight
// and dbias, whose stores would otherwise queue behind those to dx, which wait for memory.
template <typename T, bool kWeight>
NORMOPS_KERNEL row_backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  if (a.length == 0) return;
  constexpr int64_t kRows = 8;
  const int64_t at_once = is_short<T>(a.length) ? kAbreast<T> : 1;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = std::min(kRows, end - row);
    RowCoefficients<T> c[kRows];
    for (int64_t r = 0; r < rows; r += at_once) {
      rows_backward<T, kWeight>(a, row + r, std::min(at_once, rows - r), c + r);
    }
    if (a.dweight == nullptr) continue;
    const Lines<const T> dy{a.dy[row], a.dy.stride}, x{a.x[row], a.x.stride};
    sum_across<T, 2>({dy, x}, rows, a.length, a.dbias, a.dweight - a.dbias,
                     [&](int64_t r, const Pack<T>* v, int64_t, auto, Pack<T>* s) {
                       s[0] = s[0] + v[0];
                       s[1] = fmadd(v[0], fmadd(v[1] - c[r].center, c[r].rstd, c[r].low), s[1]);
                     });
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
void backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  a.weight ? row_backward<T, true>(a, begin, end) : row_backward<T, false>(a, begin, end);
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
int64_t padded(int64_t length) {
  return (length + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize;
}

// Neighbouring sums are added up together, which keeps the compiler's loops vectors and memory in long streams.
template <typename T>
NORMOPS_KERNEL sum_blocks(const Acc<T>* sums, int64_t blocks, int64_t stride, int64_t length, Acc<T>* natural) {
  constexpr int64_t kTogether = 16 * Pack<T>::kSize;
  for (int64_t from = 0; from < length; from += kTogether) {
    const int64_t n = std::min(kTogether, padded<T>(length - from));
    double totals[kTogether] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t j = 0; j < n; ++j) totals[j] += sums[block * stride + from + j];
    }
    Acc<T> packed[kTogether];
    std::copy_n(totals, n, packed);
    sweep<T>(std::min(kTogether, length - from), [&](int64_t j, auto lanes, auto) {
      store_natural<T>(Pack<T>::load_packed(packed + j), natural + from + j, lanes);
    });
  }
}

template <typename T>
void add(Kernels<T>& kernels) {
  kernels.pack_size = Pack<T>::kSize;
  kernels.memory_order = !Pack<T>::kSplit;
  kernels.pack_parameter = pack_parameter<T>;
  kernels.widen_parameter = widen_parameter<T>;
  kernels.sum_blocks = sum_blocks<T>;
  kernels.row_forward = forward<T>;
  kernels.row_backward = backward<T>;
}

}  // namespace

void add_row_kernels(KernelTable& table) {
#ifndef __AVX512BF16__  // which only bfloat16 has a use for
  add(table.f32);
  add(table.f64);
  add(table.f16);
#endif
  add(table.bf16);
}

}  // namespace normops::cpu::CPU_CAPABILITY
