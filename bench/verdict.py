"""Whether errors are too large: never more than twice torch's, unless they are those of any arithmetic."""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

SUMS = ("dweight", "dbias", "dparameters")
ROUNDINGS, OF_SUMS = 8, 16


def floor(dtype: torch.dtype, result: str) -> float:
    """The error of a result, relative to its terms, of which nothing is asked, whoever else is nearer:

    - half a unit in the last place, as it is rounded to its dtype;
    - 8 roundings of the arithmetic (float32, for float64 float64), half a unit each: of the deviation from the mean, of
      the coefficients, and of what joins them;
    - 16 more of a sum: up to 256 terms are added up before their total goes on in float64, and what 256 roundings lose,
      being independent, grows with the root of their number.
    """
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return (torch.finfo(dtype).eps + (ROUNDINGS + OF_SUMS * (result in SUMS)) * arithmetic) / 2


class Measured(Protocol):
    """What has errors by the name of the result, and says of what they are when it is printed."""

    normops: Mapping[str, float]
    torch: Mapping[str, float]

    @property
    def floor(self) -> Mapping[str, float]: ...


def rounded(errors: Mapping[str, float]) -> dict[str, float]:
    """Three digits, for records."""
    return {name: float(f"{value:.3g}") for name, value in errors.items()}


def worse(measured: Iterable[Measured]) -> list[str]:
    """Where normops' error is more than twice torch's and above the floor, or is not finite; the worst first."""
    wrong = []
    for one in measured:
        for name, error in one.normops.items():
            limit = max(2 * one.torch[name], one.floor[name])
            if error > limit or not math.isfinite(error):
                text = f"{name} of {one}: {error:.2g}, torch's {one.torch[name]:.2g}, {one.floor[name]:.2g} allowed"
                wrong.append((error / limit if math.isfinite(limit) else math.inf, text))
    return [text for _, text in sorted(wrong, reverse=True)]
