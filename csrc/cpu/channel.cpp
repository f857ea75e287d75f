// Channel engine on the CPU: reduce, merge, apply. How the three stages are cut into regions and shared among threads
// is decided here; the loops over memory are in channel_forward.cpp and channel_backward.cpp.

#include <ATen/Dispatch.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "../extras.h"
#include "../statistics.h"
#include "cache.h"
#include "channel.h"
#include "channel_epilogue.h"
#include "extremes.h"
#include "kernels.h"
#include "parallel.h"

namespace normops::cpu {
namespace {

// A contiguous input is walked in blocks of channels, of which each sample has a run of memory. The processor fetches
// ahead only once a run is under way, so runs are long, if those of all samples fit in half of a cache. Small planes
// are read a few kilobytes at a time in any case (kBlock in tiles.h).
constexpr int64_t kShortestRun = 4 * 1024, kLongestRun = 64 * 1024;
int64_t run_bytes(const Geometry& g) {
  return g.width > 1 ? kShortestRun
                     : std::clamp(second_level_cache() / 2 / g.samples_per_row(), kShortestRun, kLongestRun);
}

// What a thread takes at a time where no group has to be kept together.
constexpr int64_t kBatchBytes = 64 * 1024;
// Channels merged by one thread at a time.
constexpr int64_t kMergeChannels = 64;

// Some segments by some channels, whole groups wherever rows are whole.
struct Region {
  int64_t first_segment, last_segment;
  int64_t first_channel, last_channel;
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

enum class Order { kForwards, kBackwards };

using Stage = c10::function_ref<void(const Region&)>;

// f(region) for regions of `segments` by `channels`, shared among threads.
void for_regions(const Geometry& g, int64_t segments, int64_t channels, Order order, Stage f) {
  const int64_t across = (g.channels + channels - 1) / channels;
  const int64_t down = (g.segments() + segments - 1) / segments;
  const int64_t elements = g.elements() / std::max<int64_t>(1, across * down);
  parallel(across * down, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = order == Order::kForwards ? i : begin + end - 1 - i;
      const int64_t segment = at / across * segments, channel = at % across * channels;
      f(Region{segment, std::min(segment + segments, g.segments()), channel, std::min(channel + channels, g.channels)});
    }
  });
}

// f(segment, tile) for every segment of a region.
template <typename F>
void for_tiles(const Geometry& g, const Region& r, Order order, const F& f) {
  for (int64_t i = r.first_segment; i < r.last_segment; ++i) {
    const int64_t k = order == Order::kForwards ? i : r.first_segment + r.last_segment - 1 - i;
    f(k, Tile{g.layout, r.last_channel - r.first_channel, g.segment_count(k), g.width});
  }
}

// f(row, group, channel) for every group of a region: its row, its statistic, its first channel.
template <typename F>
void for_groups(const Geometry& g, const Region& r, const F& f) {
  const int64_t row_segments = g.segments_per_row();
  for (int64_t row = r.first_segment / row_segments; row * row_segments < r.last_segment; ++row) {
    for (int64_t c = r.first_channel; c < r.last_channel; c += g.group_size()) {
      f(row, row * g.num_groups + c / g.group_size(), c);
    }
  }
}

// Runs the stages: reduce, merge and coefficients for a group, and then apply, which begins where reduce ended, as that
// is still in cache. A thread takes a group through all stages if there are enough of them for all threads. Otherwise
// every stage is shared among all threads in turn. With statistics given there is no order to keep: memory is read
// once, and the sums of the backward pass are merged at the end. All ways do the same arithmetic.
void run_stages(const Geometry& g, int64_t element_size, bool given, Stage reduce, Stage merge, Stage coefficients,
                Stage apply) {
  const int64_t row_segments = g.segments_per_row();
  const auto channels_of = [&](int64_t bytes, int64_t bytes_per_channel) {
    const int64_t wanted = bytes / std::max<int64_t>(1, bytes_per_channel);
    return std::min(g.channels, round_up(std::max<int64_t>(1, wanted), g.group_size()));
  };
  const int64_t few_channels = channels_of(kMergeChannels, 1);
  if (given) {
    const bool lines = g.layout == Layout::kChannelsLast && g.width == 1;
    const int64_t positions = std::min(g.positions, g.segment_length) * g.width;
    const int64_t channels = lines ? g.channels : channels_of(kBatchBytes, positions * element_size);
    for_regions(g, row_segments, few_channels, Order::kForwards, coefficients);
    for_regions(g, 1, channels, Order::kForwards, [&](const Region& r) {
      reduce(r);
      apply(r);
    });
    for_regions(g, row_segments, few_channels, Order::kForwards, merge);
    return;
  }
  // A run of memory that belongs to one channel: a position's, in channels_last only where it is wide.
  const int64_t run = g.layout == Layout::kContiguous ? g.positions : g.width;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + g.elements() / kElementsPerThread);
  int64_t channels = run > 1 ? channels_of(run_bytes(g), run * element_size) : g.channels;
  int64_t regions = g.rows() * at::divup(g.channels, channels);
  if (run > 1 && g.over_batch) {  // as many for each thread
    channels = at::divup(g.channels, round_up(regions, threads));
    regions = at::divup(g.channels, channels);
  }
  if (regions % threads == 0 || regions >= 4 * threads) {
    for_regions(g, row_segments, channels, Order::kForwards, [&](const Region& r) {
      reduce(r);
      merge(r);
      coefficients(r);
      apply(r);
    });
    return;
  }
  for_regions(g, 1, channels, Order::kForwards, reduce);
  for_regions(g, row_segments, few_channels, Order::kForwards, [&](const Region& r) {
    merge(r);
    coefficients(r);
  });
  for_regions(g, 1, channels, Order::kBackwards, apply);
}

// Joins, in place and in order, the moments of all segments of a row into those of its first.
void merge_segments(const Geometry& g, const Mask* mask, const Region& r, int64_t first, int64_t last, double* mean,
                    double* m2) {
  const auto elements = [&](int64_t segment) {  // of a channel
    return double((mask ? mask->positions(segment) : g.segment_count(segment)) * g.width);
  };
  double count = elements(first);
  for (int64_t k = first + 1; k < last; ++k) {
    const double added = elements(k);
    if (added == 0) continue;
    const MomentsMerge merge(count, added);
    count += added;
    for (int64_t c = r.first_channel; c < r.last_channel; ++c) {
      merge(mean[first * g.channels + c], m2[first * g.channels + c], mean[k * g.channels + c], m2[k * g.channels + c]);
    }
  }
}

int64_t elements_per_group(const Geometry& g, const Mask* mask, int64_t row) {
  return mask ? mask->positions_of_row(row) * g.width * g.group_size() : g.elements_per_group();
}

// What of a segment's tile is walked: all of it, or what lies between the first and the last valid position.
struct Span {
  const Tile& whole;
  Run run;
  Tile tile;

  Span(const Tile& whole, const Mask* mask, int64_t segment)
      : whole(whole), run(mask ? span_of(mask->runs(segment)) : Run{0, whole.positions}), tile(part_of(whole, run)) {}

  template <typename T>
  Lines<T> of(const Lines<T>& x) const {
    return part_of(whole, x, run);
  }
};

}  // namespace

template <typename T>
void channel_forward(const Geometry& g, Operand<const T> x, Operand<T> y, Parameter<T> weight, Parameter<T> bias,
                     double eps, bool given, double* stat_mean, double* stat_var, const Epilogue<T>& epilogue,
                     const Mask* mask) {
  using A = Acc<T>;
  const int64_t C = g.channels, row_segments = g.segments_per_row();
  const Kernels<T>& kernel = kernels().of<T>();
  const Scratch<double> mean(given ? 0 : g.segments() * C), m2(given ? 0 : g.segments() * C);
  const CoefficientRows sets(g, weight);
  const Scratch<A> center(sets.count * C), scale(sets.count * C), shift(sets.count * C);

  // A group of contiguous channels is one line to the statistics, unless it is very long.
  const bool joined =
      g.layout == Layout::kContiguous && !g.over_batch && !mask && g.group_size() * g.positions <= g.segment_length;
  const int64_t join = joined ? g.group_size() : 1;

  const auto reduce = [&](const Region& r) {
    if (given) return;
    for_tiles(g, r, Order::kForwards, [&](int64_t k, Tile tile) {
      if (k + 1 < r.last_segment) x.prefetch(g, k + 1, r.first_channel);
      tile.channels /= join;
      tile.positions *= join;
      Lines<const T> lines = x.lines(g, k, r.first_channel);
      lines.stride *= join;
      const int64_t at = k * C + r.first_channel / join;
      if (!mask) {
        kernel.moments(tile, lines, mean + at, m2 + at);
        return;
      }
      std::fill_n(mean + at, tile.channels, 0.0);
      std::fill_n(m2 + at, tile.channels, 0.0);
      const auto moments = [&](int64_t c, const Tile& valid, const Lines<const T>& x) {
        kernel.moments(valid, x, mean + at + c, m2 + at + c);
      };
      for_valid(tile, mask->segment(k), moments, lines);
    });
  };
  const auto merge = [&](const Region& r) {
    if (given) return;
    for (int64_t first = r.first_segment; first < r.last_segment; first += row_segments) {
      merge_segments(g, mask, r, first, first + row_segments, mean.data.get(), m2.data.get());
    }
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const int64_t elements = elements_per_group(g, mask, row);
      if (elements == 0) {
        stat_mean[group] = stat_var[group] = 0;
        return;
      }
      const int64_t at = row * row_segments * C + c / join;
      const int64_t parts = g.group_size() / join;
      const double count = double(elements) / parts;  // of each part: equal ones need no chain of merges
      double group_mean = 0, group_m2 = 0;
      for (int64_t i = 0; i < parts; ++i) group_mean += mean[at + i];
      group_mean /= parts;
      for (int64_t i = 0; i < parts; ++i) {
        const double distance = mean[at + i] - group_mean;
        group_m2 += m2[at + i] + count * distance * distance;
      }
      stat_mean[group] = group_mean;
      stat_var[group] = group_m2 / elements;
      if (is_extreme_variance<T>(stat_var[group] + eps)) [[unlikely]] {
        const auto each = [&](const auto& f) {
          for (int64_t k = row * row_segments; k < (row + 1) * row_segments; ++k) {
            const Tile tile{g.layout, g.group_size(), g.segment_count(k), g.width};
            const Run all{0, tile.positions};
            const auto runs = mask ? mask->runs(k) : c10::ArrayRef<Run>(all);
            for (int64_t i = 0; i < g.group_size(); ++i) for_channel(tile, runs, x.lines(g, k, c), i, f);
          }
        };
        exact_moments(each, double(elements), /*centered=*/true, stat_mean[group], stat_var[group]);
      }
    });
  };
  const auto coefficients = [&](const Region& r) {
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const SplitMean<A> split(stat_mean[group]);
      const double rstd = 1 / std::sqrt(stat_var[group] + eps);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        for (int64_t i = c; i < c + g.group_size(); ++i) {
          const double factor = rstd * weight[set * weight.apart + i];
          center[set * C + i] = split.center;
          scale[set * C + i] = A(factor);
          shift[set * C + i] = A(bias[set * bias.apart + i] - split.low * factor);
        }
      }
    });
  };
  const auto apply = [&](const Region& r) {
    if (y.data == nullptr) return;
    for_tiles(g, r, Order::kBackwards, [&](int64_t k, const Tile& whole) {
      const int64_t at = sets.of(g.sample_of(k)) * C + r.first_channel;
      const Span span(whole, mask, k);
      const Tile& tile = span.tile;
      const Lines<const T> from = span.of(x.lines(g, k, r.first_channel));
      const Lines<T> to = span.of(y.lines(g, k, r.first_channel));
      const ForwardCoefficients<A> coefficients{center + at, scale + at, shift + at};
      if (tile.positions == 0) {
      } else if (epilogue) {
        apply_epilogue(tile, from, to, coefficients, epilogue.activation,
                       span.of(epilogue.residual.lines(g, k, r.first_channel)));
      } else {
        kernel.apply(tile, from, to, coefficients);
      }
      if (mask) clear_masked(whole, mask->segment(k), y.lines(g, k, r.first_channel));
    });
  };
  run_stages(g, sizeof(T), given, reduce, merge, coefficients, apply);
}

template <typename T>
void channel_backward(const Geometry& g, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Parameter<T> weight,
                      const double* stat_mean, const double* stat_var, double eps, bool given, const GradTotals& totals,
                      double* dweight, double* dbias, const Epilogue<T>& epilogue, const Mask* mask) {
  using A = Acc<T>;
  const int64_t C = g.channels, row_segments = g.segments_per_row();
  const Kernels<T>& kernel = kernels().of<T>();
  const bool sums_needed = dweight || dbias || !(given || totals.dy);
  const Scratch<double> sum_dy(sums_needed ? g.segments() * C : 0), sum_dy_x(sums_needed ? g.segments() * C : 0);
  const CoefficientRows sets(g, weight);
  const Scratch<A> center(sets.count * C), scale(sets.count * C), slope(sets.count * C), shift(sets.count * C);
  const auto group_of = [&](int64_t set, int64_t c) { return sets.row_of(set) * g.num_groups + c / g.group_size(); };
  bool extreme = false;
  for (int64_t set = 0; set < sets.count; ++set) {
    for (int64_t c = 0; c < C; c += g.group_size()) {
      const int64_t group = group_of(set, c);
      std::fill_n(center + (set * C + c), g.group_size(), A(stat_mean[group]));
      extreme = extreme || is_extreme_variance<T>(stat_var[group] + eps);
    }
  }
  // The coefficients of the forward, to make anew what the activation was applied to.
  const int64_t remade = epilogue && !epilogue.output.data ? sets.count * C : 0;
  const Scratch<A> z_scale(remade), z_shift(remade);
  for (int64_t i = 0; i < remade; ++i) {
    const int64_t set = i / C, c = i % C, group = group_of(set, c);
    const double factor = 1 / std::sqrt(stat_var[group] + eps) * weight[set * weight.apart + c];
    z_scale[i] = A(factor);
    z_shift[i] = A(epilogue.bias[set * epilogue.bias.apart + c] - SplitMean<A>(stat_mean[group]).low * factor);
  }
  // Those that leave the range of float, in double (extremes.h).
  const Scratch<double> exact(extreme ? 4 * sets.count * C : 0);
  // What goes on from the first stage.
  const Operand<const T> gradient = epilogue ? Operand<const T>{epilogue.dz.data, epilogue.dz.strides} : dy;

  const auto reduce = [&](const Region& r) {
    if (!sums_needed && !epilogue.dz.data) return;
    for_tiles(g, r, Order::kForwards, [&](int64_t k, const Tile& tile) {
      if (k + 1 < r.last_segment) {
        dy.prefetch(g, k + 1, r.first_channel);
        x.prefetch(g, k + 1, r.first_channel);
      }
      const int64_t at = k * C + r.first_channel;
      if (mask && sums_needed) {
        std::fill_n(sum_dy + at, tile.channels, 0.0);
        std::fill_n(sum_dy_x + at, tile.channels, 0.0);
      }
      // Sums of rounded dz, where valid elements are not side by side.
      const bool apart = mask && mask->runs(k).size() != 1;
      const auto sums_of_valid = [&](const Lines<const T>& dz, const Lines<const T>& x) {
        const int64_t row = sets.of(g.sample_of(k)) * C + r.first_channel;
        const auto sums = [&](int64_t c, const Tile& valid, const Lines<const T>& dz, const Lines<const T>& x) {
          kernel.grad_sums(valid, dz, x, center + row + c, sum_dy + at + c, sum_dy_x + at + c);
        };
        for_valid(tile, mask->segment(k), sums, dz, x);
      };
      if (epilogue) {
        const Span span(tile, mask, k);
        const int64_t c = sets.of(g.sample_of(k)) * C + r.first_channel;
        const auto of = [&](const auto& operand) { return span.of(operand.lines(g, k, r.first_channel)); };
        const EpilogueGradient<T> before{span.tile,
                                         of(dy),
                                         of(x),
                                         {center + c, z_scale + c, z_shift + c},
                                         epilogue.activation,
                                         of(epilogue.residual),
                                         of(epilogue.output),
                                         of(epilogue.dz)};
        const bool sums = sums_needed && !apart;
        if (span.tile.positions > 0) before.run(sums ? sum_dy + at : nullptr, sums ? sum_dy_x + at : nullptr);
        if (mask) clear_masked(tile, mask->segment(k), epilogue.dz.lines(g, k, r.first_channel));
        if (sums_needed && apart) {
          sums_of_valid(gradient.lines(g, k, r.first_channel), x.lines(g, k, r.first_channel));
        }
        return;
      }
      if (mask) {
        sums_of_valid(dy.lines(g, k, r.first_channel), x.lines(g, k, r.first_channel));
        return;
      }
      kernel.grad_sums(tile, dy.lines(g, k, r.first_channel), x.lines(g, k, r.first_channel),
                       center + (sets.of(g.sample_of(k)) * C + r.first_channel), sum_dy + at, sum_dy_x + at);
    });
  };
  // Leaves in the first segment of each row, or sample: sum dy, and sum dy * (x - mean) * rstd.
  const int64_t set_segments = row_segments / sets.per_row;
  const auto merge = [&](const Region& r) {
    if (!sums_needed) return;
    for (int64_t first = r.first_segment; first < r.last_segment; first += set_segments) {
      for (int64_t k = first + 1; k < first + set_segments; ++k) {
        for (int64_t c = r.first_channel; c < r.last_channel; ++c) {
          sum_dy[first * C + c] += sum_dy[k * C + c];
          sum_dy_x[first * C + c] += sum_dy_x[k * C + c];
        }
      }
    }
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      if (mask && mask->positions_of_row(row) == 0) return;
      const double low = SplitMean<A>(stat_mean[group]).low;
      const double rstd = 1 / std::sqrt(stat_var[group] + eps);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        for (int64_t i = set * set_segments * C + c, end = i + g.group_size(); i < end; ++i) {
          sum_dy_x[i] = (sum_dy_x[i] - low * sum_dy[i]) * rstd;
        }
      }
    });
  };
  const auto coefficients = [&](const Region& r) {
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const double rstd = 1 / std::sqrt(stat_var[group] + eps);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        const int64_t own = set * weight.apart;
        for (int64_t i = c; i < c + g.group_size(); ++i) scale[set * C + i] = A(rstd * weight[own + i]);
      }
      if (given) return;
      const double count = totals.dy ? totals.count : double(elements_per_group(g, mask, row));
      double group_dy = 0, group_dy_xhat = 0;
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        const int64_t at = set * set_segments * C, own = set * weight.apart;
        const double* const dy = totals.dy ? totals.dy : sum_dy + at;
        const double* const dy_xhat = totals.dy ? totals.dy_xhat : sum_dy_x + at;
        for (int64_t i = c; i < c + g.group_size(); ++i) {
          group_dy += dy[i] * weight[own + i];
          group_dy_xhat += dy_xhat[i] * weight[own + i];
        }
      }
      const double low = SplitMean<A>(stat_mean[group]).low;
      const InputGradient gradient(rstd, low, group_dy / count, group_dy_xhat / count, /*centered=*/true);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        std::fill_n(slope + (set * C + c), g.group_size(), A(gradient.slope));
        std::fill_n(shift + (set * C + c), g.group_size(), A(gradient.shift));
        for (int64_t i = c; extreme && i < c + g.group_size(); ++i) {
          double* const k = exact + 4 * (set * C + i);
          const bool own = is_extreme_variance<T>(stat_var[group] + eps) && std::isfinite(rstd);
          k[0] = own ? rstd * weight[set * weight.apart + i] : std::nan("");
          k[1] = gradient.slope;
          k[2] = SplitMean<A>(stat_mean[group]).center;
          k[3] = gradient.shift;
        }
      }
    });
  };
  const auto apply = [&](const Region& r) {
    if (dx.data == nullptr) return;
    for_tiles(g, r, Order::kBackwards, [&](int64_t k, const Tile& whole) {
      const int64_t at = sets.of(g.sample_of(k)) * C + r.first_channel;
      const Span span(whole, mask, k);
      const Lines<const T> from = span.of(gradient.lines(g, k, r.first_channel));
      const Lines<T> to = span.of(dx.lines(g, k, r.first_channel));
      if (span.tile.positions == 0) {
      } else if (given) {
        kernel.scale(span.tile, from, to, scale + at);
      } else if (extreme) {
        const Lines<const T> x_lines = span.of(x.lines(g, k, r.first_channel));
        const ExtremeGradients<T> extremes(span.tile, from, x_lines, exact + 4 * at);
        kernel.grad_apply(span.tile, from, x_lines, to, {center + at, scale + at, slope + at, shift + at});
        extremes.store(to);
      } else {
        kernel.grad_apply(span.tile, from, span.of(x.lines(g, k, r.first_channel)), to,
                          {center + at, scale + at, slope + at, shift + at});
      }
      if (mask) clear_masked(whole, mask->segment(k), dx.lines(g, k, r.first_channel));
    });
  };
  run_stages(g, 2 * sizeof(T), given || totals.dy, reduce, merge, coefficients, apply);

  const auto sum_rows = [&](const Scratch<double>& sums, double* total) {
    if (total == nullptr) return;
    if (weight.apart) {
      for (int64_t set = 0; set < sets.count; ++set) std::copy_n(sums + set * set_segments * C, C, total + set * C);
      return;
    }
    parallel(C, g.rows(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0;
        for (int64_t row = 0; row < g.rows(); ++row) sum += sums[row * row_segments * C + c];
        total[c] = sum;
      }
    });
  };
  sum_rows(sum_dy_x, dweight);
  sum_rows(sum_dy, dbias);
}

#define NORMOPS_INSTANTIATE(T)                                                                                        \
  template void channel_forward<T>(const Geometry&, Operand<const T>, Operand<T>, Parameter<T>, Parameter<T>, double, \
                                   bool, double*, double*, const Epilogue<T>&, const Mask*);                          \
  template void channel_backward<T>(const Geometry&, Operand<const T>, Operand<const T>, Operand<T>, Parameter<T>,    \
                                    const double*, const double*, double, bool, const GradTotals&, double*, double*,  \
                                    const Epilogue<T>&, const Mask*);
NORMOPS_INSTANTIATE(float)
NORMOPS_INSTANTIATE(double)
NORMOPS_INSTANTIATE(c10::Half)
NORMOPS_INSTANTIATE(c10::BFloat16)
#undef NORMOPS_INSTANTIATE

at::Tensor as_flags(const OptionalTensor& mask, const at::Tensor& input) {
  if (!defined(mask)) return {};
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->device() == input.device() && mask->dim() + 1 == input.dim() &&
                  mask->numel() * input.size(1) == input.numel(),
              "normops: expected a mask of bools for each position of input (", input.sizes(), "), got ",
              mask->scalar_type(), " of shape ", mask->sizes());
  const at::Tensor flags = mask->contiguous();
  const bool masks = std::memchr(flags.const_data_ptr<bool>(), 0, flags.numel()) != nullptr;
  return masks ? flags : at::Tensor();
}

namespace {

// Elements of a weight or bias.
int64_t parameters_of(const at::Tensor& input, int64_t varying) {
  return input.size(1) * (varying ? input.size(0) : 1);
}

// As torch does for inputs of one value. What has none is not an error, as samples may be there to fill a batch.
void check_counts(const Geometry& g, const Mask& mask, const at::Tensor& input) {
  const char* const op = g.over_batch ? "batch_norm" : g.num_groups == g.channels ? "instance_norm" : "group_norm";
  for (int64_t row = 0; row < g.rows(); ++row) {
    TORCH_CHECK_VALUE(
        elements_per_group(g, &mask, row) != 1, op,
        ": expected mask to leave more than 1 value per statistic when training, got 1 in input of shape ",
        input.sizes(), g.over_batch ? "" : ", sample " + std::to_string(row));
  }
}

// A given statistic in float64.
at::Tensor in_double(at::IntArrayRef shape, const OptionalTensor& given, const at::Tensor& input, const char* name) {
  const at::Tensor statistic = new_array(shape);
  const at::Tensor values = as_parameter(given, input, statistic.numel(), given->scalar_type(), name);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "normops::_channel_norm", [&] {
    std::copy_n(values.const_data_ptr<scalar_t>(), values.numel(), statistic.mutable_data_ptr<double>());
  });
  return statistic;
}

// Tensors of the input's shape and type, to be seen through one geometry: undefined ones are left out.
class Operands {
 public:
  explicit Operands(std::initializer_list<at::Tensor*> tensors) {
    for (at::Tensor* tensor : tensors) {
      if (tensor->defined()) tensors_.push_back(tensor);
    }
  }

  ChannelView view(int64_t num_groups, bool over_batch, bool wide, bool per_sample) {
    ChannelView view = wide && !per_sample ? wide_channel_view(tensors_, num_groups, over_batch)
                                           : channel_view(tensors_, num_groups, over_batch, per_sample);
    strides_ = view.strides;
    return view;
  }

  // After `view`.
  template <typename T>
  Operand<const T> input(const at::Tensor& tensor) const {
    if (!tensor.defined()) return {};
    return {tensor.const_data_ptr<T>(), strides_of(tensor)};
  }
  template <typename T>
  Operand<T> output(const at::Tensor& tensor) const {
    if (!tensor.defined()) return {};
    return {tensor.mutable_data_ptr<T>(), strides_of(tensor)};
  }

 private:
  Strides strides_of(const at::Tensor& tensor) const {
    size_t i = 0;
    while (tensors_[i] != &tensor) ++i;
    return strides_[i];
  }

  std::vector<at::Tensor*> tensors_;
  std::vector<Strides> strides_;
};

Tensors3 channel_norm(const at::Tensor& input, const OptionalTensor& given_mean, const OptionalTensor& given_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, bool over_batch,
                      double eps, const OptionalTensor& residual, OptionalName activation, double negative_slope,
                      const OptionalTensor& mask, int64_t varying) {
  at::Tensor x = input, added = residual.value_or(at::Tensor());
  at::Tensor output = new_like(input);
  const bool given = defined(given_mean);
  Operands operands{&x, &output, &added};
  const at::Tensor flags = as_flags(mask, input);
  const Geometry g = operands.view(num_groups, over_batch, /*wide=*/!given && !flags.defined(), varying).geometry;
  const auto valid = mask_of(g, flags);
  if (valid && !given) check_counts(g, *valid, input);
  const auto shape = channel_statistics_shape(input, num_groups, over_batch);
  TORCH_CHECK(given == defined(given_var), "normops: expected mean and var to be given together");
  const at::Tensor mean = given ? in_double(shape, given_mean, input, "mean") : new_array(shape);
  const at::Tensor var = given ? in_double(shape, given_var, input, "var") : new_array(shape);
  if (g.elements() == 0) {
    if (!given) {
      mean.zero_();
      var.zero_();
    }
    return {output, mean, var};
  }
  const Activation kind = as_activation(activation, negative_slope);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm", [&] {
    const int64_t numel = parameters_of(input, varying), apart = varying ? g.channels : 0;
    const at::Tensor w = as_own_parameter(weight, input, numel, "weight");
    const at::Tensor b = as_own_parameter(bias, input, numel, "bias");
    channel_forward<scalar_t>(g, operands.input<scalar_t>(x), operands.output<scalar_t>(output), {w, 1, apart},
                              {b, 0, apart}, eps, given, mean.mutable_data_ptr<double>(),
                              var.mutable_data_ptr<double>(), {kind, operands.input<scalar_t>(added)},
                              valid ? &*valid : nullptr);
  });
  return {output, mean, var};
}

// Sums as a tensor in the type of the arithmetic; undefined where there are none.
at::Tensor rounded(const double* sums, at::IntArrayRef shape, at::ScalarType type) {
  if (sums == nullptr) return {};
  const at::Tensor result = new_array(shape, type);
  const int64_t length = result.numel();
  if (type == at::kDouble)
    std::copy_n(sums, length, result.mutable_data_ptr<double>());
  else
    std::copy_n(sums, length, result.mutable_data_ptr<float>());
  return result;
}

Tensors4 channel_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                               const at::Tensor& var, const OptionalTensor& weight, int64_t num_groups, bool over_batch,
                               double eps, bool input_stats, Mask4 output_mask, const OptionalTensor& bias,
                               const OptionalTensor& residual, const OptionalTensor& output, OptionalName activation,
                               double negative_slope, const OptionalTensor& mask, int64_t varying) {
  const Activation kind = as_activation(activation, negative_slope);
  at::Tensor x = input, dy = grad_output, dx, dresidual, added, y, unwanted;
  const at::Tensor flags = as_flags(mask, input);
  if (output_mask[0]) dx = new_like(input);
  if (output_mask[3]) dresidual = new_like(input);
  if (kind) {
    added = residual.value_or(at::Tensor());
    y = output.value_or(at::Tensor());
    // Sums over elements that do not lie side by side are taken of what was stored.
    if (flags.defined() && !output_mask[0] && !output_mask[3]) unwanted = new_like(input);
  }
  Operands operands{&x, &dy, &dx, &added, &y, &dresidual, &unwanted};
  const Geometry g = operands.view(num_groups, over_batch, /*wide=*/!flags.defined(), varying).geometry;
  const auto valid = mask_of(g, flags);
  const int64_t count = c10::multiply_integers(channel_statistics_shape(input, num_groups, over_batch));
  const at::Tensor means = as_parameter(mean, input, count, at::kDouble, "mean");
  const at::Tensor vars = as_parameter(var, input, count, at::kDouble, "var");
  const int64_t numel = parameters_of(input, varying), apart = varying ? g.channels : 0;
  const Scratch<double> sums(2 * numel);
  std::fill_n(sums + 0, 2 * numel, 0.0);
  double* const dweight = output_mask[1] ? sums + 0 : nullptr;
  double* const dbias = output_mask[2] ? sums + numel : nullptr;
  if (g.elements() > 0) {
    if (dresidual.defined() && !kind) {
      dresidual.copy_(grad_output);
      if (flags.defined()) dresidual.masked_fill_(mask->unsqueeze(1).logical_not(), 0);
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_channel_norm_backward", [&] {
          const at::Tensor w = as_own_parameter(weight, input, numel, "weight");
          const at::Tensor b = kind ? as_own_parameter(bias, input, numel, "bias") : at::Tensor();
          Epilogue<scalar_t> epilogue{kind};
          if (kind) {
            epilogue = {kind,
                        operands.input<scalar_t>(added),
                        operands.input<scalar_t>(y),
                        {b, 0, apart},
                        operands.output<scalar_t>(output_mask[3]   ? dresidual
                                                  : output_mask[0] ? dx
                                                                   : unwanted)};
          }
          channel_backward<scalar_t>(g, operands.input<scalar_t>(dy), operands.input<scalar_t>(x),
                                     operands.output<scalar_t>(dx), {w, 1, apart}, means.const_data_ptr<double>(),
                                     vars.const_data_ptr<double>(), eps, !input_stats, {}, dweight, dbias, epilogue,
                                     valid ? &*valid : nullptr);
        });
  }
  const at::ScalarType type = acc_type(input);
  const int64_t channels = input.size(1);
  const at::DimVector shape = varying ? at::DimVector{input.size(0), channels} : at::DimVector{channels};
  return {dx, rounded(dweight, shape, type), rounded(dbias, shape, type), dresidual};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CPU, m) {
  m.impl("_channel_norm", channel_norm);
  m.impl("_channel_norm_backward", channel_norm_backward);
}

}  // namespace normops::cpu
