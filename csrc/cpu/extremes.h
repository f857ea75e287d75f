#pragma once

// What leaves the range of float on the way, though the result does not: squares of more than 1e19 overflow, those of
// less than 1e-19 vanish, and so do products of rstd with itself. Whether that happens is seen by rstd, once for each
// statistic; elements are then taken one by one, in double. There is nothing wider for double.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace normops::cpu {

template <typename T>
bool is_extreme(double rstd) {
  constexpr double kLeast = 1e-15, kMost = 1e15;
  return !std::is_same_v<T, double> && !(rstd > kLeast && rstd < kMost);
}

// Mean and variance of what `each(f)` calls f with, twice; false if there are none that are finite.
template <typename Each>
bool exact_moments(const Each& each, double count, bool centered, double& mean, double& var) {
  double sum = 0, squares = 0;
  each([&](double x) { sum += x; });
  const double center = centered ? sum / count : 0;
  each([&](double x) { squares += (x - center) * (x - center); });
  if (!std::isfinite(center) || !std::isfinite(squares)) return false;
  mean = center;
  var = squares / count;
  return true;
}

// Where parameters of rows have element j.
template <typename T>
int64_t packed(int64_t j) {
  const Kernels<T>& kernel = kernels().of<T>();
  const int64_t size = kernel.pack_size, in_pack = j % size;
  return kernel.memory_order ? j : j - in_pack + in_pack % 2 * (size / 2) + in_pack / 2;
}

// Asked for every group: not a call, as without the word at -O1.
template <typename T>
inline bool is_extreme_variance(double var) {
  return !std::is_same_v<T, double> && !(var > 1e-30 && var < 1e30);
}

// Rows that the kernel has walked, again where it could not know better.
template <typename T>
void mend_rows(const RowForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!is_extreme<T>(a.rstd[row])) continue;
    const T* const x = a.x[row];
    double mean, var;
    const auto each = [&](const auto& f) {
      for (int64_t j = 0; j < a.length; ++j) f(double(x[j]));
    };
    if (!exact_moments(each, double(a.length), a.centered, mean, var)) continue;
    const double rstd = 1 / std::sqrt(var + a.eps);
    if (!std::isfinite(rstd)) continue;
    a.mean[row] = mean;
    a.rstd[row] = rstd;
    for (int64_t j = 0; j < a.length; ++j) {
      double y = (double(x[j]) - mean) * rstd;
      if (a.weight) y *= a.weight[packed<T>(j)];
      if (a.bias) y += a.bias[packed<T>(j)];
      a.y[row][j] = T(Acc<T>(y));
    }
  }
}

template <typename T>
bool is_extreme_row(const RowBackward<T>& a, int64_t row) {
  return a.dx.data && is_extreme<T>(a.rstd[row]) && std::isfinite(a.rstd[row]) && a.rstd[row] != 0;
}

template <typename T>
void extreme_row_backward(const RowBackward<T>& a, int64_t row, T* dx) {
  const double mean = a.mean[row], rstd = a.rstd[row];
  const T *const dy = a.dy[row], *const x = a.x[row];
  const auto g = [&](int64_t j) { return double(dy[j]) * (a.weight ? double(a.weight[packed<T>(j)]) : 1.0); };
  double sum_g = 0, sum_g_xhat = 0;
  for (int64_t j = 0; j < a.length; ++j) {
    sum_g += g(j);
    sum_g_xhat += g(j) * (double(x[j]) - mean) * rstd;
  }
  const double mean_g = a.centered ? sum_g / a.length : 0, along = sum_g_xhat / a.length;
  for (int64_t j = 0; j < a.length; ++j) {
    dx[j] = T(Acc<T>(rstd * (g(j) - mean_g - (double(x[j]) - mean) * rstd * along)));
  }
}

// The kernel, and again those rows that it could not know better: before it, where dx takes the place of dy.
template <typename T>
void row_backward_and_extremes(const RowBackward<T>& a, int64_t begin, int64_t end) {
  const bool in_place = a.dx.data == a.dy.data;
  std::vector<T> kept;
  for (int64_t row = begin; in_place && row < end; ++row) {
    if (!is_extreme_row(a, row)) continue;
    kept.resize(kept.size() + a.length);
    extreme_row_backward(a, row, kept.data() + kept.size() - a.length);
  }
  kernels().of<T>().row_backward(a, begin, end);
  auto next = kept.begin();
  for (int64_t row = begin; row < end; ++row) {
    if (!is_extreme_row(a, row)) continue;
    if (!in_place) {
      extreme_row_backward(a, row, a.dx[row]);
      continue;
    }
    std::copy_n(next, a.length, a.dx[row]);
    next += a.length;
  }
}

// f(line, j, i) for every element of a channel of a tile, the i-th.
template <typename F>
void for_elements(const Tile& tile, int64_t c, const F& f) {
  for (int64_t p = 0; p < tile.positions; ++p) {
    for (int64_t j = 0; j < tile.width; ++j) {
      const bool contiguous = tile.layout == Layout::kContiguous;
      f(contiguous ? c : p, contiguous ? p : c * tile.width + j, p * tile.width + j);
    }
  }
}

// Sums of g and of g * (x - mean): products of floats overflow as their squares do.
struct ExactGradSums {
  double mean, g = 0, g_x = 0;

  void add(double own_g, double x) {
    g += own_g;
    g_x += own_g * (x - mean);
  }
};

// dx = scale * dy + slope * (x - center) + shift of the channels of a tile that have coefficients in double, four of
// them in this order; the first of other channels is NaN. dx may take the place of dy, so results are kept until the
// kernel has been there.
template <typename T>
class ExtremeGradients {
 public:
  ExtremeGradients(const Tile& tile, const Lines<const T>& dy, const Lines<const T>& x, const double* coefficients)
      : tile_(tile) {
    for (int64_t c = 0; c < tile.channels; ++c) {
      const double* const k = coefficients + 4 * c;
      if (std::isnan(k[0])) continue;
      channels_.push_back(c);
      for_elements(tile_, c, [&](int64_t line, int64_t j, int64_t) {
        results_.push_back(T(Acc<T>(k[0] * double(dy[line][j]) + k[1] * (double(x[line][j]) - k[2]) + k[3])));
      });
    }
  }

  void store(const Lines<T>& dx) const {
    auto next = results_.begin();
    for (const int64_t c : channels_) {
      for_elements(tile_, c, [&](int64_t line, int64_t j, int64_t) { dx[line][j] = *next++; });
    }
  }

 private:
  const Tile tile_;
  std::vector<int64_t> channels_;
  std::vector<T> results_;
};

}  // namespace normops::cpu
