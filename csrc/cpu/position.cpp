// LayerNorm and RMSNorm over the channels of inputs whose positions lie side by side.
//
// Some neighbouring positions with all their channels are a tile of the channel engine turned around: what it takes for
// a channel is a position here, and its line is a channel. Its kernels take statistics across the lines of such a tile
// (channels_last), and walk the same memory along the lines (contiguous) for what a channel has for itself: weight,
// bias and their gradients. A tile stays in the second-level cache, so memory is read once.

#include "position.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "../statistics.h"
#include "channel.h"
#include "channel_epilogue.h"
#include "extremes.h"
#include "parallel.h"

namespace normops::cpu {
namespace {

// Sums across lines are float for so many of them.
constexpr int64_t kSummed = 256;
// Of a tile, in the type of the arithmetic; but lines are no shorter than is worth it, and either all of a plane or
// long enough that kernels do not take several for one (kNarrowChannels).
constexpr int64_t kTileBytes = 256 * 1024, kShortest = 2 * kNarrowChannels + 2, kLongest = 2048;

struct Planes {
  int64_t samples, channels, positions;
  int64_t tiles_per_sample;

  Planes(const at::Tensor& input) : samples(input.size(0)), channels(input.size(1)), positions(1) {
    for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);
    const int64_t bytes = at::elementSize(acc_type(input));
    const int64_t most = std::clamp(kTileBytes / std::max<int64_t>(1, channels * bytes), kShortest, kLongest);
    tiles_per_sample = (positions + most - 1) / most;
  }

  int64_t tiles() const { return samples * tiles_per_sample; }
  int64_t elements() const { return samples * channels * positions; }
  int64_t longest() const { return (positions + tiles_per_sample - 1) / std::max<int64_t>(1, tiles_per_sample); }
};

// One tile: which positions of which sample.
struct Part {
  int64_t number, sample, first, width;

  Part(const Planes& planes, int64_t number)
      : number(number),
        sample(number / planes.tiles_per_sample),
        first(number % planes.tiles_per_sample * planes.positions / planes.tiles_per_sample),
        width((number % planes.tiles_per_sample + 1) * planes.positions / planes.tiles_per_sample - first) {}

  Tile across(int64_t lines) const { return {Layout::kChannelsLast, width, lines, 1}; }
  Tile along(int64_t lines) const { return {Layout::kContiguous, lines, width, 1}; }
};

// A tensor as lines of channels.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t sample = 0, channel = 0;

  Lines<T> lines(const Part& part, int64_t c = 0) const {
    if (data == nullptr) return {};
    return {data + part.sample * sample + c * channel + part.first, channel};
  }
};

// Contiguous planes as they are, in any order of samples and channels; others copied.
at::Tensor as_planes(const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(tensor.sizes() == input.sizes() && tensor.scalar_type() == input.scalar_type(),
              "normops: expected a tensor like the input (", input.scalar_type(), ", ", input.sizes(), "), got ",
              tensor.scalar_type(), ", ", tensor.sizes());
  int64_t extent = 1;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != extent) return tensor.contiguous();
    extent *= tensor.size(d);
  }
  // Short lines are taken several for one, so nothing may lie between them.
  return tensor.stride(1) != extent && extent <= kNarrowChannels ? tensor.contiguous() : tensor;
}

template <typename T>
Matrix<T> matrix(const at::Tensor& tensor) {
  using Element = std::remove_const_t<T>;
  if (!tensor.defined()) return {};
  if constexpr (std::is_const_v<T>)
    return {tensor.const_data_ptr<Element>(), tensor.stride(0), tensor.stride(1)};
  else
    return {tensor.mutable_data_ptr<Element>(), tensor.stride(0), tensor.stride(1)};
}

// f(lines, first, count) for some channels of a tile at a time: what is between one loop and the next stays in the
// nearest cache.
template <typename F>
void for_channels(const Planes& planes, const Part& part, const F& f) {
  const int64_t step = std::min(kSummed, std::max(kPieceLines, kPieceElements / std::max<int64_t>(1, part.width)));
  for (int64_t c = 0; c < planes.channels; c += step) f(c, std::min(step, planes.channels - c));
}

// Weight and bias in the type of the arithmetic, the former moved by its offset; null where absent.
template <typename A>
struct ChannelParameters {
  std::unique_ptr<A[]> weight, bias;
  std::unique_ptr<A[]> zero;  // for the coefficients of a line

  ChannelParameters(const at::Tensor& input, const OptionalTensor& given_weight, const OptionalTensor& given_bias,
                    double offset)
      : weight(copy(input, given_weight, offset, "weight")), bias(copy(input, given_bias, 0, "bias")) {
    const int64_t channels = input.size(1);
    zero.reset(new A[channels]());
    if (bias && !weight) {
      weight.reset(new A[channels]);
      std::fill_n(weight.get(), channels, A(1));
    }
  }

  // Lines times weight plus bias, where they lie.
  void apply(const Kernels<A>& kernel, const Tile& along, const Lines<A>& z, int64_t c) const {
    if (weight)
      kernel.apply(along, read_only(z), z, {zero.get() + c, weight.get() + c, (bias ? bias : zero).get() + c});
  }

 private:
  static std::unique_ptr<A[]> copy(const at::Tensor& input, const OptionalTensor& given, double offset,
                                   const char* name) {
    if (!defined(given)) return nullptr;
    const at::Tensor own = as_parameter(given, input, input.size(1), acc_type(input), name);
    std::unique_ptr<A[]> values(new A[own.numel()]);
    const A* const data = own.const_data_ptr<A>();
    for (int64_t c = 0; c < own.numel(); ++c) values[c] = A(double(data[c]) + offset);
    return values;
  }
};

// Statistics of the positions of a tile, and what kernels make xhat with.
template <typename A>
struct Positions {
  std::unique_ptr<double[]> mean, second, part_mean, part_second;
  std::unique_ptr<A[]> center, scale, shift;

  explicit Positions(int64_t width)
      : mean(new double[width]),
        second(new double[width]),
        part_mean(new double[width]),
        part_second(new double[width]),
        center(new A[width]),
        scale(new A[width]),
        shift(new A[width]) {}

  template <typename T>
  void take_moments(const Planes& planes, const Part& part, const Matrix<const T>& x) {
    const Kernels<T>& kernel = kernels().of<T>();
    for (int64_t c = 0; c < planes.channels; c += kSummed) {
      const int64_t lines = std::min(kSummed, planes.channels - c);
      double* const to_mean = c == 0 ? mean.get() : part_mean.get();
      double* const to_second = c == 0 ? second.get() : part_second.get();
      kernel.moments(part.across(lines), x.lines(part, c), to_mean, to_second);
      if (c == 0) continue;
      const MomentsMerge merge{double(c), double(lines)};
      for (int64_t i = 0; i < part.width; ++i) merge(mean[i], second[i], part_mean[i], part_second[i]);
    }
  }

  void set(int64_t i, double mean, double rstd) {
    const SplitMean<A> split(mean);
    center[i] = split.center;
    scale[i] = A(rstd);
    shift[i] = A(-split.low * rstd);
  }

  ForwardCoefficients<A> coefficients() const { return {center.get(), scale.get(), shift.get()}; }
};

// The lines of some channels in the type of the arithmetic: as they lie, or widened into `memory`.
template <typename T>
Lines<const Acc<T>> wide_lines(const Lines<const T>& x, Acc<T>* memory, int64_t lines, int64_t width) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return x;
  } else {
    kernels().of<T>().widen_lines(x, {memory, width}, lines, width);
    return {memory, width};
  }
}

// The same, always into `to`.
template <typename T>
void take_lines(const Lines<const T>& x, const Lines<Acc<T>>& to, int64_t lines, int64_t width) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    for (int64_t line = 0; line < lines; ++line) std::copy_n(x[line], width, to[line]);
  } else {
    kernels().of<T>().widen_lines(x, to, lines, width);
  }
}

template <typename A>
std::unique_ptr<A[]> memory_of(int64_t elements) {
  return std::unique_ptr<A[]>(new A[elements]);
}

int64_t piece_elements(const Planes& planes) { return std::max(kPieceElements, kPieceLines * planes.longest()); }

// z = norm(x) + residual for some channels: what comes before the activation.
template <typename T>
void before_activation(const Part& part, const Positions<Acc<T>>& positions,
                       const ChannelParameters<Acc<T>>& parameters, const Lines<const Acc<T>>& x,
                       const Lines<const T>& residual, const Lines<Acc<T>>& z, int64_t c, int64_t lines) {
  const Kernels<Acc<T>>& wide = kernels().of<Acc<T>>();
  wide.apply(part.across(lines), x, z, positions.coefficients());
  parameters.apply(wide, part.along(lines), z, c);
  if (residual.data) kernels().of<T>().add_lines(residual, z, lines, part.width);
}

template <typename T>
void forward(const Planes& planes, Matrix<const T> x, Matrix<T> y, Matrix<const T> residual,
             const ChannelParameters<Acc<T>>& parameters, double eps, bool centered, const Activation& activation,
             double* mean, double* rstd) {
  using A = Acc<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const Kernels<A>& wide = kernels().of<A>();
  parallel(planes.tiles(), planes.channels * planes.longest(), [&](int64_t begin, int64_t end) {
    Positions<A> positions(planes.longest());
    const auto memory = kWide ? nullptr : memory_of<A>(piece_elements(planes));
    for (int64_t number = begin; number < end; ++number) {
      const Part part(planes, number);
      const int64_t at = part.sample * planes.positions + part.first;
      positions.take_moments(planes, part, x);
      for (int64_t i = 0; i < part.width; ++i) {
        double own = positions.mean[i], var = positions.second[i] / planes.channels;
        if (!centered) var += own * own;
        if (is_extreme_variance<T>(var + eps)) [[unlikely]] {
          const Lines<const T> lines = x.lines(part);
          const auto each = [&](const auto& f) {
            for (int64_t c = 0; c < planes.channels; ++c) f(double(lines[c][i]));
          };
          exact_moments(each, double(planes.channels), centered, own, var);
        }
        mean[at + i] = centered ? own : 0;
        rstd[at + i] = 1 / std::sqrt(var + eps);
        positions.set(i, mean[at + i], rstd[at + i]);
      }
      for_channels(planes, part, [&](int64_t c, int64_t lines) {
        Lines<A> z{};
        if constexpr (kWide)
          z = y.lines(part, c);
        else
          z = {memory.get(), part.width};
        before_activation<T>(part, positions, parameters, wide_lines(x.lines(part, c), memory.get(), lines, part.width),
                             residual.lines(part, c), z, c, lines);
        if (activation) wide.activate(activation, z, lines, part.width);
        if constexpr (!kWide) kernels().of<T>().narrow_lines(read_only(z), y.lines(part, c), lines, part.width);
      });
    }
  });
}

// dx = scale * g + slope * (x - center) + shift of a position whose coefficients leave the range of float.
struct ExtremePosition {
  int64_t position;
  double scale, slope, center, shift;

  template <typename A, typename T>
  void store(const Lines<const A>& g, const Lines<const A>& x, const Lines<T>& dx, int64_t lines) const {
    for (int64_t c = 0; c < lines; ++c) {
      const double deviation = double(x[c][position]) - center;
      dx[c][position] = T(A(scale * double(g[c][position]) + slope * deviation + shift));
    }
  }
};

// What the derivative of an activation is taken from, and where the gradient before it goes.
template <typename T>
struct PositionEpilogue {
  Activation activation{};
  Matrix<const T> residual{}, output{};
  Matrix<T> dz{};
};

template <typename T>
void backward(const Planes& planes, Matrix<const T> dy, Matrix<const T> x, Matrix<T> dx,
              const ChannelParameters<Acc<T>>& parameters, const double* mean, const double* rstd, bool centered,
              const PositionEpilogue<T>& epilogue, double* dweight, double* dbias) {
  using A = Acc<T>;
  constexpr bool kWide = std::is_same_v<T, A>;
  const Kernels<T>& kernel = kernels().of<T>();
  const Kernels<A>& wide = kernels().of<A>();
  const int64_t C = planes.channels, width = planes.longest();
  const bool sums = dweight || dbias;
  const Scratch<double> totals(sums ? planes.tiles() * 2 * C : 0);  // of each tile: dbias, dweight
  const Matrix<const T> gradient =
      epilogue.activation ? Matrix<const T>{epilogue.dz.data, epilogue.dz.sample, epilogue.dz.channel} : dy;
  parallel(planes.tiles(), C * width, [&](int64_t begin, int64_t end) {
    Positions<A> positions(width);
    const Scratch<double> sum_g(width), sum_g_x(width), part_g(width), part_g_x(width);
    const Scratch<A> slope(width), shift(width);
    std::vector<ExtremePosition> extremes;
    // The tile in the type of the arithmetic, g = dy * weight above all, and some of its channels.
    const bool weighted = parameters.weight != nullptr;
    const auto all_x = kWide ? nullptr : memory_of<A>(C * width), all_g = memory_of<A>(C * width);
    const auto piece = memory_of<A>(piece_elements(planes)), piece_dy = memory_of<A>(piece_elements(planes));
    for (int64_t number = begin; number < end; ++number) {
      const Part part(planes, number);
      const int64_t at = part.sample * planes.positions + part.first;
      for (int64_t i = 0; i < part.width; ++i) positions.set(i, mean[at + i], rstd[at + i]);
      std::fill_n(sum_g + 0, part.width, 0.0);
      std::fill_n(sum_g_x + 0, part.width, 0.0);
      const auto g_lines = [&](int64_t c) { return Lines<A>{all_g.get() + c * part.width, part.width}; };
      const auto x_lines = [&](int64_t c) -> Lines<const A> {
        if constexpr (kWide)
          return x.lines(part, c);
        else
          return {all_x.get() + c * part.width, part.width};
      };
      for_channels(planes, part, [&](int64_t c, int64_t lines) {
        const Lines<A> scratch{piece.get(), part.width};
        if constexpr (!kWide) {
          kernel.widen_lines(x.lines(part, c), {all_x.get() + c * part.width, part.width}, lines, part.width);
        }
        if (epilogue.activation) {
          const Lines<A> z{piece_dy.get(), part.width};
          if (epilogue.output.data) {
            take_lines<T>(epilogue.output.lines(part, c), z, lines, part.width);
          } else {
            before_activation<T>(part, positions, parameters, x_lines(c), epilogue.residual.lines(part, c), z, c,
                                 lines);
          }
          const Lines<const A> dy_lines = wide_lines(dy.lines(part, c), piece.get(), lines, part.width);
          wide.differentiate(epilogue.activation, read_only(z), dy_lines, z, lines, part.width);
          if constexpr (kWide)
            take_lines<T>(read_only(z), epilogue.dz.lines(part, c), lines, part.width);
          else
            kernel.narrow_lines(read_only(z), epilogue.dz.lines(part, c), lines, part.width);
        }
        Lines<const A> dz = wide_lines(gradient.lines(part, c), piece_dy.get(), lines, part.width);
        if (sums) {
          wide.apply(part.across(lines), x_lines(c), scratch, positions.coefficients());
          double* const own = totals + part.number * 2 * C;
          wide.grad_sums(part.along(lines), dz, read_only(scratch), parameters.zero.get(), own + c, own + C + c);
        }
        if (dx.data == nullptr) return;
        const Lines<A> g = g_lines(c);
        if (weighted)
          wide.scale(part.along(lines), dz, g, parameters.weight.get() + c);
        else
          take_lines<T>(gradient.lines(part, c), g, lines, part.width);
        wide.grad_sums(part.across(lines), read_only(g), x_lines(c), positions.center.get(), part_g + 0, part_g_x + 0);
        for (int64_t i = 0; i < part.width; ++i) {
          sum_g[i] += part_g[i];
          sum_g_x[i] += part_g_x[i];
        }
      });
      if (dx.data == nullptr) continue;
      extremes.clear();
      for (int64_t i = 0; i < part.width; ++i) {
        const bool extreme = is_extreme<T>(rstd[at + i]) && std::isfinite(rstd[at + i]);
        const double low = SplitMean<A>(mean[at + i]).low;
        double sum_g_xhat = (sum_g_x[i] - low * sum_g[i]) * rstd[at + i];
        if (extreme) [[unlikely]] {
          ExactGradSums exact{mean[at + i]};
          for (int64_t c = 0; c < C; ++c) exact.add(double(g_lines(c)[0][i]), double(x_lines(c)[0][i]));
          sum_g[i] = exact.g;
          sum_g_xhat = exact.g_x * rstd[at + i];
        }
        const InputGradient to_x(rstd[at + i], low, sum_g[i] / C, sum_g_xhat / C, centered);
        slope[i] = A(to_x.slope);
        shift[i] = A(to_x.shift);
        if (extreme) extremes.push_back({i, rstd[at + i], to_x.slope, positions.center[i], to_x.shift});
      }
      const BackwardCoefficients<A> k{positions.center.get(), positions.scale.get(), slope + 0, shift + 0};
      for_channels(planes, part, [&](int64_t c, int64_t lines) {
        const Lines<const A> g = read_only(g_lines(c));
        if constexpr (kWide) {
          wide.grad_apply(part.across(lines), g, x_lines(c), dx.lines(part, c), k);
        } else {
          const Lines<A> result{piece.get(), part.width};
          wide.grad_apply(part.across(lines), g, x_lines(c), result, k);
          kernel.narrow_lines(read_only(result), dx.lines(part, c), lines, part.width);
        }
        for (const ExtremePosition& own : extremes) own.store(g, x_lines(c), dx.lines(part, c), lines);
      });
    }
  });
  const auto sum_tiles = [&](double* total, int64_t first) {
    if (total == nullptr) return;
    std::fill_n(total, C, 0.0);
    for (int64_t tile = 0; tile < planes.tiles(); ++tile) {
      for (int64_t c = 0; c < C; ++c) total[c] += totals[tile * 2 * C + first + c];
    }
  };
  sum_tiles(dbias, 0);
  sum_tiles(dweight, C);
}

at::DimVector statistics_shape(const at::Tensor& input) {
  at::DimVector shape(input.sizes());
  shape[1] = 1;
  return shape;
}

void check_is_planes(const at::Tensor& input) {
  TORCH_CHECK(input.dim() >= 2, "normops: expected input with at least 2 dimensions, got ", input.dim());
}

at::Tensor in_type(const double* sums, int64_t count, at::ScalarType type) {
  const at::Tensor result = new_array({count});
  std::copy_n(sums, count, result.mutable_data_ptr<double>());
  return result.to(type);
}

}  // namespace

Tensors3 position_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                       bool centered, const Extras& extras) {
  check_is_planes(input);
  const Planes planes(input);
  const at::Tensor x = as_planes(input, input);
  const at::Tensor added = defined(extras.residual) ? as_planes(*extras.residual, input) : at::Tensor();
  const at::Tensor output = new_output(input);
  const at::Tensor mean = new_array(statistics_shape(input)), rstd = new_array(statistics_shape(input));
  if (planes.elements() == 0) {
    mean.zero_();
    rstd.fill_(1 / std::sqrt(eps));
    return {output, mean, rstd};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm", [&] {
    const ChannelParameters<Acc<scalar_t>> parameters(input, weight, bias, extras.weight_offset);
    forward<scalar_t>(planes, matrix<const scalar_t>(x), matrix<scalar_t>(output), matrix<const scalar_t>(added),
                      parameters, eps, centered, extras.activation, mean.mutable_data_ptr<double>(),
                      rstd.mutable_data_ptr<double>());
  });
  return {output, mean, rstd};
}

Tensors4 position_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
                                const at::Tensor& rstd, const OptionalTensor& weight, double eps, bool centered,
                                Mask4 output_mask, const BackwardExtras& extras) {
  check_is_planes(input);
  const Planes planes(input);
  const auto planes_of = [&](const OptionalTensor& tensor) {
    return defined(tensor) ? as_planes(*tensor, input) : at::Tensor();
  };
  const at::Tensor x = as_planes(input, input), dy = as_planes(grad_output, input);
  at::Tensor dx, dresidual, added, y, unwanted;
  if (output_mask[0]) dx = place_of_gradient(extras.in_place, grad_output, input);
  if (output_mask[3]) dresidual = new_output(input);
  if (extras.activation) {
    added = planes_of(extras.residual);
    y = planes_of(extras.output);
    if (!output_mask[0] && !output_mask[3]) unwanted = new_output(input);
  } else if (output_mask[3]) {
    dresidual.copy_(grad_output);
  }
  const int64_t statistics = planes.samples * planes.positions;
  const at::Tensor means = as_parameter(mean, input, statistics, at::kDouble, "mean");
  const at::Tensor rstds = as_parameter(rstd, input, statistics, at::kDouble, "rstd");
  const Scratch<double> sums(2 * planes.channels);
  std::fill_n(sums + 0, 2 * planes.channels, 0.0);
  double* const dweight = output_mask[1] ? sums + 0 : nullptr;
  double* const dbias = output_mask[2] ? sums + planes.channels : nullptr;
  if (planes.elements() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "normops::_row_norm_backward", [&] {
      using A = Acc<scalar_t>;
      const OptionalTensor none;
      const ChannelParameters<A> parameters(input, weight, extras.activation ? extras.bias : none,
                                            extras.weight_offset);
      PositionEpilogue<scalar_t> epilogue{extras.activation, matrix<const scalar_t>(added), matrix<const scalar_t>(y)};
      if (extras.activation) {
        epilogue.dz = matrix<scalar_t>(output_mask[3] ? dresidual : output_mask[0] ? dx : unwanted);
      }
      backward<scalar_t>(planes, matrix<const scalar_t>(dy), matrix<const scalar_t>(x), matrix<scalar_t>(dx),
                         parameters, means.const_data_ptr<double>(), rstds.const_data_ptr<double>(), centered, epilogue,
                         dweight, dbias);
    });
    if (dx.defined() && defined(extras.grad_sum)) dx.add_(*extras.grad_sum);
  }
  const auto parameter = [&](const double* total) {
    return total ? in_type(total, planes.channels, acc_type(input)) : at::Tensor();
  };
  return {dx, parameter(dweight), parameter(dbias), dresidual};
}

}  // namespace normops::cpu
