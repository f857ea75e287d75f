#pragma once

// Sums and statistics of lines: along one, across many, and of one that fits in registers.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <utility>

#include "../statistics.h"
#include "pack.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Sums of kTerms quantities along each of up to kLines lines: term(line, j, lanes, sums) adds the pack at j to
// sums[0..kTerms). Summing up the lanes takes as long as some packs of a line, so that is done for all lines together.
template <typename T, int kTerms, int kLines, int kUnroll, typename Term>
NORMOPS_INLINE std::array<Acc<T>, kLines * kTerms> sums_along(int64_t lines, int64_t length, Term term) {
  Pack<T> totals[kLines * kTerms];
  for (int64_t line = 0; line < lines; ++line) {
    Pack<T> sums[kUnroll][kTerms];
    sweep<T, kUnroll>(length, [&](int64_t j, auto lanes, auto u) { term(line, j, lanes, sums[u]); });
    for (int k = 0; k < kTerms; ++k) {
      for (int step = kUnroll / 2; step > 0; step /= 2) {
        for (int u = 0; u < step; ++u) sums[u][k] = sums[u][k] + sums[u + step][k];
      }
      totals[line * kTerms + k] = sums[0][k];
    }
  }
  return sums_of<T>(totals);
}

// The same for one line: term(j, lanes, sums).
template <typename T, int kTerms, typename Term>
NORMOPS_INLINE std::array<Acc<T>, kTerms> sum_along(int64_t length, Term term) {
  constexpr int kUnroll = NORMOPS_PLAIN ? 1 : 8 / (kTerms * Pack<T>::kParts);
  return sums_along<T, kTerms, 1, kUnroll>(
      1, length, [&](int64_t, int64_t j, auto lanes, Pack<T>* sums) { term(j, lanes, sums); });
}

// Lines of which two quantities are summed together.
template <typename T>
constexpr int kLinesTogether = std::min<int64_t>(4, Pack<T>::kLanes / 2);
constexpr int kUnrolled = NORMOPS_PLAIN ? 1 : 2;  // packs of such a line in flight

// Sums of kTerms quantities across lines, one per element of the line: term(line, values, j, lanes, sums) adds the
// packs at j of one line of each operand to the sums, which are kTerms arrays in pack order, `stride` apart. A few
// lines at a time are walked down in panels, as wide as registers hold sums for. That is not the order in which they
// lie in memory: meanwhile the next few lines are asked for in that order.
template <typename T, int kTerms, int kOperands, typename Term>
NORMOPS_INLINE void sum_across(const Lines<const T> (&operands)[kOperands], int64_t lines, int64_t length, Acc<T>* sums,
                               int64_t stride, Term term) {
  constexpr int64_t kSize = Pack<T>::kSize, kBytesAtOnce = 8 * 1024, kCacheLine = 64 / sizeof(T);
  constexpr int kPanel = NORMOPS_PLAIN ? 1 : 4 / Pack<T>::kParts;
  const int64_t at_once = std::max<int64_t>(4, kBytesAtOnce / sizeof(T) / length);
  for (int64_t first = 0; first < lines; first += at_once) {
    const int64_t last = std::min(first + at_once, lines);
    int64_t next_line = last, next = 0;
    const auto ask = [&](int64_t elements) {
      if (next_line >= lines || length <= kPanel * kSize) return;  // one panel: this is the order of memory
      for (const Lines<const T>& operand : operands) {
        for (int64_t i = 0; i < elements; i += kCacheLine) __builtin_prefetch(operand[next_line] + next + i, 0, 2);
      }
      next += elements;
      if (next < length) return;
      next = 0;
      ++next_line;
    };
    const auto panel = [&](int64_t j, auto packs, auto lanes) {
      Pack<T> totals[packs][kTerms];
      unroll<packs>([&](auto u) {
        for (int k = 0; k < kTerms; ++k) totals[u][k] = Pack<T>::load_packed(sums + k * stride + j + u * kSize);
      });
      for (int64_t line = first; line < last; ++line) {
        ask(packs * kSize);
        unroll<packs>([&](auto u) {
          Pack<T> values[kOperands];
          for (int i = 0; i < kOperands; ++i) values[i] = Pack<T>::load(operands[i][line] + j + u * kSize, lanes);
          term(line, values, j + u * kSize, lanes, totals[u]);
        });
      }
      unroll<packs>([&](auto u) {
        for (int k = 0; k < kTerms; ++k) totals[u][k].store_packed(sums + k * stride + j + u * kSize);
      });
    };
    int64_t j = 0;
    if constexpr (kPanel > 1) {
      for (; j + kPanel * kSize <= length; j += kPanel * kSize) panel(j, std::integral_constant<int, kPanel>{}, Full{});
    }
    for (; j + kSize <= length; j += kSize) panel(j, std::integral_constant<int, 1>{}, Full{});
    if (j < length) panel(j, std::integral_constant<int, 1>{}, Tail{length - j});
  }
}

// Sums in float are taken over at most this many elements before they go on in double.
constexpr int64_t kChunk = 4096;
constexpr int64_t kHalfChunk = kChunk / 2;  // where only half as many sums are kept side by side

// Deviations from a guess at the mean, n of them, with sum `first` and sum of squares `second`, give the moments by the
// corrected formula: mean = guess + first / n, M2 = second - first^2 / n. The last difference keeps its digits as long
// as the guess is within some standard deviations of the mean, so one pass is enough unless this says it was not.
NORMOPS_INLINE bool guess_was_near(double first, double second, double inverse) {
  return first * first * inverse <= 0.8 * second;
}

// Mean and M2 of one chunk, given a guess at the mean.
template <typename T>
NORMOPS_INLINE std::pair<double, double> chunk_moments(const T* x, int64_t n, double inverse, Acc<T> guess) {
  const auto deviations = [&](const Acc<T> center) {
    return sum_along<T, 2>(n, [&](int64_t j, auto lanes, Pack<T>* sums) {
      const Pack<T> d = (Pack<T>::load(x + j, lanes) - center).masked(lanes);
      sums[0] = sums[0] + d;
      sums[1] = fmadd(d, d, sums[1]);
    });
  };
  auto sums = deviations(guess);
  if (!guess_was_near(sums[0], sums[1], inverse)) {
    guess = Acc<T>(guess + sums[0] * inverse);
    sums = deviations(guess);
  }
  const double low = sums[0] * inverse;
  return {guess + low, sums[1] - sums[0] * low};
}

// Mean and M2 of a line, chunk by chunk while the chunk is in cache. Each chunk's guess is the mean so far; that of the
// first, the mean of its first pack.
template <typename T>
NORMOPS_INLINE std::pair<double, double> moments_along(const T* x, int64_t length) {
  int64_t begin = std::min(kChunk, length);
  const int64_t few = std::min(Pack<T>::kSize, length);
  auto [mean, m2] = chunk_moments(x, begin, 1.0 / begin, Pack<T>::load(x, Tail{few}).sum() / Acc<T>(few));
  for (; begin < length; begin += kChunk) {
    const int64_t n = std::min(kChunk, length - begin);
    const auto [chunk_mean, chunk_m2] = chunk_moments(x + begin, n, 1.0 / n, Acc<T>(mean));
    MomentsMerge(begin, n)(mean, m2, chunk_mean, chunk_m2);
  }
  return {mean, m2};
}

// A line short enough to stay in registers: memory is read, and 16-bit elements widened, once.
template <typename T, int kPacks>
struct ShortLine {
  Pack<T> values[kPacks];
  Tail last;
  double inverse;

  explicit ShortLine(int64_t length) : last{length - (kPacks - 1) * Pack<T>::kSize}, inverse(1.0 / length) {}

  // f(i, element, lanes) for every pack.
  template <typename F>
  NORMOPS_INLINE void each(F f) const {
    unroll<kPacks>([&](auto i) {
      if constexpr (i + 1 < kPacks)
        f(i, i * Pack<T>::kSize, Full{});
      else
        f(i, i * Pack<T>::kSize, last);
    });
  }

  NORMOPS_INLINE void load(const T* x) {
    each([&](int i, int64_t j, auto lanes) { values[i] = Pack<T>::load(x + j, lanes); });
  }

  NORMOPS_INLINE Pack<T> sum() const {
    Pack<T> total;
    each([&](int i, int64_t, auto) { total = total + values[i]; });
    return total;
  }
  NORMOPS_INLINE Pack<T> sum_of_squares() const {
    Pack<T> total;
    each([&](int i, int64_t, auto) { total = fmadd(values[i], values[i], total); });
    return total;
  }
  NORMOPS_INLINE void subtract(Acc<T> center) {
    each([&](int i, int64_t, auto lanes) { values[i] = (values[i] - center).masked(lanes); });
  }
};

// As many short lines at once as registers hold, so that they are summed together.
template <typename T, int kPacks>
struct ShortLines {
  static constexpr int kVectors = sizeof(typename Pack<T>::Vec) >= 64 ? 16 : 8;
  static constexpr int kMost = std::min<int64_t>(8, Pack<T>::kLanes);
  static constexpr int kCount =
      std::clamp<int>(std::bit_floor(unsigned(kVectors / (kPacks * Pack<T>::kParts))), 1, kMost);

  ShortLine<T, kPacks> line[kCount];
  double mean[kCount], m2[kCount];
  Acc<T> low[kCount];  // what rounding lost of the means

  explicit ShortLines(int64_t length) : ShortLines(length, std::make_integer_sequence<int, kCount>{}) {}

  // Loads the lines at address(0), address(1), ..., takes their moments (mean and sum of squares about it; or, if not
  // centered, about zero) and leaves in `line` their deviations from the means without `low`.
  template <typename Address>
  NORMOPS_INLINE void take_moments(bool centered, Address address) {
    std::array<Acc<T>, kCount> center{}, first{};
    Pack<T> sums[kCount];
    unroll<kCount>([&](auto r) { line[r].load(address(r)); });
    if (centered) {
      unroll<kCount>([&](auto r) {
        center[r] = mean_of_four(address(r));
        line[r].subtract(center[r]);
        sums[r] = line[r].sum();
      });
      first = sums_of<T>(sums);
    }
    unroll<kCount>([&](auto r) { sums[r] = line[r].sum_of_squares(); });
    auto second = sums_of<T>(sums);
    unroll<kCount>([&](auto r) {
      const double inverse = line[r].inverse;
      if (centered && !guess_was_near(first[r], second[r], inverse)) [[unlikely]] {
        center[r] = Acc<T>(center[r] + first[r] * inverse);
        line[r].load(address(r));
        line[r].subtract(center[r]);
        first[r] = line[r].sum().sum();
        second[r] = line[r].sum_of_squares().sum();
      }
      const double exact_low = first[r] * inverse;
      mean[r] = center[r] + exact_low;
      m2[r] = second[r] - first[r] * exact_low;
      low[r] = Acc<T>(exact_low);
    });
  }

 private:
  int64_t length_;

  template <int... I>
  ShortLines(int64_t length, std::integer_sequence<int, I...>)
      : line{((void)I, ShortLine<T, kPacks>(length))...}, length_(length) {}

  // A guess at the mean of the line at x.
  NORMOPS_INLINE Acc<T> mean_of_four(const T* x) const {
    const int64_t quarter = length_ / 4;
    return (Acc<T>(x[0]) + Acc<T>(x[quarter]) + Acc<T>(x[2 * quarter]) + Acc<T>(x[3 * quarter])) / 4;
  }
};

// f(packs) with the number of packs in a line as a constant, if the line is short; false if it is not. Each number of
// packs is code of its own, which float64 is not worth.
template <typename T, typename F>
NORMOPS_INLINE bool if_short(int64_t length, F f) {
  constexpr int kShortPacks = NORMOPS_PLAIN || std::is_same_v<T, double> ? 0 : 8;
  const int64_t packs = (length + Pack<T>::kSize - 1) / Pack<T>::kSize;
  if (packs < 1 || packs > kShortPacks) return false;
  unroll<kShortPacks>([&](auto i) {
    if (packs == i + 1) f(std::integral_constant<int, i + 1>{});
  });
  return true;
}

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
