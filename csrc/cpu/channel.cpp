// Channel engine on the CPU: reduce, merge, apply. How the three stages are cut into regions and shared among threads
// is decided in regions.h; the loops over memory are in channel_forward.cpp and channel_backward.cpp.

#include "channel.h"

#include <algorithm>
#include <cmath>

#include "../statistics.h"
#include "channel_epilogue.h"
#include "extremes.h"
#include "kernels.h"
#include "regions.h"

namespace normops::cpu {
namespace {

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

// f(line, j) for the valid elements of channel c of a group, in lines that begin with the group's first.
template <typename F>
void for_valid_of(const Geometry& g, const Mask* mask, int64_t segment, int64_t c, const F& f) {
  const Tile tile{g.layout, g.group_size(), g.segment_count(segment), g.width};
  const Run all{0, tile.positions};
  for_elements(tile, mask ? mask->runs(segment) : c10::ArrayRef<Run>(all), c, f);
}

}  // namespace

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
      const auto moments = [&](int64_t c, int64_t before, const Tile& valid, const Lines<const T>& x) {
        if (before == 0) {
          kernel.moments(valid, x, mean + at + c, m2 + at + c);
          return;
        }
        const Scratch<double> more_mean(valid.channels), more_m2(valid.channels);
        kernel.moments(valid, x, more_mean + 0, more_m2 + 0);
        const MomentsMerge merge(double(before * valid.width), double(valid.positions * valid.width));
        for (int64_t i = 0; i < valid.channels; ++i) {
          merge(mean[at + c + i], m2[at + c + i], more_mean[i], more_m2[i]);
        }
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
            const Lines<const T> own = x.lines(g, k, c);
            for (int64_t i = 0; i < g.group_size(); ++i) {
              for_valid_of(g, mask, k, i, [&](int64_t line, int64_t j) { f(double(own[line][j])); });
            }
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
        const auto sums = [&](int64_t c, int64_t before, const Tile& valid, const Lines<const T>& dz,
                              const Lines<const T>& x) {
          if (before == 0) {
            kernel.grad_sums(valid, dz, x, center + row + c, sum_dy + at + c, sum_dy_x + at + c);
            return;
          }
          const Scratch<double> more_dy(valid.channels), more_dy_x(valid.channels);
          kernel.grad_sums(valid, dz, x, center + row + c, more_dy + 0, more_dy_x + 0);
          for (int64_t i = 0; i < valid.channels; ++i) {
            sum_dy[at + c + i] += more_dy[i];
            sum_dy_x[at + c + i] += more_dy_x[i];
          }
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
        const int64_t at = set * set_segments * C + c;
        for (int64_t i = at, end = i + g.group_size(); i < end; ++i) {
          sum_dy_x[i] = (sum_dy_x[i] - low * sum_dy[i]) * rstd;
        }
        if (!is_extreme_variance<T>(stat_var[group] + eps)) continue;
        for (int64_t i = 0; i < g.group_size(); ++i) {
          ExactGradSums sums{stat_mean[group]};
          for (int64_t k = set * set_segments; k < (set + 1) * set_segments; ++k) {
            const Lines<const T> own_g = gradient.lines(g, k, c), own_x = x.lines(g, k, c);
            for_valid_of(g, mask, k, i,
                         [&](int64_t line, int64_t j) { sums.add(double(own_g[line][j]), double(own_x[line][j])); });
          }
          sum_dy[at + i] = sums.g;
          sum_dy_x[at + i] = sums.g_x * rstd;
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

}  // namespace normops::cpu
