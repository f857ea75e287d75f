// Moments of a whole from those of its parts, wherever they are: SyncBatchNorm has one part for each rank.

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "tensors.h"

namespace normops {
namespace {

// With shares w = count / sum(count): mean = sum(w * mean), var = sum(w * (var + (mean of the part - mean)^2)). A whole
// without elements has mean and variance 0.
Tensors2 merge_moments(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var) {
  TORCH_CHECK(count.dim() == 1 && mean.dim() == 2 && mean.size(0) == count.size(0) && mean.sizes() == var.sizes(),
              "normops: expected count of shape (R) and mean and var of shape (R, C), got ", count.sizes(), ", ",
              mean.sizes(), " and ", var.sizes());
  const at::Tensor counts = count.to(at::kDouble).unsqueeze(1), means = mean.to(at::kDouble);
  const at::Tensor share = counts / counts.sum().clamp_min(1);
  const at::Tensor merged = (share * means).sum(0);
  return {merged, (share * (var.to(at::kDouble) + (means - merged).square())).sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(normops, CompositeExplicitAutograd, m) { m.impl("_merge_moments", merge_moments); }

}  // namespace normops
