"""The layers as one formula of numpy's arrays: of float64, or of numbers with as many digits as are asked for.

None of torch's kernels has a part in it, whose own errors are what is looked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

DIGITS = 50


@dataclass(frozen=True)
class Form:
    """An input as an array: which of its axes share a statistic, and the shape of the parameters beside it."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parameters: tuple[int, ...]


def form(function: str, shape: Sequence[int], groups: int = 1) -> Form:
    if function in ("layer_norm", "rms_norm"):
        rows, row = math.prod(shape[:-1]), shape[-1]
        return Form((rows, row), (1,), (1, row))
    samples, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    if function == "group_norm":
        width = channels // groups
        return Form((samples, groups, width, positions), (2, 3), (1, groups, width, 1))
    axes = {"instance_norm": (2,), "channel_layer_norm": (1,)}.get(function, (0, 2))
    return Form((samples, channels, positions), axes, (1, channels, 1))


@dataclass
class Exact:
    """Of each result the values, and the size of the terms that these are sums of: errors are relative to it."""

    values: dict[str, np.ndarray]
    sizes: dict[str, float]


def numbers(tensor: Tensor, precise: bool = False) -> np.ndarray:
    """Those of the tensor in float64, or as mpmath has them.

    Raises:
        ImportError: mpmath is not installed.
    """
    values = tensor.detach().double().contiguous().numpy()
    if not precise:
        return values
    import mpmath

    mpmath.mp.dps = DIGITS
    return np.vectorize(mpmath.mpf, otypes=[object])(values)


def normalize(function: str, form: Form, arrays: Mapping[str, np.ndarray], eps: float) -> Exact:
    """``arrays``: input, dy, weight and, where there are any, bias, running_mean and running_var."""
    x, dy = (arrays[name].reshape(form.shape) for name in ("input", "dy"))
    weight = arrays["weight"].reshape(form.parameters)
    centered, given = function != "rms_norm", "running_mean" in arrays

    def mean(values):
        return values.mean(axis=form.axes, keepdims=True)

    if given:
        center, variance = (arrays[name].reshape(form.parameters) for name in ("running_mean", "running_var"))
    elif centered:
        # A mean is rounded: that of equal numbers is not always one of them, but with its own error taken off it is.
        center = mean(x)
        center = center + mean(x - center)
    else:
        center = 0.0
    deviations = x - center
    if not given:
        variance = mean(deviations * deviations)
    rstd = (variance + eps) ** -0.5
    xhat = deviations * rstd
    slopes = dy * weight
    terms = rstd * slopes
    dx = terms
    if not given:
        dx = rstd * (slopes - (mean(slopes) if centered else 0.0) - xhat * mean(slopes * xhat))
    scaled, products = xhat * weight, dy * xhat
    others = tuple(axis for axis, size in enumerate(form.parameters) if size == 1)

    def root_of_squares(values):
        """As large as a sum of independent terms is, also where it happens to cancel."""
        return largest((values * values).sum(axis=others)) ** 0.5

    values = {"output": scaled, "dx": dx, "dweight": products.sum(axis=others)}
    sizes = {"output": largest(scaled), "dx": largest(terms), "dweight": root_of_squares(products)}
    if "bias" in arrays:
        bias = arrays["bias"].reshape(form.parameters)
        values |= {"output": scaled + bias, "dbias": dy.sum(axis=others)}
        sizes |= {"output": sizes["output"] + largest(bias), "dbias": root_of_squares(dy)}
    for name in ("dweight", "dbias"):
        if name in values:
            sizes[name] = max(sizes[name], largest(values[name]))
    if not sizes["output"]:
        sizes["output"] = 1.0
    # Of what has no terms but zero, errors are relative to those of data with a variance.
    sizes["dweight"] = sizes["dweight"] or root_of_squares(dy)
    return Exact(values, sizes)


def largest(values: np.ndarray) -> float:
    return float(max(values.max(), -values.min())) if values.size else 0.0


def error(values: np.ndarray, exact: np.ndarray, most: float) -> float:
    """The largest one, infinite where a value is not a number; of what is beyond ``most`` nothing is asked."""
    values = values.reshape(exact.shape)
    within = np.abs(exact) <= most
    if exact.dtype == object:
        values = np.where(np.isfinite(values.astype(float)), values, math.inf)
    if not within.all():
        values, exact = values[within], exact[within]
    if not values.size:
        return 0.0
    found = largest(values - exact)
    return math.inf if math.isnan(found) else found
