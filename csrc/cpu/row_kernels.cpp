// Inner loops of the row engine (LayerNorm, RMSNorm). Compiled once per instruction set.

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
double sum_of_squares(const T* x, int64_t length) {
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const T* chunk = x + begin;
    total += sum_along<T, 1>(std::min(kChunk, length - begin), [&](int64_t j, auto lanes, Pack<T>* sums) {
      const Pack<T> v = Pack<T>::load(chunk + j, lanes);
      sums[0] = fmadd(v, v, sums[0]);
    })[0];
  }
  return total;
}

// A weight or bias along a row, or the number that stands for an absent one: kernels read either.
template <typename T>
class RowParameter {
 public:
  NORMOPS_INLINE RowParameter(const Acc<T>* given, Acc<T> absent)
      : data_(given ? given : absent_), step_(given ? 1 : 0) {
    Pack<T>(absent).store_packed(absent_);
  }
  NORMOPS_INLINE Pack<T> operator[](int64_t j) const { return Pack<T>::load_packed(data_ + j * step_); }

 private:
  alignas(64) Acc<T> absent_[Pack<T>::kSize];
  const Acc<T>* data_;
  int64_t step_;
};

template <typename T>
NORMOPS_KERNEL row_forward(RowForward<T> a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const RowParameter<T> weight(a.weight, 1), bias(a.bias, 0);
  const double inverse = 1.0 / a.length;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x[row];
    T* y = a.y[row];
    const auto [mean, m2] =
        a.centered ? moments_along(x, a.length) : std::pair<double, double>(0.0, sum_of_squares(x, a.length));
    const double rstd = 1 / std::sqrt(m2 * inverse + a.eps);
    a.mean[row] = mean;
    a.rstd[row] = rstd;
    const SplitMean<A> split(mean);
    const A center = split.center;
    const Pack<T> scale = A(rstd), shift = A(-split.low * rstd);
    const T* const next = a.x[std::min(row + 1, end - 1)];
    // From the end, where the row is still in cache.
    for (int64_t from = (a.length - 1) / kChunk * kChunk; from >= 0; from -= kChunk) {
      sweep<T, 2>(std::min(kChunk, a.length - from), [&](int64_t i, auto lanes, auto) {
        const int64_t j = from + i;
        if (a.length <= kChunk) prefetch(next + j);
        const Pack<T> v = fmadd(Pack<T>::load(x + j, lanes) - center, scale, shift);
        fmadd(v, weight[j], bias[j]).store(y + j, lanes);
      });
    }
  }
}

template <typename T, int kPacks>
NORMOPS_KERNEL short_row_forward(const RowForward<T>& a, int64_t begin, int64_t end) {
  ShortLines<T, kPacks> lines(a.length);
  const RowParameter<T> w(a.weight, 1), b(a.bias, 0);
  Pack<T> weight[kPacks], bias[kPacks];
  lines.line[0].each([&](int i, int64_t j, auto) {
    weight[i] = w[j];
    bias[i] = b[j];
  });
  const double inverse = 1.0 / a.length;
  for (int64_t row = begin; row < end; row += lines.kCount) {
    const int64_t count = std::min<int64_t>(lines.kCount, end - row);
    lines.take_moments(a.centered, [&](int64_t i) { return a.x[row + std::min(i, count - 1)]; });
    double rstd[lines.kCount];
    for (int r = 0; r < lines.kCount; ++r) rstd[r] = 1 / std::sqrt(lines.m2[r] * inverse + a.eps);
    std::copy_n(lines.mean, count, a.mean + row);
    std::copy_n(rstd, count, a.rstd + row);
    unroll<lines.kCount>([&](auto r) {
      if (r >= count) return;
      const Pack<T> scale = Acc<T>(rstd[r]), shift = -lines.low[r] * Acc<T>(rstd[r]);
      T* y = a.y[row + r];
      lines.line[r].each([&](int i, int64_t j, auto lanes) {
        fmadd(fmadd(lines.line[r].values[i], scale, shift), weight[i], bias[i]).store(y + j, lanes);
      });
    });
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

template <typename T, int kPacks>
NORMOPS_KERNEL short_row_backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  ShortLine<T, kPacks> dy(a.length), x(a.length);
  const RowParameter<T> w(a.weight, 1);
  Pack<T> weight[kPacks], dweight[kPacks], dbias[kPacks];
  dy.each([&](int i, int64_t j, auto) { weight[i] = w[j]; });
  for (int64_t row = begin; row < end; ++row) {
    RowCoefficients<T> c(a.mean[row], a.rstd[row]);
    dy.load(a.dy[row]);
    x.load(a.x[row]);
    x.each([&](int i, int64_t, auto) {
      x.values[i] = x.values[i] - c.center;
      dweight[i] = fmadd(dy.values[i], fmadd(x.values[i], c.rstd, c.low), dweight[i]);
      dbias[i] = dbias[i] + dy.values[i];
    });
    if (a.dx.data == nullptr) continue;
    Pack<T> sum_g, sum_g_x;
    x.each([&](int i, int64_t, auto) {
      dy.values[i] = dy.values[i] * weight[i];
      sum_g = sum_g + dy.values[i];
      sum_g_x = fmadd(dy.values[i], x.values[i], sum_g_x);
    });
    c.set_sums(sum_g.sum(), sum_g_x.sum(), x.inverse, a.centered);
    T* dx = a.dx[row];
    x.each([&](int i, int64_t j, auto lanes) {
      fmadd(dy.values[i], c.rstd, fmadd(x.values[i], c.slope, c.shift)).store(dx + j, lanes);
    });
  }
  if (a.dweight == nullptr) return;
  dy.each([&](int i, int64_t j, auto) {
    (Pack<T>::load_packed(a.dweight + j) + dweight[i]).store_packed(a.dweight + j);
    (Pack<T>::load_packed(a.dbias + j) + dbias[i]).store_packed(a.dbias + j);
  });
}

template <typename T>
NORMOPS_INLINE RowCoefficients<T> row_coefficients(const RowBackward<T>& a, const RowParameter<T>& weight,
                                                   int64_t row) {
  RowCoefficients<T> c(a.mean[row], a.rstd[row]);
  if (a.dx.data == nullptr) return c;
  const T* dy = a.dy[row];
  const T* x = a.x[row];
  double sum_g = 0, sum_g_x = 0;
  for (int64_t from = 0; from < a.length; from += kChunk) {
    const auto [first, second] =
        sum_along<T, 2>(std::min(kChunk, a.length - from), [&](int64_t i, auto lanes, Pack<T>* sums) {
          const int64_t j = from + i;
          const Pack<T> g = Pack<T>::load(dy + j, lanes) * weight[j];
          sums[0] = sums[0] + g;
          sums[1] = fmadd(g, Pack<T>::load(x + j, lanes) - c.center, sums[1]);
        });
    sum_g += first;
    sum_g_x += second;
  }
  c.set_sums(sum_g, sum_g_x, 1.0 / a.length, a.centered);
  return c;
}

constexpr int kRows = NORMOPS_PLAIN ? 1 : 4;

template <typename T, bool kDx, bool kParams>
NORMOPS_KERNEL row_backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  const RowParameter<T> weight(a.weight, 1);
  const auto rows = [&](int64_t first, auto count) {
    RowCoefficients<T> c[count];
    for (int r = 0; r < count; ++r) c[r] = row_coefficients<T>(a, weight, first + r);
    // Rows that no cache would hold until their turn are not asked for.
    const int64_t next = a.length * int64_t(sizeof(T)) <= 128 * 1024 ? std::min(first + count, end - count) : first;
    sweep<T>(a.length, [&](int64_t j, auto lanes, auto) {
      Pack<T> w, dweight, dbias;
      if constexpr (kDx) w = weight[j];
      if constexpr (kParams) {
        dweight = Pack<T>::load_packed(a.dweight + j);
        dbias = Pack<T>::load_packed(a.dbias + j);
      }
      unroll<count>([&](auto r) {
        prefetch(a.dy[next + r] + j);
        prefetch(a.x[next + r] + j);
        const Pack<T> g = Pack<T>::load(a.dy[first + r] + j, lanes);
        const Pack<T> d = Pack<T>::load(a.x[first + r] + j, lanes) - c[r].center;
        if constexpr (kParams) {
          dweight = fmadd(g, fmadd(d, c[r].rstd, c[r].low), dweight);
          dbias = dbias + g;
        }
        if constexpr (kDx) {
          fmadd(g * w, c[r].rstd, fmadd(d, c[r].slope, c[r].shift)).store(a.dx[first + r] + j, lanes);
        }
      });
      if constexpr (kParams) {
        dweight.store_packed(a.dweight + j);
        dbias.store_packed(a.dbias + j);
      }
    });
  };
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) rows(row, std::integral_constant<int, kRows>{});
  for (; row < end; ++row) rows(row, std::integral_constant<int, 1>{});
}

template <typename T>
void forward(const RowForward<T>& a, int64_t begin, int64_t end) {
  if (!if_short<T>(a.length, [&](auto packs) { short_row_forward<T, packs>(a, begin, end); })) {
    row_forward<T>(a, begin, end);
  }
}

template <typename T>
void backward(const RowBackward<T>& a, int64_t begin, int64_t end) {
  if (if_short<T>(a.length, [&](auto packs) { short_row_backward<T, packs>(a, begin, end); })) return;
  const bool dx = a.dx.data != nullptr;
  const bool params = a.dweight != nullptr;
  const auto run = dx && params ? row_backward<T, true, true>
                   : dx         ? row_backward<T, true, false>
                                : row_backward<T, false, true>;
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
