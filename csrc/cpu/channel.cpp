// Channel engine on the CPU: reduce, merge, apply, and what has to be known of each channel in between. How these
// stages are cut into regions and shared among threads is decided in regions.h; the loops over memory are in
// channel_forward.cpp and channel_backward.cpp.

#include "channel.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "../statistics.h"
#include "channel_epilogue.h"
#include "extremes.h"
#include "kernels.h"
#include "regions.h"

namespace normops::cpu {
namespace {

// Loops over channels have pointers of their own: this file is compiled without strict aliasing (-O1, see
// building/library.py), so a captured one would be read anew after each store.

// Joins, in place and in order, the moments of all segments of a row into those of its first.
void merge_segments(const Geometry& g, const Mask* mask, const Region& r, int64_t first, int64_t last, double* mean,
                    double* m2) {
  const auto elements = [&](int64_t segment) {  // of a channel
    return double(mask ? mask->elements(segment) : g.segment_count(segment) * g.width);
  };
  double count = elements(first);
  for (int64_t k = first + 1; k < last; ++k) {
    const double added = elements(k);
    if (added == 0) continue;
    const MomentsMerge merge(count, added);
    count += added;
    double *const to_mean = mean + first * g.channels, *const to_m2 = m2 + first * g.channels;
    const double *const from_mean = mean + k * g.channels, *const from_m2 = m2 + k * g.channels;
    for (int64_t c = r.first_channel, end = r.last_channel; c < end; ++c) {
      merge(to_mean[c], to_m2[c], from_mean[c], from_m2[c]);
    }
  }
}

// f(line, j) for the valid elements of channel c of a group, in lines that begin with the group's first.
template <typename F>
void for_valid_of(const Geometry& g, const Mask* mask, int64_t segment, int64_t c, const F& f) {
  const Tile tile{g.layout, g.group_size(), g.segment_count(segment), g.width};
  const bool* const flags = mask ? mask->segment(segment).flags : nullptr;
  for_elements(tile, c, [&](int64_t line, int64_t j, int64_t element) {
    if (flags == nullptr || flags[element]) f(line, j);
  });
}

// The coefficients of y = (x - center) * scale + shift for the channels of a group: the backward, which may have to
// make anew what an activation was applied to, must find the same bits. A null shift is not needed.
template <typename T>
void output_coefficients(double mean, double rstd, const Parameter<T>& weight, const Parameter<T>& bias, int64_t first,
                         int64_t last, Acc<T>* center, Acc<T>* scale, Acc<T>* shift) {
  using A = Acc<T>;
  const SplitMean<A> split(mean);
  for (int64_t c = first; c < last; ++c) {
    const double factor = rstd * weight[c];
    center[c] = split.center;
    scale[c] = A(factor);
    if (shift) shift[c] = A(bias[c] - split.low * factor);
  }
}

}  // namespace

template <typename T>
void channel_forward(const Geometry& g, Operand<const T> x, Operand<T> y, Parameter<T> weight, Parameter<T> bias,
                     double eps, bool given, double* stat_mean, double* stat_var, const Epilogue<T>& epilogue,
                     const Mask* mask) {
  using A = Acc<T>;
  const int64_t C = g.channels, size = g.group_size(), row_segments = g.segments_per_row();
  const Kernels<T>& kernel = kernels().of<T>();
  const GroupElements group_elements(g, mask);
  const Scratch<double> mean(given ? 0 : g.segments() * C), m2(given ? 0 : g.segments() * C);
  const CoefficientRows sets(g, weight);
  const Scratch<A> center(sets.count * C), scale(sets.count * C), shift(sets.count * C);
  const MaskWords<T> words(g, mask);

  // A group of contiguous channels is one line to the statistics, unless it is very long.
  const bool joined = g.layout == Layout::kContiguous && !g.over_batch && size * g.positions <= g.segment_length &&
                      (!mask || JoinedMask<T>::pays(g));
  const std::optional<JoinedMask<T>> joined_mask =
      joined && mask && !given ? std::optional<JoinedMask<T>>(std::in_place, g, *mask) : std::nullopt;
  const int64_t join = joined ? size : 1, parts = size / join;

  const auto reduce = [&](const Region& r) {
    if (given) return;
    for_tiles(g, r, Order::kForwards, [&](int64_t k, Tile tile) {
      if (k + 1 < r.last_segment) x.prefetch(g, k + 1, r.first_channel);
      tile.channels /= join;
      tile.positions *= join;
      Lines<const T> lines = x.lines(g, k, r.first_channel);
      lines.stride *= join;
      const int64_t at = k * C + r.first_channel / join;
      if (mask && mask->elements(k) == 0) {
        std::fill_n(mean + at, tile.channels, 0.0);
        std::fill_n(m2 + at, tile.channels, 0.0);
        return;
      }
      const Span<T> span = joined_mask ? joined_mask->span(tile, k) : Span<T>(tile, mask, words, k);
      kernel.moments(span.tile, span.of(lines), mean + at, m2 + at);
    });
  };
  const auto merge = [&](const Region& r) {
    if (given) return;
    for (int64_t first = r.first_segment; first < r.last_segment; first += row_segments) {
      merge_segments(g, mask, r, first, first + row_segments, mean.data.get(), m2.data.get());
    }
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const int64_t elements = group_elements.of_row(row);
      if (elements == 0) {
        stat_mean[group] = stat_var[group] = 0;
        return;
      }
      const int64_t at = row * row_segments * C + (joined ? group - row * g.num_groups : c);
      const double count = double(elements) / parts;  // of each part: equal ones need no chain of merges
      const double *const means = mean + at, *const m2s = m2 + at;
      double group_mean = 0, group_m2 = 0;
      for (int64_t i = 0, end = parts; i < end; ++i) group_mean += means[i];
      group_mean /= parts;
      for (int64_t i = 0, end = parts; i < end; ++i) {
        const double distance = means[i] - group_mean;
        group_m2 += m2s[i] + count * distance * distance;
      }
      stat_mean[group] = group_mean;
      stat_var[group] = group_m2 / elements;
      if (is_extreme_variance<T>(stat_var[group] + eps)) [[unlikely]] {
        const auto each = [&](const auto& f) {
          for (int64_t k = row * row_segments; k < (row + 1) * row_segments; ++k) {
            const Lines<const T> own = x.lines(g, k, c);
            for (int64_t i = 0; i < size; ++i) {
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
      const double rstd = 1 / std::sqrt(stat_var[group] + eps);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        output_coefficients(stat_mean[group], rstd, weight.of_set(set), bias.of_set(set), c, c + size, center + set * C,
                            scale + set * C, shift + set * C);
      }
    });
  };
  const auto apply = [&](const Region& r) {
    if (y.data == nullptr) return;
    for_tiles(g, r, Order::kBackwards, [&](int64_t k, const Tile& whole) {
      const int64_t at = sets.of(g.sample_of(k)) * C + r.first_channel;
      const Span<T> span(whole, mask, words, k);
      const Tile& tile = span.tile;
      const Lines<T> y_lines = y.lines(g, k, r.first_channel);
      const Lines<const T> from = span.of(x.lines(g, k, r.first_channel));
      const Lines<T> to = span.of(y_lines);
      const ForwardCoefficients<A> coefficients{center + at, scale + at, shift + at};
      if (tile.positions == 0) {
      } else if (epilogue) {
        apply_epilogue(tile, from, to, coefficients, epilogue.activation,
                       span.of(epilogue.residual.lines(g, k, r.first_channel)));
        span.clear_within(y_lines);
      } else {
        kernel.apply(tile, from, to, coefficients);
      }
      span.clear_around(y_lines);
    });
  };
  run_stages(g, sizeof(T), given, /*prepare=*/nullptr, reduce, merge, coefficients, apply);
}

template <typename T>
void channel_backward(const Geometry& g, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Parameter<T> weight,
                      const double* stat_mean, const double* stat_var, double eps, bool given, const GradTotals& totals,
                      double* dweight, double* dbias, const Epilogue<T>& epilogue, const Mask* mask) {
  using A = Acc<T>;
  const int64_t C = g.channels, size = g.group_size(), row_segments = g.segments_per_row();
  const Kernels<T>& kernel = kernels().of<T>();
  const GroupElements group_elements(g, mask);
  const MaskWords<T> words(g, mask);
  const bool sums_needed = dweight || dbias || !(given || totals.dy);
  const Scratch<double> sum_dy(sums_needed ? g.segments() * C : 0), sum_dy_x(sums_needed ? g.segments() * C : 0);
  const CoefficientRows sets(g, weight);
  const Scratch<A> center(sets.count * C), scale(sets.count * C), slope(sets.count * C), shift(sets.count * C);
  const Scratch<double> rstd(g.rows() * g.num_groups);
  const bool remakes = epilogue && !epilogue.output.data;  // what the activation was applied to
  const Scratch<A> output_shift(remakes ? sets.count * C : 0);
  const bool extreme = std::any_of(stat_var, stat_var + g.rows() * g.num_groups,
                                   [&](double var) { return is_extreme_variance<T>(var + eps); });
  // Those that leave the range of float, in double (extremes.h).
  const Scratch<double> exact(extreme ? 4 * sets.count * C : 0);
  // What goes on from the first stage.
  const Operand<const T> gradient = epilogue ? Operand<const T>{epilogue.dz.data, epilogue.dz.strides} : dy;

  const auto prepare = [&](const Region& r) {
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const double own_rstd = rstd[group] = 1 / std::sqrt(stat_var[group] + eps);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        output_coefficients(stat_mean[group], own_rstd, weight.of_set(set), epilogue.bias.of_set(set), c, c + size,
                            center + set * C, scale + set * C, remakes ? output_shift + set * C : nullptr);
      }
    });
  };
  // Where float has no room for them: they replace those of the kernel, before dx may take the place of dy.
  const auto exact_sums = [&](int64_t k, const Region& r) {
    const int64_t set = sets.of(g.sample_of(k));
    int64_t group = sets.row_of(set) * g.num_groups + r.first_channel / size;
    for (int64_t c = r.first_channel; c < r.last_channel; c += size, ++group) {
      if (!is_extreme_variance<T>(stat_var[group] + eps)) continue;
      const Lines<const T> own_g = gradient.lines(g, k, c), own_x = x.lines(g, k, c);
      for (int64_t i = 0; i < size; ++i) {
        ExactGradSums sums{stat_mean[group]};
        for_valid_of(g, mask, k, i,
                     [&](int64_t line, int64_t j) { sums.add(double(own_g[line][j]), double(own_x[line][j])); });
        sum_dy[k * C + c + i] = sums.g;
        sum_dy_x[k * C + c + i] = sums.g_x;
      }
    }
  };
  const auto reduce = [&](const Region& r) {
    if (!sums_needed && !epilogue.dz.data) return;
    const auto take = [&](int64_t k, const Tile& tile) {
      if (k + 1 < r.last_segment) {
        dy.prefetch(g, k + 1, r.first_channel);
        x.prefetch(g, k + 1, r.first_channel);
      }
      const int64_t at = k * C + r.first_channel;
      const Lines<const T> x_lines = x.lines(g, k, r.first_channel);
      const Span<T> span(tile, mask, words, k);
      const bool nothing = span.tile.positions == 0;
      if (nothing && sums_needed) {
        std::fill_n(sum_dy + at, tile.channels, 0.0);
        std::fill_n(sum_dy_x + at, tile.channels, 0.0);
      }
      const int64_t c = sets.of(g.sample_of(k)) * C + r.first_channel;
      const auto sums_of = [&](const Lines<const T>& dz) {
        if (nothing || !sums_needed) return;
        kernel.grad_sums(span.tile, span.of(dz), span.of(x_lines), center + c, sum_dy + at, sum_dy_x + at);
      };
      if (!epilogue) {
        sums_of(dy.lines(g, k, r.first_channel));
        return;
      }
      const auto of = [&](const auto& operand) { return span.of(operand.lines(g, k, r.first_channel)); };
      const EpilogueGradient<T> before{span.tile,
                                       of(dy),
                                       of(x),
                                       {center + c, scale + c, output_shift + c},
                                       epilogue.activation,
                                       of(epilogue.residual),
                                       of(epilogue.output),
                                       of(epilogue.dz)};
      // Where some of the span is masked, sums are of dz as it was rounded.
      const bool sums = sums_needed && span.tile.valid == nullptr;
      if (!nothing) before.run(sums ? sum_dy + at : nullptr, sums ? sum_dy_x + at : nullptr);
      if (mask == nullptr) return;
      const Lines<T> dz = epilogue.dz.lines(g, k, r.first_channel);
      if (dz.data) {
        span.clear_within(dz);
        span.clear_around(dz);
      }
      if (!sums) sums_of(gradient.lines(g, k, r.first_channel));
    };
    for_tiles(g, r, Order::kForwards, [&](int64_t k, const Tile& tile) {
      take(k, tile);
      if (extreme && sums_needed) [[unlikely]]
        exact_sums(k, r);
    });
  };
  // Leaves in the first segment of each row, or sample: sum dy, and sum dy * (x - mean) * rstd.
  const int64_t set_segments = row_segments / sets.per_row;
  const bool sums_are_totals = g.rows() == 1 && !weight.apart;
  const auto merge = [&](const Region& r) {
    if (!sums_needed) return;
    for (int64_t first = r.first_segment; first < r.last_segment; first += set_segments) {
      double *const to_dy = sum_dy + first * C, *const to_dy_x = sum_dy_x + first * C;
      for (int64_t k = first + 1; k < first + set_segments; ++k) {
        const double *const from_dy = sum_dy + k * C, *const from_dy_x = sum_dy_x + k * C;
        for (int64_t c = r.first_channel, end = r.last_channel; c < end; ++c) {
          to_dy[c] += from_dy[c];
          to_dy_x[c] += from_dy_x[c];
        }
      }
    }
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      if (mask && mask->elements_of_row(row) == 0) return;
      const bool exact = is_extreme_variance<T>(stat_var[group] + eps);
      const double low = SplitMean<A>(stat_mean[group]).low, own_rstd = rstd[group];
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        const int64_t at = set * set_segments * C + c;
        const double* const own_dy = sum_dy + at;
        double* const own_dy_x = sum_dy_x + at;
        for (int64_t i = 0, end = size; i < end; ++i) {
          own_dy_x[i] = (exact ? own_dy_x[i] : own_dy_x[i] - low * own_dy[i]) * own_rstd;
        }
      }
    });
    if (!sums_are_totals) return;
    const auto copy = [&](const Scratch<double>& sums, double* total) {
      if (total) std::copy(sums + r.first_channel, sums + r.last_channel, total + r.first_channel);
    };
    copy(sum_dy_x, dweight);
    copy(sum_dy, dbias);
  };
  const auto coefficients = [&](const Region& r) {
    if (given) return;
    for_groups(g, r, [&](int64_t row, int64_t group, int64_t c) {
      const double own_rstd = rstd[group];
      const double count = totals.dy ? totals.count : double(group_elements.of_row(row));
      double group_dy = 0, group_dy_xhat = 0;
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        const int64_t at = set * set_segments * C;
        const Parameter<T> own_weight = weight.of_set(set);
        const double* const own_dy = totals.dy ? totals.dy : sum_dy + at;
        const double* const own_dy_xhat = totals.dy ? totals.dy_xhat : sum_dy_x + at;
        for (int64_t i = c, end = c + size; i < end; ++i) {
          const double w = own_weight[i];
          group_dy += own_dy[i] * w;
          group_dy_xhat += own_dy_xhat[i] * w;
        }
      }
      const double low = SplitMean<A>(stat_mean[group]).low;
      const InputGradient gradient(own_rstd, low, group_dy / count, group_dy_xhat / count, /*centered=*/true);
      for (int64_t set = sets.first(row); set < sets.first(row + 1); ++set) {
        std::fill_n(slope + (set * C + c), size, A(gradient.slope));
        std::fill_n(shift + (set * C + c), size, A(gradient.shift));
        for (int64_t i = c; extreme && i < c + size; ++i) {
          double* const k = exact + 4 * (set * C + i);
          const bool own = is_extreme_variance<T>(stat_var[group] + eps) && std::isfinite(own_rstd);
          k[0] = own ? own_rstd * weight.of_set(set)[i] : std::nan("");
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
      const Span<T> span(whole, mask, words, k);
      const Lines<T> dx_lines = dx.lines(g, k, r.first_channel);
      const Lines<const T> from = span.of(gradient.lines(g, k, r.first_channel));
      const Lines<T> to = span.of(dx_lines);
      if (span.tile.positions == 0) {
      } else if (given) {
        kernel.scale(span.tile, from, to, scale + at);
      } else if (extreme) {
        const Lines<const T> x_lines = span.of(x.lines(g, k, r.first_channel));
        const ExtremeGradients<T> extremes(span.tile, from, x_lines, exact + 4 * at);
        kernel.grad_apply(span.tile, from, x_lines, to, {center + at, scale + at, slope + at, shift + at});
        extremes.store(to);
        span.clear_within(dx_lines);
      } else {
        kernel.grad_apply(span.tile, from, span.of(x.lines(g, k, r.first_channel)), to,
                          {center + at, scale + at, slope + at, shift + at});
      }
      span.clear_around(dx_lines);
    });
  };
  run_stages(g, 2 * sizeof(T), given || totals.dy, prepare, reduce, merge, coefficients, apply);

  if (sums_are_totals) return;
  const auto sum_rows = [&](const Scratch<double>& sums, double* total) {
    if (total == nullptr) return;
    if (weight.apart) {
      for (int64_t set = 0; set < sets.count; ++set) std::copy_n(sums + set * set_segments * C, C, total + set * C);
      return;
    }
    parallel(C, g.rows(), [&](int64_t begin, int64_t end) {
      double* const to = total;
      std::fill(to + begin, to + end, 0.0);
      for (int64_t row = 0; row < g.rows(); ++row) {
        const double* const own = sums + row * row_segments * C;
        for (int64_t c = begin; c < end; ++c) to[c] += own[c];
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
