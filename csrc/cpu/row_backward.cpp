// Inner loops of the row engine (LayerNorm, RMSNorm), backward. Compiled once per instruction set.

#include <algorithm>
#include <array>

#include "lines.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

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
NORMOPS_INLINE void rows_backward(const RowBackward<T>& a, int64_t row, int64_t count, int64_t end,
                                  RowCoefficients<T>* c) {
  const auto load_scaled = [&](const T* dy, int64_t j, auto lanes) {
    const Pack<T> g = Pack<T>::load(dy + j, lanes);
    if constexpr (kWeight)
      return g * Pack<T>::load_packed(a.weight + j);
    else
      return g;
  };
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
    const int64_t next = std::min(row + count + r, end - 1);
    const T *const next_dy = a.dy[next], *const next_x = a.x[next];
    const Pack<T> center = c[r].center, rstd = c[r].rstd, slope = c[r].slope, shift = c[r].shift;
    sweep<T, 2>(a.length, [&](int64_t j, auto lanes, auto) {
      if (a.length <= kChunk) {
        prefetch(next_dy + j);
        prefetch(next_x + j);
      }
      const Pack<T> g = load_scaled(dy, j, lanes);
      fmadd(g, rstd, fmadd(Pack<T>::load(x + j, lanes) - center, slope, shift)).store(dx + j, lanes);
    });
  }
}

// dx row by row, so that memory is read and written in turns; and then, for some rows together, the sums for dweight
// and dbias, whose stores would otherwise queue behind those to dx, which wait for memory. Where dx takes the place of
// dy, that memory is in the cache already, and the sums have to be first.
template <typename T, bool kWeight>
NORMOPS_KERNEL row_backward(RowBackward<T> a, int64_t begin, int64_t end) {  // a copy, as in row_forward
  if (a.length == 0) return;
  constexpr int64_t kRows = 8;
  const int64_t at_once = is_short<T>(a.length) ? kTogether<T> : 1;
  const bool in_place = a.dx.data == a.dy.data;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = std::min(kRows, end - row);
    RowCoefficients<T> c[kRows];
    for (int64_t r = 0; r < rows; ++r) c[r] = RowCoefficients<T>(a.mean[row + r], a.rstd[row + r]);
    const auto input = [&] {
      if (a.dx.data == nullptr) return;
      for (int64_t r = 0; r < rows; r += at_once) {
        rows_backward<T, kWeight>(a, row + r, std::min(at_once, rows - r), end, c + r);
      }
    };
    const auto parameters = [&] {
      if (a.dweight == nullptr) return;
      const Lines<const T> dy{a.dy[row], a.dy.stride}, x{a.x[row], a.x.stride};
      sum_across<T, 2>({dy, x}, rows, a.length, a.dbias, a.dweight - a.dbias,
                       [&](int64_t r, const Pack<T>* v, int64_t, auto, Pack<T>* s) {
                         s[0] = s[0] + v[0];
                         s[1] = fmadd(v[0], fmadd(v[1] - c[r].center, c[r].rstd, c[r].low), s[1]);
                       });
    };
    if (in_place) parameters();
    input();
    if (!in_place) parameters();
  }
}

template <typename T>
void backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  a.weight ? row_backward<T, true>(a, begin, end) : row_backward<T, false>(a, begin, end);
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
void fill_row_backward(Kernels<T>& kernels) {
  kernels.sum_blocks = sum_blocks<T>;
  kernels.row_backward = backward<T>;
}

}  // namespace

void add_row_backward(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_row_backward, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
