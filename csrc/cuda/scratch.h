#pragma once

#include <cstddef>
#include <cstdint>

namespace normops::cuda {

// Hands out pieces of one allocation. Without memory it hands out null pointers and counts the bytes, so that the same
// code says how much is needed.
class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 16;
    T* const piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace normops::cuda
