#pragma once

// Division by what the host knows: a multiplication and a shift, where the device would take a hundred instructions.

#include <cstdint>

#include "../statistics.h"

namespace normops::cuda {

// For numbers below 2^31. Doubled, so that there is a shift for 1 too and nothing to ask.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(uint32_t(divisor)) {
    while (int64_t(1) << bits_ < divisor) ++bits_;
    factor_ = uint32_t((uint64_t(1) << (31 + bits_)) / divisor_ + 1);
  }

  NORMOPS_HOST_DEVICE uint32_t divisor() const { return divisor_; }
  NORMOPS_HOST_DEVICE uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n + n) * factor_ >> 32) >> bits_; }
  // Leaves the remainder in n.
  NORMOPS_HOST_DEVICE uint32_t split(uint32_t& n) const {
    const uint32_t q = quotient(n);
    n -= q * divisor_;
    return q;
  }

 private:
  uint32_t divisor_ = 1, factor_ = 0x80000001u, bits_ = 0;
};

}  // namespace normops::cuda
