"""The floor of norm layers in a model: the same model, whose norm layers move the memory that they must, no more."""

import copy

import torch
from torch import Tensor, nn


class _Copy(torch.autograd.Function):
    """y is a copy of x. Going back, the gradient of y and x are read and the gradient of x is written in the place of
    that of y, which it equals: other users of that memory, which layers have to spare, see no change."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        return grad_output.add_(ctx.saved_tensors[0], alpha=0.0)


def copying(module: nn.Module, norms: list[str]) -> nn.Module:
    """A copy of the model, with the layers of these names as they are but for what they do."""
    result = copy.deepcopy(module)
    for name in norms:
        result.get_submodule(name).forward = lambda x, *_: _Copy.apply(x)
    return result
