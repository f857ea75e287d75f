#pragma once

// Sums and statistics of lines: along one, along a few short ones together, and across many.

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

#include "../statistics.h"
#include "pack.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// Asks for what is read after the results of now are stored: memory and arithmetic then take their time together.
template <typename T>
NORMOPS_INLINE void prefetch(const T* address) {
  __builtin_prefetch(address, 0, 2);
}

// Sums of kTerms quantities along a line, but for their lanes: term(j, lanes, sums) adds the pack at j to the sums.
template <typename T, int kTerms, int kUnroll, typename Term>
NORMOPS_INLINE void lanes_along(int64_t length, typename Pack<T>::Vec* totals, Term term) {
  Pack<T> sums[kUnroll][kTerms];
  sweep<T, kUnroll>(length, [&](int64_t j, auto lanes, auto u) { term(j, lanes, sums[u]); });
  for (int k = 0; k < kTerms; ++k) {
    for (int step = kUnroll / 2; step > 0; step /= 2) {
      for (int u = 0; u < step; ++u) sums[u][k] = sums[u][k] + sums[u + step][k];
    }
    totals[k] = sums[0][k].sum_of_parts();
  }
}

// The same to the end.
template <typename T, int kTerms, typename Term>
NORMOPS_INLINE std::array<Acc<T>, kTerms> sum_along(int64_t length, Term term) {
  constexpr int kUnroll = NORMOPS_PLAIN ? 1 : 8 / (kTerms * Pack<T>::kParts);
  typename Pack<T>::Vec totals[kTerms];
  lanes_along<T, kTerms, kUnroll>(length, totals, term);
  return sums_of<T>(totals);
}

constexpr int64_t kHalfChunk =
    kChunk / 2;  // of sums in float (kernels.h), where only half as many sums are kept side by side

// Summing up the lanes takes as long as some packs of a line, so for short lines it is done together, for some
// kilobytes of them, as they are walked a second time.
template <typename T>
constexpr int64_t kTogether = std::min<int64_t>(4, Pack<T>::kLanes / 2);
template <typename T>
NORMOPS_INLINE bool is_short(int64_t length) {
  return !NORMOPS_PLAIN && length > 0 && length * kTogether<T> * int64_t(sizeof(T)) <= 4 * 1024;
}

// Sums of kTerms quantities along each of some lines: term(line, j, lanes, sums) adds the pack at j of a line to its
// sums, take(line, totals) gets them in double. Which lines are taken together changes no bit.
template <typename T, int kTerms, typename Term, typename Take>
NORMOPS_INLINE void sums_of_short_lines(int64_t count, int64_t length, Term term, Take take) {
  for (int64_t first = 0; first < count; first += kTogether<T>) {
    const int64_t lines = std::min(kTogether<T>, count - first);
    typename Pack<T>::Vec totals[kTogether<T> * kTerms];
    for (int64_t i = 0; i < lines; ++i) {
      lanes_along<T, kTerms, 2>(length, totals + i * kTerms,
                                [&](int64_t j, auto lanes, Pack<T>* sums) { term(first + i, j, lanes, sums); });
    }
    const auto sums = sums_of<T>(totals);
    for (int64_t i = 0; i < lines; ++i) {
      std::array<double, kTerms> own;
      std::copy_n(sums.data() + i * kTerms, kTerms, own.begin());
      take(first + i, own);
    }
  }
}
template <typename T, int kTerms, typename Term, typename Take>
NORMOPS_INLINE void sums_of_lines(int64_t count, int64_t length, Term term, Take take) {
  if (is_short<T>(length)) return sums_of_short_lines<T, kTerms>(count, length, term, take);
  constexpr int64_t chunk = kTerms == 1 ? kChunk : kHalfChunk;
  for (int64_t line = 0; line < count; ++line) {
    std::array<double, kTerms> totals{};
    for (int64_t from = 0; from < length; from += chunk) {
      const auto part = sum_along<T, kTerms>(std::min(chunk, length - from), [&](int64_t j, auto lanes, Pack<T>* sums) {
        term(line, from + j, lanes, sums);
      });
      for (int k = 0; k < kTerms; ++k) totals[k] += part[k];
    }
    take(line, totals);
  }
}

// Sums of kTerms quantities for each of some channels, whose elements lie in runs of equal length, one at each of some
// positions: term(channel, position, j, lanes, sums) adds the pack at j of such a run, and take(channel, totals) gets
// them in double. A few channels are taken together, so that memory is read in longer runs and their lanes are summed
// up together; which they are changes no bit.
template <typename T, int kTerms, typename Term, typename Take>
NORMOPS_INLINE void sums_of_runs(int64_t count, int64_t positions, int64_t length, Term term, Take take) {
  const int64_t at_once = std::max<int64_t>(1, kHalfChunk / length);
  const auto sum = [&](int64_t first, auto channels) {
    std::array<double, kTerms> totals[channels] = {};
    for (int64_t from = 0; from < positions; from += at_once) {
      const int64_t to = std::min(from + at_once, positions);
      Pack<T> sums[channels][kTerms];
      for (int64_t position = from; position < to; ++position) {
        unroll<channels>([&](auto i) {
          sweep<T>(length, [&](int64_t j, auto lanes, auto) { term(first + i, position, j, lanes, sums[i]); });
        });
      }
      typename Pack<T>::Vec lanes[channels * kTerms];
      for (int i = 0; i < channels * kTerms; ++i) lanes[i] = sums[i / kTerms][i % kTerms].sum_of_parts();
      const auto parts = sums_of<T>(lanes);
      for (int i = 0; i < channels * kTerms; ++i) totals[i / kTerms][i % kTerms] += parts[i];
    }
    for (int i = 0; i < channels; ++i) take(first + i, totals[i]);
  };
  constexpr int kAtOnce = NORMOPS_PLAIN ? 1 : int(kTogether<T>);
  int64_t channel = 0;
  for (; channel + kAtOnce <= count; channel += kAtOnce) sum(channel, std::integral_constant<int, kAtOnce>{});
  for (; channel < count; ++channel) sum(channel, std::integral_constant<int, 1>{});
}

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

// Deviations from a guess at the mean, n of them, with sum `first` and sum of squares `second`, give the moments by the
// corrected formula: mean = guess + first / n, M2 = second - first^2 / n. The last difference keeps its digits as long
// as the guess is within some standard deviations of the mean, so one pass is enough unless this says it was not.
NORMOPS_INLINE bool guess_was_near(double first, double second, double inverse) {
  return first * first * inverse <= 0.8 * second;
}

// Adds a pack's deviations from the guess, and their squares, to two sums.
template <typename T, typename Lanes>
NORMOPS_INLINE void add_deviations(const T* x, Lanes lanes, Acc<T> guess, Pack<T>* sums) {
  const Pack<T> d = (Pack<T>::load(x, lanes) - guess).masked(lanes);
  sums[0] = sums[0] + d;
  sums[1] = fmadd(d, d, sums[1]);
}

// Which elements of lines count: all of them. What else there is: SomeValid in tiles.h.
struct AllValid {
  static constexpr bool all() { return true; }

  template <typename Lanes>
  NORMOPS_INLINE Lanes lanes(int64_t, int64_t, Lanes lanes) const {
    return lanes;
  }
  template <typename Values>
  NORMOPS_INLINE Values clear(const Values& values, int64_t, int64_t) const {
    return values;
  }
  // Of a channel's, of a chunk's; and one of four from all over a channel, if all of it is there.
  NORMOPS_INLINE int64_t count(int64_t all) const { return all; }
  NORMOPS_INLINE int64_t count(int64_t, int64_t size) const { return size; }
  NORMOPS_INLINE Place few(int, const Place& otherwise) const { return otherwise; }
  NORMOPS_INLINE AllValid of_blocks(int64_t) const { return *this; }
};

// Mean and M2 of one chunk, given a guess at the mean.
template <typename T, typename Which>
NORMOPS_INLINE std::pair<double, double> chunk_moments(const T* x, int64_t begin, int64_t size, double inverse,
                                                       Acc<T> guess, const Which& valid) {
  for (bool last = false;; last = true) {
    const auto sums = sum_along<T, 2>(size, [&](int64_t j, auto lanes, Pack<T>* sums) {
      add_deviations(x + begin + j, valid.lanes(0, begin + j, lanes), guess, sums);
    });
    if (last || guess_was_near(sums[0], sums[1], inverse)) {
      const double low = sums[0] * inverse;
      return {guess + low, sums[1] - sums[0] * low};
    }
    guess = Acc<T>(guess + sums[0] * inverse);
  }
}

// The mean of four elements from all over.
template <typename T>
NORMOPS_INLINE Acc<T> mean_of_four(const T* const (&x)[4]) {
  return (Acc<T>(*x[0]) + Acc<T>(*x[1]) + Acc<T>(*x[2]) + Acc<T>(*x[3])) / 4;
}

// Mean and M2 of a line, chunk by chunk while the chunk is in cache. Each chunk's guess is the mean so far; that of the
// first, the mean of its first pack.
template <typename T, typename Which>
NORMOPS_KERNEL moments_along(const T* x, int64_t length, double* mean, double* m2, const Which& valid) {
  const auto first_guess = [&] {
    if (valid.all()) {
      const int64_t few = std::min(Pack<T>::kSize, length);
      return Pack<T>::load(x, Tail{few}).sum() / Acc<T>(few);
    }
    const T* places[4];
    for (int i = 0; i < 4; ++i) places[i] = x + valid.few(i, {}).offset;
    return mean_of_four(places);
  };
  int64_t before = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t size = std::min(kChunk, length - begin), n = valid.count(begin, size);
    if (n == 0) continue;
    const Acc<T> guess = before == 0 ? first_guess() : Acc<T>(*mean);
    const auto [chunk_mean, chunk_m2] = chunk_moments(x, begin, size, 1.0 / n, guess, valid);
    if (before == 0)
      std::tie(*mean, *m2) = std::pair(chunk_mean, chunk_m2);
    else
      MomentsMerge(before, n)(*mean, *m2, chunk_mean, chunk_m2);
    before += n;
  }
}

// The same for up to kTogether short lines. The guess is the mean of four elements from all over the line.
template <typename T, typename Which>
NORMOPS_KERNEL moments_together(const Lines<const T>& x, int64_t count, int64_t length, double* mean, double* m2,
                                const Which& valid) {
  const double inverse = 1.0 / valid.count(length);
  Acc<T> guess[kTogether<T>];
  for (int64_t i = 0; i < count; ++i) {
    const T* places[4];
    for (int k = 0; k < 4; ++k) places[k] = x[i] + valid.few(k, {0, k * (length / 4)}).offset;
    guess[i] = mean_of_four(places);
  }
  const auto add = [&](int64_t i, int64_t j, auto lanes, Pack<T>* s) {
    add_deviations(x[i] + j, valid.lanes(0, j, lanes), guess[i], s);
  };
  sums_of_short_lines<T, 2>(count, length, add, [&](int64_t i, const std::array<double, 2>& sums) {
    const auto [first, second] = sums;
    const double low = first * inverse;
    mean[i] = guess[i] + low;
    m2[i] = second - first * low;
    if (!guess_was_near(first, second, inverse)) [[unlikely]]
      moments_along(x[i], length, mean + i, m2 + i, valid);
  });
}

// Mean and M2 of `count` channels that lie in runs, side by side at each of some positions. The guess is the mean of
// four elements from all over.
template <typename T, typename Which>
NORMOPS_KERNEL moments_of_runs(const Lines<const T>& x, int64_t count, int64_t positions, int64_t length, double* mean,
                               double* m2, const Which& valid) {
  using A = Acc<T>;
  const double inverse = 1.0 / valid.count(positions * length);
  A guess[kTogether<T>];
  for (int64_t first = 0; first < count; first += kTogether<T>) {
    const int64_t channels = std::min(kTogether<T>, count - first);
    const T* const begin = x.data + first * length;
    for (int64_t i = 0; i < channels; ++i) {
      const T* places[4];
      for (int k = 0; k < 4; ++k) {
        const Place place = valid.few(k, {positions * k / 4, length * k / 4});
        places[k] = begin + place.position * x.stride + i * length + place.offset;
      }
      guess[i] = mean_of_four(places);
    }
    const auto add = [&](int64_t i, int64_t position, int64_t j, auto lanes, Pack<T>* s) {
      const T* const own = begin + position * x.stride + i * length + j;
      add_deviations(own, valid.lanes(position, j, lanes), guess[i], s);
    };
    bool near = false;
    for (int pass = 0; pass < 2 && !near; ++pass) {
      near = true;
      sums_of_runs<T, 2>(channels, positions, length, add, [&](int64_t i, const std::array<double, 2>& sums) {
        if (pass == 0 && !guess_was_near(sums[0], sums[1], inverse)) [[unlikely]] {
          guess[i] = A(guess[i] + sums[0] * inverse);
          near = false;
        } else {
          const double low = sums[0] * inverse;
          mean[first + i] = guess[i] + low;
          m2[first + i] = sums[1] - sums[0] * low;
        }
      });
    }
  }
}

// Mean and M2 of `count` lines.
template <typename T, typename Which = AllValid>
void moments_of_lines(const Lines<const T>& x, int64_t count, int64_t length, double* mean, double* m2,
                      const Which& valid = {}) {
  const bool is_short_line = is_short<T>(length);
  const int64_t at_once = is_short_line ? kTogether<T> : 1;
  for (int64_t i = 0; i < count; i += at_once) {
    if (is_short_line)
      moments_together<T>({x[i], x.stride}, std::min(at_once, count - i), length, mean + i, m2 + i, valid);
    else
      moments_along(x[i], length, mean + i, m2 + i, valid);
  }
}

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
