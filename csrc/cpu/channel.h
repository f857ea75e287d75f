#pragma once

// The channel engine of the CPU, as the operators call it: the layers (channel_operators.cpp), and the stages of
// one of them (stages.cpp).

#include <ATen/EmptyTensor.h>

#include <memory>

#include "../activation.h"
#include "../tensors.h"
#include "kernels.h"
#include "mask.h"
#include "memory.h"

namespace normops::cpu {

template <typename T>
struct Operand {
  T* data;
  Strides strides;

  Lines<T> lines(const Geometry& g, int64_t segment, int64_t channel) const {
    if (data == nullptr) return {};
    return {data + g.sample_of(segment) * strides.sample + g.segment_begin(segment) * strides.position +
                channel * strides.channel,
            g.layout == Layout::kContiguous ? strides.channel : strides.position};
  }

  // Asks for the beginning of a segment: the processor sees a run of memory coming only once it is under way.
  void prefetch(const Geometry& g, int64_t segment, int64_t channel) const {
    constexpr int64_t kLines = 8, kLineElements = 64 / sizeof(T);
    const T* const begin = lines(g, segment, channel).data;
    for (int64_t i = 0; i < kLines; ++i) __builtin_prefetch(begin + i * kLineElements);
  }
};

template <typename A>
struct Scratch {
  explicit Scratch(int64_t size) : data(new A[size]) {}
  A* operator+(int64_t offset) const { return data.get() + offset; }
  A& operator[](int64_t i) const { return data[i]; }
  std::unique_ptr<A[]> data;
};

// A weight or bias, of the input's type or of the arithmetic's, or what an absent one stands for. `apart`: from one
// sample's to the next, where each has its own, and zero otherwise; said of an absent one as well.
template <typename T>
struct Parameter {
  const T* own = nullptr;
  const Acc<T>* data = nullptr;
  double absent;
  int64_t apart;

  Parameter(const at::Tensor& tensor, double absent, int64_t apart = 0) : absent(absent), apart(apart) {
    if (!tensor.defined()) return;
    if (tensor.scalar_type() == c10::CppTypeToScalarType<T>::value)
      own = tensor.const_data_ptr<T>();
    else
      data = tensor.const_data_ptr<Acc<T>>();
  }
  Parameter of_set(int64_t set) const {
    Parameter result = *this;
    if (own) result.own += set * apart;
    if (data) result.data += set * apart;
    return result;
  }
  double operator[](int64_t channel) const { return own ? Acc<T>(own[channel]) : data ? data[channel] : absent; }
};

// Coefficients come in sets of one for each channel: one set for each row of statistics, or, where they have parameters
// of their own, for each sample.
struct CoefficientRows {
  int64_t per_row, count;

  template <typename T>
  CoefficientRows(const Geometry& g, const Parameter<T>& weight)
      : per_row(weight.apart ? g.samples_per_row() : 1),
        count(g.rows() * per_row),
        samples_per_set_(g.samples / count) {}

  int64_t first(int64_t row) const { return row * per_row; }
  int64_t row_of(int64_t set) const { return set / per_row; }
  int64_t of(int64_t sample) const { return sample / samples_per_set_; }

 private:
  int64_t samples_per_set_;
};

// Sums of dy and dy * xhat per channel over all of the `count` elements that share a statistic. Null: over this input.
struct GradTotals {
  const double* dy = nullptr;
  const double* dy_xhat = nullptr;
  double count = 0;
};

// What follows a layer in the same pass (channel_epilogue.h). Null data: not there, or not wanted.
template <typename T>
struct Epilogue {
  Activation activation{};
  Operand<const T> residual{};
  // Of the backward, where there is an activation:
  Operand<const T> output{};  // what its derivative is taken from, or else from x, bias and residual
  Parameter<T> bias{at::Tensor(), 0};
  Operand<T>
      dz{};  // where the gradient before it goes: to the residual's, or to dx, of which it is then the first step

  explicit operator bool() const { return activation || residual.data; }
};

// Any of the three stages can be left out: the first where statistics are given, the last where y is null. With a mask,
// statistics are of valid elements, and results are zero elsewhere. Where each sample has parameters of its own, so has
// each coefficients, and the gradients of parameters are (samples, channels).
template <typename T>
void channel_forward(const Geometry& g, Operand<const T> x, Operand<T> y, Parameter<T> weight, Parameter<T> bias,
                     double eps, bool given, double* stat_mean, double* stat_var, const Epilogue<T>& epilogue = {},
                     const Mask* mask = nullptr);

// dx = weight * rstd * dy + slope * (x - center) + shift (statistics.h); the last two terms are absent where the
// statistics are constants (evaluation). The first stage is left out where nothing needs sums of this input: they may
// be only a part, and the whole is given as `totals`. The last is left out where dx is null.
// After an epilogue, dy stands for the gradient before it.
template <typename T>
void channel_backward(const Geometry& g, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Parameter<T> weight,
                      const double* stat_mean, const double* stat_var, double eps, bool given, const GradTotals& totals,
                      double* dweight, double* dbias, const Epilogue<T>& epilogue = {}, const Mask* mask = nullptr);

// What a mask, of bools and as many of them as samples have positions, says of an input: undefined if all of it is
// valid, so that nothing is done otherwise than without a mask.
at::Tensor as_flags(const OptionalTensor& mask, const at::Tensor& input);
inline std::optional<Mask> mask_of(const Geometry& g, const at::Tensor& flags) {
  return flags.defined() && g.elements() > 0 ? std::optional<Mask>(std::in_place, g, flags.const_data_ptr<bool>())
                                             : std::nullopt;
}

inline at::Tensor new_like(const at::Tensor& input) { return new_output(input, input.suggest_memory_format()); }

inline at::Tensor new_array(at::IntArrayRef shape, at::ScalarType dtype = at::kDouble) {
  return at::detail::empty_cpu(shape, dtype);
}

}  // namespace normops::cpu
