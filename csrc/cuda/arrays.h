#pragma once

// Parameters and their gradients are few, so they are read and written in their own dtype, which is looked up, and no
// kernel is compiled for each.

#include <cstdint>

#include "../statistics.h"

namespace normops::cuda {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

// A small array of any floating dtype; where it is absent, a constant.
struct AnyArray {
  const void* data;
  ElementType type;
  double absent;
};

struct AnyOutput {
  void* data;  // null: not wanted
  ElementType type;

  NORMOPS_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

}  // namespace normops::cuda
