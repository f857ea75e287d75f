"""The functions with what follows them in the same pass."""

import dataclasses

import pytest
import reference
import torch
from cases import CASES, SHAPE, each_case

ACTIVATIONS = [None, *reference.ACTIVATIONS]
SLOPE = 0.2


def extras(activation):
    """The arguments of an activation that none of the others has."""
    options = {} if activation is None else {"activation": activation}
    return options | ({"negative_slope": SLOPE} if activation == "leaky_relu" else {})


def fused(case, activation, residual, shape=SHAPE, **kwargs):
    """A sample of a case with an activation and, among its parameters, a residual."""
    sample = case.sample(shape, **kwargs)
    sample.fixed |= extras(activation)
    if residual:
        sample.parameters["residual"] = (3 * torch.randn_like(sample.input)).detach().requires_grad_()
    return sample


def laid_out(sample, layout):
    """Input and residual in one of the ways there are to lie in memory."""
    sample = sample.with_input(layout(sample.input.detach()))
    if "residual" in sample.parameters:
        residual = layout(sample.parameters["residual"].detach()).requires_grad_()
        sample = dataclasses.replace(sample, parameters=sample.parameters | {"residual": residual})
    return sample


# Arguments that are refused: what is told of them.
X = torch.randn(SHAPE)
WRONG = {
    "activation": ({"activation": "swish"}, ValueError, ["activation", "'relu', 'relu6'", "got 'swish'"]),
    "activation type": ({"activation": 3}, TypeError, ["activation", "str", "got int"]),
    "slope": ({"negative_slope": 0.2}, ValueError, ["negative_slope only with activation='leaky_relu'", "got 0.2"]),
    "slope of another": ({"activation": "relu", "negative_slope": 0.2}, ValueError, ["negative_slope", "with 'relu'"]),
    "residual shape": ({"residual": X[:1]}, ValueError, ["residual of the shape of input", "[4, 6, 5, 7]", "[1, 6"]),
    "residual dtype": ({"residual": X.double()}, TypeError, ["residual of the dtype of input (Float)", "got Double"]),
    "residual device": ({"residual": X.to("meta")}, ValueError, ["residual on the device of input (cpu)", "got meta"]),
    "residual type": ({"residual": 1.0}, TypeError, ["residual of type Tensor or None", "got float"]),
}

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
each_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
# One of each engine and kind of statistic, for what takes long.
FEW = ["batch_norm_training", "batch_norm_eval", "group_norm_3", "layer_norm_1d", "rms_norm_1d"]
few_cases = pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW], ids=lambda case: case.name)
few_activations = pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"], ids=str)

__all__ = [
    "ACTIVATIONS",
    "SLOPE",
    "WRONG",
    "X",
    "each_activation",
    "each_case",
    "each_residual",
    "extras",
    "few_activations",
    "few_cases",
    "fused",
    "laid_out",
]
