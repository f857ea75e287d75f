#pragma once

// exp and erf of registers of floats, for activations: short enough to stay in the loop they are used in, where those
// of a library are calls. Of all floats tried (every 64th), exp was within 1 unit in the last
// place, and erf, in which a GELU needs no more than that, within 0.9e-7. Included only by files compiled once per
// instruction set.

#include "pack.h"

namespace normops::cpu::CPU_CAPABILITY {
namespace {

// c[0] + c[1] * x + c[2] * x^2 + ...
template <size_t kTerms>
NORMOPS_INLINE Floats polynomial(const Floats& x, const float (&c)[kTerms]) {
  Floats sum(c[kTerms - 1]);
  for (int i = int(kTerms) - 2; i >= 0; --i) sum = at::vec::fmadd(sum, x, Floats(c[i]));
  return sum;
}

// e^x = 2^n * e^r with a whole n and |r| <= log(2) / 2. Zero below 2^-126.5, infinite from 2^127.5 on.
NORMOPS_INLINE Floats exponential(const Floats& x) {
  // Adding so large a number leaves n in the last bits of the sum, with 127 added to it: shifted into the place of an
  // exponent these are 2^n. The smallest n gives zero, the largest infinity.
  constexpr float kRound = 3 << 22, kShift = kRound + 127;
  const Floats bounded = at::vec::clamp(x, Floats(-88.0f), Floats(88.8f));
  const Floats shifted = at::vec::fmadd(bounded, Floats(1.44269504088896341f), Floats(kShift));
  const Floats power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23));
  const Floats n = shifted - Floats(kShift);
  // log(2) in two parts: n times the first, of 15 bits, is exact.
  const Floats high = at::vec::fmadd(n, Floats(-0.693145751953125f), bounded);
  const Floats r = at::vec::fmadd(n, Floats(-1.42860682030941723e-6f), high);
  // (e^r - 1 - r) / r^2, to 3e-9 of e^r.
  const Floats rest = polynomial(r, {0.4999999403953552f, 0.1666652113199234f, 0.04166838899254799f,
                                     0.008368738926947117f, 0.0013814562698826194f});
  return (at::vec::fmadd(r * r, rest, r) + Floats(1)) * power;  // above zero times what may be infinite
}

// 1 - e^P(|x|), with the sign of x: the logarithm of 1 - erf is nearly a polynomial. To 2e-9, from 4 on to 2e-8.
NORMOPS_INLINE Floats error_function(const Floats& x) {
  const Floats size = at::vec::clamp_max(x.abs(), Floats(4));
  const Floats logarithm =
      size * polynomial(size, {-1.1283793325045501f, -0.6366161067105951f, -0.10279921249253689f, 0.0192171493109129f,
                               5.877076432429355e-05f, -0.0015767498012770934f, 0.0005879451072979168f,
                               -0.00010602507755790597f, 8.043643227480677e-06f});
  return (Floats(1) - exponential(logarithm)) | (x & Floats(-0.0f));
}

}  // namespace
}  // namespace normops::cpu::CPU_CAPABILITY
