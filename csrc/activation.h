#pragma once

// Activations: their names, values and derivatives, once for all engines and devices. A formula is a template over
// numbers: registers of the CPU (cpu/epilogue.cpp) and at::Tensor (autograd/composition.cpp) so far. Beside
// arithmetic with each other and with double, numbers have
//
//   exp(z), erf(z), sigmoid(z), clamp(z, least, most)
//   choose(z, limit, above, otherwise)    the number `above` where z > limit, the number `otherwise` elsewhere
//
// To add one, write its struct and put it at the end of `Activations`; then a line in normops/_activations.py.

#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "statistics.h"

#define NORMOPS_FORMULA \
  template <typename V> \
  NORMOPS_HOST_DEVICE static __attribute__((always_inline)) V

namespace normops {
namespace activations {

// `kFromOutput`: the derivative at y = value(z) is that at z, so that y can take the place of z.
struct WithInput {
  static constexpr bool kFromOutput = false;
};
struct WithOutput {
  static constexpr bool kFromOutput = true;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Those that are linear in pieces: z above zero and below `upper`, slope * z below zero, constant elsewhere. Engines
// may have kernels for them.
struct LinearPieces {
  double slope;
  double lower;  // zero where the slope is: it may not meet an infinity
  double upper;
};

struct ReLU : WithOutput {
  static constexpr std::string_view kName = "relu";
  static constexpr LinearPieces pieces(double) { return {0, 0, kInfinity}; }
  NORMOPS_FORMULA value(const V& z, double) { return clamp(z, 0, kInfinity); }
  NORMOPS_FORMULA derivative(const V& z, double) { return choose(z, 0, 1, 0); }
};

struct ReLU6 : WithInput {  // 16-bit outputs near 6 are rounded to it
  static constexpr std::string_view kName = "relu6";
  static constexpr LinearPieces pieces(double) { return {0, 0, 6}; }
  NORMOPS_FORMULA value(const V& z, double) { return clamp(z, 0, 6); }
  NORMOPS_FORMULA derivative(const V& z, double) { return choose(z, 0, 1, 0) * choose(-z, -6, 1, 0); }
};

struct LeakyReLU : WithOutput {
  static constexpr std::string_view kName = "leaky_relu";
  static constexpr LinearPieces pieces(double slope) { return {slope, slope == 0 ? 0 : -kInfinity, kInfinity}; }
  NORMOPS_FORMULA value(const V& z, double slope) { return z * choose(z, 0, 1, slope); }
  NORMOPS_FORMULA derivative(const V& z, double slope) { return choose(z, 0, 1, slope); }
};

struct ELU : WithInput {
  static constexpr std::string_view kName = "elu";
  NORMOPS_FORMULA value(const V& z, double) { return clamp(z, 0, kInfinity) + (exp(clamp(z, -kInfinity, 0)) - 1.0); }
  NORMOPS_FORMULA derivative(const V& z, double) { return exp(clamp(z, -kInfinity, 0)); }
};

struct SiLU : WithInput {
  static constexpr std::string_view kName = "silu";
  NORMOPS_FORMULA value(const V& z, double) { return z * sigmoid(z); }
  NORMOPS_FORMULA derivative(const V& z, double) {
    const V s = sigmoid(z);
    return s * (z * (1.0 - s) + 1.0);
  }
};

// z times the normal distribution.
struct GELU : WithInput {
  static constexpr std::string_view kName = "gelu";
  static constexpr double kRootHalf = 0.70710678118654752440, kDensity = 0.39894228040143267794;
  NORMOPS_FORMULA distribution(const V& z) { return (erf(z * kRootHalf) + 1.0) * 0.5; }
  NORMOPS_FORMULA value(const V& z, double) { return z * distribution(z); }
  NORMOPS_FORMULA derivative(const V& z, double) { return distribution(z) + z * exp(z * z * -0.5) * kDensity; }
};

// Its approximation 0.5 * z * (1 + tanh(u)), where (1 + tanh(u)) / 2 = sigmoid(2 * u).
struct GELUTanh : WithInput {
  static constexpr std::string_view kName = "gelu_tanh";
  static constexpr double kSlope = 2 * 0.79788456080286535588, kCubic = 0.044715;
  NORMOPS_FORMULA distribution(const V& z) { return sigmoid(z * (z * z * kCubic + 1.0) * kSlope); }
  NORMOPS_FORMULA value(const V& z, double) { return z * distribution(z); }
  NORMOPS_FORMULA derivative(const V& z, double) {
    const V near = clamp(z, -8, 8);  // beyond, the second term is zero and its factors large
    const V u = near * (near * near * kCubic + 1.0) * kSlope, s = sigmoid(u);
    const V rest = exp(-u) * s;  // 1 - s, of which a difference would lose the digits that its factors make large
    return s + near * s * rest * (near * near * (3 * kCubic) + 1.0) * kSlope;
  }
};

struct Hardswish : WithInput {
  static constexpr std::string_view kName = "hardswish";
  NORMOPS_FORMULA value(const V& z, double) { return z * clamp(z + 3.0, 0, 6) * (1.0 / 6); }
  NORMOPS_FORMULA derivative(const V& z, double) {
    const V within = clamp(z, -3, 3) * (1.0 / 3) - 0.5;
    return choose(z, -3, 1, 0) * (choose(-z, -3, 1, 0) * within + 1.0);
  }
};

// z * tanh(softplus(z)), where tanh(log(1 + e)) = n / (n + 2) with n = e * (e + 2); it is one long before e overflows.
struct Mish : WithInput {
  static constexpr std::string_view kName = "mish";
  NORMOPS_FORMULA factor(const V& z) {
    const V e = exp(clamp(z, -kInfinity, 20)), n = e * (e + 2.0);
    return n / (n + 2.0);
  }
  NORMOPS_FORMULA value(const V& z, double) { return z * factor(z); }
  NORMOPS_FORMULA derivative(const V& z, double) {
    const V t = factor(z);
    return t + z * sigmoid(z) * (1.0 - t * t);
  }
};

}  // namespace activations

using Activations =
    std::tuple<activations::ReLU, activations::ReLU6, activations::LeakyReLU, activations::ELU, activations::SiLU,
               activations::GELU, activations::GELUTanh, activations::Hardswish, activations::Mish>;

// What happens to a normalized value before it is stored.
struct Activation {
  int kind = 0;  // none, or one more than the place in `Activations`
  double negative_slope = 0.01;

  explicit operator bool() const { return kind != 0; }
};

// f(activation) with the struct that `kind` stands for.
template <typename F>
__attribute__((always_inline)) inline void with_activation(int kind, const F& f) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    ((kind == int(I) + 1 ? f(std::tuple_element_t<I, Activations>{}) : void()), ...);
  }(std::make_index_sequence<std::tuple_size_v<Activations>>{});
}

// Whether the backward can do with the output in place of what came before the activation.
inline bool derivative_from_output(const Activation& activation) {
  bool possible = !activation;
  with_activation(activation.kind,
                  [&](auto f) { possible = decltype(f)::kFromOutput && activation.negative_slope >= 0; });
  return possible;
}

// Of an activation that is linear in pieces, as none is.
inline std::optional<activations::LinearPieces> linear_pieces(const Activation& activation) {
  std::optional<activations::LinearPieces> pieces;
  if (!activation) pieces = {1, -activations::kInfinity, activations::kInfinity};
  with_activation(activation.kind, [&](auto f) {
    if constexpr (requires { f.pieces(0.0); }) pieces = f.pieces(activation.negative_slope);
  });
  return pieces;
}

// Zero if there is none of this name.
inline int activation_kind(std::string_view name) {
  int found = 0;
  for (int kind = 1; kind <= int(std::tuple_size_v<Activations>); ++kind) {
    with_activation(kind, [&](auto f) { found = decltype(f)::kName == name ? kind : found; });
  }
  return found;
}

inline std::optional<std::string_view> activation_name(int kind) {
  std::optional<std::string_view> name;
  with_activation(kind, [&](auto f) { name = decltype(f)::kName; });
  return name;
}

// 'relu', 'relu6', ...
inline std::string known_activations() {
  std::string names;
  for (int kind = 1; kind <= int(std::tuple_size_v<Activations>); ++kind) {
    names += (kind > 1 ? ", '" : "'") + std::string(*activation_name(kind)) + "'";
  }
  return names;
}

}  // namespace normops

#undef NORMOPS_FORMULA
