// What a fused epilogue adds to the engines' kernels: loops over lines that are in the nearest cache, between elements
// and the type of the arithmetic. Compiled once per instruction set.

#include <cmath>

#include "../activation.h"
#include "smooth.h"
#include "tiles.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// A register of numbers as activation.h wants them.
template <typename A>
struct Number {
  using Vec = at::vec::Vectorized<A>;
  Vec v;

  NORMOPS_INLINE friend Number operator+(const Number& a, const Number& b) { return {a.v + b.v}; }
  NORMOPS_INLINE friend Number operator+(const Number& a, double b) { return {a.v + Vec(A(b))}; }
  NORMOPS_INLINE friend Number operator-(const Number& a, double b) { return {a.v - Vec(A(b))}; }
  NORMOPS_INLINE friend Number operator-(double a, const Number& b) { return {Vec(A(a)) - b.v}; }
  NORMOPS_INLINE friend Number operator-(const Number& a) { return {a.v.neg()}; }
  NORMOPS_INLINE friend Number operator*(const Number& a, const Number& b) { return {a.v * b.v}; }
  NORMOPS_INLINE friend Number operator*(const Number& a, double b) { return {a.v * Vec(A(b))}; }

  NORMOPS_INLINE friend Number operator/(const Number& a, const Number& b) { return {a.v / b.v}; }

  NORMOPS_INLINE friend Number exp(const Number& z) {
    if constexpr (std::is_same_v<A, float>)
      return {exponential(z.v)};
    else
      return {z.v.exp()};
  }
  NORMOPS_INLINE friend Number erf(const Number& z) {
    if constexpr (std::is_same_v<A, float>)
      return {error_function(z.v)};
    else
      return {z.v.erf()};
  }
  NORMOPS_INLINE friend Number sigmoid(const Number& z) { return {Vec(A(1)) / (exp(-z) + 1.0).v}; }
  NORMOPS_INLINE friend Number clamp(const Number& z, double least, double most) {
    return {at::vec::clamp(z.v, Vec(A(least)), Vec(A(most)))};
  }
  NORMOPS_INLINE friend Number choose(const Number& z, double limit, double above, double otherwise) {
    return {where_above(z.v, Vec(A(limit)), Vec(A(above)), Vec(A(otherwise)))};
  }
};

// f(line, length) for line after line, or for the whole of lines that follow each other.
template <typename F>
NORMOPS_INLINE void for_lines(bool together, int64_t lines, int64_t length, F f) {
  if (together) {
    length *= lines;
    lines = 1;
  }
  for (int64_t line = 0; line < lines; ++line) f(line, length);
}

// to = formula(activation, numbers of each input), in a type of arithmetic. What is left of a line goes through the
// same loop in a copy: formulas are many and long, and each is compiled once.
template <typename A, int kInputs, typename F>
NORMOPS_INLINE void map_numbers(int kind, const Lines<const A> (&from)[kInputs], Lines<A> to, int64_t lines,
                                int64_t length, F formula) {
  constexpr int64_t kSize = Pack<A>::kSize;
  bool together = to.stride == length;
  for (const Lines<const A>& input : from) together = together && input.stride == length;
  for_lines(together, lines, length, [&](int64_t line, int64_t n) {
    const int64_t left = n % kSize, whole = n - left;
    for (const bool is_rest : {false, true}) {
      if (is_rest && left == 0) continue;
      const A* inputs[kInputs];
      A *output = to[line], copies[kInputs + 1][kSize];
      for (int i = 0; i < kInputs; ++i) inputs[i] = from[i][line];
      if (is_rest) {
        for (int i = 0; i < kInputs; ++i) {
          std::fill(std::copy_n(inputs[i] + whole, left, copies[i]), copies[i] + kSize, A(0));
          inputs[i] = copies[i];
        }
        output = copies[kInputs];
      }
      with_activation(kind, [&](auto activation) {
        for (int64_t j = 0; j < (is_rest ? kSize : whole); j += kSize) {
          Number<A> numbers[kInputs];
          for (int i = 0; i < kInputs; ++i) numbers[i].v = Number<A>::Vec::loadu(inputs[i] + j);
          formula(activation, numbers).v.store(output + j);
        }
      });
      if (is_rest) std::copy_n(output, left, to[line] + whole);
    }
  });
}

template <typename A>
NORMOPS_KERNEL activate(const Activation& activation, Lines<A> z, int64_t lines, int64_t length) {
  const double slope = activation.negative_slope;
  map_numbers<A, 1>(activation.kind, {{z.data, z.stride}}, z, lines, length,
                    [&](auto f, const Number<A>* z) { return f.value(z[0], slope); });
}

// dz = dy * derivative(z)
template <typename A>
NORMOPS_KERNEL differentiate(const Activation& activation, Lines<const A> z, Lines<const A> dy, Lines<A> dz,
                             int64_t lines, int64_t length) {
  const double slope = activation.negative_slope;
  map_numbers<A, 2>(activation.kind, {z, dy}, dz, lines, length,
                    [&](auto f, const Number<A>* v) { return v[1] * f.derivative(v[0], slope); });
}

// Of 16-bit types.
template <typename T>
NORMOPS_KERNEL widen_lines(Lines<const T> source, Lines<Acc<T>> target, int64_t lines, int64_t length) {
  for_lines(source.stride == length && target.stride == length, lines, length, [&](int64_t line, int64_t n) {
    sweep<T>(n, [&](int64_t j, auto lanes, auto) {
      store_natural<T>(Pack<T>::load(source[line] + j, lanes), target[line] + j, lanes);
    });
  });
}

template <typename T>
NORMOPS_KERNEL narrow_lines(Lines<const Acc<T>> source, Lines<T> target, int64_t lines, int64_t length) {
  for_lines(source.stride == length && target.stride == length, lines, length, [&](int64_t line, int64_t n) {
    sweep<T>(n, [&](int64_t j, auto lanes, auto) {
      load_natural<T>(source[line] + j, lanes).store(target[line] + j, lanes);
    });
  });
}

// target = target + source
template <typename T>
NORMOPS_KERNEL add_lines(Lines<const T> source, Lines<Acc<T>> target, int64_t lines, int64_t length) {
  for_lines(source.stride == length && target.stride == length, lines, length, [&](int64_t line, int64_t n) {
    Acc<T>* const to = target[line];
    sweep<T>(n, [&](int64_t j, auto lanes, auto) {
      store_natural<T>(load_natural<T>(to + j, lanes) + Pack<T>::load(source[line] + j, lanes), to + j, lanes);
    });
  });
}

// What activations::LinearPieces says, in registers.
template <typename T>
struct Pieces {
  using A = Acc<T>;
  using Vec = typename Pack<T>::Vec;
  Vec slope, lower, upper, last;

  NORMOPS_INLINE explicit Pieces(const activations::LinearPieces& p)
      : slope(A(p.slope)),
        lower(A(p.lower)),
        upper(A(p.upper)),
        last(std::isinf(p.upper) ? A(p.upper) : std::nextafter(A(p.upper), A(0))) {}

  NORMOPS_INLINE Pack<T> value(Pack<T> z) const {
    for (Vec& part : z.part) {
      part = at::vec::clamp(part, lower, upper);
      part = where_above(part, Vec(A(0)), part, part * slope);
    }
    return z;
  }
  NORMOPS_INLINE Pack<T> gate(Pack<T> dy, const Pack<T>& z) const {
    for (int i = 0; i < Pack<T>::kParts; ++i) {
      const Vec sloped = where_above(z.part[i], Vec(A(0)), dy.part[i], dy.part[i] * slope);
      dy.part[i] = where_at_most(z.part[i], last, sloped, Vec(A(0)));
    }
    return dy;
  }
};

// z = (x - center) * scale + shift + residual
template <typename T>
NORMOPS_KERNEL pre_activation(const Tile& tile, Lines<const T> x, Lines<const T> residual, Lines<Acc<T>> z,
                              const ForwardCoefficients<Acc<T>>& k) {
  if (residual.data) {
    map<T, 2, 3>(tile, {x, residual}, z, {k.center, k.scale, k.shift},
                 [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0] - k[0], k[1], k[2]) + v[1]; });
  } else {
    map<T, 1, 3>(tile, {x}, z, {k.center, k.scale, k.shift},
                 [](const Pack<T>* v, const Pack<T>* k) { return fmadd(v[0] - k[0], k[1], k[2]); });
  }
}

template <typename T>
NORMOPS_KERNEL apply_linear(const Tile& tile, Lines<const T> x, Lines<const T> residual, Lines<T> y,
                            const ForwardCoefficients<Acc<T>>& k, const activations::LinearPieces& linear) {
  const Pieces<T> pieces(linear);
  if (residual.data) {
    map<T, 2, 3>(tile, {x, residual}, y, {k.center, k.scale, k.shift}, [&](const Pack<T>* v, const Pack<T>* k) {
      return pieces.value(fmadd(v[0] - k[0], k[1], k[2]) + v[1]);
    });
  } else {
    map<T, 1, 3>(tile, {x}, y, {k.center, k.scale, k.shift},
                 [&](const Pack<T>* v, const Pack<T>* k) { return pieces.value(fmadd(v[0] - k[0], k[1], k[2])); });
  }
}

template <typename T>
NORMOPS_KERNEL gate(const Tile& tile, Lines<const T> dy, Lines<const T> x, Lines<T> dz,
                    const ForwardCoefficients<Acc<T>>& k, const activations::LinearPieces& linear) {
  const Pieces<T> pieces(linear);
  map<T, 2, 3>(tile, {dy, x}, dz, {k.center, k.scale, k.shift},
               [&](const Pack<T>* v, const Pack<T>* k) { return pieces.gate(v[0], fmadd(v[1] - k[0], k[1], k[2])); });
}

template <typename T>
NORMOPS_KERNEL gate_by_output(Lines<const T> dy, Lines<const T> y, Lines<T> dz, int64_t lines, int64_t length,
                              const activations::LinearPieces& linear) {
  const Pieces<T> pieces(linear);
  for_lines(
      dy.stride == length && y.stride == length && dz.stride == length, lines, length, [&](int64_t line, int64_t n) {
        sweep<T, 2>(n, [&](int64_t j, auto lanes, auto) {
          pieces.gate(Pack<T>::load(dy[line] + j, lanes), Pack<T>::load(y[line] + j, lanes)).store(dz[line] + j, lanes);
        });
      });
}

// sum = a + b
template <typename T>
NORMOPS_KERNEL sum_lines(Lines<const T> a, Lines<const T> b, Lines<T> sum, int64_t lines, int64_t length) {
  const bool together = a.stride == length && b.stride == length && sum.stride == length;
  for_lines(together, lines, length, [&](int64_t line, int64_t n) {
    sweep<T, 2>(n, [&](int64_t j, auto lanes, auto) {
      (Pack<T>::load(a[line] + j, lanes) + Pack<T>::load(b[line] + j, lanes)).store(sum[line] + j, lanes);
    });
  });
}

template <typename T>
void fill_epilogue(Kernels<T>& kernels) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    kernels.activate = activate<T>;
    kernels.differentiate = differentiate<T>;
  } else {
    kernels.widen_lines = widen_lines<T>;
    kernels.narrow_lines = narrow_lines<T>;
  }
  kernels.add_lines = add_lines<T>;
  kernels.pre_activation = pre_activation<T>;
  kernels.apply_linear = apply_linear<T>;
  kernels.gate = gate<T>;
  kernels.gate_by_output = gate_by_output<T>;
  kernels.sum_lines = sum_lines<T>;
}

}  // namespace

void add_epilogue(KernelTable& table) { NORMOPS_FOR_EACH_TYPE(fill_epilogue, table) }

}  // namespace normops::cpu::CPU_CAPABILITY
