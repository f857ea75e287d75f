#pragma once

#include <torch/csrc/python_headers.h>

namespace normops {

// The public operators as functions of Python, ended by an empty one. Each takes all arguments of the operator and its
// extras, by position, and returns NotImplemented for what it does not read: that is left to torch.ops.
extern PyMethodDef python_calls[];

}  // namespace normops
